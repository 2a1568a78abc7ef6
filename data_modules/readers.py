"""Documents out of files: JSON lines or plain text, as they are or compressed by gzip or zstandard.

The suffixes of a name are peeled off from the right: ``.gz``, ``.zst`` and ``.zstd`` say how a file is
compressed; then ``.jsonl``, ``.ndjson`` and ``.json`` mean one JSON object on each line, and anything else is
UTF-8 text: one document, or several with a separator between them.

A *record* is a line of JSON, or a document of a text file. What is wrong with one record is given as a
value, so that a caller may skip it; what is wrong with a file (it is missing, cannot be decompressed or ends
too early) is always raised, since nobody knows how much was lost.
"""

import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from memlm.errors import DataError

JSON_LINES = {".jsonl", ".ndjson", ".json"}
COMPRESSED = {".gz", ".zst", ".zstd"}
CHUNK = 1 << 20
"""Bytes read at a time."""

Record = tuple[int, str | DataError | None]
"""A record's number in its file, from 0, and its text, or what is wrong with it, or None for a blank line."""


def find_files(patterns: list[str], key: str) -> list[Path]:
    """The files that paths and glob patterns name, sorted and each once.

    Args:
        patterns: Paths, or patterns with ``*``, ``?``, ``[...]`` and ``**`` (any number of directories).
        key: The YAML key they came from, for messages.

    Raises:
        DataError: A pattern names no file.
    """
    files: set[Path] = set()
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            raise DataError(
                pattern, f"{key}: is a directory; name its files, e.g. '{path / '**' / '*.jsonl'}'"
            )
        found = [path] if path.exists() else map(Path, glob.glob(str(path), recursive=True))
        matches = {file for file in found if not file.is_dir()}
        if not matches:
            raise DataError(pattern, f"{key}: matches no file")
        files |= matches
    if not files:
        raise DataError("[]", f"{key}: names no file")
    return sorted(files)


def read_records(path: Path, text_key: str, start: int = 0, separator: str | None = None) -> Iterator[Record]:
    """The records of a file in their order. A text file is read into memory whole.

    Args:
        path: The file.
        text_key: Where a JSON object holds its text.
        separator: What stands between the documents of a text file; None if it is one document.
        start: Number of the first record wanted. Those before are read past without being parsed.

    Raises:
        DataError: The file cannot be read to its end.
    """
    if _content_suffix(path) not in JSON_LINES:
        text = _decode(b"".join(_chunks(path)), path)
        parts = text.split(separator) if separator is not None and isinstance(text, str) else [text]
        yield from list(enumerate(parts))[start:]
        return
    for number, line in enumerate(_lines(path)):
        if number >= start:
            yield number, _parse(line, text_key, path, number + 1)


def read_documents(files: list[Path], text_key: str) -> Iterator[str]:
    """The texts of all files.

    Raises:
        DataError: Anything is wrong with a file or a record.
    """
    for path in files:
        for _, text in read_records(path, text_key):
            if isinstance(text, DataError):
                raise text
            if text is not None:
                yield text


def _content_suffix(path: Path) -> str:
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return name.suffix.lower()


def _parse(line: bytes, text_key: str, path: Path, number: int) -> str | DataError | None:
    if not line.strip():
        return None
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return DataError(
            path, f"is not valid UTF-8 ({error.reason} at byte {error.start} of the line)", number
        )
    except (ValueError, RecursionError) as error:
        # Not str(error), whose "line 1" is that within the line.
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        return DataError(path, f"is not valid JSON ({reason}); expected one JSON object on each line", number)
    if not isinstance(record, dict):
        return DataError(
            path, f"holds a JSON {_name(record)}; expected an object with key {text_key!r}", number
        )
    if text_key not in record:
        keys = ", ".join(map(repr, list(record)[:8])) or "no keys"
        return DataError(path, f"has no key {text_key!r} (data.text_key); it has {keys}", number)
    text = record[text_key]
    if not isinstance(text, str):
        return DataError(path, f"{text_key!r} is a {_name(text)}; expected a string (data.text_key)", number)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return DataError(path, f"{text_key!r} holds half a surrogate pair, which is no text", number)
    return text


def _name(value: object) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _decode(content: bytes, path: Path) -> str | DataError:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return DataError(path, f"is not valid UTF-8 text ({error.reason} at byte {error.start})", line)


def _lines(path: Path) -> Iterator[bytes]:
    """Lines without their ends. What goes wrong on the way names the line that could not be read."""
    number, rest = 1, [b""]
    try:
        for chunk in _chunks(path):
            head, *tail = chunk.split(b"\n")
            rest.append(head)
            for line in tail:
                yield b"".join(rest)
                number += 1
                rest = [line]
    except DataError as error:
        if error.line is None:
            raise DataError(path, str(error).removeprefix(f"{path}: "), number) from None
        raise
    if any(rest):
        yield b"".join(rest)


def _chunks(path: Path) -> Iterator[bytes]:
    """The decompressed content of a file, without a byte order mark."""
    suffix = path.suffix.lower()
    try:
        with open(path, "rb") as file:
            if suffix in COMPRESSED and os.fstat(file.fileno()).st_size == 0:
                raise EOFError
            if suffix == ".gz":
                chunks = _gzip_chunks(file)
            elif suffix in COMPRESSED:
                chunks = _zstd_chunks(file)
            else:
                chunks = iter(lambda: file.read(CHUNK), b"")
            first = next(chunks, b"")
            yield first.removeprefix(b"\xef\xbb\xbf")
            yield from chunks
    except EOFError:
        raise DataError(path, f"is truncated: the {suffix} stream ends before its end mark") from None
    except (gzip.BadGzipFile, zlib.error, _ZstdError) as error:
        raise DataError(path, f"cannot be decompressed as {suffix} ({error})") from None
    except FileNotFoundError:
        raise DataError(path, "no such file") from None
    except OSError as error:
        raise DataError(path, f"cannot be read ({error.strerror or error})") from None


def _gzip_chunks(file: BinaryIO) -> Iterator[bytes]:
    with gzip.open(file) as content:
        yield from iter(lambda: content.read1(CHUNK), b"")  # raises EOFError if cut off, after all before it


class _ZstdError(Exception):
    """What zstandard.ZstdError says; that package is imported only where a file needs it."""


def _zstd_chunks(file: BinaryIO) -> Iterator[bytes]:
    """Frames one after the other. (zstandard's own stream reader ends silently where a file is cut off.)"""
    import zstandard

    frame = None
    while data := file.read(CHUNK // 16):
        while data:
            frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            try:
                content = frame.decompress(data)
            except zstandard.ZstdError as error:
                raise _ZstdError(error) from None
            if content:
                yield content
            data = frame.unused_data if frame.eof else b""
            if frame.eof:
                frame = None
    if frame is not None:
        raise EOFError
