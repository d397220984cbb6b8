"""How small a model and a training stage of a rehearsal are, and what they keep of the recipe.

Kept, because code branches on it: architecture, top-k, the ratio of query to key/value heads, shared experts, groups of
experts, tied embeddings, ZeRO stage, whether there is expert parallelism, gradient accumulation, warm-up and restarts.
Cut, because it is only more of the same: width, depth, experts, tokens, steps, ranks. Nothing is ever made larger.
Shape letters: H hidden, E experts, K experts per token, G groups of experts.
"""

from dataclasses import dataclass
from math import gcd
from typing import Any

RANKS = 2
"""Ranks of a training stage at most: two are enough for every exchange."""
LAYERS, HEAD_DIM, WIDTH, LATENT = 2, 32, 128, 32
SEQ_LEN, MICRO_BATCH, ACCUMULATION, STEPS, EVALUATE_TOKENS = 128, 2, 2, 16, 2048
CYCLE, CYCLES = 8, 2
RANK = 4
"""Rank of adapters."""
VOCABULARY = 512
GROUP_SIZE = 32
"""Weights to a scale in quantization: divides every width here."""

CALIBRATION = {"tokens": 1024, "max_tokens": 2048, "seq_len": SEQ_LEN, "iterations": 2, "batch_size": MICRO_BATCH}
"""At most, of quantization with text."""

Settings = dict[str, Any]


@dataclass(frozen=True)
class Room:
    """Processes that a rehearsal may have: these nodes at most, so many on a node, `RANKS` together."""

    nodes: int
    ranks_per_node: int


def num_experts(experts: int, top_k: int, groups: int = 1, top_groups: int = 1) -> int:
    """Experts that are enough: more than a token takes, an even number, whole groups. At most `experts`."""
    each = max(2, -(-top_k // top_groups)) if groups > 1 else 1
    enough = max(4, 2 * top_k, groups * each)
    unit = groups * 2 // gcd(groups, 2)
    return min(experts, -(-enough // unit) * unit)


def attention(hidden: int, heads: int, kv_heads: int) -> tuple[int, int, int]:
    """H, heads and key/value heads with the same number of query heads to each key/value head."""
    ratio = heads // kv_heads
    few_kv = min(kv_heads, max(1, 4 // ratio))
    few = ratio * few_kv
    return min(hidden, few * HEAD_DIM), few, few_kv


def quantization(settings: Settings, *, looks_at_text: bool) -> None:
    """Cut a quantize stage, in place."""
    settings["group_size"] = GROUP_SIZE
    if not looks_at_text:
        return
    kept = settings["calibration"]
    settings["calibration"] = kept | {key: min(kept[key] or most, most) for key, most in CALIBRATION.items()}


def model(settings: Settings, router: Settings) -> None:
    """Cut `train.model` and `train.router` of a pretraining stage, in place."""
    kv_heads = settings["num_key_value_heads"]
    heads = attention(settings["hidden_size"], settings["num_attention_heads"],
                      kv_heads or settings["num_attention_heads"])  # fmt: skip
    settings["hidden_size"], settings["num_attention_heads"] = heads[:2]
    settings["num_key_value_heads"] = heads[2] if kv_heads else None
    settings["num_layers"] = min(settings["num_layers"], LAYERS)
    settings["num_dense_layers"] = min(settings["num_dense_layers"], settings["num_layers"] - 1)
    settings["expert_size"] = min(settings["expert_size"], WIDTH)
    if settings["dense_size"]:
        settings["dense_size"] = min(settings["dense_size"], 2 * WIDTH)
    for name, size in (settings["latent_attention"] or {}).items():
        settings["latent_attention"][name] = min(size, LATENT) if size else size
    router["num_experts"] = num_experts(
        router["num_experts"], router["top_k"], router["num_groups"], router["top_groups"]
    )


def upcycle(settings: Settings) -> None:
    """Cut the experts of an upcycled model to whole virtual groups, in place."""
    parts = settings["granularity"] - settings["shared"]
    enough = num_experts(settings["num_experts"], settings["top_k"])
    unit = parts * 2 // gcd(parts, 2)
    settings["num_experts"] = min(settings["num_experts"], -(-enough // unit) * unit)


def checkpoint(config: Settings, granularity: int) -> Settings:
    """config.json of a small model of the same architecture, whose blocks can be cut into `granularity` experts."""
    dropped = ("layer_types", "quantization_config", "_name_or_path", "transformers_version", "torch_dtype", "dtype",
               "rope_scaling", "rope_parameters", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id",
               "max_window_layers")  # fmt: skip
    small = {key: value for key, value in config.items() if key not in dropped}
    heads = int(config["num_attention_heads"])
    hidden, few, few_kv = attention(int(config["hidden_size"]), heads, int(config.get("num_key_value_heads") or heads))
    small |= {
        "hidden_size": hidden,
        "num_attention_heads": few,
        "num_key_value_heads": few_kv,
        "vocab_size": VOCABULARY,
    }
    if config.get("head_dim"):
        small["head_dim"] = hidden // few
    small["num_hidden_layers"] = layers = min(int(config["num_hidden_layers"]), LAYERS)
    small["max_position_embeddings"] = min(int(config.get("max_position_embeddings") or 2048), 2048)
    small["intermediate_size"] = min(int(config["intermediate_size"]), WIDTH * granularity)
    for key in ("moe_intermediate_size", "shared_expert_intermediate_size"):
        if config.get(key):
            small[key] = min(int(config[key]), WIDTH)
    for key in ("num_local_experts", "num_experts", "n_routed_experts"):
        if config.get(key):
            small[key] = num_experts(int(config[key]), int(config["num_experts_per_tok"]))
    if "mlp_only_layers" in small:
        small["mlp_only_layers"] = [number for number in small["mlp_only_layers"] or [] if number < layers]
    return small


def training(settings: Settings, room: Room, device: str) -> None:
    """Cut `train` of any training stage, in place."""
    _parallel(settings, room)
    batches, parallel = settings["batches"], settings["parallel"]
    ranks = parallel["nodes"] * parallel["ranks_per_node"]
    passes = batches.pop("passes")
    batches["seq_len"] = min(batches["seq_len"], SEQ_LEN)
    batches["micro_batch_size"] = min(batches["micro_batch_size"], MICRO_BATCH)
    one_pass = ranks * batches["micro_batch_size"] * batches["seq_len"]
    batches["tokens_per_step"] = one_pass * min(passes, ACCUMULATION)
    _steps(settings)
    if device != "cuda":
        _without_gpu(settings)
    if "rank" in settings:
        _adapters(settings)


def _parallel(settings: Settings, room: Room) -> None:
    batches, parallel = settings["batches"], settings["parallel"]
    asked = parallel["nodes"] * parallel["ranks_per_node"]
    one_pass = asked * batches["micro_batch_size"] * batches["seq_len"]
    batches["passes"] = batches["tokens_per_step"] // one_pass
    nodes = min(parallel["nodes"], room.nodes)
    per_node = min(max(1, asked // nodes), room.ranks_per_node, RANKS // nodes)
    experts = settings["router"]["num_experts"] if "router" in settings else 0
    ranks = nodes * per_node
    wanted = gcd(ranks, experts) if experts else ranks
    ep = max(size for size in range(1, wanted + 1) if wanted % size == 0 and size <= parallel["expert_parallel_size"])
    parallel |= {"nodes": nodes, "ranks_per_node": per_node, "expert_parallel_size": ep}


def _steps(settings: Settings) -> None:
    schedule = settings["schedule"]
    if schedule["restart_every_steps"]:
        cycles = max(1, settings["steps"] // schedule["restart_every_steps"])
        schedule["restart_every_steps"] = min(schedule["restart_every_steps"], CYCLE)
        schedule["restart_warmup_steps"] = min(schedule["restart_warmup_steps"], schedule["restart_every_steps"] // 4)
        settings["steps"] = schedule["restart_every_steps"] * min(cycles, CYCLES)
    settings["steps"] = steps = min(settings["steps"], STEPS)
    schedule["warmup_steps"] = min(schedule["warmup_steps"], steps // 8)
    settings["checkpoint_every_steps"] = min(settings["checkpoint_every_steps"], max(1, steps // 2))
    if settings["keep_every_steps"]:
        settings["keep_every_steps"] = settings["checkpoint_every_steps"]
    settings["evaluate_every_steps"] = min(settings["evaluate_every_steps"], max(1, steps // 2))
    settings["evaluate_tokens"] = min(settings["evaluate_tokens"], EVALUATE_TOKENS)


def _without_gpu(settings: Settings) -> None:
    """What only a GPU can do is done in the way that every device can."""
    if settings["expert_compute"] == "megablocks":
        settings["expert_compute"] = "grouped_mm"
    if settings["attention_kernel"] == "flash_attention_2":
        settings["attention_kernel"] = "auto"


def _adapters(settings: Settings) -> None:
    rank = min(settings["rank"], RANK)
    settings["alpha"] = settings["alpha"] * rank / settings["rank"]
    settings["rank"] = rank
    choice = settings["expert_choice"]
    if choice and choice["named"]:
        choice["named"] = {0: [0]}
