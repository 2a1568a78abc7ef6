"""The documents of many files as one stream of tokens with a position."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from data_modules.hashed_random import permutation
from data_modules.packing import Position, Tokens
from data_modules.readers import Piece, is_held_out, read_records, record_error
from memlm.errors import DataError
from memlm.tokenizers import Tokenizer

ENCODED_AT_ONCE = 1 << 18
"""Characters of the documents that are tokenized together; more only where one document is longer."""
ENCODED_FIRST = 1 << 14
"""The same for the first documents after a position; it doubles from there, so that a stream begins soon."""

COUNTED = ("skipped", "empty", "unreadable")
"""What a position counts besides its place."""


@dataclass(frozen=True)
class Skip:
    """What is passed over and counted instead of being an error.

    Args:
        malformed: Records that are not valid UTF-8 or JSON or lack the text.
        empty: Documents of nothing but white space.
        unreadable: What follows a fault in a file: one that ends too early, vanished, or cannot be read.
    """

    malformed: bool = False
    empty: bool = False
    unreadable: bool = False


@dataclass
class Documents:
    """The documents of some files, as tokens.

    They are dealt to a number of lanes: record r of file f belongs to lane (r + f) mod lanes. A lane reads
    past the records of the others, and tokenizes its own alone.

    Args:
        files: Each file and the key of the text in its records, in the order they are read in.
        name: What to call all of them in messages.
        separator: What stands between the documents of a text file; None if it is one document.
        tokenizer: Makes tokens of the text.
        skip: What is counted instead of raised.
        held_out: Share of the documents that are held out, chosen by a hash of their text, so that copies of
            one text are on the same side.
        only_held_out: Whether these documents are the ones held out, or the others.
        seed: Chooses which documents are held out, and the order of shuffled files.
        shuffle: Whether each epoch has its own order of the files.
    """

    files: list[tuple[Path, str]]
    name: str
    separator: str | None
    tokenizer: Tokenizer
    skip: Skip
    held_out: float
    only_held_out: bool
    seed: int
    shuffle: bool = False

    @staticmethod
    def start() -> Position:
        """The position of the first document."""
        return dict.fromkeys(["epoch", "file", "record", "token", *COUNTED], 0)

    def read(
        self, start: Position, endless: bool, least: int, lane: int = 0, lanes: int = 1
    ) -> Iterator[tuple[Position, Tokens]]:
        """Documents of a lane from a position on, over and over if ``endless``.

        A position holds the numbers of the epoch, file (in the epoch's order) and record (line of JSON, row
        of Parquet, or document of a text file) and the offset in the record's tokens, and how many records
        were skipped as malformed and dropped as empty, and files found unreadable, before it. Only records
        behind a position are parsed and tokenized. A file's fault is counted in one of the lanes.

        Args:
            start: The first document's position.
            endless: Whether to begin again at the end of the last file.
            least: Tokens that a whole epoch of the lane must have.
            lane: Which lane to read.
            lanes: Their number.

        Yields:
            A document's position and its tokens from the offset on, after one end-of-document token.

        Raises:
            DataError: A file or record cannot be read, or the files hold fewer than ``least`` tokens.
        """
        at = dict(start)
        whole = not (at["file"] or at["record"] or at["token"])
        while True:
            total = 0
            for position, tokens in self._encoded(self._texts(at, lane, lanes)):
                total += len(tokens)
                yield position, tokens[position["token"] :]
            if whole and total < least:
                self._too_little(total, least, lane, lanes)
            if not endless:
                if any(at[name] for name in COUNTED):
                    rank_zero_warn(f"{self.name}: {counts(at)} in validation")
                return
            at |= {"epoch": at["epoch"] + 1, "file": 0}
            whole = True

    def _texts(self, at: Position, lane: int, lanes: int) -> Iterator[tuple[Position, str]]:
        """The lane's documents in the rest of an epoch; moves ``at`` along."""
        order = permutation(len(self.files), self.seed, at["epoch"]) if self.shuffle else None
        for ordinal in range(at["file"], len(self.files)):
            at["file"] = ordinal
            number = ordinal if order is None else int(order[ordinal])
            path, key = self.files[number]
            own = (lane - number) % lanes
            records = read_records(path, key, at["record"], self.separator, lanes, own)
            while True:
                try:
                    record, text = next(records, (-1, None))
                except DataError as error:
                    if not self.skip.unreadable:
                        hint = "data.skip_unreadable: true goes on with the next file"
                        raise error.with_hint(hint) from None
                    if own == 0:
                        at["unreadable"] += 1
                        rank_zero_warn(f"left the rest of a file unread: {error}")
                    break
                if record < 0:
                    break
                if record > at["record"]:
                    at["record"], at["token"] = record, 0
                if isinstance(text, DataError):
                    self._pass_malformed(text, first=at["skipped"] == 0)
                    at["skipped"] += 1
                elif text is not None and (not text or text.isspace()):
                    if not self.skip.empty:
                        hint = "data.skip_empty: true drops and counts such documents"
                        raise record_error(Piece(path), record, f"is an empty document; {hint}")
                    if at["empty"] == 0:
                        first = record_error(Piece(path), record, "is an empty document")
                        rank_zero_warn(f"dropped a document, and will count further ones: {first}")
                    at["empty"] += 1
                elif text is not None and self._is_wanted(text):
                    yield dict(at), text
            at["record"] = at["token"] = 0

    def _encoded(self, texts: Iterator[tuple[Position, str]]) -> Iterator[tuple[Position, Tokens]]:
        """Tokenizes many documents at a time. Those before a fault are given before it is raised."""
        waiting: list[tuple[Position, str]] = []
        size, limit = 0, ENCODED_FIRST
        ended, fault = False, None
        while not ended:
            try:
                waiting.append(item := next(texts))
                size += len(item[1])
            except StopIteration:
                ended = True
            except DataError as error:
                ended, fault = True, error
            if size >= limit or ended:
                encoded = self.tokenizer.encode_batch([text for _, text in waiting])
                for (position, _), ids in zip(waiting, encoded, strict=True):
                    tokens = np.empty(len(ids) + 1, np.int32)
                    tokens[0], tokens[1:] = self.tokenizer.eos_id, ids
                    yield position, tokens
                waiting, size, limit = [], 0, min(2 * limit, ENCODED_AT_ONCE)
        if fault is not None:
            raise fault

    def _is_wanted(self, text: str) -> bool:
        return self.held_out == 0 or is_held_out(text, self.held_out, self.seed) == self.only_held_out

    def _pass_malformed(self, error: DataError, first: bool) -> None:
        if not self.skip.malformed:
            raise error.with_hint("data.skip_malformed: true skips and counts such records")
        if first:
            rank_zero_warn(f"skipped a malformed record, and will count further ones: {error}")

    def _too_little(self, total: int, least: int, lane: int, lanes: int) -> None:
        if self.only_held_out:
            message = (
                f"no document is held out by data.validation_fraction {self.held_out}; raise it, set it to "
                "0, set data.validation_paths, or split text files by data.document_separator"
            )
        elif total == 0:
            message = "no document to train on; all are empty" + (" or held out" if self.held_out else "")
        else:
            message = f"{total} tokens in all, but data.sequence_length + 1 are {least}; shorten it or use "
            message += "packing: documents"
        if lanes > 1:
            message = f"in lane {lane} of data.lanes {lanes}: {message}, or use fewer lanes"
        raise DataError(self.name, message)


def counts(position: Position) -> str:
    """What a position counts, in words."""
    return (
        f"{position['skipped']} malformed records skipped, {position['empty']} empty documents dropped, "
        f"{position['unreadable']} files unreadable"
    )
