"""A shuffle that needs no memory: the place of any number in a keyed permutation of range(count), for whole arrays.

A generalised Feistel network (Black and Rogaway 2002, "Ciphers with arbitrary finite domains", section 5): a number
below rows x columns is a pair (row, column), and in turns each half is moved around by a hash of the other. rows x
columns exceeds `count` by less than one column's length; the few numbers that fall outside are put through again until
they are inside (cycle walking), which keeps it a permutation. A Feistel network on bits would walk up to four times.
"""

import hashlib
from functools import lru_cache
from math import isqrt

import numpy as np
from numpy.typing import NDArray

ROUNDS = 4
"""Luby and Rackoff 1988: four rounds make a strong pseudo-random permutation of a good round function."""


def permute(positions: NDArray[np.uint64], count: int, *key: int) -> NDArray[np.uint64]:
    """The places of `positions`, each below `count`, in the permutation of range(count) that `key` names."""
    rows = isqrt(max(0, count - 1)) + 1
    columns = -(-count // rows)
    keys = _round_keys(key)
    places = _rounds(positions, rows, columns, keys)
    while (outside := places >= count).any():
        places[outside] = _rounds(places[outside], rows, columns, keys)
    return places


def _rounds(values: NDArray[np.uint64], rows: int, columns: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    num_rows, num_columns = np.uint64(rows), np.uint64(columns)
    row, column = values // num_columns, values % num_columns
    for number in range(0, ROUNDS, 2):
        row = (row + _mix(column, keys[number]) % num_rows) % num_rows
        column = (column + _mix(row, keys[number + 1]) % num_columns) % num_columns
    return row * num_columns + column


def _mix(values: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """SplitMix64's finalizer (Steele et al. 2014) of values and a round key."""
    state = values + key
    state ^= state >> np.uint64(30)
    state *= np.uint64(0xBF58476D1CE4E5B9)
    state ^= state >> np.uint64(27)
    state *= np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    return state


@lru_cache(maxsize=256)
def _round_keys(key: tuple[int, ...]) -> NDArray[np.uint64]:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * ROUNDS).digest()
    return np.frombuffer(digest, "<u8").astype(np.uint64)
