"""Which row of which source comes when, as a function of its number in the run."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data_modules.mixture import Mixture
from data_modules.permutation import Permutation


class RowOrder:
    """An endless random order of the rows of some sources.

    Args:
        rows: Number of rows of each source.
        weights: Share of the run's rows that each source gives, going through its own rows in a new order as
            often as that takes. None: all rows of all sources in one random order, and then in another.
        seed: Chooses the order.

    Raises:
        ValueError: A weight is not positive, or too small (see `Mixture`).
    """

    def __init__(self, rows: Sequence[int], weights: Sequence[float] | None, seed: int) -> None:
        self.rows, self.seed = np.array(rows, np.int64), seed
        self._ends = np.cumsum(self.rows)
        self._mixture = None if weights is None else Mixture(weights, seed)
        self._permutations: dict[int, tuple[int, Permutation]] = {}

    def locate(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source and the row in it of some rows of the run, both int64 [n].

        Args:
            numbers: Of these rows, int64 [n], ascending.
        """
        if self._mixture is None:
            place = self._shuffled(0, int(self._ends[-1]), numbers)
            source = np.searchsorted(self._ends, place, side="right")
            return source, place - (self._ends - self.rows)[source]
        first = int(numbers[0])
        sources, ordinals = self._mixture.assign(first, int(numbers[-1]) - first + 1)
        source, ordinal = sources[numbers - first], ordinals[numbers - first]
        row = np.empty_like(ordinal)
        for number in np.unique(source):
            mine = source == number
            row[mine] = self._shuffled(int(number), int(self.rows[number]), ordinal[mine])
        return source, row

    def epochs(self, numbers: int) -> NDArray[np.float64]:
        """How often each source has been gone through after so many rows of the run, float64 [sources]."""
        if self._mixture is None:
            return np.full(len(self.rows), numbers / self._ends[-1])
        return self._mixture.counts(numbers) / self.rows

    def _shuffled(self, source: int, rows: int, ordinals: NDArray[np.int64]) -> NDArray[np.int64]:
        epochs, index = np.divmod(ordinals, rows)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            mine = epochs == epoch
            index[mine] = self._permutation(source, rows, epoch)(index[mine])
        return index

    def _permutation(self, source: int, rows: int, epoch: int) -> Permutation:
        if self._permutations.get(source, (-1,))[0] != epoch:
            self._permutations[source] = epoch, Permutation(rows, self.seed, source, epoch)
        return self._permutations[source][1]
