"""Batches of rows of text: endless for training, one pass for evaluation."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from operator import itemgetter
from typing import Generic, TypeVar

import numpy as np
from torch.utils.data import get_worker_info

from data_modules.base import Batch, BatchSource, Cursor
from data_modules.mixture import Mixture
from data_modules.packing import Packing, Position, Tokens, batch_of_rows, concatenate, one_document_a_row
from data_modules.streaming.documents import Documents
from data_modules.streaming.lanes import Lane, LaneCursor, Rows, joined, own_lanes, rows_given

Item = TypeVar("Item")


@dataclass(frozen=True)
class RowFormat:
    """What rows and batches look like.

    Args:
        length: Tokens in a row (T).
        batch_size: Rows of a batch (B).
        packing: How documents become rows.
        confine_attention: Whether to number the documents of a row.
        eos: The end-of-document token.
    """

    length: int
    batch_size: int
    packing: Packing
    confine_attention: bool
    eos: int

    def batch(self, rows: list[Tokens]) -> Batch:
        """A batch of these rows, padded."""
        return batch_of_rows(rows, self.length, self.eos, self.confine_attention)


@dataclass
class TextRows(BatchSource):
    """Endless training batches of one stream of documents, or of several by weights, in lanes.

    Args:
        streams: Where the rows come from.
        weights: The streams' shares of the rows; None if there is one stream.
        lanes: Number of lanes.
        format: The rows and batches.
        seed: Chooses which stream gives which row.
    """

    streams: list[Documents]
    weights: list[float] | None
    lanes: int
    format: RowFormat
    seed: int

    def batches(
        self, cursor: Cursor, world: int, rank: int, worker: int = 0, workers: int = 1
    ) -> Iterator[Batch]:
        assert isinstance(cursor, dict)
        if get_worker_info() is not None:
            # The thread pool of the forked parent does not answer; and other workers have the other cores.
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        row = cursor["row"]
        own = {
            lane: self._lane(lane, cursor)
            for lane in own_lanes(row, self.lanes, world, rank, worker, workers)
        }
        while True:
            rows, places = [], []
            for number in range(self.format.batch_size * world):
                if (lane := own.get((row + number) % self.lanes)) is not None:
                    tokens = lane.next_row()
                    if number % world == rank:
                        rows.append(tokens)
                        places.append(number // world)
            row += self.format.batch_size * world
            positions = [list(own[i].positions) if i in own else None for i in range(self.lanes)]
            part = {"cursor": {"row": row, "lanes": positions}}
            yield part | (self.format.batch(rows) if workers == 1 else {"rows": rows, "places": places})

    def join(self, items: Iterator[Batch], workers: int) -> Iterator[Batch]:
        if workers == 1:
            yield from items
        while parts := list(islice(items, workers)):
            # Arrays and not tensors, each of which would come as a file descriptor of its own.
            placed = sorted(
                (pair for part in parts for pair in zip(part["places"], part["rows"], strict=True)),
                key=itemgetter(0),
            )
            batch = self.format.batch([row for _, row in placed])
            yield batch | {"cursor": joined(part["cursor"] for part in parts)}

    def check(self, world: int, rank: int) -> None:
        """Make a first row of every stream in one of the rank's lanes.

        Raises:
            DataError: A stream cannot be read, or holds too little text.
        """
        lane = own_lanes(0, self.lanes, world, rank)[0]
        for number, documents in enumerate(self.streams):
            next(self._rows(lane, number, documents.start()))

    def _lane(self, lane: int, cursor: LaneCursor) -> Lane:
        mixture = None if self.weights is None else Mixture(self.weights, self.seed, lane)
        given = rows_given(cursor["row"], lane, self.lanes)
        return Lane(cursor["lanes"][lane], given, mixture, partial(self._rows, lane))

    def _rows(self, lane: int, stream: int, position: Position) -> Rows:
        least = self.format.length + 1 if self.format.packing == "concatenate" else 1
        documents = self.streams[stream].read(position, True, least, lane, self.lanes)
        if self.format.packing == "documents":
            return one_document_a_row(documents, self.format.length, self.format.eos)
        return concatenate(documents, self.format.length)


@dataclass
class EvaluationText(BatchSource):
    """Batches of one pass over documents; what was read once is kept for the next time.

    Args:
        documents: Where the rows come from.
        format: The rows and batches.
    """

    documents: Documents
    format: RowFormat
    _one_pass: dict[tuple[int, int], "_Replayed[Tokens]"] = field(default_factory=dict)

    def batches(
        self, cursor: Cursor, world: int, rank: int, worker: int = 0, workers: int = 1
    ) -> Iterator[Batch]:
        assert workers == 1  # another process would keep nothing for the next time
        if (world, rank) not in self._one_pass:
            self._one_pass[world, rank] = _Replayed(self._share(world, rank))
        rows = iter(self._one_pass[world, rank])
        while some := list(islice(rows, self.format.batch_size)):
            yield self.format.batch(some)

    def _share(self, world: int, rank: int) -> Iterator[Tokens]:
        """This rank's rows; ranks beyond the last row get an empty one, so that all have equally many."""
        own: Tokens | None = None
        number = -1
        for number, (row, _) in enumerate(self._rows()):
            if number % world == rank:
                own = row
            if number % world == world - 1 and own is not None:
                yield own
                own = None
        if (number + 1) % world:
            yield np.empty(0, np.int32) if own is None else own

    def _rows(self) -> Rows:
        documents = self.documents.read(self.documents.start(), endless=False, least=1)
        if self.format.packing == "documents":
            return one_document_a_row(documents, self.format.length, self.format.eos)
        return concatenate(_closed(documents, self.format.eos), self.format.length)


def _closed(documents: Iterable[tuple[Position, Tokens]], eos: int) -> Iterator[tuple[Position, Tokens]]:
    """The documents and the token that ends the last one."""
    position: Position = {}
    for position, tokens in documents:
        yield position, tokens
    yield {**position, "token": 0}, np.array([eos], np.int32)


class _Replayed(Generic[Item]):
    """Goes through an iterator's items any number of times, keeping those that were read once."""

    def __init__(self, items: Iterator[Item]) -> None:
        self.items, self.kept = items, list[Item]()

    def __iter__(self) -> Iterator[Item]:
        number = 0
        while True:
            if number == len(self.kept):
                try:
                    self.kept.append(next(self.items))
                except StopIteration:
                    return
            yield self.kept[number]
            number += 1
