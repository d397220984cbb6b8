"""'A 10 kW machine really uses 30 kW, because of its cooling': a PUE of 3, beside the PUEs that operators publish.

PUE is the energy of the whole facility over that of its IT (ISO/IEC 30134-2). No figure of this file is a default of
the footprint: a site states its own.
"""

from hpc.bench.claims.claim import ARTICLE, Bench, Claim, Entry, Premise, Step
from hpc.bench.claims.page import figure

NAME = "ten-kw-needs-thirty"
STATEMENT = "A 10 kW computer needs 30 kW: cooling takes twice the power of the computer."
IT_KW, TOTAL_KW = 10.0, 30.0

PUES = (
    Premise(
        "PUE of ARCHER2's plant, EPCC",
        1.10,
        "",
        "ARCHER2's worked example of a job's energy, 10 % for plant on top of all IT: "
        "https://docs.archer2.ac.uk/user-guide/energy, read 2026-11",
    ),
    Premise(
        "cooling PUE of EPCC's Advanced Computing Facility, average of the seasons",
        1.16,
        "",
        "its builder: https://www.crownhouse.com/our-work/all-case-studies/advanced-computer-facilities-for-"
        "supercomputers.aspx (works of 2007 to 2013), read 2026-11",
    ),
    Premise(
        "PUE of Meta's data centers",
        1.08,
        "",
        "https://www.datacenterdynamics.com/en/news/aws-global-data-centers-achieved-pue-of-115-in-2023/, 2024-12",
    ),
    Premise("PUE of Google's data centers", 1.10, "", "the same page"),
    Premise("PUE of Amazon Web Services' data centers in 2023", 1.15, "", "the same page"),
    Premise("PUE of Microsoft's data centers", 1.18, "", "the same page"),
    Premise(
        "average PUE of the industry in 2023",
        1.58,
        "",
        "Uptime Institute, Global Data Center Survey: https://journal.uptimeinstitute.com/"
        "large-data-centers-are-mostly-more-efficient-analysis-confirms/ (2024)",
    ),
    Premise(
        "average PUE of the industry in 2011",
        1.8,
        "",
        "Uptime Institute, survey of 500: http://www.datacenterknowledge.com/archives/2011/05/10/"
        "uptime-institute-the-average-pue-is-1-8/",
    ),
    Premise("average PUE that Uptime Institute told before that survey", 2.5, "", "the same page"),
)
"""Published PUEs, the site's own first."""

DGX = Premise(
    "largest input of a DGX H100",
    10.2,
    "kW",
    "its user guide, as https://unanswered.io/guide/nvidia-dgx-power-consumption-watts has it",
)


def audit(bench: Bench) -> Claim:
    """The PUE that the claim asks for, and what 10 kW of IT draw at published ones."""
    claimed = TOTAL_KW / IT_KW
    steps = [Step("PUE that the claim asks for", f"{TOTAL_KW:g} / {IT_KW:g}", claimed, "")]
    steps += [
        Step(f"10 kW of IT at the {pue.name}", f"{IT_KW:g} x {figure(pue.value)}", IT_KW * pue.value, "kW")
        for pue in PUES
    ]
    highest, here = max(pue.value for pue in PUES), PUES[0].value
    average = next(pue.value for pue in PUES if "2023" in pue.name and "average" in pue.name)
    steps.append(
        Step(
            "overhead that the claim tells for each that the average site has",
            f"({figure(claimed)} - 1) / ({figure(average)} - 1)",
            (claimed - 1) / (average - 1),
            "",
        )
    )
    return Claim(
        name=NAME,
        statement=STATEMENT,
        said_by=ARTICLE,
        kind="on paper",
        verdict="does not hold here" if claimed > highest else "holds if",
        because=(
            f"It asks for a PUE of {claimed:.1f}. At EPCC 10 kW of IT take {IT_KW * here:.1f} kW, at the average site "
            f"of 2023 {IT_KW * average:.1f} kW; no average found here was ever above {highest:.1f}. That the machine "
            f"itself draws 10 kW is right: {DGX.value} kW for a DGX H100."
        ),
        depends_on=(
            "what counts as overhead: PUE is cooling and power distribution over all IT; network and storage are IT "
            "(ARCHER2 adds 15 % for them before the plant's 10 %)",
            "the room: a machine in an office or a closet, cooled by a split unit, may come near 2 or 3; no survey of "
            "such rooms was found here",
            "the climate and the season: 1.10 and 1.16 are Edinburgh's, with free cooling",
        ),
        premises=(
            Premise("power of the machine, as told", IT_KW, "kW", ARTICLE),
            Premise("power with cooling, as told", TOTAL_KW, "kW", ARTICLE),
            DGX,
            *PUES,
        ),
        arithmetic=tuple(steps),
    )


ENTRY = Entry(NAME, STATEMENT, "on paper", audit)
