"""The pool of values: the one owner of the value table, and of its row gradient."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from memlm.kernels import operators
from memlm.kernels.checks import check_read
from memlm.memory.row_gradient import RowGradient


class MemoryPool(nn.Module):
    """The values of one or more memory layers (Memory Layers at Scale, section 3.1, "shared memory").

    The pool belongs to the model; layers receive it when they are called, so that the table has one
    owner, one state-dict key and one gradient. ``values.grad`` stays None: the gradient is
    :attr:`gradient`, a list of touched rows, and :class:`memlm.optim.MemoryAdamW` consumes it.

    Args:
        slots: ``S``, rows of the table.
        value_dim: ``V``, elements of a row.
        dtype: Of the values: float32, bfloat16 (or float64, by the reference kernels).
        kernels: See :func:`memlm.kernels.backend.select`.
        alone: Whether just one layer reads this pool.

    Attributes:
        values: ``[S, V]`` parameter.
        gradient: The compact gradient of the values.
        observers: Functions called with ``(slots [N, L], weights [N, L])``, without gradient, at every
            read. They run inside the forward pass, and interrupt a compiled graph: keep them free of host
            synchronisation.
    """

    def __init__(
        self,
        slots: int,
        value_dim: int,
        dtype: torch.dtype = torch.float32,
        kernels: str = "auto",
        alone: bool = False,
    ) -> None:
        super().__init__()
        self.slots = slots
        self.value_dim = value_dim
        self.values = nn.Parameter(torch.empty(slots, value_dim, dtype=dtype))
        self.gradient = RowGradient(slots, kernels, alone)
        self.observers: list[Callable[[Tensor, Tensor], None]] = []

    def read(self, slots: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum of the rows that each token reads.

        Args:
            slots: ``[N, L]`` int32 or int64, each in ``[0, S)``.
            weights: ``[N, L]`` floating point.

        Returns:
            ``[N, V]`` in the dtype of the values.

        Raises:
            ValueError: Shapes, types or devices do not fit. Slots out of range and weights that are not
                finite are found on a CPU, and on other devices only if ``MEMLM_DEBUG`` is 1, since looking
                waits for the device.
        """
        check_read(self.values, slots, weights)
        if self.observers:
            self._observe(slots.detach(), weights.detach())
        if torch.compiler.is_compiling() and self.values.requires_grad and not weights.requires_grad:
            return self._read_outside(slots, weights)
        return operators.read(
            self.values,
            slots,
            weights,
            self.gradient.kernels,
            self.gradient.number,
            torch.compiler.is_compiling(),
        )

    @torch.compiler.disable
    def _observe(self, slots: Tensor, weights: Tensor) -> None:
        for observe in self.observers:
            observe(slots, weights)

    @torch.compiler.disable
    def _read_outside(self, slots: Tensor, weights: Tensor) -> Tensor:
        """A compiler would drop the backward pass of a read of which it needs no gradient."""
        return operators.read(self.values, slots, weights, self.gradient.kernels, self.gradient.number, False)

    def extra_repr(self) -> str:
        return f"slots={self.slots}, value_dim={self.value_dim}, dtype={self.values.dtype}"
