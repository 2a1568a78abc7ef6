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


class ShuffledEpochs:
    """An endless sequence that goes through some items again and again, each time in a new random order.

    Args:
        items: Any numbers, int64 [n].
        parts: Integers that choose the orders.
    """

    def __init__(self, items: NDArray[np.int64], *parts: int) -> None:
        self.items, self._parts = items, parts
        self._order: tuple[int, NDArray[np.int64]] = (-1, items)

    def locate(
        self, numbers: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Epoch, place in it, and item of these (ascending) numbers of the sequence, int64 [m] each."""
        epoch, index = np.divmod(numbers, len(self.items))
        found = [self._of(int(e))[index[epoch == e]] for e in np.unique(epoch)]
        return epoch, index, np.concatenate(found)

    def _of(self, epoch: int) -> NDArray[np.int64]:
        if self._order[0] != epoch:
            self._order = (epoch, self.items[permutation(len(self.items), *self._parts, epoch)])
        return self._order[1]


def permutation(count: int, *parts: int) -> NDArray[np.int64]:
    """A permutation of range(count), int64 [count]."""
    return np.argsort(hashed(*parts, np.arange(count)), kind="stable")
