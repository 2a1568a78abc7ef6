"""Reads the folder of a sharded checkpoint part by part; no tensor need ever be whole in memory."""

import io
import os
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from memlm.errors import CheckpointError

METADATA = ".metadata"

_READ_AT_ONCE = 1 << 23
"""Bytes."""

# All that the metadata of torch.distributed.checkpoint consist of. An unpickler that finds any other name
# would run whatever the file says.
_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


class _Slice(io.RawIOBase):
    """Some bytes of a file, as a file of their own."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self.file, self.start, self.length, self.position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence]
        self.position = base + offset
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self.length - self.position))
        self.file.seek(self.start + self.position)
        read = self.file.readinto(memoryview(buffer)[:count])  # type: ignore[attr-defined]
        self.position += read
        return read


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    elements: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(elements)


@dataclass
class _Part:
    """A block of a tensor, which one rank has written."""

    file: Path
    start: int
    length: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    data: int | None = field(default=None)
    """Where in the file its elements begin, once that is known."""

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Some of its rows: a tensor without dimensions has one."""
        shape = (last - first, *self.sizes[1:]) if self.sizes else ()
        with self._opened() as file:
            if self.data is None:
                whole = self._look(file, dtype)
                if whole is not None:  # not in the order of its elements
                    return whole[first:last]
                assert self.data is not None
            result = torch.empty(shape, dtype=dtype)
            row = result[0].numel() if self.sizes and last > first else 1
            file.seek(self.data + first * row * result.element_size())
            self._read(file, as_bytes(result))
        return result

    def _opened(self) -> BinaryIO:
        try:
            return open(self.file, "rb", buffering=0)
        except OSError as error:
            raise CheckpointError(self.file, f"cannot be read: {error.strerror or error}") from error

    def _read(self, file: BinaryIO, buffer: memoryview) -> None:
        while buffer:
            count = file.readinto(buffer)  # type: ignore[attr-defined]
            if not count:
                raise CheckpointError(self.file, "is truncated")
            buffer = buffer[count:]

    def _load(self, file: BinaryIO, device: str) -> Any:
        part = io.BufferedReader(_Slice(file, self.start, self.length))
        return torch.load(part, map_location=device, weights_only=True)

    def _look(self, file: BinaryIO, dtype: torch.dtype) -> Tensor | None:
        """Find where the elements begin; a tensor that is not contiguous is read at once."""
        if os.fstat(file.fileno()).st_size < self.start + self.length:
            raise CheckpointError(self.file, "is truncated")
        try:
            found = self._load(file, "meta")
            fits = isinstance(found, Tensor) and (tuple(found.shape), found.dtype) == (self.sizes, dtype)
            if fits and not found.is_contiguous():
                return self._load(file, "cpu")
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
            detail = (str(error) or type(error).__name__).splitlines()[0]
            raise CheckpointError(self.file, f"is damaged: {detail}") from error
        if not fits:
            raise CheckpointError(
                self.file, f"is damaged: it lacks a tensor of shape {list(self.sizes)} at byte {self.start}"
            )
        within: int = found.untyped_storage()._checkpoint_offset
        self.data = self.start + within + found.storage_offset() * found.element_size()
        return None


@dataclass
class StoredTensor:
    """A tensor of a sharded checkpoint, on disk."""

    shape: torch.Size
    dtype: torch.dtype
    parts: list[_Part]

    def chunks(self, size: int) -> Iterator[Tensor]:
        """Its rows from first to last, in contiguous tensors of about ``size`` bytes."""
        if not self.shape:
            yield self.parts[0].rows(0, 1, self.dtype)
            return
        row = max(1, self.shape[1:].numel() * self.dtype.itemsize)
        step = max(1, size // row)
        for start in range(0, self.shape[0], step):
            yield self._rows(start, min(start + step, self.shape[0]))

    def fill(self, target: Tensor, offsets: Sequence[int]) -> None:
        """Copy a block of it, a few megabytes at a time; parts that the block does not meet are not read.

        Args:
            target: As large as the block; of any device and dtype.
            offsets: Where the block begins, in each dimension.
        """
        if not self.shape:
            target.copy_(self.parts[0].rows(0, 1, self.dtype))
            return
        for part in self.parts:
            block = [
                (max(first, own), min(first + size, own + own_size))
                for first, size, own, own_size in zip(
                    offsets, target.shape, part.offsets, part.sizes, strict=True
                )
            ]
            if any(low >= high for low, high in block):
                continue
            columns = [
                slice(low - own, high - own) for (low, high), own in zip(block, part.offsets, strict=True)
            ]
            place = [
                slice(low - first, high - first) for (low, high), first in zip(block, offsets, strict=True)
            ]
            row = max(1, torch.Size(part.sizes[1:]).numel() * self.dtype.itemsize)
            step = max(1, _READ_AT_ONCE // row)
            for start in range(columns[0].start, columns[0].stop, step):
                end = min(start + step, columns[0].stop)
                shift = place[0].start - columns[0].start
                rows = part.rows(start, end, self.dtype)[(slice(None), *columns[1:])]
                target[(slice(start + shift, end + shift), *place[1:])].copy_(rows)

    def _rows(self, start: int, end: int) -> Tensor:
        result = torch.empty(end - start, *self.shape[1:], dtype=self.dtype)
        for part in self.parts:
            low, high = max(start, part.offsets[0]), min(end, part.offsets[0] + part.sizes[0])
            if low >= high:
                continue
            place = [slice(low - start, high - start)]
            place += [
                slice(offset, offset + size)
                for offset, size in zip(part.offsets[1:], part.sizes[1:], strict=True)
            ]
            result[tuple(place)] = part.rows(low - part.offsets[0], high - part.offsets[0], self.dtype)
        return result


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors that ranks have written to the folder of a sharded checkpoint, by name.

    Raises:
        CheckpointError: The folder is no such checkpoint, or lacks a part.
    """
    metadata = read_metadata(folder)
    return {
        name: _stored_tensor(folder, metadata, name, stored)
        for name, stored in metadata.state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata)
    }


def read_metadata(folder: Path) -> Metadata:
    """Which tensors a folder has, and where; unlike torch's own reader it runs no code that the file names.

    Raises:
        CheckpointError: They are missing or damaged.
    """
    path = folder / METADATA
    try:
        with open(path, "rb") as file:
            metadata = _Unpickler(file).load()
    except FileNotFoundError:
        raise CheckpointError(
            folder, f"is no whole sharded checkpoint: it lacks {METADATA}, which is written last"
        ) from None
    except (pickle.UnpicklingError, EOFError, ValueError, AttributeError, TypeError, IndexError) as error:
        raise CheckpointError(path, f"is damaged: {error}") from error
    if not isinstance(metadata, Metadata):
        raise CheckpointError(path, f"is damaged: it holds {type(metadata).__name__}, expected Metadata")
    return metadata


def _part(
    folder: Path, metadata: Metadata, index: MetadataIndex, offsets: tuple[int, ...], sizes: tuple[int, ...]
) -> _Part:
    info = (metadata.storage_data or {}).get(index)
    if info is None:
        raise CheckpointError(folder / METADATA, f"is damaged: it does not say where {index.fqn} is")
    if getattr(info, "transform_descriptors", None):
        raise CheckpointError(folder, "is compressed; expected a checkpoint as memlm writes it")
    file = folder / info.relative_path
    if file.parent != folder or not file.is_file():
        raise CheckpointError(folder, f"lacks its file {info.relative_path}, with a part of {index.fqn}")
    return _Part(file, info.offset, info.length, offsets, sizes)


def _stored_tensor(folder: Path, metadata: Metadata, key: str, stored: TensorStorageMetadata) -> StoredTensor:
    parts = [
        _part(folder, metadata, MetadataIndex(key, chunk.offsets), tuple(chunk.offsets), tuple(chunk.sizes))
        for chunk in stored.chunks
    ]
    # Parts do not overlap: torch.distributed.checkpoint has each written once.
    if sum(torch.Size(part.sizes).numel() for part in parts) != stored.size.numel():
        raise CheckpointError(folder, f"is damaged: the parts of {key} are not the whole of it")
    return StoredTensor(stored.size, stored.properties.dtype, parts)
