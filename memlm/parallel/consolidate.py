"""One file of a sharded checkpoint, whose tables are never whole in memory."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from memlm.errors import CheckpointError, DataError
from memlm.parallel.checkpoint_folder import GROUPS, META, OPTIMIZER, WEIGHTS, by_number
from memlm.parallel.folder_swap import recover
from memlm.parallel.sharded_checkpoint import StoredTensor, as_bytes, read_tensors
from memlm.resume import read_checkpoint

_CHUNK_BYTES = 1 << 23


def consolidate(folder: Path, target: Path) -> dict[str, Any]:
    """Write a sharded checkpoint as one file, which any single device reads as its own.

    The file has all that the folder has: parameters, the optimizer's state, the schedule, where training
    stood in its data, and the random state of every rank. It appears when it is whole.

    Args:
        folder: Of a checkpoint that several ranks have written.
        target: File to make.

    Returns:
        The content; tensors of the ranks are :class:`StoredTensor` in it.

    Raises:
        CheckpointError: The folder is no whole checkpoint of memlm.
        DataError: The file exists already, or cannot be written.
    """
    if target.exists():
        raise DataError(target, "exists already, and is not overwritten; choose another name")
    recover(folder)
    if not folder.is_dir():
        found = "is a single file already" if folder.is_file() else "does not exist"
        raise CheckpointError(folder, f"{found}; expected the folder of a sharded checkpoint")
    if not (folder / META).exists():
        runs = folder / "checkpoints" / "last.ckpt"
        hint = f"; its run's last is {runs}" if runs.is_dir() else ""
        raise CheckpointError(folder, f"is not a sharded checkpoint: it lacks {META}{hint}")
    before = _identity(folder)
    content = _content(folder)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.touch(exist_ok=False)  # torch reports what it cannot write as no OSError
        _write(temporary, content)
        if _identity(folder) != before:
            raise CheckpointError(folder, "was replaced by a newer one while it was read; try again")
        os.replace(temporary, target)
    except OSError as error:
        raise DataError(target, f"cannot be written ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)
    return content


def _identity(folder: Path) -> tuple[int, int] | None:
    """Differs between folders that have had one name: a run that goes on replaces its checkpoint."""
    try:
        found = folder.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def _content(folder: Path) -> dict[str, Any]:
    """The checkpoint as a single device would have saved it."""
    content = read_checkpoint(folder)
    stored = read_tensors(folder)
    state = _below(stored, WEIGHTS)
    if not state:
        raise CheckpointError(folder, "holds no model")
    if content["architecture"].get("transformer", {}).get("tie_embeddings"):
        state["transformer.output.weight"] = state["transformer.embedding.weight"]
    groups = content.pop(GROUPS, None)
    if groups is None:
        raise CheckpointError(folder / META, f"lacks {GROUPS}: memlm did not write it")
    optimizer = by_number(_by_parameter(_below(stored, OPTIMIZER)), groups)
    return content | {"state_dict": state, "optimizer_states": [optimizer]}


def _below(stored: dict[str, StoredTensor], prefix: str) -> dict[str, StoredTensor]:
    return {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}


def _by_parameter(stored: dict[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    """An optimizer's tensors, ``NAME.KIND``, by name and kind."""
    state: dict[str, dict[str, StoredTensor]] = {}
    for key, tensor in stored.items():
        name, kind = key.rsplit(".", 1)
        state.setdefault(name, {})[kind] = tensor
    return state


def _write(path: Path, content: dict[str, Any]) -> None:
    """First write all but the numbers, with room for them; then put these in their places."""
    with FakeTensorMode():
        made: dict[int, Tensor] = {}  # what is one tensor stays one

        def without_memory(tensor: Any) -> Tensor:
            if id(tensor) not in made:
                made[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            return made[id(tensor)]

        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(_mapped(content, without_memory), path)
    places = torch.load(path, map_location="meta", weights_only=True)
    with open(path, "r+b", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        filled: set[int] = set()
        for source, place in zip(_tensors(content), _tensors(places), strict=True):
            start: int = place.untyped_storage()._checkpoint_offset
            if start in filled or not place.numel():
                continue
            filled.add(start)
            file.seek(start)
            chunks = source.chunks(_CHUNK_BYTES) if isinstance(source, StoredTensor) else [source]
            for chunk in chunks:
                left = as_bytes(chunk.contiguous())
                while left:
                    left = left[file.write(left) :]
        assert os.fstat(file.fileno()).st_size == size, "a tensor was larger than its place"
        os.fsync(file.fileno())


def _mapped(tree: Any, change: Callable[[Any], Any]) -> Any:
    """A tree whose tensors are changed."""
    if isinstance(tree, (Tensor, StoredTensor)):
        return change(tree)
    if isinstance(tree, dict):
        return {key: _mapped(value, change) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(_mapped(value, change) for value in tree)
    return tree


def _tensors(tree: Any) -> Iterator[Any]:
    """The tensors of a tree, in its order."""
    if isinstance(tree, (Tensor, StoredTensor)):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _tensors(value)
    elif type(tree) in (list, tuple):
        for value in tree:
            yield from _tensors(value)
