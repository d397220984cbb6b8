"""Which text a calibrated method looks at. Shape letters: N windows, S tokens of one."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hpc.errors import DataError

Ids = npt.NDArray[np.int64]


def windows(texts: Sequence[npt.NDArray[Any]], tokens: int, seq_len: int) -> Ids:
    """About `tokens` ids as (N, S), the same number from each text, spread evenly over it without overlap.

    A text that is too short for its share gives what it has. Raises DataError when none holds a window.
    """
    share = max(1, round(tokens / seq_len / max(1, len(texts))))
    rows = []
    for text in texts:
        count = min(share, len(text) // seq_len)
        starts = np.linspace(0, len(text) - seq_len, count).astype(int) if count > 1 else range(count)
        rows += [np.asarray(text[start : start + seq_len], dtype=np.int64) for start in starts]
    if not rows:
        raise DataError(f"no text that is needed holds {seq_len} tokens to calibrate on: lower calibration.seq_len")
    return np.stack(rows)
