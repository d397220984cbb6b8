"""Shapes of known models by the names people give them, and a standard shape for a name that only says a size.

Sources of the shapes, read 2026-11-25: configuration classes of transformers 5.23 (Mixtral 8x7B, OLMoE, DeepSeek-V3,
GPT-OSS 120B, Llama 4, Nemotron, Qwen2-MoE, GLM-4.5-Air, MiniMax M2, Phi-MoE, Gemma); AI-Hypercomputer/maxtext
src/maxtext/configs/models (Llama 2 and 3, DeepSeek V2, Kimi K2, Mixtral 8x22B, GPT-OSS 20B, Qwen3);
NVIDIA-NeMo/Megatron-Bridge nemotron_h_provider.py @ 160cccc (Nemotron H, 3 Nano, 3 Super); NVIDIA/dgxc-benchmarking
(Nemotron 4 15B, GPT-3 175B, Llama 3.1); the table of arXiv:2407.21783 (Llama 3); mosaicml/llm-foundry (MPT, whose
parameter counts fix the shapes); jzhang38/TinyLlama; table 1 of arXiv:2104.04473 (GPT from 1.7B to 1008B).

Memory helped with the rest (GPT-3 5B and 20B, Nemotron 3 8B, Nemotron 4 22B and 340B, Grok 1, BLOOM, Qwen 2.5, OLMo,
DBRX; depth and expert width of Arctic, JetMoE, Skywork-MoE): published parameter or FLOP counts confirm the first seven
and the last three. Nemotron 3 Ultra is Super with all widths doubled, assumed: 505B of its 550B.
tests/plan/test_step_time.py holds the counts.
"""

import re
from dataclasses import replace

from hpc.errors import ConfigError
from hpc.plan.shapes import Shape


def _dense(h: int, layers: int, ffn: int, heads: int, kv: int, vocab: int, gated: bool = True, dim: int = 0,
           tied: bool = False) -> Shape:  # fmt: skip
    return Shape(
        hidden=h, vocab=vocab, attention_layers=layers, heads=heads, kv_heads=kv, head_dim=dim or h // heads,
        dense_layers=layers, dense_size=ffn, gated=gated, tied=tied,
    )  # fmt: skip


def _gpt(h: int, layers: int, heads: int, vocab: int = 51200, tied: bool = True) -> Shape:
    return _dense(h, layers, 4 * h, heads, heads, vocab, gated=False, tied=tied)


def _moe(h: int, layers: int, experts: int, k: int, size: int, heads: int, kv: int, vocab: int, dim: int = 0,
         shared: int = 0) -> Shape:  # fmt: skip
    return Shape(
        hidden=h, vocab=vocab, attention_layers=layers, heads=heads, kv_heads=kv, head_dim=dim or h // heads,
        moe_layers=layers, experts=experts, top_k=k, expert_size=size, shared_size=shared,
    )  # fmt: skip


def _latent(h: int, layers: int, dense: int, experts: int, k: int, shared: int, size: int, ffn: int, heads: int,
            vocab: int, query_rank: int = 1536) -> Shape:  # fmt: skip
    return Shape(
        hidden=h, vocab=vocab, attention_layers=layers, heads=heads, kv_heads=heads, head_dim=192, value_dim=128,
        query_rank=query_rank, kv_rank=512, rope_dim=64, dense_layers=dense, dense_size=ffn,
        moe_layers=layers - dense, experts=experts, top_k=k, expert_size=size, shared_size=shared * size,
    )  # fmt: skip


_V3 = _latent(7168, 61, 3, 256, 8, 1, 2048, 18432, 128, 129280)
_HYBRID = Shape(hidden=1, vocab=131072, attention_layers=1, gated=False, mamba_groups=8)

SHAPES: dict[str, Shape] = {
    "llama27b": _dense(4096, 32, 11008, 32, 32, 32000),
    "llama213b": _dense(5120, 40, 13824, 40, 40, 32000),
    "llama234b": _dense(8192, 48, 22016, 64, 8, 32000),
    "llama270b": _dense(8192, 80, 28672, 64, 8, 32000),
    "llama31b": _dense(2048, 16, 8192, 32, 8, 128256, tied=True),
    "llama33b": _dense(3072, 28, 8192, 24, 8, 128256, tied=True),
    "llama38b": _dense(4096, 32, 14336, 32, 8, 128256),
    "llama370b": _dense(8192, 80, 28672, 64, 8, 128256),
    "llama3405b": _dense(16384, 126, 53248, 128, 8, 128256),
    "llama4scout": _moe(5120, 48, 16, 1, 8192, 40, 8, 202048, dim=128, shared=8192),
    "llama4maverick": replace(
        _moe(5120, 48, 128, 1, 8192, 40, 8, 202048, dim=128, shared=8192), moe_layers=24, dense_layers=24,
        dense_size=16384),
    "tinyllama11b": _dense(2048, 22, 5632, 32, 4, 32000),
    "mistral7b": _dense(4096, 32, 14336, 32, 8, 32000),
    "mixtral8x7b": _moe(4096, 32, 8, 2, 14336, 32, 8, 32000),
    "mixtral8x22b": _moe(6144, 56, 8, 2, 16384, 48, 8, 32768),
    "olmoe": _moe(2048, 16, 64, 8, 1024, 16, 16, 50304),
    "olmo1b": _dense(2048, 16, 8192, 16, 16, 50304),
    "olmo7b": _dense(4096, 32, 11008, 32, 32, 50304),
    "olmo37b": _dense(4096, 32, 11008, 32, 32, 100352),
    "olmo332b": _dense(5120, 64, 27648, 40, 8, 100352),
    "qwen257b": _dense(3584, 28, 18944, 28, 4, 152064),
    "qwen2514b": _dense(5120, 48, 13824, 40, 8, 152064),
    "qwen2532b": _dense(5120, 64, 27648, 40, 8, 152064),
    "qwen2572b": _dense(8192, 80, 29568, 64, 8, 152064),
    "qwen317b": _dense(2048, 28, 6144, 16, 8, 151936, dim=128, tied=True),
    "qwen38b": _dense(4096, 36, 12288, 32, 8, 151936),
    "qwen314b": _dense(5120, 40, 17408, 40, 8, 151936),
    "qwen332b": _dense(5120, 64, 25600, 64, 8, 151936, dim=128),
    "qwen330ba3b": _moe(2048, 48, 128, 8, 768, 32, 4, 151936, dim=128),
    "qwen3235ba22b": _moe(4096, 94, 128, 8, 1536, 64, 4, 151936, dim=128),
    "qwen257ba14b": _moe(3584, 28, 64, 8, 2560, 28, 4, 151936, shared=20480),
    "qwen15moea27b": _moe(2048, 24, 60, 4, 1408, 16, 16, 151936, shared=5632),
    "deepseekv2lite": _latent(2048, 27, 1, 64, 6, 2, 1408, 10944, 16, 102400, query_rank=0),
    "deepseekv2": _latent(5120, 60, 1, 160, 6, 2, 1536, 12288, 128, 102400),
    "deepseekv3womtp": _V3,
    "deepseekv3": replace(_V3, attention_layers=62, moe_layers=59, extra_heads=1),
    "moonlight": _latent(2048, 27, 1, 64, 6, 2, 1408, 11264, 16, 163840, query_rank=0),
    "kimik2": _latent(7168, 61, 1, 384, 8, 1, 2048, 18432, 64, 163840),
    "gptoss20b": replace(_moe(2880, 24, 32, 4, 2880, 64, 8, 201088, dim=64), windowed_layers=12, window=128),
    "gptoss120b": replace(_moe(2880, 36, 128, 4, 2880, 64, 8, 201088, dim=64), windowed_layers=18, window=128),
    "grok1": _moe(6144, 64, 8, 2, 32768, 48, 8, 131072),
    "dbrx": _moe(6144, 40, 16, 4, 10752, 48, 8, 100352),
    "gpt35b": _gpt(4096, 24, 32),
    "gpt320b": _gpt(6144, 44, 48),
    "gpt322b": _gpt(6144, 48, 64),
    "gpt3175b": _gpt(12288, 96, 96),
    "gptneox20b": _gpt(6144, 44, 64, 50432, tied=False),
    "bloom176b": _gpt(14336, 70, 112, 250880),
    "nemotron38b": _gpt(4096, 32, 32, 256000, tied=False),
    "nemotron415b": _dense(6144, 32, 24576, 48, 8, 256000, gated=False),
    "nemotron422b": _dense(6144, 40, 24576, 48, 48, 256000, gated=False),
    "nemotron4340b": _dense(18432, 96, 73728, 96, 8, 256000, gated=False),
    "nemotronh8b": replace(
        _HYBRID, hidden=4096, attention_layers=4, heads=32, kv_heads=8, dense_layers=24, dense_size=21504,
        mamba_layers=24, mamba_inner=8192, mamba_state=128, mamba_heads=128),
    "nemotronh47b": replace(
        _HYBRID, hidden=8192, attention_layers=5, heads=64, kv_heads=8, dense_layers=49, dense_size=30720,
        mamba_layers=44, mamba_inner=16384, mamba_state=256, mamba_heads=256),
    "nemotronh56b": replace(
        _HYBRID, hidden=8192, attention_layers=10, heads=64, kv_heads=8, dense_layers=54, dense_size=32768,
        mamba_layers=54, mamba_inner=16384, mamba_state=256, mamba_heads=256),
    "nemotron3nano": replace(
        _HYBRID, hidden=2688, attention_layers=6, heads=32, kv_heads=2, moe_layers=23, experts=128, top_k=6,
        expert_size=1856, shared_size=3712, mamba_layers=23, mamba_inner=4096, mamba_state=128, mamba_heads=64),
    "nemotron3super": replace(
        _HYBRID, hidden=4096, attention_layers=10, heads=32, kv_heads=2, moe_layers=42, experts=512, top_k=22,
        expert_size=2688, shared_size=5376, latent=1024, mamba_layers=40, mamba_inner=8192, mamba_state=128,
        mamba_heads=128, extra_heads=2),
    "glm45air": replace(
        _moe(4096, 46, 128, 8, 1408, 96, 8, 151552, dim=128, shared=1408), moe_layers=45, dense_layers=1,
        dense_size=10944),
    "minimaxm2": _moe(3072, 62, 256, 8, 1536, 48, 8, 200064, dim=128),
    "phi35": _moe(4096, 32, 16, 2, 6400, 32, 8, 32064),
    "phi3mini": _dense(3072, 32, 8192, 32, 32, 32064),
    "gemma7b": _dense(3072, 28, 24576, 16, 16, 256000, dim=256, tied=True),
    "gemma22b": _dense(2304, 26, 9216, 8, 4, 256000, dim=256, tied=True),
    "jet": _moe(2048, 24, 8, 2, 5632, 32, 16, 32000, dim=128),
    "arctic": replace(
        _moe(7168, 35, 128, 2, 4864, 56, 8, 32000), dense_layers=35, dense_size=7168),
    "skywork146b": _moe(4608, 52, 16, 2, 12288, 36, 36, 65536),
    "nemotron3ultra": replace(
        _HYBRID, hidden=8192, attention_layers=10, heads=64, kv_heads=4, moe_layers=42, experts=512, top_k=22,
        expert_size=5376, shared_size=10752, latent=2048, mamba_layers=40, mamba_inner=16384, mamba_state=128,
        mamba_heads=256, extra_heads=2),
    "mpt125m": _gpt(768, 12, 12, 50368),
    "mpt350m": _gpt(1024, 24, 16, 50368),
    "mpt760m": _gpt(1536, 24, 12, 50368),
    "mpt1b": _gpt(2048, 24, 16, 50368),
    "mpt3b": _gpt(2560, 32, 20, 50368),
    "mpt7b": _gpt(4096, 32, 32, 50368),
    "mpt13b": _gpt(5120, 40, 40, 50368),
    "mpt30b": _gpt(7168, 48, 56, 50368),
    "mpt70b": _gpt(8192, 80, 64, 50368),
}  # fmt: skip
"""Shapes by plain name: small letters and digits only."""

_REWRITES = (
    (r"jetmoe(8b)?(a2b)?", "jet"),
    (r"phi(35|3)?moe.*", "phi35"),
    (r"meta|mosaicml?|mosaicgpt|nvidia|pretrain(ing)?|base|instruct|dense|model|(?<!ol)moe(?!a)|hf|v01", ""),
    (r"dropless|tokendrop", ""),
    (r"llama3[123]|llama3[123](?=\d+b)", "llama3"),
    (r"deepseekv?3[12]?(671b|685b)?", "deepseekv3"),
    (r"dsv3", "deepseekv3"),
    (r"deepseekv?2lite(16b)?|deepseek(v2)?16b|dsv2lite", "deepseekv2lite"),
    (r"deepseekv?2(236b)?(?!lite)", "deepseekv2"),
    (r"wmtp", ""),
    (r"(withoutmtp|nomtp|womtp)", "womtp"),
    (r"kimik2(1t|thinking|instruct)?", "kimik2"),
    (r"grok1?(314b)?", "grok1"),
    (r"olmoe(1b7b)?", "olmoe"),
    (r"nemotron3?nano(30b)?(a3b)?", "nemotron3nano"),
    (r"nemotron3?super(120b)?(a12b)?", "nemotron3super"),
    (r"nemotron3?ultra(550b)?(a55b)?", "nemotron3ultra"),
    (r"nemotron4?(?=15b|22b|340b)", "nemotron4"),
    (r"nemotron3?(?=8b)", "nemotron3"),
    (r"llama4(17b16e|scout)(109b)?.*", "llama4scout"),
    (r"llama4(17b128e|maverick)(400b)?.*", "llama4maverick"),
    (r"^codellama34b|^llama34b$", "llama234b"),
    (r"^(llama|llama1)(7b|13b|70b)$", r"llama2\2"),
    (r"^(llama)(8b|405b)$", r"llama3\2"),
    (r"qwen3(30b)$", "qwen330ba3b"),
    (r"qwen3(235b)$", "qwen3235ba22b"),
    (r"^qwen2(?=7b|14b|32b|72b)", "qwen25"),
    (r"^gptneox(?=20b)|^neox(?=20b)", "gptneox"),
    (r"^gpt(175b|22b|20b|5b)$", r"gpt3\1"),
    (r"^bloom$", "bloom176b"),
    (r"nemotron5h?(?=8b|47b|56b)", "nemotronh"),
    (r"(snowflake)?arctic(480b)?.*", "arctic"),
    (r"^skywork(146b)?(a22b)?$", "skywork146b"),
    (r"glm45air.*", "glm45air"),
    (r"minimaxm2.*", "minimaxm2"),
    (r"^(phi3mini|gemma7b)[^b]*$", r"\1"),
    (r"^mixtral(7b)?$", "mixtral8x7b"),
    (r"mixtral7x8b", "mixtral8x7b"),
    (r"^(dbrx).*", r"\1"),
)  # fmt: skip


def find(name: str) -> Shape:
    """The shape meant by a name: 'LLAMA3.1_405B', 'Qwen3 MoE 30B', 'DeepSeek-V3 (w/o MTP)', 'GPT 22B', 'MPT-7B'.

    Widths in brackets win, as in 'GPT 7.5B (h=4096 L=36 a=32 V=51200)'. An unknown name with a size gets the standard
    shape of that size. ConfigError when the name says neither.
    """
    hints = {key.lower(): int(value) for key, value in re.findall(r"\b([hLaVf])\s*=\s*(\d+)", name)}
    stated = name.split("(h=")[0].lower()
    for before, after in (("w/o", "wo"), ("w/", "w"), ("*", "x")):
        stated = stated.replace(before, after)
    if "h" in hints:
        if not all(0 < value < 1e7 for value in hints.values()):
            raise ConfigError(f"model {name!r} states a width or depth that cannot be")
        return _hinted(hints)
    plain = plain_name(stated)
    if plain in SHAPES:
        return SHAPES[plain]
    return _standard(name, stated)


def plain_name(stated: str) -> str:
    """A name as SHAPES spells it, where it is one that is known."""
    plain = re.sub(r"[^a-z0-9]", "", stated.lower())
    for pattern, replacement in _REWRITES:
        plain = re.sub(pattern, replacement, plain)
    return plain


def _hinted(hints: dict[str, int]) -> Shape:
    """A GPT of stated width and depth."""
    hidden = hints["h"]
    return _gpt(hidden, hints.get("l", max(1, hidden // 128)), hints.get("a", hidden // 64), hints.get("v", 51200))


def _standard(name: str, stated: str) -> Shape:
    """A shape for a size: Llama-like when dense, Mixtral-like for '8x7B', fine-grained for '30B-A3B'."""
    if any(not 1e6 <= value <= 1e14 for value in _sizes(stated)):
        raise ConfigError(f"model {name!r}: a size between 1M and 100T parameters is needed")
    sizes = re.search(r"(\d+)\s*x\s*(\d+(?:\.\d+)?)\s*([mb])", stated)
    if sizes:
        experts, each = max(1, int(sizes[1])), float(sizes[2]) * (1e6 if sizes[3] == "m" else 1e9)
        dense = _sized(each, like_gpt=False)
        return replace(
            dense, dense_layers=0, moe_layers=dense.attention_layers, experts=experts, top_k=2,
            expert_size=dense.dense_size)  # fmt: skip
    active = re.search(r"(\d+(?:\.\d+)?)\s*([bt])\D*a\s*(\d+(?:\.\d+)?)\s*b", stated)
    if active:
        total, used = float(active[1]) * (1e12 if active[2] == "t" else 1e9), float(active[3]) * 1e9
        return _fine_grained(total, used)
    size = _sizes(stated)
    if not size:
        raise ConfigError(
            f"model {name!r} is not known and its name says no size: use a name such as 'Llama 3 8B', 'GPT 22B', "
            "'8x7B' or '30B-A3B'"
        )
    return _sized(size[-1], re.search(r"gpt|opt|bloom|neox|pythia|megatron|nlg", stated) is not None)


def _sizes(stated: str) -> list[float]:
    """All sizes in a name, in parameters."""
    scale = {"m": 1e6, "b": 1e9, "t": 1e12}
    found = re.findall(r"(\d+(?:\.\d+)?)\s*([mbt])(?![a-z])", stated)
    return [float(number) * scale[unit] for number, unit in found]


def _sized(parameters: float, like_gpt: bool) -> Shape:
    """A dense model of a size. Small ones are like GPT: with a large vocabulary of their own little else would fit."""
    if not like_gpt and parameters >= 1e9:
        return _llama(parameters)
    for hidden, layers in _MEGATRON:
        if abs(12 * layers * hidden**2 / parameters - 1) < 0.06:
            return _gpt(hidden, layers, max(1, hidden // 128))
    hidden, layers = _aspect(parameters, 12.0, 51200)
    return _gpt(hidden, layers, max(1, hidden // 128))


_MEGATRON = ((3072, 30), (4096, 36), (6144, 40), (6144, 48), (8192, 48), (10240, 60), (12288, 80), (12288, 96),
             (16384, 96), (20480, 105), (25600, 128))  # fmt: skip
"""Width and depth of the GPT models that others compare with: table 1 of arXiv:2104.04473, 22B and 175B."""


def _aspect(parameters: float, per_layer: float, vocabulary: int) -> tuple[int, int]:
    """Width and depth with H about 100 x L for 10B (as Llama, GPT-3), and N = per_layer x L x H^2 + vocabulary x H."""
    hidden = (parameters / per_layer * 110) ** (1 / 3)
    hidden = max(256, round(hidden / 256) * 256)
    return hidden, max(1, round((parameters - vocabulary * hidden) / per_layer / hidden**2))


def _llama(parameters: float) -> Shape:
    hidden, layers = _aspect(parameters, 12.5, 128000)
    return _dense(hidden, layers, round(3.4 * hidden / 256) * 256, max(1, hidden // 128), max(1, min(8, hidden // 128)),
                  64000)  # fmt: skip


def _fine_grained(total: float, used: float) -> Shape:
    """Eight experts of many: their size and number make up what is used and what is not always used."""
    hidden, layers = _aspect(used, 16.0, 200000)
    always = layers * 2.25 * hidden**2 + 2 * 100000 * hidden
    routed = max(0.25 * used, used - always)
    experts = max(16, round(8 * (total - always) / routed / 16) * 16)
    size = max(128, round(routed / (8 * layers * 3 * hidden) / 64) * 64)
    return _moe(hidden, layers, experts, 8, size, max(1, hidden // 128), max(1, hidden // 1024), 100000)
