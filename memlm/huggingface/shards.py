"""Writing safetensors in shards, chunk by chunk: nothing as large as a tensor is made."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
}
_CHUNK_ELEMENTS = 4_000_000
_ALIGNMENT = 64  # bytes; of the place where the tensors begin


@dataclass(frozen=True)
class Entry:
    """A tensor of a file, and how to get it."""

    name: str
    dtype: torch.dtype
    """In the file."""
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[Tensor]]
    """Gives the elements in order, in tensors of ``dtype``; called once, in the order of the entries."""

    @property
    def size(self) -> int:
        """Bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass
class _Shard:
    entries: list[Entry] = field(default_factory=list)
    size: int = 0


def entry(name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> Entry:
    """A tensor in one piece, converted to ``dtype`` (default: its own) by chunks.

    Raises:
        ValueError: When it is read: a number is beyond the range of float16; names the tensor.
    """
    wanted = tensor.dtype if dtype is None else dtype

    def chunks() -> Iterator[Tensor]:
        for part in tensor.detach().reshape(-1).split(_CHUNK_ELEMENTS):
            converted = part.to(wanted)
            if wanted == torch.float16 and not torch.equal(converted.isfinite(), part.isfinite()):
                raise ValueError(
                    f"{name} holds {float(part.abs().max()):.4g}, beyond the range of float16 (65,504)"
                )
            yield converted

    return Entry(name, wanted, tuple(tensor.shape), chunks)


def write_shards(folder: Path, entries: Iterable[Entry], shard_bytes: int) -> list[Path]:
    """Write ``model.safetensors``, or numbered shards and ``model.safetensors.index.json``.

    Args:
        folder: Exists, and holds no such files.
        entries: In the order in which they are read.
        shard_bytes: Most bytes of tensors in a file; a larger tensor has a file of its own.

    Returns:
        The safetensors files.

    Raises:
        OSError: A file cannot be written.
    """
    shards = [_Shard()]
    for item in entries:
        if shards[-1].entries and shards[-1].size + item.size > shard_bytes:
            shards.append(_Shard())
        shards[-1].entries.append(item)
        shards[-1].size += item.size
    number = len(shards)
    names = (
        ["model.safetensors"]
        if number == 1
        else [f"model-{index:05d}-of-{number:05d}.safetensors" for index in range(1, number + 1)]
    )
    for name, shard in zip(names, shards, strict=True):
        _write(folder / name, shard.entries)
    if number > 1:
        index: dict[str, Any] = {
            "metadata": {"total_size": sum(shard.size for shard in shards)},
            "weight_map": {
                item.name: name for name, shard in zip(names, shards, strict=True) for item in shard.entries
            },
        }
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2) + "\n", encoding="utf-8"
        )
    return [folder / name for name in names]


def _write(path: Path, entries: list[Entry]) -> None:
    """One file: the length of the header, the header, the tensors one after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    # Wide elements first, so that every tensor lies at a multiple of its elements' size; large tensors first,
    # whose sizes are mostly multiples of a cache line: mapped into memory they are as well aligned as copies.
    for item in sorted(entries, key=lambda item: (-item.dtype.itemsize, -item.size)):
        place = [offset, offset + item.size]
        header[item.name] = {"dtype": _DTYPES[item.dtype], "shape": list(item.shape), "data_offsets": place}
        offset += item.size
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-(len(content) + 8) % _ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        start = file.tell()
        for item in entries:
            begin, end = (start + place for place in header[item.name]["data_offsets"])
            file.seek(begin)
            for chunk in item.chunks():
                file.write(chunk.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data)
            if file.tell() != end:
                raise AssertionError(f"{item.name}: {file.tell() - begin} bytes, not {item.size}")
        file.flush()
        os.fsync(file.fileno())
