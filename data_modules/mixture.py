"""Which source gives which row of a run, by weights, at any position."""

from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from data_modules.permutation import Permutation
from memlm.errors import ConfigError

BLOCK = 1 << 16
"""Rows within which every source gives its share."""


def checked_weights(weights: Mapping[str, float], names: Sequence[str], key: str) -> list[float]:
    """The shares of named sources, in the sources' order and the same for all weights of the same ratios.

    Args:
        weights: By name.
        names: The sources.
        key: The YAML key that names them.

    Raises:
        ConfigError: A weight is of no source, missing, not a positive number, or too small.
    """
    for name in weights:
        if name not in names:
            raise ConfigError(
                f"data.weights.{name}", f"is the weight of no source; {key} has {', '.join(names)}"
            )
    for name in names:
        if name not in weights:
            raise ConfigError("data.weights", f"has none for {name!r} of {key}; expected one for each")
        if not 0 < weights[name] < float("inf"):
            raise ConfigError(
                f"data.weights.{name}", f"is {weights[name]}; expected a positive number (or no such source)"
            )
    total = sum(map(Fraction, weights.values()))
    for name, weight in weights.items():
        if Fraction(weight) / total * BLOCK < 1:
            raise ConfigError(
                f"data.weights.{name}",
                f"is {weight / float(total):.3g} of all weights; expected at least 1/{BLOCK:,} of them",
            )
    # 0.8 and 0.2 are not quite in the ratio of 8 and 2.
    return [float((Fraction(weights[name]) / total).limit_denominator(10**9)) for name in names]


class Mixture:
    """An endless random sequence of sources in which each has its share, exactly and not on average.

    Rows come in blocks of 65,536. After every whole block each source has given weight x rows, rounded up or
    down so that the sum is right (largest remainder); within a block the order is a random permutation.

    Args:
        weights: Shares of the sources, as `checked_weights` gives them; only their ratios count.
        parts: Integers that choose the order.
    """

    def __init__(self, weights: Sequence[float], *parts: int) -> None:
        total = sum(map(Fraction, weights))
        self._shares = [Fraction(weight) / total for weight in weights]  # exact at any number of rows
        assert min(self._shares) > 0
        self._parts = parts
        self._block: tuple[int, NDArray[np.int64], NDArray[np.int64]] | None = None

    def assign(self, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where rows come from.

        Args:
            first: Number of the first row.
            count: How many rows.

        Returns:
            For each row the number of its source, and how many rows that source has given before; both
            int64 [count].
        """
        sources, ordinals = np.empty(count, np.int64), np.empty(count, np.int64)
        done = 0
        while done < count:
            block, offset = divmod(first + done, BLOCK)
            _, source, ordinal = self._cached(block)
            n = min(count - done, BLOCK - offset)
            sources[done : done + n] = source[offset : offset + n]
            ordinals[done : done + n] = ordinal[offset : offset + n]
            done += n
        return sources, ordinals

    def counts(self, rows: int) -> NDArray[np.int64]:
        """How many of the first rows each source gives, int64 [sources]."""
        block, offset = divmod(rows, BLOCK)
        counts = np.array(self._before(block), np.int64)
        if offset:
            counts += np.bincount(self._cached(block)[1][:offset], minlength=len(counts))
        return counts

    def _before(self, block: int) -> list[int]:
        """Rows of each source in all blocks before this one; grows with it, as a share is a row at least."""
        quotas = [share * (block * BLOCK) for share in self._shares]
        counts = [int(quota) for quota in quotas]
        largest = sorted(range(len(quotas)), key=lambda i: (counts[i] - quotas[i], i))
        for source in largest[: block * BLOCK - sum(counts)]:
            counts[source] += 1
        return counts

    def _cached(self, block: int) -> tuple[int, NDArray[np.int64], NDArray[np.int64]]:
        if self._block is None or self._block[0] != block:
            before, after = np.array(self._before(block)), np.array(self._before(block + 1))
            unshuffled = np.repeat(np.arange(len(before)), after - before)
            source = unshuffled[Permutation(BLOCK, *self._parts, block)(np.arange(BLOCK))]
            ordinal = np.empty(BLOCK, np.int64)
            # A source's rows, in their order, get its next ordinals.
            ordinal[np.argsort(source, kind="stable")] = np.concatenate(
                [np.arange(a, b) for a, b in zip(before, after, strict=True)]
            )
            self._block = block, source, ordinal
        return self._block
