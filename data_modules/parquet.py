"""The texts of a parquet file's column, in bounded memory. Needs the optional package pyarrow."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_modules.file_bytes import CHUNK, Progress, file_errors, file_size
from data_modules.json_lines import Record
from memlm.errors import DataError, UserError

BATCH_BYTES = 1 << 22
BATCH_ROWS = 1024
"""A batch of rows is decoded at a time: about so many bytes, and no more rows than this."""


def row_group_bytes(path: Path) -> list[int]:
    """The bytes of a file shared among its row groups, so that they add up to its size.

    Raises:
        DataError: The file cannot be read as parquet.
    """
    with _opened(path) as file:
        return _row_group_bytes(path, file.metadata)


def rows_before(path: Path, group: int) -> int:
    """Rows of a file before a row group.

    Raises:
        DataError: The file cannot be read as parquet.
    """
    with _opened(path) as file:
        return sum(file.metadata.row_group(i).num_rows for i in range(group))


def read_rows(
    path: Path,
    column: str,
    first: int = 0,
    every: int = 1,
    groups: tuple[int, int | None] = (0, None),
    progress: Progress | None = None,
) -> Iterator[Record]:
    """The texts of rows first, first + every, ..., each with its number.

    Args:
        path: The file.
        column: Name of the column of strings (or of bytes in UTF-8).
        first: Number of the first row wanted. Row groups before it are not decoded.
        every: Distance of the rows wanted.
        groups: Range of row groups to read; rows are numbered from the first one's start.
        progress: Told how many more of the file's bytes were consumed.

    Raises:
        UserError: The file has no such column of strings, or pyarrow is not installed.
        DataError: The file cannot be read as parquet.
    """
    with _opened(path) as file:
        metadata = file.metadata
        _check_column(path, column, file.schema_arrow)
        count = metadata.num_row_groups
        start, stop = groups[0], count if groups[1] is None else groups[1]
        if stop > count:
            raise DataError(path, f"has {count} row groups; expected {stop}: it was changed while in use")
        shares = _row_group_bytes(path, metadata) if progress is not None else []
        before, number = sum(metadata.row_group(group).num_rows for group in range(start)), 0
        for group in range(start, stop):
            rows, told = metadata.row_group(group).num_rows, 0
            if first < number + rows:
                at = number
                for texts in _batches(file, group, column):
                    while first < at + len(texts):
                        yield first, _text(texts[first - at].as_py(), path, column, before + first)
                        first += every
                    at += len(texts)
                    if progress is not None:
                        share = shares[group] * (at - number) // rows
                        progress(share - told)
                        told = share
                if at != number + rows:
                    message = f"row group {group} holds {at - number} rows of {column!r}; its metadata says"
                    raise DataError(path, f"{message} {rows}")
            number += rows
            if progress is not None:
                progress(shares[group] - told)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        # No DataError, and so nothing to be skipped like a damaged file.
        message = "is a parquet file, which needs package pyarrow; run: pip install 'memlm[parquet]'"
        raise UserError(f"{path}: {message}") from None
    # Once by ourselves: Arrow's own errors about files are long, and have no number to tell them by.
    with file_errors(path), open(path, "rb"):
        pass
    try:
        with pa.OSFile(str(path)) as source:
            # Buffered, or a whole row group's column is read at once.
            options = {"pre_buffer": False, "buffer_size": CHUNK, "page_checksum_verification": True}
            yield pq.ParquetFile(source, **options)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise DataError(path, f"is damaged, cut off or no parquet file ({reason})") from None


def _row_group_bytes(path: Path, metadata: Any) -> list[int]:
    sizes = []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        sizes.append(sum(group.column(i).total_compressed_size for i in range(group.num_columns)))
    if sizes:
        sizes[-1] += file_size(path) - sum(sizes)  # the metadata themselves
    return sizes


def _check_column(path: Path, column: str, schema: Any) -> None:
    import pyarrow as pa

    if column not in schema.names:
        names = ", ".join(map(repr, schema.names[:20])) or "no columns"
        raise UserError(f"{path}: has no column {column!r} (option text_key); it has {names}")
    kind = schema.field(schema.names.index(column)).type
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    tests = ["string", "large_string", "string_view", "binary", "large_binary", "binary_view"]
    if not any(getattr(pa.types, f"is_{test}")(value) for test in tests):
        message = f"column {column!r} holds values of type {kind}; expected strings (option text_key)"
        raise UserError(f"{path}: {message}")


def _batches(file: Any, group: int, column: str) -> Iterator[Any]:
    """Arrays of bytes: Arrow does not check on reading that a string is valid UTF-8."""
    import pyarrow as pa

    metadata = file.metadata.row_group(group)
    names = [metadata.column(i).path_in_schema for i in range(metadata.num_columns)]
    size = metadata.column(names.index(column)).total_uncompressed_size
    rows = min(max(BATCH_BYTES * metadata.num_rows // max(size, 1), 1), BATCH_ROWS)
    for batch in file.iter_batches(rows, row_groups=[group], columns=[column], use_threads=False):
        texts = batch.column(0)
        if pa.types.is_dictionary(texts.type):
            texts = texts.dictionary_decode()
        yield texts.cast(pa.large_binary())


def _text(value: bytes | None, path: Path, column: str, row: int) -> str | DataError:
    place = f"row {row} (from 0) of column {column!r}"
    if value is None:
        return DataError(path, f"{place} is null; expected a string")
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        return DataError(path, f"{place} is not valid UTF-8 ({error.reason} at byte {error.start})")
