"""What the process that quantizes is asked to do; plain data on its way through a JSON file."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Request:
    """One model, quantized once. Paths are absolute."""

    source: str
    """A transformers folder with a tokenizer."""
    target: str
    """The folder to make; it comes into being whole, by a rename."""
    scratch: str
    """A folder that may be filled and thrown away."""
    format: str
    """`int` or `fp8`."""
    bits: int
    group_size: int
    symmetric: bool
    ids: str | None = None
    """A .npy file of calibration ids (windows, tokens), int64; None rounds to nearest without looking at any."""
    iterations: int = 200
    batch_size: int = 8
    bits_of: dict[str, int] = field(default_factory=dict)
    """Matrices that get other bits, by their names in the file, without `.weight`."""
    nearest: list[str] = field(default_factory=list)
    """Matrices that are rounded to nearest all the same."""
