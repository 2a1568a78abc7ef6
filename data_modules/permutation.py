"""A random order of any number of things that needs no memory: the image of any index, at once."""

from math import isqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data_modules.hashed_random import hashed, permutation

_ROUNDS = 8  # pseudorandom from four on (Luby and Rackoff, 1988); more, as the halves may be small
_STORED = 1 << 10  # up to here the few different round functions do not reach all orders equally often


class Permutation:
    """A bijection of range(count), computed and not stored.

    A Feistel network over pairs (left, right) of residues, each in turn shifted by a hash of the other; pairs
    that stand for no index are sent through again until they do (Black and Rogaway: Ciphers with Arbitrary
    Finite Domains, 2002). At most sqrt(count) pairs do not, so hardly any index is. Up to 1,024 indices are
    sorted by their hashes instead.

    Args:
        count: Number of indices, 1 to 2^62.
        parts: Integers that choose the permutation.

    Raises:
        ValueError: ``count`` is out of range.
    """

    def __init__(self, count: int, *parts: int) -> None:
        if not 1 <= count <= 1 << 62:
            raise ValueError(f"count is {count}; expected 1 to 2^62")
        self.count = count
        self._stored = permutation(count, *parts) if count <= _STORED else None
        self._right = isqrt(count - 1) + 1
        self._left = -(-count // self._right)
        self._keys = hashed(*parts, np.arange(_ROUNDS))

    def __call__(self, index: ArrayLike) -> NDArray[np.int64]:
        """The images of some indices, int64 of the same shape.

        Raises:
            IndexError: An index is outside range(count).
        """
        index = np.asarray(index, np.int64)
        if index.size and (index.min() < 0 or index.max() >= self.count):
            raise IndexError(f"an index is outside range({self.count})")
        if self._stored is not None:
            return self._stored[index]
        image = self._encipher(index.ravel().astype(np.uint64))
        outside = np.flatnonzero(image >= self.count)
        while outside.size:
            image[outside] = self._encipher(image[outside])
            outside = outside[image[outside] >= self.count]
        return image.astype(np.int64).reshape(index.shape)

    def _encipher(self, index: NDArray[np.uint64]) -> NDArray[np.uint64]:
        size, other = np.uint64(self._left), np.uint64(self._right)
        half, rest = np.divmod(index, other)
        for key in self._keys:
            # The halves change places, so that the one just shifted shifts the other; after an even number
            # of rounds they are in their places again.
            half, rest = rest, (half + hashed(rest ^ key) % size) % size
            size, other = other, size
        return half * other + rest
