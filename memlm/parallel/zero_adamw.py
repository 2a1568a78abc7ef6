"""The one optimizer that Lightning sees where ZeRO has the dense parameters."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from memlm.memory import RowGradient
from memlm.optim import MemoryAdamW
from memlm.parallel.zero_state import ZeroState


class ZeroAdamW(MemoryAdamW):
    """A MemoryAdamW whose dense groups are updated by ZeRO, its memory groups as ever.

    Rates, norms and clipping are those of one optimizer. It keeps no state of the dense parameters; see
    :class:`memlm.parallel.zero_checkpoint.ZeroCheckpoint`.

    Args:
        groups: See :class:`memlm.optim.MemoryAdamW`.
        row_gradients: See there.
        **options: See there.

    Attributes:
        adamw: What ZeRO is to be made with: the dense groups, for the same fused kernel.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        row_gradients: Mapping[nn.Parameter, RowGradient] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(groups, row_gradients, **options)
        self.adamw = torch.optim.AdamW(
            [
                {name: group[name] for name in ("params", "lr", "betas", "eps", "weight_decay")}
                for group in self._groups("dense")
            ],
            fused=True,
        )
        self._zero: ZeroState | None = None

    @property
    def zero(self) -> ZeroState:
        """What has taken over :attr:`adamw`."""
        assert self._zero is not None
        return self._zero

    @zero.setter
    def zero(self, zero: ZeroState) -> None:
        self._zero = zero

    def _groups(self, kind: str) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["kind"] == kind]

    def _new_dense_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        return {}

    def states(self) -> Iterator[tuple[nn.Parameter, dict[str, Tensor]]]:
        """Every value table and what is kept for it."""
        for group in self._groups("memory"):
            for parameter in group["params"]:
                yield parameter, self.state[parameter]

    def dense_norm(self) -> Tensor:
        """Norm of the dense gradients: their mean over all ranks."""
        self._norm = self.zero.gradient_norm()
        return self._norm

    def clip_dense(self, max_norm: float, total: Tensor) -> None:
        """Scale the dense gradients down by what ``total`` is above a limit, in the step to come."""
        # ZeRO divides by its own norm over this.
        self.zero.clip(max_norm * (self._norm + 1e-6) / (total + 1e-6))

    def _step_all(self) -> None:
        """None where a dense gradient is not a number, which ZeRO refuses."""
        for own, group in zip(self.adamw.param_groups, self._groups("dense"), strict=True):
            own["lr"] = group["lr"]
        if not self.zero.step():
            rank_zero_warn("a dense gradient is not finite: this step changes nothing")
            return
        for group in self._groups("memory"):
            self._step_rows(group)
