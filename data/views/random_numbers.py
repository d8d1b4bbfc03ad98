"""Random numbers that are pure functions of their keys.

NumPy's and torch's generators carry state, which differs between workers, and promise no stable streams between
versions. A counter-based hash has neither problem: the number drawn for (seed, epoch, sample, view, purpose) is
the same on every machine, whoever draws it and whatever was drawn before.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# SplitMix64: Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators".
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)
_MASK = (1 << 64) - 1


def hash_key(*parts: int) -> int:
    """Returns a 64-bit key of a tuple of integers, as a non-negative Python integer."""
    key = 0
    for part in parts:
        key = _mix_integer((key ^ _mix_integer((part & _MASK) + _GOLDEN_GAMMA)) + _GOLDEN_GAMMA)
    return key


def hash_array(key: int | NDArray[np.uint64], values: NDArray[np.integer] | range) -> NDArray[np.uint64]:
    """Returns a 64-bit hash of every value under a key (or under keys that broadcast against the values)."""
    numbers = np.asarray(values).astype(np.uint64)
    keys = np.asarray(key, dtype=np.uint64)
    with np.errstate(over="ignore"):
        return _mix_array(keys ^ _mix_array((numbers + np.uint64(1)) * np.uint64(_GOLDEN_GAMMA)))


def draw_uniforms(keys: NDArray[np.uint64], count: int) -> NDArray[np.float64]:
    """Returns `count` numbers in [0, 1) for each key, on a new last axis."""
    hashes = hash_array(keys[..., None], range(count))
    return (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draw_permutation(key: int, size: int) -> NDArray[np.int64]:
    """Returns a permutation of range(size) that depends on the key only."""
    return np.argsort(hash_array(key, range(size)), kind="stable").astype(np.int64)


def _mix_integer(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * int(_MULTIPLIER_1)) & _MASK
    value = ((value ^ (value >> 27)) * int(_MULTIPLIER_2)) & _MASK
    return value ^ (value >> 31)


def _mix_array(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * _MULTIPLIER_1
    values = (values ^ (values >> np.uint64(27))) * _MULTIPLIER_2
    return values ^ (values >> np.uint64(31))
