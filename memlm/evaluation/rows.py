"""Rows of a task's file: JSON lines, a JSON document, parquet or CSV, with errors that name row and field."""

import csv
import gzip
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from memlm.errors import DataError, UserError

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")


class Row:
    """One example as it stands in a file.

    Args:
        fields: Its content.
        path: The file.
        line: Its line, from 1, where the file has lines.
        place: What names it where the file has none, such as ``item 3 (from 0)``.
    """

    def __init__(self, fields: Any, path: Path, line: int | None = None, place: str = "") -> None:
        self.path, self.line, self.place = path, line, place
        self.fields: dict[str, Any] = fields
        if not isinstance(fields, dict):
            raise self.fault(f"is a JSON {kind(fields)}; expected an object")

    def fault(self, message: str) -> DataError:
        """The error that something is wrong with this row."""
        return DataError(self.path, f"{self.place} {message}".strip(), self.line)

    def has(self, key: str) -> bool:
        """Whether there is such a field (dotted for one within another) and it is not null."""
        return self._find(key) is not None

    def value(self, key: str, expected: str) -> Any:
        """A field.

        Args:
            key: Its name; dotted for one within another.
            expected: What it should be, for the message.

        Raises:
            DataError: It is missing or null.
        """
        value = self._find(key)
        if value is None:
            names = ", ".join(map(repr, list(self.fields)[:12])) or "no field"
            raise self.fault(f"has no field {key!r}; expected {expected}. It has {names}")
        return value

    def text(self, key: str, empty: bool = False) -> str:
        """A field that is a string, and not empty unless ``empty``."""
        return self._text(self.value(key, "a string"), key, empty)

    def texts(self, key: str, least: int = 1, empty: bool = False) -> list[str]:
        """A field that is a list of strings, at least so many; none of them empty unless ``empty``."""
        values = self.value(key, "a list of strings")
        if not isinstance(values, list):
            raise self.fault(f"field {key!r} is a {kind(values)}; expected a list of strings")
        if len(values) < least:
            raise self.fault(f"field {key!r} has {len(values)} entries; expected at least {least}")
        return [self._text(value, f"{key}[{i}]", empty) for i, value in enumerate(values)]

    def index(self, key: str, count: int) -> int:
        """A field that is a whole number from 0, below ``count``; it may be written as a string."""
        value = self.value(key, f"a number from 0 to {count - 1}")
        try:
            number = int(value)
        except (TypeError, ValueError):
            number = -1
        if isinstance(value, (bool, float)) or not 0 <= number < count:
            raise self.fault(f"field {key!r} is {value!r}; expected a number from 0 to {count - 1}")
        return number

    def _find(self, key: str) -> Any:
        value: Any = self.fields
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def _text(self, value: Any, key: str, empty: bool) -> str:
        if not isinstance(value, str):
            raise self.fault(f"field {key!r} is a {kind(value)}; expected a string")
        if not empty and not value.strip():
            raise self.fault(f"field {key!r} is empty; expected some text")
        return value


def read_rows(path: str | Path, within: str | None = None) -> list[Row]:
    """The rows of a file, told by its suffix: ``.jsonl``, ``.ndjson``, ``.json`` (also with ``.gz`` or
    ``.zst``) or ``.parquet``.

    A ``.json`` file may be a list, an object that holds one, or JSON lines.

    Args:
        path: The file.
        within: Where an object that is the whole file holds its list of rows.

    Raises:
        DataError: The file is missing, malformed or has no rows.
        UserError: It is a parquet file and pyarrow is not installed.
    """
    path = Path(path)
    suffix = _suffix(path)
    if suffix == ".parquet":
        rows = _parquet_rows(path)
    elif suffix in JSON_SUFFIXES:
        text = read_text(path)
        document = _document_rows(path, text, within) if suffix == ".json" else None
        rows = list(_line_rows(path, text)) if document is None else document
    else:
        raise DataError(
            path, f"has suffix {suffix or 'none'!r}; expected {', '.join(JSON_SUFFIXES)} or .parquet"
        )
    if not rows:
        raise DataError(path, "has no examples")
    return rows


def read_table(path: str | Path, columns: Sequence[str]) -> list[Row]:
    """The rows of a CSV file without a header line.

    Args:
        path: The file.
        columns: Names of its columns.

    Raises:
        DataError: The file is missing, has no rows, or one of another number of columns.
    """
    path = Path(path)
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    rows, line = [], 1
    try:
        for cells in reader:
            if cells:
                row = Row(dict(zip(columns, cells, strict=False)), path, line)
                if len(cells) != len(columns):
                    names = ", ".join(columns)
                    raise row.fault(f"has {len(cells)} columns; expected {len(columns)}: {names}")
                rows.append(row)
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(path, f"is not valid CSV ({error})", line) from None
    if not rows:
        raise DataError(path, "has no examples")
    return rows


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, decompressed if its name ends in ``.gz`` or ``.zst``.

    Raises:
        DataError: It is missing, or cannot be decompressed or decoded.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(path, "no such file") from None
    except OSError as error:
        raise DataError(path, f"cannot be read ({error.strerror or error})") from None
    try:
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        elif path.suffix in (".zst", ".zstd"):
            data = _unzstd(data)
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(path, f"is not valid UTF-8 ({error.reason})", line) from None
    except Exception as error:  # what the two libraries raise has no common base
        raise DataError(path, f"cannot be decompressed as {path.suffix} ({error})") from None


def _unzstd(data: bytes) -> bytes:
    import zstandard

    # Frame by frame: one need not tell its size, and zstandard's stream reader takes a frame that is cut off
    # for a whole one.
    parts: list[bytes] = []
    while data or not parts:
        frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        parts.append(frame.decompress(data))
        if not frame.eof:
            raise ValueError("it ends within a frame")
        data = frame.unused_data
    return b"".join(parts)


def kind(value: Any) -> str:
    """What JSON calls a value."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in (".gz", ".zst", ".zstd") else path.suffix


def _line_rows(path: Path, text: str) -> Iterator[Row]:
    # Not splitlines(), which also splits at characters that may stand in a JSON string.
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        try:
            fields = json.loads(content)
        except (ValueError, RecursionError) as error:
            reason = (
                f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            )
            raise DataError(
                path, f"is not valid JSON ({reason}); expected an object on each line", line
            ) from None
        yield Row(fields, path, line)


def _document_rows(path: Path, text: str, within: str | None) -> list[Row] | None:
    """The rows of a file that is one JSON value; None if it rather has one on each line."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return None
        raise DataError(
            path, f"is not valid JSON ({error.msg} at column {error.colno})", error.lineno
        ) from None
    except RecursionError:
        raise DataError(path, "is not valid JSON (nested too deeply)") from None
    if isinstance(content, dict) and within in content:
        content = content[within]
    elif isinstance(content, dict):
        return [Row(content, path, place="item 0")]
    if not isinstance(content, list):
        raise DataError(path, f"is a JSON {kind(content)}; expected a list of examples")
    return [Row(fields, path, place=f"item {i} (from 0)") for i, fields in enumerate(content)]


def _parquet_rows(path: Path) -> list[Row]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        message = "is a parquet file, which needs package pyarrow; run: pip install 'memlm[parquet]'"
        raise UserError(f"{path}: {message}") from None
    try:
        # Not by name: read_table would take a missing file for a path of a file system it does not know.
        with path.open("rb") as file:
            rows = pq.read_table(file).to_pylist()
    except FileNotFoundError:
        raise DataError(path, "no such file") from None
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise DataError(path, f"is damaged, cut off or no parquet file ({reason})") from None
    return [Row(fields, path, place=f"row {i} (from 0)") for i, fields in enumerate(rows)]
