"""Batches of rows of prepared sources, for training and for evaluation."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_modules.base import Batch, BatchSource, Cursor
from data_modules.packed.row_layouts import RowLayout
from data_modules.packed.row_order import RowOrder
from data_modules.packed.sharded_tokens import ShardedTokens
from memlm.metrics import IGNORED

# Rows whose place is worked out together, as that costs about the same for one as for some hundred. They may
# be spread over so many rows of the run.
_PLANNED, _SPREAD = 256, 1 << 16


@dataclass
class SourceRows:
    """The rows of one source.

    Args:
        tokens: Its tokens.
        layout: Which of them make up each row.
    """

    tokens: ShardedTokens
    layout: RowLayout

    def windows(self, row: int) -> Iterator[NDArray[Any]]:
        """Each run of tokens that the row consists of, and the one after it.

        Raises:
            DataError: A shard is missing or altered.
        """
        for start, stop in self.layout.segments(row):
            yield self.tokens.window(start, stop + 1)


@dataclass
class RowShape:
    """What every batch has in common.

    Args:
        length: Tokens in a row (T).
        batch_size: Rows of a batch (B).
        eos_id: Fills the padding.
        confine_attention: Whether to number the documents of each row.
    """

    length: int
    batch_size: int
    eos_id: int
    confine_attention: bool

    def batch(self, rows: Sequence[tuple[SourceRows, int] | None]) -> Batch:
        """``tokens``, ``targets`` and, if wanted, ``documents`` of some rows; None is a row of padding.

        Raises:
            DataError: A shard is missing or altered.
        """
        tokens = np.empty((len(rows), self.length), np.int64)
        targets = np.empty_like(tokens)
        begins = np.zeros_like(tokens, np.bool_) if self.confine_attention else None
        for i, row in enumerate(rows):
            end = 0
            for window in () if row is None else row[0].windows(row[1]):
                place, end = end, end + len(window) - 1
                tokens[i, place:end] = window[:-1]
                targets[i, place:end] = window[1:]
                if begins is not None:
                    begins[i, place] = True  # the rest of a document that was cut begins with no eos
            tokens[i, end:] = self.eos_id
            targets[i, end:] = IGNORED
        batch = {"tokens": torch.from_numpy(tokens), "targets": torch.from_numpy(targets)}
        if begins is not None:
            begins |= tokens == self.eos_id
            begins[:, 0] = False
            batch["documents"] = torch.from_numpy(np.cumsum(begins, axis=1, dtype=np.int64))
        return batch


@dataclass
class TrainingRows(BatchSource):
    """Endless batches for training. The cursor is the number of rows that all ranks have been given.

    Args:
        sources: The rows to draw from.
        order: Which of them comes when.
        shape: Of the batches.
    """

    sources: list[SourceRows]
    order: RowOrder
    shape: RowShape

    def batches(
        self, cursor: Cursor, world: int, rank: int, worker: int = 0, workers: int = 1
    ) -> Iterator[Batch]:
        assert isinstance(cursor, int)
        size = self.shape.batch_size
        own, step = rank + world * np.arange(size), world * size
        planned = max(1, min(_PLANNED // size, _SPREAD // (step * workers)))
        for first in count(worker, planned * workers):
            begins = cursor + step * (first + workers * np.arange(planned))
            source, row = self.order.locate((begins[:, None] + own).ravel())
            places = list(zip(source.tolist(), row.tolist(), strict=True))
            for i, begin in enumerate(begins.tolist()):
                rows = [(self.sources[s], r) for s, r in places[i * size : (i + 1) * size]]
                yield self.shape.batch(rows) | {"cursor": begin + step}


@dataclass
class EvaluationRows(BatchSource):
    """One pass over the rows of one source in their order.

    Args:
        source: The rows.
        shape: Of the batches; the last one may have fewer rows.
    """

    source: SourceRows
    shape: RowShape

    def batches(
        self, cursor: Cursor, world: int, rank: int, worker: int = 0, workers: int = 1
    ) -> Iterator[Batch]:
        rows, size = self.source.layout.rows, self.shape.batch_size
        share = -(-rows // world)  # of each rank, with padding in place of rows that are not there
        for first in range(worker * size, share, workers * size):
            numbers = range(first * world + rank, min(first + size, share) * world, world)
            yield self.shape.batch([(self.source, n) if n < rows else None for n in numbers])
