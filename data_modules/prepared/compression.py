"""Shards stored compressed by zstandard, and expanded where they are first used."""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from data_modules.file_bytes import Progress, file_errors
from data_modules.prepared.files import CHUNK, partial, publish, writing
from memlm.errors import DataError

COMPRESSED_SUFFIX = ".zst"
LEVEL = 3


def compress_file(source: Path, target: Path) -> None:
    """Write the compressed form of a file, whole or not at all.

    Raises:
        DataError: It cannot be written.
    """
    import zstandard

    try:
        with writing(target), open(source, "rb") as content, open(partial(target), "wb") as file:
            size = os.fstat(content.fileno()).st_size
            zstandard.ZstdCompressor(level=LEVEL, write_checksum=True).copy_stream(content, file, size=size)
        publish(target)
    finally:
        partial(target).unlink(missing_ok=True)


def stored_size(path: Path) -> int:
    """Bytes that a compressed file says it expands to.

    Raises:
        DataError: It is missing or not compressed.
    """
    import zstandard

    try:
        with file_errors(path), open(path, "rb") as file:
            return zstandard.frame_content_size(file.read(18))
    except zstandard.ZstdError as error:
        raise DataError(path, f"is not compressed by zstandard ({error})") from None


def expanded_checksum(path: Path, progress: Progress | None = None) -> str:
    """SHA-256 (hex) of what a compressed file expands to.

    Raises:
        DataError: It is missing, truncated or broken.
    """
    digest = hashlib.sha256()
    for chunk in _expanded(path):
        digest.update(chunk)
        if progress:
            progress(len(chunk))
    return digest.hexdigest()


def expand_file(source: Path, target: Path, sha256: str) -> None:
    """Expand a file, whole or not at all.

    Args:
        source: The compressed file.
        target: The expanded file; left alone where it exists.
        sha256: Of the expanded content.

    Raises:
        DataError: The compressed file is missing or altered, or the expanded one cannot be written.
    """
    while True:
        with writing(target):
            file = open(partial(target), "ab")  # noqa: SIM115
        with file:
            # The lock goes with the process: what a killed one left is taken over by the next.
            fcntl.flock(file, fcntl.LOCK_EX)
            if target.exists():
                if _is_same(file, partial(target)):
                    partial(target).unlink()
                return
            if not _is_same(file, partial(target)):
                continue  # another process gave up and removed what this one waited for
            try:
                _expand_into(file, source, target, sha256)
            except BaseException:
                partial(target).unlink(missing_ok=True)
                raise
            return


def _expand_into(file: IO[bytes], source: Path, target: Path, sha256: str) -> None:
    digest = hashlib.sha256()
    with writing(target):
        file.truncate(0)
    for chunk in _expanded(source):
        digest.update(chunk)
        with writing(target):
            file.write(chunk)
    if digest.hexdigest() != sha256:
        raise DataError(
            source, f"is altered: it expands to the SHA-256 {digest.hexdigest()}; the manifest says {sha256}"
        )
    with writing(target):
        file.flush()
    publish(target)


def _is_same(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _expanded(path: Path) -> Iterator[bytes]:
    import zstandard

    try:
        with file_errors(path), open(path, "rb") as file:
            frame = zstandard.ZstdDecompressor().decompressobj()
            while data := file.read(CHUNK):
                yield frame.decompress(data)
                if frame.eof:
                    if frame.unused_data or file.read(1):
                        raise DataError(path, "is altered: something follows the end of its content")
                    return
    except zstandard.ZstdError as error:
        raise DataError(path, f"is altered: it cannot be expanded ({error})") from None
    raise DataError(path, "is truncated: it ends before its content does")
