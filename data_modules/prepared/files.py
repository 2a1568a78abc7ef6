"""Files that are whole or absent, and what to say when a disk takes no more."""

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_modules.file_bytes import Progress, file_errors
from memlm.errors import DataError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
CHUNK = 1 << 20
"""Bytes read at a time."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file that could not be written.

    Raises:
        DataError: In place of an OSError of the block.
    """
    try:
        yield
    except OSError as error:
        message = f"cannot be written ({error.strerror or error})"
        if error.errno in FULL:
            message += "; finished shards are kept: make room and run the same command again"
        raise DataError(path, message) from None


def partial(path: Path) -> Path:
    """Where a file is written until it is whole: beside it, hidden."""
    return path.with_name(f".{path.name}.partial")


def publish(path: Path) -> None:
    """Give the whole content of `partial` (path) its name, so that it survives a crash of the machine."""
    with writing(path):
        with open(partial(path), "rb") as file:
            os.fsync(file.fileno())
        partial(path).replace(path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file, whole or not at all.

    Raises:
        DataError: It cannot be written.
    """
    try:
        with writing(path):
            partial(path).write_bytes(content)
        publish(path)
    finally:
        partial(path).unlink(missing_ok=True)


def checksum(path: Path, progress: Progress | None = None) -> str:
    """SHA-256 (hex) of a file's content.

    Raises:
        DataError: It cannot be read.
    """
    digest, buffer = hashlib.sha256(), bytearray(CHUNK)
    with file_errors(path), open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            if progress:
                progress(count)
    return digest.hexdigest()
