"""Checkpoints to which every rank writes its part: folders of torch.distributed.checkpoint.

A folder holds the tensors under ``state_dict.NAME`` and ``optimizer_0.state.NAME.STATE``, whole in the eyes
of a reader however many ranks wrote them, and all else in ``meta.pt``. Any number of ranks, in groups of any
size, reads what it needs; so does one process without a process group.
"""

import io
import os
import pickle
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from memlm.errors import CheckpointError
from memlm.optim import MemoryAdamW
from memlm.optim.row_state import OptimizerStateError, check_saved, load_saved, owe_from_now
from memlm.parallel.folder_swap import beside, fresh_beside, put_in_place
from memlm.parallel.sharded_checkpoint import read_metadata, read_tensors

META = "meta.pt"
WEIGHTS, OPTIMIZER = "state_dict.", "optimizer_0.state."
GROUPS = "optimizer_groups"
"""In ``meta.pt``: the parameters' names by optimizer group."""


def is_checkpoint_folder(path: Path) -> bool:
    """Whether this is a whole checkpoint of several ranks."""
    return (path / META).is_file()


def optimizer_state(module: nn.Module, optimizer: MemoryAdamW) -> dict[str, Any]:
    """The optimizer's own tensors by the names of parameters, and those names by group."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    return {
        "state": {names[parameter]: state for parameter, state in optimizer.states()},
        "param_groups": [
            {key: value for key, value in group.items() if key != "params"}
            | {"params": [names[parameter] for parameter in group["params"]]}
            for group in optimizer.param_groups
        ],
    }


def save(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint beside its name, each rank its part, and put it in place when it is whole.

    Args:
        checkpoint: Lightning's, with ``state_dict`` and ``optimizer_states`` of this rank's tensors.
        path: Of the folder; the same on all ranks. What has that name is replaced.

    Raises:
        CheckpointError: Some rank could not write; on all ranks. What had that name still has.
    """
    Snapshot(checkpoint).write(path)


class Snapshot:
    """This rank's part of a checkpoint, ready to be written.

    Args:
        checkpoint: See :func:`save`.
        copy: Whether to copy its tensors to the CPU, so that training may change them before they are
            written. That takes as much memory as this rank's parameters and optimizer state do.
    """

    def __init__(self, checkpoint: dict[str, Any], copy: bool = False) -> None:
        self.tensors = {WEIGHTS + name: tensor for name, tensor in checkpoint["state_dict"].items()}
        meta = {k: value for k, value in checkpoint.items() if k not in ("state_dict", "optimizer_states")}
        for optimizer in checkpoint.get("optimizer_states", ()):
            meta[GROUPS] = optimizer["param_groups"]
            for name, state in optimizer["state"].items():
                self.tensors |= {f"{OPTIMIZER}{name}.{kind}": tensor for kind, tensor in state.items()}
        if copy:
            self.tensors = {
                name: tensor.detach().to("cpu", copy=True) for name, tensor in self.tensors.items()
            }
        self._meta = io.BytesIO()
        if dist.get_rank() == 0:
            torch.save(meta, self._meta)

    def write(self, path: Path, group: dist.ProcessGroup | None = None) -> None:
        """Write it, and put it in place when all ranks have written; all ranks must call this.

        Args:
            path: See :func:`save`.
            group: Of all ranks, over which they agree; default: that of training. Another thread than that of
                training needs a group of its own.

        Raises:
            CheckpointError: See :func:`save`.
        """
        folder = beside(path)
        _on_first_rank(lambda: fresh_beside(path), path, group)
        try:
            dcp.save(self.tensors, checkpoint_id=folder, process_group=group)
        except CheckpointException as error:  # no Exception, though what has failed is one
            rank, (reason, _) = next(iter(error.failures.items()))
            if dist.get_rank() == 0:
                shutil.rmtree(folder, ignore_errors=True)  # a full disk needs the room
            raise CheckpointError(path, f"cannot be written: rank {rank}: {_line(reason)}") from error

        def put() -> None:
            with open(folder / META, "wb") as file:
                file.write(self._meta.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            _check_complete(folder)
            put_in_place(folder, path)

        _on_first_rank(put, path, group)


def _on_first_rank(action: Callable[[], Any], path: Path, group: dist.ProcessGroup | None) -> None:
    """Do something with files on rank 0, for which all ranks wait; they fail together."""
    failure: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except (OSError, CheckpointError) as error:
            failure = [_line(error)]
    dist.broadcast_object_list(failure, src=0, group=group)
    if failure[0] is not None:
        raise CheckpointError(path, f"cannot be written: {failure[0]}")


def _check_complete(folder: Path) -> None:
    """See that what all ranks have written is here: they may be on nodes with file systems of their own."""
    parts = (read_metadata(folder).storage_data or {}).values()
    for name in sorted({part.relative_path for part in parts}):
        if not (folder / name).is_file():
            raise CheckpointError(
                folder,
                f"lacks {name}, which another process has written: all nodes must share {folder.parent}",
            )


def _line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def save_file(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint as a single device's: whole tensors, on rank 0; on other ranks without tensors.

    Every rank must call this. Rank 0 needs memory for all of it, others for the largest tensor.
    """
    first = dist.get_rank() == 0

    def whole(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, tensor in named.items():
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if first:
                found[name] = full.cpu()
        return found

    result = checkpoint | {"state_dict": whole(checkpoint["state_dict"])}
    optimizers = []
    for optimizer in checkpoint.get("optimizer_states", ()):
        optimizers.append(
            by_number(
                {name: whole(state) for name, state in optimizer["state"].items()},
                optimizer["param_groups"],
            )
        )
    if "optimizer_states" in checkpoint:
        result["optimizer_states"] = optimizers
    return result


def load(
    path: Path, module: nn.Module, optimizers: Iterable[MemoryAdamW], weights_only: bool
) -> dict[str, Any]:
    """Fill a model's and its optimizers' tensors, each rank its part, from a folder or a single file.

    Args:
        path: Of the folder, or of a single device's file.
        module: Whose parameters and buffers are filled.
        optimizers: Whose state is filled; none for the model alone.
        weights_only: See :func:`memlm.resume.read_checkpoint`.

    Returns:
        The rest of the checkpoint.

    Raises:
        CheckpointError: The file lacks a tensor, or has one of another shape.
        OptimizerStateError: The optimizer's state was made by other options.
    """
    optimizers = list(optimizers)
    names = {parameter: name for name, parameter in module.named_parameters()}
    source: _Folder | _File
    if path.is_dir():
        source = _Folder(path, weights_only)
    else:
        groups = [[names[p] for p in g["params"]] for own in optimizers for g in own.param_groups]
        source = _File(path, weights_only, groups)
    targets: dict[str, Tensor] = {WEIGHTS + name: tensor for name, tensor in module.state_dict().items()}
    for name, target in targets.items():
        shape = source.shapes.get(name)
        if shape != target.shape:
            found = "no such tensor" if shape is None else f"shape {tuple(shape)}"
            label = name.removeprefix(WEIGHTS)
            raise CheckpointError(
                path,
                f"does not fit the model: {label} has shape {tuple(target.shape)}, {found} in the checkpoint",
            )
    owing = []
    for optimizer in optimizers:
        for parameter, state in optimizer.states():
            prefix = f"{OPTIMIZER}{names[parameter]}."
            saved = {
                name.removeprefix(prefix): torch.empty(shape, device="meta")
                for name, shape in source.shapes.items()
                if name.startswith(prefix) and "." not in name.removeprefix(prefix)
            }
            check_saved(state, saved or None, names[parameter])
            if "decayed_at" in saved and "decayed_at" not in state:
                owe_from_now(state, optimizer.owned(parameter))
            elif "decayed_at" in state and "decayed_at" not in saved:
                owing.append((parameter, state, optimizer))
            targets |= {prefix + kind: tensor for kind, tensor in state.items() if kind in saved}
    with torch.no_grad():
        source.fill(targets)
    for parameter, state, optimizer in owing:  # nothing until now
        load_saved(optimizer.owned(parameter), state, {})
    return source.meta


def read_whole(path: Path, weights_only: bool = True, optimizer: bool = True) -> dict[str, Any]:
    """A folder as the checkpoint of a single device, whole tensors in memory.

    Args:
        path: The folder.
        weights_only: See :func:`memlm.resume.read_checkpoint`.
        optimizer: Whether to read the optimizer's state too.
    """
    folder = _Folder(path, weights_only)
    wanted = (WEIGHTS, OPTIMIZER) if optimizer else (WEIGHTS,)
    tensors = {
        name: torch.empty(stored.shape, dtype=stored.dtype)
        for name, stored in folder.tensors.items()
        if name.startswith(wanted)
    }
    folder.fill(tensors)
    state: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(OPTIMIZER):
            parameter, kind = name.removeprefix(OPTIMIZER).rsplit(".", 1)
            state.setdefault(parameter, {})[kind] = tensor
    weights = {name.removeprefix(WEIGHTS): t for name, t in tensors.items() if name.startswith(WEIGHTS)}
    groups = folder.meta.pop(GROUPS, None)
    result = folder.meta | {"state_dict": weights}
    if optimizer and groups is not None:
        result["optimizer_states"] = [by_number(state, groups)]
    return result


class _Folder:
    """Tensors of a checkpoint folder."""

    def __init__(self, path: Path, weights_only: bool) -> None:
        self.path = path
        try:
            self.meta = torch.load(path / META, map_location="cpu", weights_only=weights_only)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(path, f"is damaged: {_line(error)}") from error
        self.tensors = read_tensors(path)
        self.shapes = {name: tensor.shape for name, tensor in self.tensors.items()}

    def fill(self, targets: dict[str, Tensor]) -> None:
        """Copy into tensors, of a DTensor into this rank's part, a few megabytes at a time."""
        for name, target in targets.items():
            part, offsets = own_part(target)
            self.tensors[name].fill(part, offsets)


class _File:
    """Tensors of a single device's checkpoint, mapped: a rank reads its part and no more."""

    def __init__(self, path: Path, weights_only: bool, groups: list[list[str]]) -> None:
        self.meta = torch.load(path, map_location="cpu", weights_only=weights_only, mmap=True)
        self.tensors = {WEIGHTS + name: tensor for name, tensor in self.meta.pop("state_dict").items()}
        optimizers = self.meta.pop("optimizer_states", ()) if groups else ()
        for optimizer in optimizers:
            saved = [group["params"] for group in optimizer["param_groups"]]
            if [len(group) for group in saved] != [len(group) for group in groups]:
                raise OptimizerStateError(
                    f"optimizer state does not fit: its groups hold {[len(group) for group in saved]} "
                    f"parameters, this optimizer's {[len(group) for group in groups]}"
                )
            for numbers, names in zip(saved, groups, strict=True):
                for number, name in zip(numbers, names, strict=True):
                    for kind, tensor in optimizer["state"][number].items():
                        self.tensors[f"{OPTIMIZER}{name}.{kind}"] = tensor
        self.shapes = {name: tensor.shape for name, tensor in self.tensors.items()}

    def fill(self, targets: dict[str, Tensor]) -> None:
        """Copy into tensors, of a DTensor into this rank's part."""
        for name, target in targets.items():
            part, offsets = own_part(target)
            whole = self.tensors[name]
            for dim, (start, length) in enumerate(zip(offsets, part.shape, strict=True)):
                whole = whole.narrow(dim, min(start, whole.shape[dim]), length)
            part.copy_(whole)


def own_part(target: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """What this rank holds of a tensor, and where in it that begins."""
    if not isinstance(target, DTensor):
        return target, (0,) * target.ndim
    mesh, placements = target.device_mesh, target.placements
    shape, offsets = compute_local_shape_and_global_offset(target.shape, mesh, placements)
    return target.to_local()[tuple(map(slice, shape))], tuple(offsets)


def by_number(state: Mapping[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """An optimizer's state as torch's ``state_dict`` has it: parameters by number.

    Args:
        state: What each parameter has, by the parameter's name.
        groups: The optimizer's, with the names of their parameters.
    """
    names = dict.fromkeys(name for group in groups for name in group["params"])
    numbers = {name: number for number, name in enumerate(names)}
    return {
        "state": {number: state[name] for name, number in numbers.items() if name in state},
        "param_groups": [group | {"params": [numbers[name] for name in group["params"]]} for group in groups],
    }
