"""Value tables larger than memory, read at inference from the file that they are mapped from."""

from collections.abc import Iterable

from memlm.memory.file_rows import FileRows, file_of
from memlm.memory.pool import MemoryPool
from memlm.memory.quantised import QuantisedPool

BUFFER_BYTES = 2**25
"""Rows that a read holds at a time: 32 MiB, more than what a batch of generation reads in a layer."""


def bound_residency(pool: MemoryPool | QuantisedPool, buffer_bytes: int = BUFFER_BYTES) -> bool:
    """Let the reads of a mapped pool take their rows from its file: next to nothing of it becomes resident.

    The results are the same, to the bit. A read costs about a microsecond more for each distinct row, and on
    a cold disk as much as the disk does. The scales of quantised values stay mapped (4 bytes a row).

    Args:
        pool: Of a model that does not train.
        buffer_bytes: Most that the rows of a piece of a read take; longer reads are cut between tokens.

    Returns:
        Whether the pool's values are mapped from a file; if not, nothing changes.

    Raises:
        ValueError: The pool's values are trained: what changes in memory does not change in the file.
        CheckpointError: The file was replaced since it was mapped.
    """
    if pool.values.requires_grad:
        raise ValueError("the values of this pool are trained; only frozen ones can be read from their file")
    found = file_of(pool.values)
    if found is None:
        return False
    pool.file_rows = FileRows(*found, pool.values, buffer_bytes)
    return True


def bound_large(pools: Iterable[MemoryPool | QuantisedPool], memory_bytes: int) -> int:
    """Bound the largest mapped pools until the values of all others fit in some memory.

    Args:
        pools: Of a model that does not train.
        memory_bytes: What the values of all pools together may take.

    Returns:
        Bytes of the values that can still become resident: more than asked for where pools are not mapped
        from files.

    Raises:
        ValueError: As :func:`bound_residency`.
        CheckpointError: As :func:`bound_residency`.
    """
    largest_first = sorted(pools, key=lambda pool: pool.values.nbytes, reverse=True)
    resident = sum(pool.values.nbytes for pool in largest_first)
    for pool in largest_first:
        if resident <= memory_bytes:
            break
        if bound_residency(pool):
            resident -= pool.values.nbytes
    return resident
