"""The shards of a prepared folder as one sequence of tokens, of which any part can be read."""

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_modules.prepared.manifest import Manifest
from data_modules.prepared.shard import HEADER_BYTES, read_header
from memlm.errors import DataError


class _OpenShard:
    def __init__(self, path: str, tokenizer_hash: str) -> None:
        self.path, self.header = path, read_header(Path(path), tokenizer_hash)
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DataError(path, f"cannot be read ({error.strerror or error})") from None

    def tokens(self, start: int, stop: int) -> NDArray[Any]:
        dtype = self.header.dtype
        return np.frombuffer(
            self._read(HEADER_BYTES + start * dtype.itemsize, (stop - start) * dtype.itemsize), dtype
        )

    def starts(self) -> NDArray[np.uint64]:
        return np.frombuffer(self._read(self.header.starts_at, 8 * (self.header.documents + 1)), "<u8")

    def _read(self, place: int, size: int) -> bytes:
        try:
            content = os.pread(self._descriptor, size, place)
        except OSError as error:
            raise DataError(self.path, f"cannot be read ({error.strerror or error})") from None
        if len(content) < size:
            raise DataError(self.path, "is truncated: it became shorter while it was read")
        return content

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


class OpenShards:
    """Reads shards, and keeps open those used last: there may be more than a process may open files.

    Rows lie all over the shards, so they are read and not mapped into memory: a map reads ahead megabytes
    around each row that is not cached yet, counts as the process's memory, and kills it where a file has
    become shorter.

    Args:
        most: Shards that are kept open.
    """

    def __init__(self, most: int = 256) -> None:
        self.most = most
        self._open: OrderedDict[str, _OpenShard] = OrderedDict()

    def read(self, path: str, tokenizer_hash: str, start: int, stop: int) -> NDArray[Any]:
        """Tokens number ``start`` to ``stop - 1`` of a shard, uint16 or uint32, not to be written to.

        Raises:
            DataError: It is missing, truncated, no shard, or made with another tokenizer.
        """
        shard = self._open.get(path)
        if shard is None:
            shard = self._open[path] = _OpenShard(path, tokenizer_hash)
            if len(self._open) > self.most:
                self._open.popitem(last=False)
        else:
            self._open.move_to_end(path)
        return shard.tokens(start, stop)

    def __getstate__(self) -> dict[str, Any]:
        return {"most": self.most, "_open": OrderedDict()}  # another process opens its own


class ShardedTokens:
    """All tokens of one split of a prepared folder, in the order of its shards.

    Token number ``tokens``, behind the last one, is the end-of-document token that closes the last document.

    Args:
        manifest: The folder's manifest.
        split: ``train`` or ``validation``.
        shards: Reads the files.
    """

    def __init__(self, manifest: Manifest, split: str, shards: OpenShards) -> None:
        infos = [info for info in manifest.shards(split) if info.tokens]
        self.folder = str(manifest.folder)
        self.documents = sum(info.documents for info in infos)
        self.eos_id = manifest.eos_id
        self._hash, self._shards = manifest.tokenizer_hash, shards
        self._paths = [str(manifest.path(info)) for info in infos]
        self._firsts = [0, *accumulate(info.tokens for info in infos)]

    @property
    def tokens(self) -> int:
        """Number of tokens, one end-of-document token for each document among them."""
        return self._firsts[-1]

    def window(self, start: int, stop: int) -> NDArray[Any]:
        """Tokens number ``start`` to ``stop - 1``, uint16 or uint32, not to be written to.

        Args:
            start: 0 to ``tokens - 1``.
            stop: More than ``start``, at most ``tokens + 1``.

        Raises:
            DataError: A shard is missing or altered.
        """
        parts: list[NDArray[Any]] = []
        number = bisect_right(self._firsts, start) - 1
        while start < min(stop, self.tokens):
            first, end = self._firsts[number], min(stop, self._firsts[number + 1])
            parts.append(self._shards.read(self._paths[number], self._hash, start - first, end - first))
            start = end
            number += 1
        if start < stop:
            parts.append(np.array([self.eos_id], parts[0].dtype))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def document_starts(self) -> Iterator[NDArray[np.int64]]:
        """Where each document of a shard starts, and the end of the last one, shard by shard.

        Raises:
            DataError: A shard is missing or altered.
        """
        for path, first, end in zip(self._paths, self._firsts, self._firsts[1:], strict=False):
            starts = _OpenShard(path, self._hash).starts().astype(np.int64) + first
            if starts[0] != first or starts[-1] != end or (np.diff(starts) < 1).any():
                raise DataError(path, "is altered: the starts of its documents are not ascending")
            yield starts
