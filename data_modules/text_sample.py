"""An even sample of the text of many files, without reading all of it."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

from data_modules.readers import Piece, piece_bytes, placed, read_piece, split_file
from memlm.errors import DataError

PLACES = 1000
"""Places from which a sample is taken, about, if the files are large enough and can be read from within."""

SMALLEST_PLACE = 1 << 22
"""Bytes of a file below which it is not worth reading from several places."""


def sample_documents(
    files: list[Path], text_key: str, most: int | None, progress: Callable[[int], object]
) -> Iterator[str]:
    """Documents of about ``most`` bytes of text, spread over all files in proportion to their sizes.

    The files are divided into equal places, of which each gives its first documents; what one gives too much,
    or too little, the next make up for. A compressed or plain text file is one place whatever its size. The
    documents depend on the files and ``most`` alone, not on chance.

    Args:
        files: In the order they are read in.
        text_key: Where a JSON object holds its text, or the column of a table.
        most: Bytes of text wanted; None for all.
        progress: Told how many more bytes of the files were read or passed over.

    Raises:
        DataError: A file or a record cannot be read.
    """
    pieces = _places(files)
    sizes = [piece_bytes(piece) for piece in pieces]
    total, passed, taken = sum(sizes), 0, 0
    for piece, size in zip(pieces, sizes, strict=True):
        passed += size
        # An empty file is read, for it may be a truncated one.
        wanted = math.inf if most is None or size == 0 else most * passed // total
        told = 0

        def tell(more: int) -> None:
            nonlocal told
            told += more
            progress(more)

        for text in _texts(piece, text_key, tell) if taken < wanted else ():
            if most is not None:
                text = text[: most - taken]  # one long document is not to be the whole sample
            taken += len(text) if text.isascii() else len(text.encode())
            yield text
            if taken >= wanted:
                break
        progress(size - told)


def _places(files: list[Path]) -> list[Piece]:
    total = sum(piece_bytes(Piece(file)) for file in files)
    return [piece for file in files for piece in split_file(file, max(total // PLACES, SMALLEST_PLACE))]


def _texts(piece: Piece, text_key: str, progress: Callable[[int], object]) -> Iterator[str]:
    for number, text in read_piece(piece, text_key, progress=progress):
        if isinstance(text, DataError):
            raise placed(piece, number, text)
        if text is not None:
            yield text
