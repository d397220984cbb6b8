"""'A 47 B mixture of experts, retrained on less than 1 kW in 10 hours': at most 10 kWh, so adapters on 4 bits (QLoRA).

What memory, watts and published speeds allow, and how far that is from training the model. The recipe itself is the
reuse part's; nothing is run here.
"""

from hpc.bench.claims.claim import QUOTED, Bench, Claim, Entry, Premise, Step
from hpc.bench.claims.page import figure
from hpc.config import AdapterTraining, Model, Router
from hpc.plan.flops import adapter_flops_per_token
from hpc.plan.params import count, count_adapter

NAME = "retrain-47b"
STATEMENT = "A mixture of experts of 47 B parameters is retrained on less than 1 kW in 10 hours."
HOURS, BUDGET_KW, CARD_GB = 10.0, 1.0, 48.0
VOCABULARY, RANK = 32000, 16
MIXTRAL = Model(
    architecture="mixtral", hidden_size=4096, num_layers=32, num_attention_heads=32, num_key_value_heads=8,
    expert_size=14336,
)  # fmt: skip
ROUTER = Router(num_experts=8, top_k=2)
QUERY_TOKENS, BATCH = 174, 17
PEAK_PART = "part of the H100's peak (frozen weights: 4 FLOPs per active parameter)"
BEST, ADAPTER_PART = "tokens in 10 h at the best MFU", "adapters as part of all parameters"
ADAPTERS = AdapterTraining.model_validate(
    {"rank": RANK, "attention": False, "experts": True, "steps": 1, "optimizer": {"lr": 5e-5},
     "batches": {"seq_len": QUERY_TOKENS, "micro_batch_size": BATCH, "tokens_per_step": QUERY_TOKENS * BATCH}}
)  # fmt: skip

PAPER = "Xia et al. 2024, arXiv:2408.04693"
NF4_BITS = Premise("bits per weight in NF4, double quantization", 4.127, "bit", "QLoRA, arXiv:2305.14314, section 3")
SPEED_H100 = Premise(
    "QLoRA of Mixtral 8x7B on one H100 of 80 GB, rank 16 on the experts",
    4.90,
    "queries/s",
    f"{PAPER}, table IV (their model of measured speeds, RMSE below 0.6), batches of {BATCH}",
)
SPEED_A40 = Premise("the same on one A40 of 48 GB", 1.01, "queries/s", f"{PAPER}, table IV, batches of 4")
TOKENS = Premise("tokens of a query, median", QUERY_TOKENS, "", f"{PAPER}, section III, MATH")
QUERIES = Premise("queries of that fine-tuning: 14,000 in 10 epochs", 140_000, "", f"{PAPER}, section III")
POWER_H100 = Premise("power of an H100", 700, "W", "data sheet, SXM (the PCIe card: 350 W); the paper names neither")
POWER_A40 = Premise("power of an A40", 300, "W", "data sheet")
PEAK_H100 = Premise(
    "peak of an H100 SXM, bf16, dense", 9.89e14, "FLOP/s", "https://glennklockwood.com/garden/processors/h100"
)
BASE = Premise("power of the server around them", 250, "W", "assumed: processor, memory, fans, losses of the supply")
BYTES_TRAINED = Premise(
    "bytes per trained parameter", 16, "B", "weight, gradient, two Adam moments in fp32 (arXiv:1910.02054)"
)
NEEDED = Premise("memory that others needed for QLoRA of Mixtral", 32, "GB",
                 "https://newsletter.kaitchup.com/p/fine-tune-mixtral-8x7b-quantized (2024)")  # fmt: skip
MFU_BEST = Premise("MFU that a good implementation might reach", 0.4, "", "assumed: an upper bound")


def audit(bench: Bench) -> Claim:
    """Memory, watts, tokens and the distance to pretraining."""
    memory, power, reach = _memory(), _power(), _reach()
    values = {step.name: step.value for step in (*memory, *power, *reach)}
    fits = (
        values["memory in all"] < CARD_GB
        and values["power, one H100"] < BUDGET_KW
        and values["energy of that fine-tuning, one H100"] < BUDGET_KW * HOURS
    )
    return Claim(
        name=NAME,
        statement=STATEMENT,
        said_by=QUOTED,
        kind="on paper",
        verdict="holds if" if fits else "does not hold here",
        because=(
            f"'retrained' means adapters on a frozen base in 4 bits: {values['memory in all']:.0f} GB fit one card of "
            f"48 or 80 GB, and ten hours below 1 kW see {values['tokens in 10 h, one H100'] / 1e6:.0f} M tokens for "
            f"{values['energy in 10 h, one H100']:.1f} kWh: enough for a published fine-tuning "
            f"({values['energy of that fine-tuning, one H100']:.1f} kWh). It is no training of the 47 B: all weights "
            f"would need {values['memory to train all weights']:.0f} GB and, from scratch, "
            f"{values['years to pretrain at that speed']:.0f} years of such a machine."
        ),
        depends_on=(
            f"what 'retrained' means: adapters have {values[ADAPTER_PART]:.1%} as many parameters as the model, and "
            "see 10^7 tokens",
            "the base model's own energy, which somebody spent before and which is not in the 10 kWh",
            f"the software: the published speed is {values[PEAK_PART]:.0%} of the card's peak; {MFU_BEST.value:.0%} of "
            f"it would be {values[BEST] / 1e6:.0f} M tokens",
            "which card: one H100 SXM or two A40 stay below 1 kW with 250 W around them, two H100 SXM do not",
            "IT power only: cooling comes on top (see ten-kw-needs-thirty)",
            "quality: loss after QLoRA, and after merging, is to be measured on the task; nothing is claimed here",
        ),
        premises=(
            NF4_BITS, SPEED_H100, SPEED_A40, TOKENS, QUERIES, POWER_H100, POWER_A40, PEAK_H100, BASE, BYTES_TRAINED,
            NEEDED, MFU_BEST,
        ),
        arithmetic=(*memory, *power, *reach),
    )  # fmt: skip


def _memory() -> list[Step]:
    """GB = 1e9 bytes."""
    parameters = count(MIXTRAL, ROUTER, VOCABULARY)
    embeddings = parameters.embedding + parameters.head
    rest = parameters.total - embeddings
    adapters = count_adapter(MIXTRAL, ROUTER, ADAPTERS)
    h, i, tokens = MIXTRAL.hidden_size, MIXTRAL.expert_size, QUERY_TOKENS * BATCH
    layer = ROUTER.num_experts * 3 * h * i
    parts = [
        Step("weights in 4 bits", f"{rest} x {NF4_BITS.value} / 8 / 1e+09", rest * NF4_BITS.value / 8e9, "GB"),
        Step("embeddings in bf16", f"{embeddings} x 2 / 1e+09", embeddings * 2e-9, "GB"),
        Step("adapters of rank 16 on all experts, trained", f"{adapters} x {BYTES_TRAINED.value:g} / 1e+09",
             adapters * BYTES_TRAINED.value / 1e9, "GB"),
        Step("activations kept, recomputing whole blocks", f"{tokens} x {h} x 2 x {MIXTRAL.num_layers} / 1e+09",
             tokens * h * 2 * MIXTRAL.num_layers / 1e9, "GB"),
        Step("logits and their gradient in fp32", f"{tokens} x {VOCABULARY} x 4 x 2 / 1e+09",
             tokens * VOCABULARY * 8e-9, "GB"),
        Step("one layer's experts, back in bf16 to compute with", f"{layer} x 2 / 1e+09", layer * 2e-9, "GB"),
    ]  # fmt: skip
    return [
        *parts,
        Step("memory in all", " + ".join(figure(part.value) for part in parts), sum(p.value for p in parts), "GB"),
        Step("memory to train all weights", f"{parameters.total} x {BYTES_TRAINED.value:g} / 1e+09",
             parameters.total * BYTES_TRAINED.value / 1e9, "GB"),
        Step(ADAPTER_PART, f"{adapters} / {parameters.total}", adapters / parameters.total, ""),
    ]  # fmt: skip


def _power() -> list[Step]:
    steps = []
    for what, cards, watts in (("one H100", 1, POWER_H100), ("two A40", 2, POWER_A40), ("two H100 SXM", 2, POWER_H100)):
        kilowatts = (cards * watts.value + BASE.value) / 1000
        steps.append(Step(f"power, {what}", f"({cards} x {watts.value:g} + {BASE.value:g}) / 1000", kilowatts, "kW"))
        if kilowatts < BUDGET_KW:
            energy = kilowatts * HOURS
            steps.append(Step(f"energy in 10 h, {what}", f"{figure(kilowatts)} x {HOURS:g}", energy, "kWh"))
    return steps


def _reach() -> list[Step]:
    """Tokens in the time, against a fine-tuning and against pretraining."""
    seconds, flops = HOURS * 3600, adapter_flops_per_token(MIXTRAL, ROUTER, VOCABULARY, QUERY_TOKENS, ADAPTERS)
    active = count(MIXTRAL, ROUTER, VOCABULARY).active
    h100, a40 = SPEED_H100.value * QUERY_TOKENS, 2 * SPEED_A40.value * QUERY_TOKENS
    tuning = QUERIES.value / SPEED_H100.value / 3600
    kilowatts = (POWER_H100.value + BASE.value) / 1000
    pretraining = 6.0 * active * 20 * active
    return [
        Step("tokens in 10 h, one H100", f"{SPEED_H100.value:g} x {QUERY_TOKENS} x {seconds:g}", h100 * seconds, ""),
        Step("tokens in 10 h, two A40", f"2 x {SPEED_A40.value:g} x {QUERY_TOKENS} x {seconds:g}", a40 * seconds, ""),
        Step(PEAK_PART,
             f"{figure(h100)} x {figure(flops)} / {figure(PEAK_H100.value)}", h100 * flops / PEAK_H100.value, ""),
        Step(BEST,
             f"{MFU_BEST.value:g} x {figure(PEAK_H100.value)} / {figure(flops)} x {seconds:g}",
             MFU_BEST.value * PEAK_H100.value / flops * seconds, ""),
        Step("hours of that fine-tuning, one H100", f"{QUERIES.value:g} / {SPEED_H100.value:g} / 3600", tuning, "h"),
        Step("energy of that fine-tuning, one H100",
             f"{figure(tuning)} x {figure(kilowatts)}", tuning * kilowatts, "kWh"),
        Step("FLOPs to pretrain it on 20 tokens per active parameter",
             f"6 x {active} x 20 x {active}", pretraining, "FLOP"),
        Step("FLOPs of the 10 h", f"{figure(h100 * seconds)} x {figure(flops)}", h100 * seconds * flops, "FLOP"),
        Step("years to pretrain at that speed",
             f"{figure(pretraining)} / {figure(h100 * seconds * flops)} x {HOURS:g} / 24 / 365",
             pretraining / (h100 * seconds * flops) * HOURS / 24 / 365, "years"),
    ]  # fmt: skip


ENTRY = Entry(NAME, STATEMENT, "on paper", audit)
