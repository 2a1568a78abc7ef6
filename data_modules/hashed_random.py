"""Random numbers as a function of where they are used, instead of as a stream.

A draw is a hash of integers such as (seed, epoch, document): any draw can be made again without making those
before it, which is what lets a run resume at any position, and it is the same on every machine and version
of NumPy.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def hashed(*parts: ArrayLike) -> NDArray[np.uint64]:
    """Independent uniform 64-bit numbers, one for each element of the broadcast integer ``parts``.

    The mixing function is SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators,
    2014), applied once for each part.
    """
    state: NDArray[np.uint64] = np.zeros(1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for part in parts:
            state = state + np.asarray(part).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def draw(count: int, *parts: ArrayLike) -> NDArray[np.int64]:
    """Integers in [0, count), uniform up to a bias of count / 2^64."""
    return (hashed(*parts) % np.uint64(count)).astype(np.int64)


def permutation(count: int, *parts: int) -> NDArray[np.int64]:
    """A permutation of range(count), int64 [count]."""
    return np.argsort(hashed(*parts, np.arange(count)), kind="stable")
