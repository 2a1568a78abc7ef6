"""A model under ZeRO as checkpoints see it: whole tensors, of which each rank has an even part."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from memlm.optim.row_state import OptimizerStateError
from memlm.parallel.dense_split import split_dimension
from memlm.parallel.zero_adamw import ZeroAdamW
from memlm.parallel.zero_state import MOMENTS, ZeroState


class ZeroCheckpoint:
    """Stands for the model and its optimizer while :mod:`memlm.parallel.checkpoint_folder` saves or loads.

    What ZeRO keeps flat is copied into tensors split over all ranks, by parameter: checkpoints are those of
    any other strategy. A whole parameter is in memory at a time, beside these parts.

    Args:
        model: The module that the engine has taken over.
        zero: Its dense parameters.
        optimizer: None if nothing is trained.
        ranks: All of them, on one axis.
    """

    def __init__(
        self, model: nn.Module, zero: ZeroState, optimizer: ZeroAdamW | None, ranks: DeviceMesh
    ) -> None:
        self._model, self._zero, self._optimizer, self._ranks = model, zero, optimizer, ranks
        self._weights: dict[nn.Parameter, Tensor] = {}
        self._states: dict[nn.Parameter, dict[str, Tensor]] = {}

    # -- as a module

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The model's."""
        return self._model.named_parameters()

    def state_dict(self) -> dict[str, Any]:
        """This rank's part of the model's state; every rank must call this."""
        found = {}
        for name, tensor in self._model.state_dict(keep_vars=True).items():
            if isinstance(tensor, nn.Parameter) and not isinstance(tensor.data, DTensor):
                if tensor not in self._weights:
                    self._weights[tensor] = self._part(self._zero.whole(tensor))
                found[name] = self._weights[tensor]
            else:
                found[name] = tensor.detach()
        return found

    # -- as an optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's."""
        assert self._optimizer is not None
        return self._optimizer.param_groups

    def owned(self, parameter: nn.Parameter) -> Tensor:
        """See :class:`memlm.optim.MemoryAdamW`."""
        assert self._optimizer is not None
        return self._optimizer.owned(parameter)

    def states(self) -> Iterator[tuple[nn.Parameter, dict[str, Tensor]]]:
        """Every parameter and this rank's part of what is kept for it; every rank must call this."""
        assert self._optimizer is not None
        rows = dict(self._optimizer.states())
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in rows:
                    yield parameter, rows[parameter]
                    continue
                if parameter not in self._states:
                    self._states[parameter] = {
                        "step": self._zero.steps.clone(),
                        **{kind: self._part(self._zero.whole_moment(parameter, kind)) for kind in MOMENTS},
                    }
                yield parameter, self._states[parameter]

    # -- after loading

    @torch.no_grad()
    def put_back(self) -> None:
        """Write the tensors handed out, as they are now, into ZeRO; every rank must call this."""
        for parameter, tensor in self._weights.items():
            self._zero.put(parameter, _whole(tensor))
        steps = [state["step"] for state in self._states.values()]
        if any(taken != steps[0] for taken in steps):
            raise OptimizerStateError(
                "optimizer state does not fit: ZeRO takes equally many steps of all dense parameters, but "
                f"these have taken {int(min(steps))} to {int(max(steps))}"
            )
        if steps:
            self._zero.steps = steps[0]
        for parameter, state in self._states.items():
            for kind in MOMENTS:
                self._zero.put_moment(parameter, kind, _whole(state[kind]))

    def _part(self, whole: Tensor) -> Tensor:
        if not whole.ndim:
            return whole.clone()
        placement = [Shard(split_dimension(whole.shape, self._ranks.size()))]
        shape, offsets = compute_local_shape_and_global_offset(whole.shape, self._ranks, placement)
        part = whole
        for dim, (start, length) in enumerate(zip(offsets, shape, strict=True)):
            part = part.narrow(dim, min(start, whole.shape[dim]), length)
        return DTensor.from_local(
            part.contiguous().clone(),
            self._ranks,
            placement,
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        )


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
