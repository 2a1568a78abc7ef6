"""Training on the user's own text files, read as a stream that any position can be resumed in."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from data_modules.base import Batch, Cursor, LanguageDataModule
from data_modules.documents import Documents
from data_modules.packing import Packing, Position, Tokens, batch_of_rows, concatenate, one_document_a_row
from data_modules.readers import find_files
from memlm.errors import ConfigError
from memlm.tokenizers import load_tokenizer

Item = TypeVar("Item")


@dataclass
class TextRows:
    """Batches of a stream of documents, endless for training, in one pass for evaluation.

    Args:
        documents: Where the rows come from.
        endless: Whether this is a training stream.
        length: Tokens in a row (T).
        batch_size: Rows of a batch (B).
        packing: How documents become rows.
        confine_attention: Whether to number the documents of a row.
    """

    documents: Documents
    endless: bool
    length: int
    batch_size: int
    packing: Packing
    confine_attention: bool
    _one_pass: dict[tuple[int, int], "_Replayed[Tokens]"] = field(default_factory=dict)

    def batches(self, cursor: Cursor, world: int, rank: int) -> Iterator[Batch]:
        assert isinstance(cursor, dict)
        if self.endless:
            yield from self._training_batches(cursor, world, rank)
            return
        key = (world, rank)
        if key not in self._one_pass:
            self._one_pass[key] = _Replayed(self._evaluation_rows(cursor, world, rank))
        rows: list[Tokens] = []
        for row in self._one_pass[key]:
            rows.append(row)
            if len(rows) == self.batch_size:
                yield self._batch(rows)
                rows = []
        if rows:
            yield self._batch(rows)

    def _training_batches(self, cursor: Position, world: int, rank: int) -> Iterator[Batch]:
        rows: list[Tokens] = []
        for number, (row, after) in enumerate(self._rows(cursor)):
            place = number % (self.batch_size * world)
            if place % world == rank:
                rows.append(row)
            if place == self.batch_size * world - 1:
                yield self._batch(rows) | {"cursor": after}
                rows = []

    def _evaluation_rows(self, cursor: Position, world: int, rank: int) -> Iterator[Tokens]:
        """This rank's rows; ranks beyond the last row get an empty one, so that all have equally many."""
        own: Tokens | None = None
        number = -1
        for number, (row, _) in enumerate(self._rows(cursor)):
            if number % world == rank:
                own = row
            if number % world == world - 1 and own is not None:
                yield own
                own = None
        if (number + 1) % world:
            yield np.empty(0, np.int32) if own is None else own

    def _rows(self, cursor: Position) -> Iterator[tuple[Tokens, Position]]:
        eos = self.documents.tokenizer.eos_id
        least = self.length + 1 if self.endless and self.packing == "concatenate" else 1
        documents = self.documents.read(cursor, self.endless, least)
        if self.packing == "documents":
            return one_document_a_row(documents, self.length, eos)
        return concatenate(documents if self.endless else _closed(documents, eos), self.length)

    def _batch(self, rows: list[Tokens]) -> Batch:
        return batch_of_rows(rows, self.length, self.documents.tokenizer.eos_id, self.confine_attention)


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


class TextStream(LanguageDataModule):
    """Text files: JSON lines (.jsonl, .ndjson, .json) or plain text (anything else).

    Files may be compressed (.gz, .zst, .zstd). They are read in the order of their sorted paths, again and
    again; documents are not shuffled. Blank lines of JSON files are passed over; documents without anything
    but white space are dropped and counted. Every rank reads and tokenizes everything and keeps its share of
    the rows. What validation reads is kept in memory (4 bytes a token); ``trainer.limit_val_batches`` bounds
    it.

    Args:
        paths: Files to train on: paths or patterns such as 'my/*.jsonl.zst' ('**' for any directories).
        tokenizer: 'bytes', or the path of a Hugging Face tokenizer.json.
        text_key: Key of the text in a JSON object.
        document_separator: What stands between the documents of a plain text file, such as '<|endoftext|>'
            or a blank line. By default a file is one document.
        sequence_length: Tokens in a row.
        batch_size: Sequences per step on each device.
        packing: 'concatenate' cuts the stream of all documents into rows; 'documents' gives each document
            rows of its own, with padding after its end.
        confine_attention: Whether attention is confined to the documents of a row.
        validation_paths: Files to validate and test on. By default a share of the documents in paths.
        validation_fraction: Share of the documents that are held out for validation and test if there are no
            validation_paths; 0 for no validation. Choose validation_paths for large data: finding the
            documents held out means reading all files once.
        skip_malformed: Whether to skip records that are not valid UTF-8 or JSON or lack the text. They are
            counted and reported. By default they are errors. A file that ends too early always is.
        num_workers: Processes that prepare training batches ahead: 0 (prepare between steps) or 1.
        seed: Chooses the documents that validation_fraction holds out.

    Raises:
        ConfigError: A number is out of range.
        DataError: A file is missing, unreadable or malformed, or there is too little text. (Later, when
            the files are read, but for the tokenizer's.)
    """

    def __init__(
        self,
        paths: list[str],
        tokenizer: str = "bytes",
        text_key: str = "text",
        document_separator: str | None = None,
        sequence_length: int = 256,
        batch_size: int = 16,
        packing: Packing = "concatenate",
        confine_attention: bool = False,
        validation_paths: list[str] | None = None,
        validation_fraction: float = 0.01,
        skip_malformed: bool = False,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        if not 0 <= validation_fraction < 1:
            raise ConfigError("data.validation_fraction", f"is {validation_fraction}; expected 0 <= it < 1")
        if document_separator == "":
            raise ConfigError("data.document_separator", "is empty; leave it out for one document a file")
        self.document_separator = document_separator
        self.paths, self.validation_paths = paths, validation_paths
        self.held_out = validation_fraction if validation_paths is None else 0.0
        self.text_key, self.packing, self.confine_attention = text_key, packing, confine_attention
        self.skip_malformed, self.seed = skip_malformed, seed
        self._evaluation: TextRows | None = None
        super().__init__(load_tokenizer(tokenizer), sequence_length, batch_size, num_workers)

    @cached_property
    def files(self) -> list[Path]:
        """The files to train on, sorted."""
        return find_files(self.paths, "data.paths")

    @property
    def skipped(self) -> int:
        """Malformed records that were skipped in training so far, over all epochs."""
        assert isinstance(self.cursor, dict)
        return self.cursor["skipped"]

    def start(self) -> Position:
        return dict.fromkeys(["epoch", "file", "record", "token", "skipped", "empty"], 0)

    def fingerprint(self) -> str:
        # Not their directories: a run may be resumed where the same files lie elsewhere.
        files = [(file.name, file.stat().st_size) for file in self.files]
        meaning = [files, self.text_key, self.document_separator, self.held_out, self.seed]
        return hashlib.sha256(json.dumps(meaning).encode()).hexdigest()

    def setup(self, stage: str) -> None:
        """Read a first batch, so that missing, empty or broken files are known before anything is trained."""
        if stage == "fit":
            size = sum(file.stat().st_size for file in self.files)
            rank_zero_info(f"TextStream: {len(self.files):,} files to train on, {size / 1e6:,.1f} MB")
            next(self.training_source().batches(self.start(), *self.world))
        evaluation = self.evaluation_source(test=stage != "fit")
        if evaluation is not None:
            next(evaluation.batches(self.start(), *self.world))  # kept for the validation that reads it

    def advance(self, cursor: Cursor) -> None:
        before = self.cursor
        super().advance(cursor)
        assert isinstance(before, dict) and isinstance(cursor, dict)
        # After 1, 2, 4, 8, ... epochs: a line for each would drown the rest where the files are small.
        if cursor["epoch"].bit_length() > before["epoch"].bit_length():
            rank_zero_info(
                f"TextStream: {cursor['epoch']} epochs read; {cursor['skipped']} malformed records skipped, "
                f"{cursor['empty']} empty documents dropped so far"
            )

    def training_source(self) -> TextRows:
        return self._rows(self._documents(self.files, self.paths, only_held_out=False), endless=True)

    def evaluation_source(self, test: bool) -> TextRows | None:
        if self._evaluation is None:
            if self.validation_paths is not None:
                files = find_files(self.validation_paths, "data.validation_paths")
                documents = self._documents(files, self.validation_paths, only_held_out=False)
            elif self.held_out:
                documents = self._documents(self.files, self.paths, only_held_out=True)
            elif test:
                raise ConfigError(
                    "data.validation_paths", "is not set and data.validation_fraction is 0: no test"
                )
            else:
                return None
            self._evaluation = self._rows(documents, endless=False)
        return self._evaluation

    def _documents(self, files: list[Path], patterns: list[str], only_held_out: bool) -> Documents:
        return Documents(
            files,
            ", ".join(patterns),
            self.text_key,
            self.document_separator,
            self.tokenizer,
            self.skip_malformed,
            self.held_out,
            only_held_out,
            self.seed,
        )

    def _rows(self, documents: Documents, endless: bool) -> TextRows:
        return TextRows(
            documents, endless, self.sequence_length, self.batch_size, self.packing, self.confine_attention
        )
