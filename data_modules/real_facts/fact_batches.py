"""Batches of `FactQuestions`: statements to train on, and questions that ask what was learned."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from data_modules.base import Batch, BatchSource, Cursor
from data_modules.exposures import Exposures
from data_modules.hashed_random import ShuffledEpochs, hashed
from data_modules.packing import Packing, as_batch
from data_modules.real_facts.stated_facts import StatedFacts
from memlm.metrics import IGNORED


class FactStatements(BatchSource):
    """Training batches: an endless sequence of documents, numbered from 0.

    With packing ``documents`` the cursor is the number of rows, i.e. of documents, given so far. With
    ``concatenate`` it is (number of the document that holds the next row's first token) x
    (tokens of the longest document) + (offset of that token in it).

    Args:
        stated: The facts.
        occurrences: The fact of each document of an epoch, before they are shuffled, int64 [n].
        length: Tokens in a row (T).
        batch_size: Rows of a batch (B).
        packing: How documents become rows.
        answers_only: Whether only answers are targets.
        confine_attention: Whether to number the documents of a row.
    """

    def __init__(
        self,
        stated: StatedFacts,
        occurrences: NDArray[np.int64],
        length: int,
        batch_size: int,
        packing: Packing,
        answers_only: bool,
        confine_attention: bool,
    ) -> None:
        self.stated, self.occurrences = stated, occurrences
        self.length, self.batch_size, self.packing = length, batch_size, packing
        self.answers_only, self.confine_attention = answers_only, confine_attention
        self.lengths = stated.lengths
        self.longest, self.shortest = int(self.lengths.max()), int(self.lengths.min())
        self._epochs = ShuffledEpochs(occurrences, stated.seed, 22)

    def statements(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which statements the documents of these (ascending) numbers are, int64 [n]."""
        stated = self.stated
        epoch, index, fact = self._epochs.locate(numbers)
        choice = hashed(stated.seed, 21, epoch, index) % stated.trained_phrasings[fact].astype(np.uint64)
        return stated.first[fact] + choice.astype(np.int64)

    def batches(
        self, cursor: Cursor, world: int, rank: int, worker: int = 0, workers: int = 1
    ) -> Iterator[Batch]:
        assert isinstance(cursor, int)
        number, rows = 0, np.arange(self.batch_size) * world + rank
        while True:
            if self.packing == "documents":
                documents, after = cursor + rows, cursor + world * self.batch_size
            else:
                documents, after = self._span(cursor, world)
            if number % workers == worker:
                statements = self.statements(documents)
                if self.packing == "documents":
                    tokens, counted = self._separate_rows(statements)
                else:
                    tokens, counted = self._joined_rows(
                        statements, cursor % self.longest + self.length * rows
                    )
                targets = np.where(counted, tokens[:, 1:], IGNORED)
                eos = self.stated.tokenizer.eos_id
                yield as_batch(tokens[:, :-1], targets, eos, self.confine_attention) | {"cursor": after}
            number, cursor = number + 1, after

    def _separate_rows(self, statements: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Rows [B, T + 1] of one document each, and which of their T targets count."""
        tokens, valid, is_answer = padded(self.stated, statements, self.length + 1)
        return tokens, is_answer[:, 1:] if self.answers_only else valid[:, :-1]

    def _span(self, cursor: int, world: int) -> tuple[NDArray[np.int64], int]:
        """Numbers of the documents that the batch of all ranks is cut from, and the cursor after it."""
        first, offset = divmod(cursor, self.longest)
        end = offset + world * self.batch_size * self.length
        numbers = first + np.arange(end // self.shortest + 1)
        ends = np.cumsum(self.lengths[self.statements(numbers)])
        last = int(np.searchsorted(ends, end, side="right"))  # the document that holds the token at end
        after = (first + last) * self.longest + end - (int(ends[last - 1]) if last else 0)
        return numbers[: last + 1], after

    def _joined_rows(
        self, statements: NDArray[np.int64], begin: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The same for rows that begin at places [B] of the stream of these documents."""
        starts, stops = self.stated.starts[statements], self.stated.starts[statements + 1]
        stream = np.concatenate([np.arange(a, b) for a, b in zip(starts, stops, strict=True)])
        place = stream[begin[:, None] + np.arange(self.length + 1)]
        is_answer = self.stated.is_answer[place[:, 1:]]
        counted = is_answer if self.answers_only else np.ones_like(is_answer)
        return self.stated.tokens[place].astype(np.int64), counted


class Questions(BatchSource):
    """Evaluation batches: one statement in each row, the groups evenly mixed.

    The loss is that of held-out phrasings, or of the trained one where a fact has no other.

    Args:
        stated: The facts.
        count: Facts asked in each group, None for all.
        rows: Of a batch.
        answers_only: Whether only answers are targets.
        confine_attention: Whether to number the documents of a row.
        exposures: How often facts are trained.

    Attributes:
        table: Statement, group, and whether its loss counts, of each row, int64 [rows of all batches, 3].
        length: Tokens in a row (T).
    """

    def __init__(
        self,
        stated: StatedFacts,
        count: int | None,
        rows: int,
        answers_only: bool,
        confine_attention: bool,
        exposures: Exposures,
    ) -> None:
        self.stated, self.rows = stated, rows
        self.exposures = exposures
        self.answers_only, self.confine_attention = answers_only, confine_attention
        # The facts are in random order already.
        asked = np.arange(stated.trained)[:count]
        control = np.arange(stated.trained, len(stated.facts))[:count]
        unseen = stated.first[:-1] + np.where(stated.has_held_out, stated.trained_phrasings, 0)
        alone = ~stated.has_held_out[asked]
        groups = [
            (unseen[asked[~alone]], np.ones_like(asked[~alone])),
            (stated.first[asked], alone.astype(np.int64)),
            (unseen[control], np.zeros_like(control)),
        ]
        table, place = [], []
        for group, (statement, counts) in enumerate(groups):
            table.append(np.stack([statement, np.full_like(statement, group), counts], axis=1))
            place.append((np.arange(len(statement)) + 0.5) / max(len(statement), 1))
        self.table = np.concatenate(table)[np.argsort(np.concatenate(place), kind="stable")]
        self.length = int(stated.lengths[self.table[:, 0]].max()) - 1

    def batches(
        self, cursor: Cursor, world: int, rank: int, worker: int = 0, workers: int = 1
    ) -> Iterator[Batch]:
        padding = -len(self.table) % world
        table = np.concatenate([self.table, np.tile([[0, -1, 0]], (padding, 1))])[rank::world]
        eos = self.stated.tokenizer.eos_id
        for start in range(worker * self.rows, len(table), workers * self.rows):
            statement, group, counts = table[start : start + self.rows].T
            tokens, valid, is_answer = padded(self.stated, statement, self.length + 1)
            counted = (is_answer if self.answers_only else valid) & (counts == 1)[:, None]
            targets = np.where(counted, tokens, IGNORED)[:, 1:]
            answers = np.where(is_answer & (group >= 0)[:, None], tokens, IGNORED)[:, 1:]
            batch = as_batch(tokens[:, :-1], targets, eos, self.confine_attention)
            fact = np.searchsorted(self.stated.first, statement, side="right") - 1
            extra = {
                "answers": answers.copy(),
                "group": group.copy(),
                **self.exposures.batch(fact, group),
            }
            yield batch | {key: torch.from_numpy(value) for key, value in extra.items()}


def padded(
    stated: StatedFacts, statements: NDArray[np.int64], width: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]:
    """Tokens of statements, which are no padding, and which are answers; each [n, width], padded by eos."""
    place = stated.starts[statements][:, None] + np.arange(width)
    valid = place < stated.starts[statements + 1][:, None]
    place = np.where(valid, place, 0)
    tokens = np.where(valid, stated.tokens[place], stated.tokenizer.eos_id).astype(np.int64)
    return tokens, valid, valid & stated.is_answer[place]
