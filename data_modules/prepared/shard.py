"""One file of tokens, read through a memory map.

Layout, all numbers little-endian:

======================  =====================================================================
bytes                   content
======================  =====================================================================
0 to 7                  ``memlmtok``
8 to 11, 12 to 15       version (1), bytes of a token (2 or 4), uint32 each
16 to 23, 24 to 31      number of documents D, number of tokens N, uint64 each
32 to 63                SHA-256 of the tokenizer, as in `memlm.tokenizers.Tokenizer.hash`
64 to 127               zeros, and in the last four bytes the CRC-32 of bytes 0 to 123
128 to 128 + N * width  tokens, uint16 or uint32: ``eos t1 .. tn`` for each document
then                    zeros up to a multiple of 8 bytes
last 8 * (D + 1)        where each document starts among the tokens, uint64; the last is N
======================  =====================================================================
"""

import struct
import zlib
from array import array
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data_modules.file_bytes import file_errors
from data_modules.prepared.files import partial, publish, writing
from memlm.errors import DataError

HEADER_BYTES = 128
MAGIC = b"memlmtok"
VERSION = 1
_FIELDS = struct.Struct("<8sIIQQ32s60x")
_DTYPES: dict[int, np.dtype[Any]] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}


@dataclass(frozen=True)
class Header:
    """What a shard says of itself.

    Attributes:
        dtype: Of its tokens, little-endian uint16 or uint32.
        documents: Their number.
        tokens: Their number.
        tokenizer_hash: SHA-256 (hex) of the tokenizer.
    """

    dtype: np.dtype[Any]
    documents: int
    tokens: int
    tokenizer_hash: str

    @property
    def file_bytes(self) -> int:
        """Size of the whole file, in bytes."""
        return self.starts_at + 8 * (self.documents + 1)

    @property
    def starts_at(self) -> int:
        """Where in the file the documents' starts begin, in bytes."""
        return HEADER_BYTES + -(-self.tokens * self.dtype.itemsize // 8) * 8

    def pack(self) -> bytes:
        """The first 128 bytes of the file."""
        fields = _FIELDS.pack(
            MAGIC,
            VERSION,
            self.dtype.itemsize,
            self.documents,
            self.tokens,
            bytes.fromhex(self.tokenizer_hash),
        )
        return fields + struct.pack("<I", zlib.crc32(fields))


@dataclass(frozen=True)
class Shard:
    """An open shard.

    Attributes:
        header: Its header.
        tokens: Read-only memory map [N] of uint16 or uint32.
        starts: Read-only memory map [documents + 1] of uint64: where documents start in ``tokens``.
    """

    header: Header
    tokens: NDArray[Any]
    starts: NDArray[np.uint64]


def smallest_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrowest type of a shard's tokens that holds every id below ``vocab_size``."""
    return _DTYPES[2 if vocab_size <= 1 << 16 else 4]


def read_header(path: Path, expected_hash: str | None = None) -> Header:
    """Check a shard's header and size.

    Args:
        path: The file.
        expected_hash: Hash of the tokenizer that it must be made with; None for any.

    Raises:
        DataError: The file is missing, truncated, no shard, or made with another tokenizer.
    """
    with file_errors(path), open(path, "rb", buffering=0) as file:
        start = file.read(HEADER_BYTES)
        size = file.seek(0, 2)
    if start[: len(MAGIC)] != MAGIC[: len(start)]:
        raise DataError(path, "is not a shard of tokens (it does not begin with 'memlmtok')")
    if len(start) < HEADER_BYTES:
        raise DataError(path, f"is truncated: {len(start)} bytes; the header alone has {HEADER_BYTES}")
    _, version, width, documents, tokens, tokenizer = _FIELDS.unpack(start[:-4])
    if struct.unpack("<I", start[-4:])[0] != zlib.crc32(start[:-4]):
        raise DataError(path, "is altered: the checksum of its header is wrong")
    if version != VERSION or width not in _DTYPES:
        found = f"has version {version} with tokens of {width} bytes"
        raise DataError(path, f"{found}; expected version {VERSION} with 2 or 4 bytes")
    header = Header(_DTYPES[width], documents, tokens, tokenizer.hex())
    if size != header.file_bytes:
        fault = "truncated" if size < header.file_bytes else "altered"
        raise DataError(path, f"is {fault}: {size:,} bytes; its header says {header.file_bytes:,}")
    if expected_hash not in (None, header.tokenizer_hash):
        raise DataError(
            path, f"holds tokens of the tokenizer {header.tokenizer_hash}; expected those of {expected_hash}"
        )
    return header


def open_shard(path: Path, expected_hash: str | None = None) -> Shard:
    """Map a shard into memory.

    Args:
        path: The file.
        expected_hash: Hash of the tokenizer that it must be made with; None for any.

    Raises:
        DataError: The file is missing, truncated, no shard, or made with another tokenizer.
    """
    header = read_header(path, expected_hash)
    # One map, not one for each array: every map holds a file descriptor.
    content = np.memmap(path, np.uint8, "r")
    tokens = content[HEADER_BYTES : HEADER_BYTES + header.tokens * header.dtype.itemsize]
    return Shard(header, tokens.view(header.dtype), content[header.starts_at :].view("<u8"))


class ShardWriter:
    """Writes a shard under a temporary name and gives it its own when it is whole.

    Args:
        path: The file. One of that name is replaced.
        dtype: Of the tokens: uint16 or uint32.
        tokenizer_hash: SHA-256 (hex) of the tokenizer.

    Raises:
        DataError: The file cannot be written. This holds for all methods.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any] | type, tokenizer_hash: str) -> None:
        self.path = path
        self.dtype = _DTYPES[np.dtype(dtype).itemsize]
        self.tokenizer_hash = tokenizer_hash
        self._starts = array("Q", [0])
        with writing(path):
            self._file = open(partial(path), "wb", buffering=1 << 20)  # noqa: SIM115
            self._file.write(bytes(HEADER_BYTES))

    def add(self, tokens: ArrayLike) -> None:
        """Append a document, ``eos t1 .. tn``."""
        self.add_all([np.asarray(tokens)])

    def add_all(self, documents: Sequence[NDArray[Any]], eos: int | None = None) -> None:
        """Append several documents: many short ones cost a call for all instead of one for each.

        Args:
            documents: Tokens [n] of each.
            eos: The token to put before each of them, if they do not begin with it.
        """
        if not documents:
            return
        first = np.array([] if eos is None else [eos], self.dtype)
        parts = [part for document in documents for part in (first, document)]
        tokens = np.concatenate(parts, dtype=self.dtype, casting="unsafe")
        ends = np.cumsum([len(first) + len(document) for document in documents], dtype=np.uint64)
        self._starts.frombytes((ends + np.uint64(self._starts[-1])).tobytes())
        with writing(self.path):
            self._file.write(tokens.data)

    def finish(self) -> tuple[int, int]:
        """Make the file whole.

        Returns:
            The numbers of its documents and tokens.
        """
        header = Header(self.dtype, len(self._starts) - 1, self._starts[-1], self.tokenizer_hash)
        try:
            with writing(self.path), self._file as file:
                padding = header.starts_at - HEADER_BYTES - header.tokens * self.dtype.itemsize
                file.write(bytes(padding))
                file.write(np.frombuffer(self._starts, np.uint64).astype("<u8").data)
                file.seek(0)
                file.write(header.pack())
            publish(self.path)
        except BaseException:
            self.abort()
            raise
        return header.documents, header.tokens

    def abort(self) -> None:
        """Leave no trace; after a failed write, too."""
        with suppress(OSError):  # a full disk does not take the rest of the buffer
            self._file.close()
        partial(self.path).unlink(missing_ok=True)
