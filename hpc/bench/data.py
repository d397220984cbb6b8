"""The data loader against litdata and grain: same tokens, sequences, batches; shuffled; one process; warm page cache.

Every side delivers int64 ids of shape (BATCH, SEQ_LEN + 1). Sides take turns, medians are shown; a peer's faster way is
its figure (grain with and without its prefetching threads). Then what matters to a training run: the time of one step's
batches beside one step of the quickstart's model, on one rank, and the time to find a sample among 10^10 in a store
whose index claims that many windows and whose data file has no content (a sparse file).
"""

import os
import socket
import tempfile
import time
from collections.abc import Iterator
from itertools import count, cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

import hpc
from hpc.config import Parallel, Pretrain, Training
from hpc.config.load import load_config
from hpc.data.loader import Loader, Share
from hpc.data.store import TokenStore, write_index, write_store
from hpc.errors import ConfigError
from hpc.run.task import World

SEQ_LEN, BATCH, VOCAB_SIZE = 2048, 8, 4096
DOCUMENTS, DOCUMENT_TOKENS = 40_000, 800
"""32 million tokens in documents of 800, about what web pages have."""
ROUNDS = 5
LARGE_WINDOWS, LARGE_SEQ_LEN = 10**10, 16
LONGEST_DOCUMENT = 2**31 - 1
STEPS = 6

Batches = Iterator[Any]


def measure(seconds: float) -> dict[str, Any]:
    """All figures. Raises ConfigError when a peer is not installed."""
    try:
        import grain  # noqa: F401
        import litdata
    except ImportError as error:
        raise ConfigError(f"bench data needs {error.name}: pip install -e '.[bench]'") from None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random = np.random.default_rng(0)
        documents = (random.integers(0, VOCAB_SIZE, DOCUMENT_TOKENS, np.uint16) for _ in range(DOCUMENTS))
        write_store(folder / "tokens", documents, VOCAB_SIZE)
        store = TokenStore(folder / "tokens")
        sides = {
            "ours": _ours(store, document_masking=False),
            "ours with positions": _ours(store, document_masking=True),
            "litdata": _litdata(folder),
            "grain": _grain(store, threads=0),
            "grain, 16 threads": _grain(store, threads=16),
        }
        speeds = _alternate(sides, seconds)
        return {
            "tokens_per_s": speeds,
            "ratio_best_peer": speeds["ours"] / max(v for side, v in speeds.items() if not side.startswith("ours")),
            **_step_fraction(store),
            "seek_s_at_1e10": _seek(folder),
            "setting": f"{SEQ_LEN} tokens x {BATCH} sequences, {len(store):,} tokens, medians of {ROUNDS}",
            "versions": {"litdata": litdata.__version__, "grain": _version("grain"), "numpy": np.__version__},
        }


def show(found: dict[str, Any]) -> str:
    """The figures as a table."""
    lines = [f"{side:<22} {speed / 1e6:>8.1f} Mtokens/s" for side, speed in found["tokens_per_s"].items()]
    lines += [
        f"ours / best peer       {found['ratio_best_peer']:>8.2f}   target >= 1   ({found['setting']})",
        f"part of a step         {found['step_fraction']:>8.3%}   target < 1%   ({found['load_s'] * 1e6:,.0f} us of "
        f"{found['step_s'] * 1e3:,.0f} ms: {found['step_what']})",
        f"seek at 1e10 samples   {found['seek_s_at_1e10'] * 1e3:>8.3f} ms, target < 10 ms (store with a sparse file)",
    ]
    return "\n".join(lines)


def _alternate(sides: dict[str, Batches], seconds: float) -> dict[str, float]:
    """Median tokens a second of each side over ROUNDS turns; a turn before them warms up."""
    speeds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(ROUNDS + 1):
        for side, batches in sides.items():
            began, tokens = time.perf_counter(), 0
            while (taken := time.perf_counter() - began) < (seconds if number else seconds / 4):
                batch = next(batches)
                assert batch.shape == (BATCH, SEQ_LEN + 1), f"{side} delivers {batch.shape}"
                tokens += BATCH * SEQ_LEN
            if number:
                speeds[side].append(tokens / taken)
    return {side: median(values) for side, values in speeds.items()}


def _ours(store: TokenStore, document_masking: bool) -> Batches:
    loader = Loader((Share("text", store),), SEQ_LEN, BATCH, 1, 0, 1, seed=1, document_masking=document_masking)
    return (batch.ids for step in count() for batch in loader.micro_batches(step))


def _litdata(folder: Path) -> Batches:
    """TokensLoader over chunks of 64 MB, StreamingDataLoader without worker processes."""
    import litdata
    import torch
    from litdata.streaming.item_loader import TokensLoader

    output = str(folder / "litdata")
    litdata.optimize(
        fn=_tokens_for_litdata, inputs=[str(folder / "tokens")], output_dir=output, num_workers=1, verbose=False,
        chunk_size=(SEQ_LEN + 1) * 16384, item_loader=TokensLoader(block_size=SEQ_LEN + 1),
    )  # fmt: skip
    dataset = litdata.StreamingDataset(
        output, shuffle=True, drop_last=True, item_loader=TokensLoader(block_size=SEQ_LEN + 1)
    )

    def collate(items: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(items).to(torch.int64)

    loader = litdata.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=0, drop_last=True, collate_fn=collate)
    return (batch for _ in count() for batch in loader)


def _tokens_for_litdata(prefix: str) -> Iterator[Any]:
    import torch

    store = TokenStore(Path(prefix))
    for first in range(0, len(store), 1 << 20):
        yield torch.from_numpy(store.tokens[first : first + (1 << 20)].astype(np.int32))


class _GrainSource:
    """The same windows for grain's random access."""

    def __init__(self, store: TokenStore) -> None:
        self.tokens = store.tokens

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // SEQ_LEN

    def __getitem__(self, number: int) -> NDArray[np.int64]:
        return self.tokens[number * SEQ_LEN : number * SEQ_LEN + SEQ_LEN + 1].astype(np.int64)


def _grain(store: TokenStore, threads: int) -> Batches:
    import grain

    dataset = grain.MapDataset.source(_GrainSource(store)).seed(1).shuffle().repeat()
    dataset = dataset.batch(BATCH, drop_remainder=True, batch_fn=np.stack)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=500 if threads else 0)
    batches: Batches = iter(dataset.to_iter_dataset(options))
    return batches


def _step_fraction(store: TokenStore) -> dict[str, Any]:
    """Median time to load one step of the quickstart, and of that step itself, on one rank."""
    import torch

    from hpc.evaluate.loss import token_losses
    from hpc.model.build import build_model, model_config
    from hpc.train.engine import Engine, start_process_group

    settings = _quickstart()
    batches = settings.batches
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    start_process_group(World(), "cpu")
    model = build_model(model_config(settings.model, settings.router, VOCAB_SIZE, batches.seq_len, 0), seed=1)
    engine = Engine(model, settings, "cpu")
    accumulation = settings.gradient_accumulation_steps
    loader = Loader((Share("text", store),), batches.seq_len, batches.micro_batch_size, accumulation, 0, 1, seed=1)
    load_s, step_s = [], []
    for step in range(STEPS):
        began = time.perf_counter()
        loaded = loader.micro_batches(step)
        load_s.append(time.perf_counter() - began)
        for batch in loaded:
            ids = torch.from_numpy(batch.ids)
            engine.backward(token_losses(engine.forward(ids[:, :-1]), ids[:, 1:]).mean())
            engine.step(1e-4)
        step_s.append(time.perf_counter() - began)
    torch.distributed.destroy_process_group()
    load, whole = median(load_s[1:]), median(step_s[1:])
    what = f"configs/quickstart.yaml on one CPU rank, measured here, {torch.get_num_threads()} thread(s)"
    return {"load_s": load, "step_s": whole, "step_fraction": load / whole, "step_what": what}


def _quickstart() -> Training:
    config = load_config(Path(hpc.__file__).parent.parent / "configs" / "quickstart.yaml")
    stage = config.stage("pretrain")
    assert isinstance(stage, Pretrain)
    return stage.train.model_copy(update={"parallel": Parallel()})


def write_large_store(folder: Path) -> Path:
    """A store of LARGE_WINDOWS windows in a file that takes no space; returns its prefix."""
    prefix = folder / "large"
    tokens = LARGE_WINDOWS * LARGE_SEQ_LEN + 1
    whole, rest = divmod(tokens, LONGEST_DOCUMENT)
    write_index(prefix, 8, np.array([LONGEST_DOCUMENT] * whole + [rest], np.int32))
    with prefix.with_suffix(".bin").open("wb") as file:
        file.truncate(2 * tokens)
    return prefix


def _seek(folder: Path) -> float:
    """Median seconds from nothing to the batches of a step: open the store, make a loader, load."""
    prefix = write_large_store(folder)
    taken = []
    for step in islice(cycle([LARGE_WINDOWS // BATCH - 1, 7, LARGE_WINDOWS // BATCH // 3]), 3 * ROUNDS):
        began = time.perf_counter()
        share = (Share("large", TokenStore(prefix)),)
        Loader(share, LARGE_SEQ_LEN, BATCH, 1, 0, 1, seed=1).micro_batches(step)
        taken.append(time.perf_counter() - began)
    return median(taken)


def _version(name: str) -> str:
    from importlib.metadata import version

    return version(name)
