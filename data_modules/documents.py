"""The documents of many files as one stream of tokens with a position."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from data_modules.packing import Position, Tokens
from data_modules.readers import Record, read_records
from memlm.errors import DataError
from memlm.tokenizers import Tokenizer


@dataclass
class Documents:
    """The documents of some files, as tokens.

    Args:
        files: In the order they are read in.
        name: What to call all of them in messages.
        text_key: Where a JSON object holds its text.
        separator: What stands between the documents of a text file; None if it is one document.
        tokenizer: Makes tokens of the text.
        skip_malformed: Whether to count malformed records instead of raising.
        held_out: Share of the documents that are held out, chosen by a hash of their text, so that copies of
            one text are on the same side.
        only_held_out: Whether these documents are the ones held out, or the others.
        seed: Chooses which documents are held out.
    """

    files: list[Path]
    name: str
    text_key: str
    separator: str | None
    tokenizer: Tokenizer
    skip_malformed: bool
    held_out: float
    only_held_out: bool
    seed: int

    def read(self, start: Position, endless: bool, least: int) -> Iterator[tuple[Position, Tokens]]:
        """Documents from a position on, over and over if ``endless``.

        A position holds the numbers of the epoch, file and record (line of JSON, or document of a text
        file) and the offset in the record's tokens, and how many records were skipped as malformed and
        dropped as empty before it. Only the records behind a position are tokenized.

        Args:
            start: The first document's position.
            endless: Whether to begin again at the end of the last file.
            least: Tokens that a whole epoch must have.

        Yields:
            A document's position and its tokens from the offset on, after one end-of-document token.

        Raises:
            DataError: A file or record cannot be read, or the files hold fewer than ``least`` tokens.
        """
        at = dict(start)
        whole, total = not (at["file"] or at["record"] or at["token"]), 0
        while True:
            for number in range(at["file"], len(self.files)):
                at["file"] = number
                for record, text in self._records(self.files[number], at["record"]):
                    if record > at["record"]:
                        at["record"], at["token"] = record, 0
                    if isinstance(text, DataError):
                        self._skip(text, first=at["skipped"] == 0)
                        at["skipped"] += 1
                    elif text is not None and not text.strip():
                        at["empty"] += 1
                    elif text is not None and self._is_wanted(text):
                        tokens = np.array([self.tokenizer.eos_id, *self.tokenizer.encode(text)], np.int32)
                        total += len(tokens)
                        yield dict(at), tokens[at["token"] :]
                at["record"] = at["token"] = 0
            if whole and total < least:
                self._too_little(total, least)
            if not endless:
                if at["skipped"]:
                    rank_zero_warn(f"{self.name}: {at['skipped']} malformed records skipped in validation")
                return
            at |= {"epoch": at["epoch"] + 1, "file": 0}
            whole, total = True, 0

    def _records(self, path: Path, start: int) -> Iterator[Record]:
        return read_records(path, self.text_key, start, self.separator)

    def _is_wanted(self, text: str) -> bool:
        if self.held_out == 0:
            return True
        digest = hashlib.blake2b(f"{self.seed}:{text}".encode(), digest_size=8).digest()
        return (int.from_bytes(digest, "big") < self.held_out * 2**64) == self.only_held_out

    def _skip(self, error: DataError, first: bool) -> None:
        if not self.skip_malformed:
            hint = "; data.skip_malformed: true skips and counts such records"
            raise DataError(
                error.path, str(error).removeprefix(f"{error.path}:{error.line}: ") + hint, error.line
            )
        if first:
            rank_zero_warn(f"skipped a malformed record, and will count further ones: {error}")

    def _too_little(self, total: int, least: int) -> None:
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
        raise DataError(self.name, message)
