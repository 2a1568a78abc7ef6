"""JSON lines that are written as they come, and have their name only when they are whole."""

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from memlm.errors import DataError
from memlm.usage_errors import UsageError

_LINE_ENDS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}
"""Characters that some readers take for the end of a line."""


def json_line(value: Any) -> str:
    """A value as JSON on one line without its end, text as it is."""
    return json.dumps(value, ensure_ascii=False).translate(_LINE_ENDS)


class JsonLinesFile:
    """A file of JSON lines that another name holds until it is whole.

    What was written is kept under that name, ``<path>.partial``, if the end is never reached.

    Args:
        path: The file to make.

    Raises:
        UsageError: The file is there already, or an unfinished one, or its folder is not.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = path.with_name(f"{path.name}.partial")
        self.lines = 0
        if not path.parent.is_dir():
            raise UsageError(f"--output: {path.parent} is not a folder")
        if path.exists():
            raise UsageError(f"--output: {path} exists already; expected a new name")
        try:
            self._file = self.partial.open("x", encoding="utf-8")
        except FileExistsError:
            raise UsageError(
                f"--output: {self.partial} exists already: the answers of a command that was interrupted or "
                "is still running. Remove it or take another name"
            ) from None

    def write(self, records: Iterable[dict[str, Any]]) -> None:
        """Add records; they are in the file when this returns."""
        for record in records:
            self._file.write(json_line(record) + "\n")
            self.lines += 1
        self._file.flush()

    def finish(self) -> None:
        """Give the file its name.

        Raises:
            DataError: Another process has made a file of that name meanwhile.
        """
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if self.path.exists():
            raise DataError(self.path, f"was made meanwhile; the answers are in {self.partial}")
        os.rename(self.partial, self.path)

    def abandon(self) -> None:
        """Close the file before its end, and say where the answers so far are; none leave no file."""
        self._file.close()
        if self.lines:
            print(f"memlm: not finished; {self.lines:,} answers are in {self.partial}", file=sys.stderr)
        else:
            self.partial.unlink(missing_ok=True)
