"""Documents out of files: JSON lines, parquet or plain text, compressed by gzip or zstandard or not.

The suffixes of a name are peeled off from the right: ``.gz``, ``.zst`` and ``.zstd`` say how a file is
compressed; then ``.jsonl``, ``.ndjson`` and ``.json`` mean one JSON object on each line, ``.parquet`` means a
table with a column of texts (it is compressed within, so nothing follows this suffix; needs pyarrow), and
anything else is UTF-8 text: one document, or several with a separator between them.

A *record* is a line of JSON, a row of a table, or a document of a text file. What is wrong with one record is
given as a value, so that a caller may skip it; what is wrong with a file (it is missing, cannot be
decompressed or ends too early) is always raised, after the records before the fault, since nobody knows how
much was lost. An empty document is a record like others: what it means is the caller's to say.

A *piece* is a part of a file that can be read alone: a range of bytes of an uncompressed file of JSON lines,
a range of row groups of a parquet file. Every record is in exactly one piece. Memory depends on the longest
record, not on the file.
"""

import glob
import hashlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_modules.file_bytes import (
    COMPRESSED,
    Progress,
    contents,
    file_errors,
    file_size,
    newlines_before,
    range_contents,
)
from data_modules.json_lines import Record, read_json_lines
from data_modules.parquet import read_rows, row_group_bytes, rows_before
from memlm.errors import DataError

JSON_LINES = {".jsonl", ".ndjson", ".json"}
PARQUET = ".parquet"
KNOWN = "*.jsonl, *.ndjson, *.json, *.txt (or these with .gz, .zst, .zstd) or *.parquet"


@dataclass(frozen=True)
class Piece:
    """A part of a file that can be read alone.

    Args:
        path: The file.
        start: Its first byte in a file of JSON lines, its first row group in a parquet file, else 0.
        stop: The byte or row group behind its last one; None for the end of the file.
    """

    path: Path
    start: int = 0
    stop: int | None = None


def find_files(patterns: list[str], key: str) -> list[Path]:
    """The files that paths, glob patterns and directories name, sorted and each once.

    Args:
        patterns: Paths; patterns with ``*``, ``?``, ``[...]`` and ``**`` (any number of directories); or
            directories, which stand for all files below them with a known suffix (``.jsonl``, ``.ndjson``,
            ``.json`` and ``.txt``, compressed or not, and ``.parquet``) except hidden ones.
        key: The YAML key they came from, for messages.

    Raises:
        DataError: A pattern or directory has no file, or a directory cannot be read.
    """
    files: set[Path] = set()
    for pattern in patterns:
        path = Path(pattern).expanduser()
        with file_errors(path):
            if path.is_dir():
                matches, fault = set(_files_below(path)), f"is a directory without a file named {KNOWN}"
            else:
                found = [path] if path.exists() else map(Path, glob.glob(str(path), recursive=True))
                matches, fault = {file for file in found if not file.is_dir()}, "matches no file"
        if not matches:
            raise DataError(pattern, f"{key}: {fault}")
        files |= matches
    if not files:
        raise DataError("[]", f"{key}: names no file")
    # The same file may have been reached by two names.
    return sorted({os.path.realpath(file): file for file in sorted(files, reverse=True)}.values())


def read_records(
    path: Path,
    text_key: str,
    start: int = 0,
    separator: str | None = None,
    every: int = 1,
    offset: int = 0,
) -> Iterator[Record]:
    """The records of a file, or a regular share of them, in their order.

    Args:
        path: The file.
        text_key: Where a JSON object holds its text, or the column of a table.
        start: Number of the first record wanted. Those before are read past without being parsed.
        separator: What stands between the documents of a text file; None if it is one document.
        every: Only each ``every``-th record is parsed and given: those whose number leaves ``offset`` when
            divided by it.
        offset: 0 .. every - 1.

    Raises:
        DataError: The file cannot be read to its end.
    """
    first, kind = start + (offset - start) % every, _content_suffix(path)
    if kind in JSON_LINES:
        yield from read_json_lines(contents(path), path, text_key, first, every, lambda number: number + 1)
    elif kind == PARQUET:
        yield from read_rows(path, text_key, first, every)
    else:
        yield from _text_records(path, separator, first, every, None)


def split_file(path: Path, size: int) -> list[Piece]:
    """A file's pieces in order, at least one: of ``size`` bytes or a little less where its format allows.

    Raises:
        DataError: The file cannot be read.
    """
    if _is_range(path):
        whole = file_size(path)
        count = max(-(-whole // size), 1)
        bounds = [i * whole // count for i in range(count + 1)]
    elif _content_suffix(path) == PARQUET:
        bounds, held = [0], 0
        sizes = row_group_bytes(path)
        for group, more in enumerate(sizes):
            if held and held + more > size:
                bounds.append(group)
                held = 0
            held += more
        bounds.append(len(sizes))
    else:
        return [Piece(path)]
    return [Piece(path, start, stop) for start, stop in itertools.pairwise(bounds)]


def read_piece(
    piece: Piece, text_key: str, separator: str | None = None, progress: Progress | None = None
) -> Iterator[Record]:
    """The records of a piece, numbered from 0 within it.

    Errors that are raised name the line of the file; malformed records do not, as finding the line means to
    read the file up to it: see `placed`.

    Args:
        piece: The part of a file. A line of JSON belongs to the piece in which its first byte lies.
        text_key: Where a JSON object holds its text, or the column of a table.
        separator: What stands between the documents of a text file; None if it is one document.
        progress: Told now and then how many more bytes of the file were consumed; ``piece_bytes`` in all.

    Raises:
        DataError: The piece cannot be read to its end.
    """
    path, kind = piece.path, _content_suffix(piece.path)
    if kind in JSON_LINES:
        if piece.start == 0 and piece.stop is None:
            chunks = contents(path, progress)
        else:
            stop = file_size(path) if piece.stop is None else piece.stop
            chunks = range_contents(path, piece.start, stop, progress)

        def line_of(number: int) -> int:
            return _first_line(piece) + number

        yield from read_json_lines(chunks, path, text_key, 0, 1, line_of, place=False)
    elif kind == PARQUET:
        yield from read_rows(path, text_key, groups=(piece.start, piece.stop), progress=progress)
    else:
        yield from _text_records(path, separator, 0, 1, progress)


def placed(piece: Piece, number: int, fault: DataError, exact: bool = True) -> DataError:
    """A malformed record of `read_piece` with its place, see `record_error`."""
    if _content_suffix(piece.path) not in JSON_LINES:
        return fault  # has it already
    return record_error(piece, number, fault.message, exact)


def record_error(piece: Piece, number: int, message: str, exact: bool = True) -> DataError:
    """What a caller finds wrong with a record, with its place in the file.

    Args:
        piece: The piece that it is in; ``Piece(path)`` for a record of ``read_records``.
        number: The record's number.
        message: What was found and what was expected, e.g. ``is an empty document``.
        exact: Whether to find the line of the file, for which it is read up to there.
    """
    kind = _content_suffix(piece.path)
    if kind in JSON_LINES and piece.start and not exact:
        return DataError(
            piece.path, f"record {number} (from 0) of the part that begins at byte {piece.start:,} {message}"
        )
    if kind in JSON_LINES:
        return DataError(piece.path, message, _first_line(piece) + number)
    if kind == PARQUET:
        number += rows_before(piece.path, piece.start)
        return DataError(piece.path, f"row {number} (from 0) {message}")
    return DataError(piece.path, f"document {number} (from 0) {message}")


def piece_bytes(piece: Piece) -> int:
    """Bytes of the file, as it lies on the disk, that a piece covers; those of its pieces add up to it.

    Raises:
        DataError: The file cannot be read.
    """
    if _content_suffix(piece.path) == PARQUET and (piece.start or piece.stop is not None):
        return sum(row_group_bytes(piece.path)[piece.start : piece.stop])
    return (file_size(piece.path) if piece.stop is None else piece.stop) - piece.start


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


def is_held_out(text: str, fraction: float, seed: int) -> bool:
    """Whether a document is one of those held out from training.

    The choice depends on the text alone, so that copies of it are on the same side wherever they lie.

    Args:
        text: The document.
        fraction: Share of different documents to hold out, 0 .. 1.
        seed: Makes another choice.
    """
    if fraction == 0:
        return False
    digest = hashlib.blake2b(f"{seed}:{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def _content_suffix(path: Path) -> str:
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return name.suffix.lower()


def _first_line(piece: Piece) -> int:
    # The newline that ends the line before is at start - 1 or later.
    return newlines_before(piece.path, piece.start - 1) + 2 if piece.start else 1


def _is_range(path: Path) -> bool:
    return path.suffix.lower() in JSON_LINES


def _files_below(folder: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise DataError(error.filename or folder, f"cannot be read ({error.strerror})") from None

    # Links to directories are followed: data sets are often spread over disks by them.
    seen = set()
    for here, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            path = Path(here, name)
            known = _content_suffix(path) in JSON_LINES | {".txt"} or path.suffix.lower() == PARQUET
            if known and not name.startswith("."):
                yield path


def _text_records(
    path: Path, separator: str | None, first: int, every: int, progress: Progress | None
) -> Iterator[Record]:
    if separator is None and first > 0:
        return  # the only record is not wanted
    line, place = 1, 0
    for number, content, ended in _split(contents(path, progress), separator):
        if number == first:
            first += every
            try:
                text: str | DataError | None = content.decode()
            except UnicodeDecodeError as error:
                message = f"is not valid UTF-8 text ({error.reason} at byte {place + error.start})"
                text = DataError(path, message, line + content.count(b"\n", 0, error.start))
            if ended and number and not content.strip():
                text = None  # a separator may end the last document, too
            yield number, text
        if separator is not None:
            line += content.count(b"\n") + separator.count("\n")
            place += len(content) + len(separator.encode())


def _split(chunks: Iterator[bytes], separator: str | None) -> Iterator[tuple[int, bytes, bool]]:
    """Each document's number and bytes, and whether it is the last one."""
    # No byte within a character of UTF-8 begins another one: bytes can be split like text.
    mark = None if separator is None else separator.encode()
    number, rest, searched = 0, bytearray(), 0
    for chunk in chunks:
        rest += chunk
        if mark is None:
            continue
        begin = 0
        while (end := rest.find(mark, max(begin, searched))) >= 0:
            yield number, bytes(rest[begin:end]), False
            number, begin = number + 1, end + len(mark)
        del rest[:begin]
        searched = max(len(rest) - len(mark) + 1, 0)
    yield number, bytes(rest), True
