"""The pool of values: the one owner of the value table, and of its row gradient."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from memlm.kernels import operators
from memlm.kernels.checks import check_dot, check_read
from memlm.memory.file_rows import FileRows
from memlm.memory.row_gradient import RowGradient

Operator = Callable[[Tensor, Tensor, Tensor, str, int, bool], Tensor]
"""``memlm::read`` or ``memlm::dot``."""


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
        start_at_zero: Whether the values are zero at first.

    Attributes:
        values: ``[S, V]`` parameter.
        gradient: The compact gradient of the values.
        observers: Functions called with ``(slots [N, L], weights [N, L])``, without gradient, at every read,
            and at every dot with weights of one. ``N`` is a multiple of the batch's tokens where a token
            reads in several parts. They run inside the forward pass, and interrupt a compiled graph: keep
            them free of host synchronisation.
        file_rows: If not None, rows are read from the values' file: see
            :func:`memlm.memory.mapped.bound_residency`.
    """

    def __init__(
        self,
        slots: int,
        value_dim: int,
        dtype: torch.dtype = torch.float32,
        kernels: str = "auto",
        alone: bool = False,
        start_at_zero: bool = False,
    ) -> None:
        super().__init__()
        self.start_at_zero = start_at_zero
        self.slots = slots
        self.value_dim = value_dim
        self.values = nn.Parameter(torch.empty(slots, value_dim, dtype=dtype))
        self.gradient = RowGradient(slots, kernels, alone)
        self.observers: list[Callable[[Tensor, Tensor], None]] = []
        self.file_rows: FileRows | None = None

    def initialise(self, residual_scale: float) -> None:
        """Values normal with std ``V^-1/2`` (released code of the paper), or zero.

        Of pre-values too, whose ``V`` is the model dim: dot products with a normalised input have std 1.
        """
        if self.start_at_zero:
            nn.init.zeros_(self.values)
        else:
            nn.init.normal_(self.values, std=self.value_dim**-0.5)

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
        return self._apply_operator(operators.read, slots, weights)

    def dot(self, slots: Tensor, hidden: Tensor) -> Tensor:
        """Dot product of each token with each of the rows that it reads.

        Args:
            slots: ``[N, L]`` int32 or int64, each in ``[0, S)``.
            hidden: ``[N, V]`` floating point.

        Returns:
            ``[N, L]`` fp32 (fp64 for fp64 values).

        Raises:
            ValueError: As for :meth:`read`, of hidden states instead of weights.
        """
        check_dot(self.values, slots, hidden)
        if self.observers:
            self._observe(slots, torch.ones(slots.shape, dtype=torch.float32, device=slots.device))
        return self._apply_operator(operators.dot, slots, hidden)

    @torch.compiler.disable
    def _observe(self, slots: Tensor, weights: Tensor) -> None:
        for observe in self.observers:
            observe(slots, weights)

    def _apply_operator(self, operator: Operator, slots: Tensor, factors: Tensor) -> Tensor:
        if self.file_rows is not None:
            kernels = self.gradient.kernels
            return self.file_rows.apply(
                lambda table, _, numbers, own: operator(table, numbers, own, kernels, 0, False),
                slots,
                factors,
            )
        compiling = torch.compiler.is_compiling()
        if compiling and self.values.requires_grad and not factors.requires_grad:
            return self._apply_outside(operator, slots, factors)
        numbers = (self.gradient.kernels, self.gradient.number)
        return operator(self.values, slots, factors, *numbers, compiling)

    @torch.compiler.disable
    def _apply_outside(self, operator: Operator, slots: Tensor, factors: Tensor) -> Tensor:
        """A compiler would drop the backward pass of an operator of which it needs no gradient."""
        return operator(self.values, slots, factors, self.gradient.kernels, self.gradient.number, False)

    def extra_repr(self) -> str:
        return f"slots={self.slots}, value_dim={self.value_dim}, dtype={self.values.dtype}"
