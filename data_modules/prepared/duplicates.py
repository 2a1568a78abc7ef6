"""Exact duplicates among all documents, by 128-bit hashes of their text, in bounded memory.

Every unit's hashes lie in one file, sorted. A bucket is a range of hashes; the hashes of one bucket are
gathered from all files and sorted, which brings the copies of a document together. Buckets are small enough
for memory, and come one after the other.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_modules.prepared.files import partial, publish, writing

BUCKET_DOCUMENTS = 1 << 20
"""Hashes in memory at a time, about: 24 MB, and as much again several times for sorting them."""
_ROW_BYTES = 24


def hashes_path(state: Path, unit: int) -> Path:
    """The hashes of a unit's documents."""
    return state / f"hashes-{unit:05d}"


def _duplicates_path(state: Path) -> Path:
    return state / "duplicates"


def save_hashes(state: Path, unit: int, digests: bytes | bytearray) -> None:
    """Write the hashes of a unit's documents, whole or not at all.

    Args:
        state: The folder.
        unit: The unit.
        digests: 16 bytes for each document, in order.

    Raises:
        DataError: They cannot be written.
    """
    words = np.frombuffer(digests, ">u8").reshape(-1, 2)
    order = np.lexsort((words[:, 1], words[:, 0]))  # stable: copies stay in order
    rows = np.empty((len(order), 3), "<u8")
    rows[:, :2], rows[:, 2] = words[order], order
    path = hashes_path(state, unit)
    try:
        with writing(path), open(partial(path), "wb") as file:
            file.write(rows.data)
        publish(path)
    finally:
        partial(path).unlink(missing_ok=True)


def find_duplicates(state: Path, units: int, progress: Callable[[int], object]) -> None:
    """Mark every document of which an earlier one is a copy.

    Args:
        state: The folder with the hashes of all units.
        units: Their number.
        progress: Told of documents done.

    Raises:
        DataError: The marks cannot be written.
    """
    paths = [hashes_path(state, unit) for unit in range(units)]
    firsts = np.cumsum([0, *(_documents(path) for path in paths)])
    documents = int(firsts[-1])
    path = _duplicates_path(state)
    try:
        with writing(path), open(partial(path), "wb") as file:
            # A hole in the file would be a bus error where a full disk cannot fill it.
            os.posix_fallocate(file.fileno(), 0, max(documents, 1))
            marks = np.memmap(partial(path), np.bool_, "r+")
            for hashes, numbers in _buckets(paths, firsts):
                order = np.lexsort((hashes[:, 1], hashes[:, 0]))
                ordered = hashes[order]
                copies = (ordered[1:] == ordered[:-1]).all(axis=1)
                marks[numbers[order][1:][copies]] = True
                progress(len(order))
            marks.flush()
            del marks
        publish(path)
    finally:
        partial(path).unlink(missing_ok=True)


def are_found(state: Path) -> bool:
    """Whether `find_duplicates` is done."""
    return _duplicates_path(state).exists()


def duplicates_of(state: Path, unit: int) -> NDArray[np.bool_]:
    """Which documents of a unit are copies of earlier ones, bool [documents of the unit]."""
    first = sum(_documents(hashes_path(state, before)) for before in range(unit))
    count = _documents(hashes_path(state, unit))
    return np.fromfile(_duplicates_path(state), np.bool_, count, offset=first)


def _documents(path: Path) -> int:
    return path.stat().st_size // _ROW_BYTES


def _buckets(
    paths: list[Path], firsts: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.int64]]]:
    """Hashes [documents, 2] of one bucket after the other, and the documents' numbers among all.

    Documents with the same hash are in order.
    """
    bits = max(int(firsts[-1]) // BUCKET_DOCUMENTS, 1).bit_length()
    count = 1 << bits
    starts = np.arange(1, count, dtype=np.uint64) << np.uint64(64 - bits)
    bounds = np.array(
        [
            [0, *np.searchsorted(np.fromfile(path, "<u8").reshape(-1, 3)[:, 0], starts), _documents(path)]
            for path in paths
        ]
    )
    for bucket in range(count):
        rows, numbers = [], []
        for path, first, bound in zip(paths, firsts, bounds, strict=False):
            start, stop = int(bound[bucket]), int(bound[bucket + 1])
            if start < stop:
                found = np.fromfile(path, "<u8", 3 * (stop - start), offset=_ROW_BYTES * start).reshape(-1, 3)
                rows.append(found[:, :2])
                numbers.append(found[:, 2].astype(np.int64) + first)
        if rows:
            yield np.concatenate(rows), np.concatenate(numbers)
