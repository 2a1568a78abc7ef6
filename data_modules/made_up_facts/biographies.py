"""Batches of `SyntheticFacts`: biographies to train on, and prompts that ask what was learned."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from data_modules.base import Batch, BatchSource, Cursor
from data_modules.exposures import Exposures
from data_modules.hashed_random import ShuffledEpochs, draw, hashed, permutation
from data_modules.made_up_facts.facts import NOTHING, Facts
from data_modules.packing import Packing, as_batch
from memlm.metrics import IGNORED


class Biographies(BatchSource):
    """Training batches of `SyntheticFacts`: an endless sequence of biographies, numbered from 0.

    With packing ``documents`` the cursor is the number of rows, i.e. of documents, given so far. With
    ``concatenate`` it is (number of the document that holds the next row's first token) x
    (tokens of the longest document) + (offset of that token in it).
    """

    def __init__(
        self,
        facts: Facts,
        occurrences: NDArray[np.int64],
        length: int,
        batch_size: int,
        packing: Packing,
        answers_only: bool,
        confine_attention: bool,
    ) -> None:
        self.facts = facts
        self.occurrences = occurrences  # the person of each document of an epoch, before shuffling
        self.length, self.batch_size, self.packing = length, batch_size, packing
        self.answers_only, self.confine_attention = answers_only, confine_attention
        self.longest = facts.document_length(np.max)
        self.shortest = facts.document_length(np.min)
        self._epochs = ShuffledEpochs(occurrences, facts.seed, 12)

    def documents(self, numbers: NDArray[np.int64]) -> NDArray[np.int32]:
        """Tokens of the documents of these (ascending) numbers, int32 [n, L], with gaps of `NOTHING`."""
        facts = self.facts
        epoch, index, person = self._epochs.locate(numbers)
        epoch, index, person = epoch[:, None], index[:, None], person[:, None]
        slots = np.arange(facts.attributes)
        attribute = np.argsort(hashed(facts.seed, 10, epoch, index, slots), axis=1)
        choice = draw(facts.trained.shape[2], facts.seed, 11, epoch, index, slots)
        clauses = facts.clauses(person, attribute, facts.trained[person, attribute, choice])
        ends = np.full((*attribute.shape, 1), facts.comma, dtype=np.int32)
        ends[:, -1] = facts.stop
        clauses = np.concatenate([clauses, ends], axis=2).reshape(len(numbers), -1)
        start = np.full((len(numbers), 1), facts.tokenizer.eos_id, dtype=np.int32)
        return np.concatenate([start, facts.names[person[:, 0]], clauses], axis=1)

    def batches(
        self, cursor: Cursor, world: int, rank: int, worker: int = 0, workers: int = 1
    ) -> Iterator[Batch]:
        assert isinstance(cursor, int) and workers == 1  # made faster than a worker could hand them over
        while True:
            if self.packing == "documents":
                rows, lengths, cursor = self._separate_rows(cursor, world, rank)
            else:
                rows, lengths, cursor = self._joined_rows(cursor, world, rank)
            tokens, targets = rows[:, :-1], rows[:, 1:]
            counted = np.arange(self.length) < lengths[:, None]
            if self.answers_only:
                counted &= self.facts.is_value(targets)
            targets = np.where(counted, targets, IGNORED)
            yield as_batch(tokens, targets, self.facts.tokenizer.eos_id, self.confine_attention) | {
                "cursor": cursor
            }

    def _separate_rows(
        self, cursor: int, world: int, rank: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        """Rows [B, T + 1] of one document each, the number of targets in each, and the next cursor."""
        documents = self.documents(cursor + rank + world * np.arange(self.batch_size))
        valid = documents != NOTHING
        column = np.cumsum(valid, axis=1) - 1
        rows = np.full((self.batch_size, self.length + 1), self.facts.tokenizer.eos_id, dtype=np.int64)
        rows[np.nonzero(valid)[0], column[valid]] = documents[valid]
        return rows, column[:, -1] + 1, cursor + world * self.batch_size

    def _joined_rows(
        self, cursor: int, world: int, rank: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        """The same for rows cut from the stream of all documents, every target of which counts."""
        first, offset = divmod(cursor, self.longest)
        end = offset + world * self.batch_size * self.length
        documents = self.documents(first + np.arange(end // self.shortest + 1))
        valid = documents != NOTHING
        stream = documents[valid].astype(np.int64)
        starts = offset + self.length * (rank + world * np.arange(self.batch_size))
        ends = np.cumsum(valid.sum(axis=1))
        last = int(np.searchsorted(ends, end, side="right"))  # the document that holds stream[end]
        after = (first + last) * self.longest + end - (int(ends[last - 1]) if last else 0)
        rows = stream[starts[:, None] + np.arange(self.length + 1)]
        return rows, np.full(self.batch_size, self.length), after


class Prompts(BatchSource):
    """Evaluation batches of `SyntheticFacts`: a name and one clause in each row, the groups evenly mixed."""

    def __init__(
        self,
        facts: Facts,
        count: int | None,
        length: int,
        rows: int,
        answers_only: bool,
        confine: bool,
        exposures: Exposures,
    ) -> None:
        self.facts, self.length, self.rows = facts, length, rows
        self.exposures = exposures
        self.answers_only, self.confine_attention = answers_only, confine
        trained = self._some_facts(0, facts.people, count)
        control = self._some_facts(facts.people, facts.control, count)
        # Person, attribute, phrasing, group; and where each row stands, so that every batch has all groups.
        table, place = [], []
        for group, (fact, phrasings) in enumerate(
            [(trained, facts.held_out), (trained, facts.trained), (control, facts.held_out)]
        ):
            person, attribute = np.divmod(fact, facts.attributes)
            phrasing = phrasings[person, attribute, 0]
            table.append(np.stack([person, attribute, phrasing, np.full_like(fact, group)], axis=1))
            place.append((np.arange(len(fact)) + 0.5) / max(len(fact), 1))
        self.table = np.concatenate(table)[np.argsort(np.concatenate(place), kind="stable")]

    def _some_facts(self, first: int, people: int, count: int | None) -> NDArray[np.int64]:
        order = permutation(people * self.facts.attributes, self.facts.seed, 13, first)
        return first * self.facts.attributes + order[:count]

    def batches(
        self, cursor: Cursor, world: int, rank: int, worker: int = 0, workers: int = 1
    ) -> Iterator[Batch]:
        padding = -len(self.table) % world
        table = np.concatenate([self.table, np.tile([[0, 0, 0, -1]], (padding, 1))])[rank::world]
        eos = self.facts.tokenizer.eos_id
        for start in range(0, len(table), self.rows):
            person, attribute, phrasing, group = table[start : start + self.rows].T
            clause = self.facts.clauses(person, attribute, phrasing)
            sentence = np.concatenate([self.facts.names[person], clause], axis=1, dtype=np.int64)
            tokens = np.full((len(person), self.length), eos)
            tokens[:, 1:] = np.where(sentence == NOTHING, eos, sentence)[:, :-1]
            is_value = self.facts.is_value(sentence)
            counted = is_value if self.answers_only else sentence != NOTHING
            targets = np.where(counted & (group == 0)[:, None], sentence, IGNORED)
            answers = np.where(is_value & (group >= 0)[:, None], sentence, IGNORED)
            batch = as_batch(tokens, targets, eos, self.confine_attention)
            extra = {"answers": answers, "group": group.copy(), **self.exposures.batch(person, group)}
            yield batch | {key: torch.from_numpy(value) for key, value in extra.items()}
