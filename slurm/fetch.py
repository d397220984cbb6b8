"""What a chain starts from, brought here before anything is launched: compute nodes may have no network."""

from hpc.config import Reuse, RunConfig
from hpc.reuse.fetch import cache_folder, fetch, locate
from hpc.run.directory import RunDirectory


def fetch_sources(run: RunDirectory, config: RunConfig) -> None:
    """Fetch every checkpoint that a stage without a receipt starts from. Raises DataError."""
    for stage in config.stages:
        if not isinstance(stage, Reuse) or stage.init is None or run.stage(stage.name).receipt.exists():
            continue
        cache = cache_folder(run.root)
        if locate(stage.init, cache) is None:
            print(f"{stage.name}: fetching {stage.init.source}", flush=True)
            fetch(stage.init, cache)
