"""'A 47 B mixture of experts runs on an M2 Mac': which of them hold it in four bits, and how fast they answer.

Memory tensor by tensor, as `launch.py fit mixtral-8x7b` has it, and speeds that others published. Nothing is run here:
only a Mac could.
"""

from collections import Counter

from hpc.bench.claims.claim import QUOTED, Bench, Claim, Entry, Premise, Step
from hpc.bench.claims.page import figure
from hpc.plan.catalogue import SHAPES
from hpc.plan.inference.cache import cache_bytes, overhead_bytes
from hpc.plan.inference.formats import FORMATS, size
from hpc.plan.inference.machines import APPLE, LADDER, machines
from hpc.plan.inference.speed import bound
from hpc.plan.inference.tensors import tensors
from hpc.plan.quantity import GIB

NAME = "run-47b-on-m2"
STATEMENT = "A mixture of experts of 47 B parameters, compressed, runs on an M2 Mac."
MIXTRAL = SHAPES["mixtral8x7b"]
FORM = FORMATS["gguf-q4_k_m"]
CONTEXT = 8192
IN_ALL = "memory in all"
PART = "part of the bound that was measured"
MEASURED_ON = "M2 Max"

PUBLISHED = "measured by brozkrut, https://github.com/ggml-org/llama.cpp/pull/4406 (M2 Max, 38 GPU cores, 96 GB)"
BITS = Premise(
    "bits per weight of Q4_K; of Q6_K 6.5625, Q5_K 5.5, Q8_0 8.5", 4.5, "bit",
    "https://github.com/ggml-org/llama.cpp src/llama-quant.cpp and ggml-common.h @ 007dbbf",
)  # fmt: skip
SHARE_SMALL = Premise(
    "part of 16 or 32 GiB that macOS lets the GPU use", 2 / 3, "",
    "measured: 10,922.67 and 21,845.34 MB, https://github.com/abetlen/llama-cpp-python/issues/687 and "
    "https://github.com/ollama/ollama/issues/434; newer systems give more",
)  # fmt: skip
SHARE_LARGE = Premise(
    "part of 96 GiB", 3 / 4, "", "measured: 73,728 MB, https://github.com/ggml-org/llama.cpp/issues/3213"
)
KEPT = Premise(
    "what stays for macOS with a raised limit (iogpu.wired_limit_mb)", 4, "GiB",
    "assumed; with 96 GiB others left 6: https://github.com/antirez/ds4/issues/46",
)  # fmt: skip
OVERHEAD = Premise(
    "memory of the runtime", overhead_bytes(MIXTRAL) / GIB, "GiB", "estimated: hpc/plan/inference/cache.py"
)
SPEED_Q4_0 = Premise("tokens/s in Q4_0, 24.62 GiB", 36.66, "tokens/s", PUBLISHED)
SPEED_Q4_K_M = Premise("tokens/s in Q4_K_M of then, 24.62 GiB", 34.72, "tokens/s", PUBLISHED)
LOSS_BEST = Premise(
    "perplexity of Q4_K_M against 8 bits, improved models", 4.1652 / 4.1049, "",
    "measured by ikawrakow, https://huggingface.co/ikawrakow/mixtral-8x7b-quantized-gguf",
)  # fmt: skip
LOSS_THEN = Premise("the same as llama.cpp made it at the end of 2023", 4.2523 / 4.1049, "", "the same page")


def audit(bench: Bench) -> Claim:
    """Memory of the model against that of every M2, and speed."""
    memory, room, speed = _memory(), _room(), _speed()
    needed = next(step.value for step in memory if step.name == IN_ALL)
    values = {step.name: step.value for step in (*room, *speed)}
    plain = [name for name in _names() if values[f"for the GPU, {name}"] >= needed]
    raised = [name for name in _names() if name not in plain and values[f"with a raised limit, {name}"] >= needed]
    short = [name for name in _names() if name not in plain and name not in raised]
    return Claim(
        name=NAME,
        statement=STATEMENT,
        said_by=QUOTED,
        kind="on paper",
        verdict="holds if" if plain else "does not hold here",
        because=(
            f"the M2 is a Max with 64 GB or more ({', '.join(plain)}): in four bits and with {CONTEXT:,} tokens the "
            f"model takes {needed:.1f} GiB. {', '.join(raised)} holds it only after the limit for the GPU is raised, "
            f"and then with little to spare; {', '.join(short)} do not. On an M2 Max it answers with "
            f"{SPEED_Q4_K_M.value:.0f} tokens/s (published), {values[PART]:.0%} of what its memory allows, and loses "
            f"{LOSS_BEST.value - 1:.1%} to {LOSS_THEN.value - 1:.1%} of perplexity."
        ),
        depends_on=(
            "which M2: the plain chip ends at 24 GB and has a quarter of the Max's bandwidth",
            "the mix: llama.cpp's Q4_K_M of December 2023 was 26.4 GB, today's is 28.4, because an error in the mix "
            "for experts was mended (https://github.com/ggml-org/llama.cpp/pull/4872); IQ4_XS is 25.4 GB",
            "the context: each 8,192 tokens take another GiB",
            "the version of macOS: newer ones let the GPU use more; the careful figures are used here",
            "energy is not part of it: nobody published joules per token for this model on an M2",
        ),
        premises=(
            BITS, SHARE_SMALL, SHARE_LARGE, KEPT, OVERHEAD, SPEED_Q4_0, SPEED_Q4_K_M, LOSS_BEST, LOSS_THEN,
        ),
        arithmetic=(*memory, *room, *speed),
    )  # fmt: skip


def _names() -> list[str]:
    return [f"{chip} {gib} GiB" for chip, gib in LADDER]


def _memory() -> list[Step]:
    """Weights by what they are for and by bits, the cache, the runtime."""
    groups: Counter[tuple[str, float]] = Counter()
    for tensor in tensors(MIXTRAL):
        groups[tensor.role, FORM.bits(tensor, MIXTRAL)] += tensor.parameters
    parts = [
        Step(f"{role}, {bits:g} bits", f"{parameters} x {bits:g} / 8 / 2^30", parameters * bits / 8 / GIB, "GiB")
        for (role, bits), parameters in sorted(groups.items(), key=lambda item: -item[1] * item[0][1])
    ]
    weights = sum(part.value for part in parts)
    held = size(MIXTRAL, FORM)
    cache = cache_bytes(MIXTRAL, CONTEXT) / GIB
    return [
        *parts,
        Step("all weights", " + ".join(figure(part.value) for part in parts), weights, "GiB"),
        Step("the same as a file", f"{figure(weights)} x 2^30 / 1e+09", held.weights / 1e9, "GB"),
        Step("bits per weight", f"{figure(weights)} x 2^30 x 8 / {held.parameters}", held.bits_per_weight, ""),
        Step(f"keys and values of {CONTEXT} tokens in fp16",
             f"{MIXTRAL.attention_layers} x 2 x {MIXTRAL.kv_heads} x {MIXTRAL.head_dim} x 2 x {CONTEXT} / 2^30", cache,
             "GiB"),
        Step(IN_ALL, f"{figure(weights)} + {figure(cache)} + {figure(OVERHEAD.value)}",
             weights + cache + OVERHEAD.value, "GiB"),
    ]  # fmt: skip


def _room() -> list[Step]:
    """What each M2 gives its GPU, before and after the limit is raised."""
    steps = []
    for name, (_, gib), machine in zip(_names(), LADDER, machines(None, None, None), strict=True):
        share = "2 / 3" if gib <= 36 else "3 / 4"
        steps.append(Step(f"for the GPU, {name}", f"{gib} x {share}", machine.usable / GIB, "GiB"))
        kept = max(KEPT.value, gib / 16)
        line = f"{gib} - {kept:g}" if gib - kept > machine.usable / GIB else f"{gib} x {share}"
        steps.append(Step(f"with a raised limit, {name}", line, machine.raised / GIB, "GiB"))
    return steps


def _speed() -> list[Step]:
    """The bound of an M2 Max at the beginning of a conversation, in the format that was measured and in today's."""
    chip = next(machine for machine in machines(MEASURED_ON, 96, None))
    bandwidth = 1e9 * APPLE[MEASURED_ON].bandwidth_gb_s
    steps = []
    for form in (FORMATS["gguf-q4_0"], FORM):
        held = size(MIXTRAL, form)
        experts = sum(form.bits(one, MIXTRAL) / 8 * one.parameters for one in tensors(MIXTRAL) if one.count > 1)
        rest = held.read - experts * MIXTRAL.top_k / MIXTRAL.experts
        most = bound(MIXTRAL, held, 0, chip).value
        assert most is not None
        steps += [
            Step(f"bytes that a token reads, {form.name}: its experts, and the rest without the embedding",
                 f"({figure(experts)} x {MIXTRAL.top_k} / {MIXTRAL.experts} + {figure(rest)}) / 1e+09", held.read / 1e9,
                 "GB"),
            Step(f"tokens/s at most, {form.name}", f"{figure(bandwidth)} / {figure(held.read)}", most, "tokens/s"),
        ]  # fmt: skip
    first = steps[1].value
    measured = SPEED_Q4_0.value
    return [
        *steps,
        Step(PART, f"{measured:g} / {figure(first)}", measured / first, ""),
    ]


ENTRY = Entry(NAME, STATEMENT, "on paper", audit)
