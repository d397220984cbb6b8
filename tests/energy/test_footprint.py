"""The facility around the nodes: published examples to the last digit, and nothing that the site does not say."""

import pytest
import yaml
from pydantic import ValidationError

from hpc.config import Facility
from hpc.energy.footprint import footprint, lines
from slurm.site import SITES, load_site

ARCHER2 = Facility.model_validate(
    {"other_it_fraction": 0.15, "pue": 1.10, "carbon_g_per_kwh": 7, "embodied_g_per_node_hour": 14, "source": "EPCC"}
)
KWH = 3.6e6


def test_archer2s_worked_example_of_a_job_comes_out_exactly() -> None:
    """64 nodes for 870 s, 7.740 kWh."""
    found = footprint(7.740 * KWH, 64 * 870 / 3600, ARCHER2)
    told = (found.it_kwh, found.other_it_kwh, found.plant_kwh, found.total_kwh, found.carbon_kg, found.embodied_kg)
    assert [f"{value:.3f}" for value in told] == ["7.740", "1.161", "0.890", "9.791", "0.069", "0.217"]


def test_archer2s_worked_example_of_a_period_comes_out_exactly() -> None:
    """347.596 kWh over 847.795 node-hours."""
    found = footprint(347.596 * KWH, 847.795, ARCHER2)
    assert f"{found.total_kwh:.3f}" == "439.709"
    assert f"{found.embodied_kg:.3f}" == "11.869"
    assert found.carbon_kg == pytest.approx(439.709 * 7e-3, rel=1e-5)


def test_blooms_dynamic_consumption_comes_out_as_published() -> None:
    """1,082,990 GPU-hours at 0.4 kW and 57 g/kWh: 433 MWh and 24.7 t, of the GPUs alone (arXiv:2211.02001)."""
    facility = Facility.model_validate({"carbon_g_per_kwh": {"value": 57, "source": "arXiv:2211.02001", "year": 2022}})
    found = footprint(1_082_990 * 0.4 * KWH, 0.0, facility)
    assert round(found.it_kwh / 1e3) == 433
    assert f"{found.it_carbon_kg / 1e3:.1f}" == "24.7"
    assert (found.total_kwh, found.carbon_kg) == (None, None), "no PUE was stated, so nothing is said of the building"
    assert found.emissions_g == pytest.approx(24.69e6, rel=1e-3)


def test_a_real_archer2_job_of_4_58_mj() -> None:
    """4.58 MJ are 1.27 kWh, as the service's documentation has it."""
    assert f"{footprint(4.58e6, 2.33, Facility()).it_kwh:.2f}" == "1.27"


def test_water_is_litres_per_kwh_of_it_energy_not_of_the_buildings() -> None:
    facility = Facility.model_validate({"other_it_fraction": 0.2, "pue": 2.0, "wue_l_per_kwh": 1.8})
    assert footprint(10 * KWH, 1, facility).water_l == pytest.approx(1.8 * 12)


def test_what_the_site_does_not_state_is_unknown_and_the_rows_say_so() -> None:
    found = footprint(KWH, 1.0, Facility())
    assert found.it_kwh == 1.0
    rows = lines(found, 1.0, Facility())
    assert [row.value for row in rows] == [None] * 7
    assert all(row.how.startswith("the site does not state its ") and not row.source for row in rows)


def test_parts_on_two_sites_add_up_and_one_that_states_less_makes_the_sum_unknown() -> None:
    here, there = footprint(2 * KWH, 1, ARCHER2), footprint(3 * KWH, 1, Facility())
    assert (here + here).carbon_kg == pytest.approx(2 * (here.carbon_kg or 0))
    assert (here + there).it_kwh == 5.0
    assert (here + there).carbon_kg is None


def test_each_figure_carries_its_own_source_and_year_or_the_facilitys() -> None:
    facility = Facility.model_validate(
        yaml.safe_load(
            "{pue: 1.2, carbon_g_per_kwh: {value: 41.5, source: grid operator, year: 2025}, source: site report,"
            " year: 2024}"
        )
    )
    rows = {row.name: row for row in lines(footprint(KWH, 1.0, facility), 1.0, facility)}
    assert rows["all of it"].source == "site report, 2024"
    assert rows["carbon of all of it"].source == "grid operator, 2025; site report, 2024"
    assert rows["carbon of all of it"].value == pytest.approx(1.2 * 41.5e-3)
    assert Facility.model_validate_json(facility.model_dump_json()) == facility


def test_a_pue_below_one_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"pue is 0\.9, but a building draws at least what its IT does"):
        Facility.model_validate({"pue": 0.9})


def test_a_figure_of_the_facility_can_be_given_on_the_command_line() -> None:
    pue = load_site("archer2-gpu", ["facility.pue=1.25"]).facility.pue
    assert pue is not None
    assert pue.value == 1.25


@pytest.mark.parametrize("name", sorted(path.stem for path in SITES.glob("*.yaml")))
def test_every_figure_of_a_shipped_site_has_a_source_and_a_year(name: str) -> None:
    for key, figure in load_site(name).facility.stated().items():
        assert figure.source, key
        assert figure.year, key
