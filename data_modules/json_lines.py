"""Lines of bytes, and the text in a line of JSON."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from memlm.errors import DataError

Record = tuple[int, str | DataError | None]
"""A record's number, from 0, and its text, or what is wrong with it, or None for a blank line."""


def read_lines(
    chunks: Iterator[bytes], path: Path, first: int, every: int, line_of: Callable[[int], int]
) -> Iterator[tuple[int, bytes]]:
    """Lines first, first + every, ... without their ends, each with its number.

    Args:
        chunks: The lines' bytes, cut anywhere.
        path: The file, for messages.
        first: Number of the first line wanted, from 0.
        every: Distance of the lines wanted.
        line_of: Gives the line of the file, from 1, that has a number.

    Raises:
        DataError: What ``chunks`` raises, with the line that could not be read.
    """
    number, rest = 0, [b""]
    try:
        for chunk in chunks:
            lines = chunk.split(b"\n")
            rest.append(lines[0])
            if len(lines) == 1:
                continue
            end = number + len(lines) - 1
            if first < end:
                # A line may be as large as memory allows once: only who asked for it holds it.
                lines[0], rest = b"".join(rest), []
                wanted, lines = lines[first - number : -1 : every][::-1], lines[-1:]
                while wanted:
                    yield first, wanted.pop()
                    first += every
            number, rest = end, lines[-1:]
    except DataError as error:
        if error.line is None and path.is_file():
            raise DataError(path, error.message, line_of(number)) from None
        raise
    if first == number and any(rest):
        yield number, b"".join(rest)


def read_json_lines(
    chunks: Iterator[bytes],
    path: Path,
    text_key: str,
    first: int,
    every: int,
    line_of: Callable[[int], int],
    place: bool = True,
) -> Iterator[Record]:
    """The texts of lines first, first + every, ..., with the arguments of ``read_lines``.

    Args:
        place: Whether to give malformed records with their line of the file.
    """
    for number, line in read_lines(chunks, path, first, every, line_of):
        try:
            record: str | DataError | None = _text(line, text_key)
        except _Malformed as fault:
            record = DataError(path, str(fault), line_of(number) if place else None)
        held = [record]
        del line, record
        yield number, held.pop()


class _Malformed(Exception):
    """What is wrong with a line."""


def _text(line: bytes, text_key: str) -> str | None:
    if not line or line.isspace():
        return None
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise _Malformed(f"is not valid UTF-8 ({error.reason} at byte {error.start} of the line)") from None
    except (ValueError, RecursionError) as error:
        # Not str(error), whose "line 1" is that within the line.
        reason: object = error
        if isinstance(error, json.JSONDecodeError):
            reason = f"{error.msg.removesuffix(' at')} at column {error.colno}"
        raise _Malformed(f"is not valid JSON ({reason}); expected one JSON object on each line") from None
    if not isinstance(record, dict):
        raise _Malformed(f"holds a JSON {_name(record)}; expected an object with key {text_key!r}")
    if text_key not in record:
        keys = ", ".join(map(repr, list(record)[:8])) or "no keys"
        raise _Malformed(f"has no key {text_key!r} (option text_key); it has {keys}")
    text = record[text_key]
    if not isinstance(text, str):
        raise _Malformed(f"{text_key!r} is a {_name(text)}; expected a string (option text_key)")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise _Malformed(f"{text_key!r} holds half a surrogate pair, which is no text") from None
    return text


def _name(value: object) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
