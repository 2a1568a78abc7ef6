"""Which tokens of a prepared source make up each row.

The tokens are one sequence of documents, ``eos t1 .. tn`` each, closed by one more eos. The target of every
token is the one after it, so that of a document's last token is the eos which begins the next one, whatever
stands beside it in its row. The policies:

- ``concatenate``: the sequence is cut every T tokens, and only the last row is padded.
- ``documents``: no row holds two documents. A longer document goes on in the next row, a shorter one is
  padded.
- ``best_fit``: documents of at most T tokens stay whole and of longer ones T tokens are cut off at a time;
  the pieces are then put together into as few rows as best-fit-decreasing finds (see `best_fit`). Ding et al.
  (Fewer Truncations Improve Language Modeling, ICML 2024) report better models than with ``concatenate``, as
  fewer documents are cut.
"""

from abc import ABC, abstractmethod
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data_modules.packed.sharded_tokens import ShardedTokens

PreparedPacking = Literal["concatenate", "best_fit", "documents"]


class RowLayout(ABC):
    """The rows of one source, numbered from 0; every token is in exactly one.

    Attributes:
        rows: Their number.
    """

    rows: int

    @abstractmethod
    def segments(self, row: int) -> list[tuple[int, int]]:
        """The runs of tokens, from a number up to but without another, that a row consists of."""


def lay_out(tokens: ShardedTokens, packing: PreparedPacking, length: int) -> RowLayout:
    """The rows of a source.

    Needs no memory for ``concatenate``, 8 bytes a row for ``documents``, and 12 bytes a piece and 4 bytes a
    row for ``best_fit``.

    Args:
        tokens: At least one.
        packing: How documents become rows.
        length: Tokens in a row (T).

    Raises:
        DataError: A shard is missing or altered.
    """
    if packing == "concatenate":
        return Consecutive(tokens.tokens, length)
    starts = piece_starts(tokens, length)
    return Separate(starts) if packing == "documents" else BestFit(starts, length)


def piece_starts(tokens: ShardedTokens, length: int) -> NDArray[np.int64]:
    """Where the pieces of all documents start, and where the last one ends, int64 [pieces + 1].

    A piece is ``length`` tokens of a document, or what is left at its end.

    Raises:
        DataError: A shard is missing or altered.
    """
    found = []
    for starts in tokens.document_starts():
        pieces = -(-np.diff(starts) // length)
        within = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        found.append(np.repeat(starts[:-1], pieces) + length * within)
    return np.concatenate([*found, np.array([tokens.tokens])])


class Consecutive(RowLayout):
    """See ``concatenate``."""

    def __init__(self, tokens: int, length: int) -> None:
        self.tokens, self.length = tokens, length
        self.rows = -(-tokens // length)

    def segments(self, row: int) -> list[tuple[int, int]]:
        return [(row * self.length, min((row + 1) * self.length, self.tokens))]


class Separate(RowLayout):
    """See ``documents``."""

    def __init__(self, starts: NDArray[np.int64]) -> None:
        self.starts = starts
        self.rows = len(starts) - 1

    def segments(self, row: int) -> list[tuple[int, int]]:
        return [(int(self.starts[row]), int(self.starts[row + 1]))]


class BestFit(RowLayout):
    """See ``best_fit``."""

    def __init__(self, starts: NDArray[np.int64], length: int) -> None:
        from data_modules.packed.best_fit import best_fit_decreasing  # numba takes a while to import

        self.starts = starts
        self.order, self.firsts = best_fit_decreasing(starts, length)
        self.rows = len(self.firsts) - 1

    def segments(self, row: int) -> list[tuple[int, int]]:
        pieces = self.order[self.firsts[row] : self.firsts[row + 1]]
        return list(zip(self.starts[pieces].tolist(), self.starts[pieces + 1].tolist(), strict=True))
