"""Which runtime an artifact is for, told from its files."""

import json
from pathlib import Path
from typing import Any, Literal

from hpc.errors import DataError

Runtime = Literal["transformers", "llama.cpp", "mlx"]


def locate(path: Path) -> tuple[Runtime, Path]:
    """The runtime of an artifact, and the file or folder that it opens.

    path: a .gguf file, a model folder, or the folder of a finished stage. Raises DataError for anything else.
    """
    if path.is_file() and path.suffix == ".gguf":
        return "llama.cpp", path
    folder = path / "artifact" if (path / "artifact").is_dir() else path
    if not folder.is_dir():
        raise DataError(f"{path} is neither a .gguf file nor a folder: name a model folder, or RUN/stages/STAGE")
    files = sorted(folder.glob("*.gguf"))
    if len(files) == 1:
        return "llama.cpp", files[0]
    if len(files) > 1:
        raise DataError(f"{folder} holds {len(files)} .gguf files: name the one you mean, such as {files[0].name}")
    if (folder / "adapter_config.json").is_file():
        raise DataError(f"{path} holds an adapter, which answers only on its base: merge it and name the merged model")
    if not (folder / "config.json").is_file():
        raise DataError(f"{path} holds no model (no config.json, no .gguf): name a model folder, or RUN/stages/STAGE")
    return "mlx" if _is_mlx(folder) else "transformers", folder


def _is_mlx(folder: Path) -> bool:
    """Whether mlx-lm wrote a folder: its weight files say so."""
    for file in sorted(folder.glob("*.safetensors"))[:1]:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            try:
                header: dict[str, Any] = json.loads(stream.read(size)) if size < 100_000_000 else {}
            except ValueError:  # damaged: its runtime will say how
                return False
        return bool(header.get("__metadata__", {}).get("format") == "mlx")
    return False
