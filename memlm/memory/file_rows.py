"""Rows of a table read from the file that it is mapped from, so that few of its pages are ever resident."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from memlm.errors import CheckpointError

_MAPS = Path("/proc/self/maps")

Operation = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Of a table of some rows, their numbers in the whole table, slots in the small one, and other factors."""


class FileRows:
    """Reads rows of a table by their place in a file.

    A page fault of a mapped table makes more resident than the row that was asked for: the kernel maps what
    lies around it and is in its cache, up to all of a large folio (2 MB), and there is no telling it not to.
    Reading the row instead takes memory for the row alone, and costs less than the fault. The kernel's cache
    of the file serves both.

    Args:
        file: Opened without a buffer.
        offset: Of the table in the file, in bytes.
        table: ``[S, V]``, mapped from the file and contiguous.
        buffer_bytes: Most that the rows of a piece of a read may take.
    """

    def __init__(self, file: BinaryIO, offset: int, table: Tensor, buffer_bytes: int) -> None:
        self.file, self.offset, self.buffer_bytes = file, offset, buffer_bytes
        self.value_dim, self.dtype = table.shape[1], table.dtype
        self.row_bytes = table.shape[1] * table.element_size()
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), offset, table.nbytes, os.POSIX_FADV_RANDOM)

    def __deepcopy__(self, memo: dict[int, Any]) -> "FileRows":
        return self  # nothing of it changes

    def take(self, rows: Tensor) -> Tensor:
        """Some rows of the table.

        Args:
            rows: ``[U]`` integers.

        Returns:
            ``[U, V]`` in the table's type.

        Raises:
            CheckpointError: The file ends too early: it was cut after it was opened.
        """
        result = torch.empty(len(rows), self.row_bytes, dtype=torch.uint8)
        descriptor, size = self.file.fileno(), self.row_bytes
        places = [self.offset + row * size for row in rows.tolist()]
        # All are asked for before the first is waited for: six times as fast where the kernel has none.
        for place in places:
            os.posix_fadvise(descriptor, place, size, os.POSIX_FADV_WILLNEED)
        for row, place in zip(result.numpy(), places, strict=True):
            if os.preadv(descriptor, [row], place) != size:
                raise CheckpointError(self.file.name, f"ends before byte {place + size}: it was cut short")
        return result.view(self.dtype)

    def apply(self, operation: Operation, slots: Tensor, factors: Tensor) -> Tensor:
        """An operation on the rows that tokens read, in pieces of bounded memory.

        Args:
            operation: See :data:`Operation`.
            slots: ``[N, L]``.
            factors: ``[N, ...]``.
        """
        step = max(1, self.buffer_bytes // max(1, slots.shape[1] * self.row_bytes))
        results = []
        for part, own in zip(slots.split(step), factors.split(step), strict=True):
            rows, numbers = torch.unique(part, return_inverse=True)
            results.append(operation(self.take(rows), rows, numbers.to(slots.dtype), own))
        return results[0] if len(results) == 1 else torch.cat(results)


def file_of(table: Tensor) -> tuple[BinaryIO, int] | None:
    """The file that a table is mapped from, opened, and the table's offset in it; None if there is none.

    Known on Linux alone.

    Raises:
        CheckpointError: The file is not there any more, or is another one by now.
    """
    if table.device.type != "cpu" or not table.is_contiguous() or not table.nbytes or not _MAPS.exists():
        return None
    address = table.data_ptr()
    for line in _MAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        span, _, start, _, _, *path = line.split(maxsplit=5)
        first, end = (int(bound, 16) for bound in span.split("-"))
        if not first <= address < end:
            continue
        if not path or not path[0].startswith("/") or address + table.nbytes > end:
            return None
        return _opened(path[0], int(start, 16) + address - first, table)
    return None


def _opened(path: str, offset: int, table: Tensor) -> tuple[BinaryIO, int]:
    changed = CheckpointError(
        path.removesuffix(" (deleted)"), "was replaced while it was read; read it again"
    )
    try:
        file = open(path, "rb", buffering=0)  # noqa: SIM115  # kept open
    except OSError as error:
        raise changed from error
    for row in (0, len(table) - 1):
        size = table[row].nbytes
        if (
            os.pread(file.fileno(), size, offset + row * size)
            != table[row].view(torch.uint8).numpy().tobytes()
        ):
            file.close()
            raise changed
    return file, offset
