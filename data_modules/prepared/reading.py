"""The documents of one unit, with what is wrong with its records and files counted or raised."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from data_modules.prepared.plan import Options, State, file_state
from data_modules.readers import Piece, Record, placed, read_piece, record_error
from memlm.errors import DataError

NOTES = 3
"""Skipped records of a unit that are named; the others are only counted."""


@dataclass(frozen=True)
class Faults:
    """Which faults are skipped and counted instead of ending the preparation."""

    skip_malformed: bool = False
    skip_empty: bool = False
    skip_unreadable: bool = False


@dataclass
class UnitReader:
    """Reads the documents of a unit once.

    Args:
        pieces: The unit.
        states: Size and time of change that the files must have before and after.
        options: Say where the text is.
        faults: Say what is skipped.
        progress: Told of bytes of the files consumed.

    Attributes:
        skipped: Number of records skipped so far as ``malformed`` or ``empty``.
        notes: The first few of those, each as a message.
        unreadable: Files whose end could not be read so far, with ``file`` and ``message``.
    """

    pieces: list[Piece]
    states: dict[Path, State]
    options: Options
    faults: Faults
    progress: Callable[[int], object]
    skipped: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    unreadable: list[dict[str, str]] = field(default_factory=list)

    def texts(self) -> Iterator[str]:
        """The documents in order, those that are skipped left out.

        Raises:
            DataError: A record or file has a fault that is not skipped, or a file vanished or was changed.
        """
        for piece in self.pieces:
            for number, text in self._records(piece):
                if isinstance(text, DataError):
                    self._skip("malformed", piece, number, text)
                elif text is not None and (not text or text.isspace()):
                    self._skip("empty", piece, number, None)
                elif text is not None:
                    held = [text]
                    del text  # not held here while it is worked on: it may be long
                    yield held.pop()

    def _records(self, piece: Piece) -> Iterator[Record]:
        self._check_unchanged(piece.path)
        try:
            yield from read_piece(
                piece, self.options.text_key, self.options.document_separator, self.progress
            )
        except DataError as error:
            self._check_unchanged(piece.path)
            if not self.faults.skip_unreadable:
                hint = "--skip_unreadable true keeps what is before the fault and lists the file"
                raise error.with_hint(hint) from None
            self.unreadable.append({"file": str(piece.path), "message": error.message})
            self.notes.insert(0, f"left out the rest of a file: {error}")
            return
        self._check_unchanged(piece.path)

    def _skip(
        self, kind: Literal["malformed", "empty"], piece: Piece, number: int, fault: DataError | None
    ) -> None:
        ends = not getattr(self.faults, f"skip_{kind}")
        if ends or self.skipped.total() < NOTES:
            # Finding a line means to read the file up to it: not for what is skipped in each of many parts.
            if fault is None:
                error = record_error(piece, number, "is an empty document", exact=ends)
            else:
                error = placed(piece, number, fault, exact=ends)
            if ends:
                raise error.with_hint(f"--skip_{kind} true skips and counts such records")
            self.notes.append(f"skipped: {error}")
        self.skipped[kind] += 1

    def _check_unchanged(self, path: Path) -> None:
        size, changed = file_state(path)
        expected, _ = self.states[path]
        if (size, changed) == self.states[path]:
            return
        if size < 0:
            raise DataError(path, f"vanished while it was prepared; it had {expected:,} bytes")
        if size != expected:
            raise DataError(path, f"was changed while it was prepared: {size:,} bytes; it had {expected:,}")
        raise DataError(path, "was changed while it was prepared")
