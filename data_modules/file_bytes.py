"""The bytes of a file in chunks: decompressed as its name says, or only the lines of a range of it."""

import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from memlm.errors import DataError

COMPRESSED = {".gz", ".zst", ".zstd"}
CHUNK = 1 << 18
"""Bytes read at a time: they stay in a core's cache until they are split into lines."""
COMPRESSED_CHUNK = 1 << 16
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

Progress = Callable[[int], object]
"""Told now and then how many more bytes of a file, as it lies on the disk, were consumed."""


@contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Says what the operating system says about a file as a DataError."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(path, "no such file") from None
    except OSError as error:
        raise DataError(path, f"cannot be read ({error.strerror or error})") from None


def file_size(path: Path) -> int:
    """Bytes of a file on the disk.

    Raises:
        DataError: There is no such file, or it cannot be asked for.
    """
    with file_errors(path):
        return path.stat().st_size


def contents(path: Path, progress: Progress | None = None) -> Iterator[bytes]:
    """The decompressed content of a file, without a byte order mark.

    Raises:
        DataError: The file cannot be read, or cannot be decompressed to its end. What comes before the fault
            has been yielded then.
    """
    suffix = path.suffix.lower()
    try:
        with file_errors(path), open(path, "rb") as file:
            if suffix in COMPRESSED and os.fstat(file.fileno()).st_size == 0:
                raise EOFError
            if suffix == ".gz":
                chunks = _gzip_chunks(_raw_chunks(file, COMPRESSED_CHUNK, progress))
            elif suffix in COMPRESSED:
                chunks = _zstd_chunks(_raw_chunks(file, COMPRESSED_CHUNK, progress))
            else:
                chunks = _raw_chunks(file, CHUNK, progress)
            yield from _without_mark(chunks)
    except EOFError:
        raise DataError(path, f"is truncated: the {suffix} stream ends before its end mark") from None
    except (zlib.error, _ZstdError) as error:
        raise DataError(path, f"cannot be decompressed as {suffix} ({error})") from None


def range_contents(path: Path, start: int, stop: int, progress: Progress | None = None) -> Iterator[bytes]:
    """The lines of an uncompressed file whose first bytes lie in a range, without the file's byte order mark.

    Args:
        path: The file.
        start: Offset of the range's first byte.
        stop: Offset behind the range's last byte, at most the file's size.
        progress: Told of the bytes within the range alone, so that ranges add up to the file.

    Raises:
        DataError: The file cannot be read, or ends before the range does.
    """
    with file_errors(path), open(path, "rb") as file:
        chunks = _range_chunks(file, path, start, stop, progress)
        yield from chunks if start else _without_mark(chunks)


def newlines_before(path: Path, stop: int) -> int:
    """Newlines among the first ``stop`` bytes of a file."""
    count = 0
    with file_errors(path), open(path, "rb") as file:
        while stop > 0 and (chunk := file.read(min(CHUNK, stop))):
            count += chunk.count(b"\n")
            stop -= len(chunk)
    return count


def _raw_chunks(file: BinaryIO, size: int, progress: Progress | None) -> Iterator[bytes]:
    while chunk := file.read(size):
        if progress is not None:
            progress(len(chunk))
        yield chunk


def _range_chunks(
    file: BinaryIO, path: Path, start: int, stop: int, progress: Progress | None
) -> Iterator[bytes]:
    # The byte before the range tells whether a line starts with the range or before it.
    position = max(start - 1, 0)
    file.seek(position)
    in_line_before, at_line_start = start > 0, True
    while position < stop:
        chunk = file.read(min(CHUNK, stop - position))
        if not chunk:
            raise DataError(path, f"ends at byte {position}; expected {stop}: it was changed while in use")
        before, position = position, position + len(chunk)
        if progress is not None:
            progress(position - max(before, start))
        at_line_start = chunk.endswith(b"\n")
        if in_line_before:
            end = chunk.find(b"\n") + 1
            in_line_before = end == 0
            chunk = chunk[end:] if end else b""
        yield chunk
    if in_line_before or at_line_start:
        return
    while chunk := file.read(CHUNK):
        end = chunk.find(b"\n") + 1
        yield chunk[:end] if end else chunk
        if end:
            return


def _without_mark(chunks: Iterator[bytes]) -> Iterator[bytes]:
    head = b""
    for chunk in chunks:
        head += chunk
        if len(head) >= len(BYTE_ORDER_MARK):
            break
    yield head.removeprefix(BYTE_ORDER_MARK)
    yield from chunks


def _gzip_chunks(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Members one after the other, with zeros as padding between them, at most CHUNK bytes at a time."""
    member, members = None, 0
    for data in blocks:
        while data:
            if member is None:
                data = data.lstrip(b"\0") if members else data
                if not data:
                    break
                member, members = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16), members + 1
            content = member.decompress(data, CHUNK)
            if content:
                yield content
            data = member.unused_data if member.eof else member.unconsumed_tail
            if member.eof:
                member = None
    if member is not None:
        raise EOFError


class _ZstdError(Exception):
    """What zstandard.ZstdError says; that package is imported only where a file needs it."""


def _zstd_chunks(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Frames one after the other. (zstandard's own stream reader ends silently where a file is cut off.)

    All content of the bytes handed in comes back at once, and repetitive content may be ten thousand times as
    long: so many bytes are handed in as lately gave a few chunks.
    """
    import zstandard

    frame, size = None, 1 << 10
    for block in blocks:
        while block:
            data, block = block[:size], block[size:]
            length = 0
            while data:
                frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
                try:
                    content = frame.decompress(data)
                except zstandard.ZstdError as error:
                    raise _ZstdError(error) from None
                length += len(content)
                if content:
                    yield content
                data = frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame = None
            size = min(2 * size, COMPRESSED_CHUNK) if length < 4 * CHUNK else max(size // 2, 1 << 10)
    if frame is not None:
        raise EOFError
