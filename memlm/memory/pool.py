"""The pool of values: the one owner of the value table, and of its row gradient."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from memlm.kernels import operators
from memlm.kernels.checks import check_dot, check_read
from memlm.kernels.interface import slot_dtype
from memlm.memory.exchange import Alone, Arriving, Exchange, Pending, Sent
from memlm.memory.file_rows import FileRows
from memlm.memory.row_gradient import RowGradient
from memlm.memory.value_expansion import expanded

_DRAWN_AT_ONCE = 1 << 22
"""Elements of the initial values; 16 rows or a multiple of them, for torch draws numbers by 16."""

_without_memory: ContextVar[bool] = ContextVar("without_memory", default=False)


@contextmanager
def values_without_memory() -> Iterator[None]:
    """Within it, pools are made with values on the meta device: for a model that is to be split."""
    token = _without_memory.set(True)
    try:
        yield
    finally:
        _without_memory.reset(token)


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
        values: ``[S, V]`` parameter; a DTensor where ranks hold parts of it.
        gradient: The compact gradient of the values.
        observers: Functions called with ``(slots [N, L], weights [N, L])``, without gradient, at every read,
            and at every dot with weights of one. ``N`` is a multiple of the batch's tokens where a token
            reads in several parts. They run inside the forward pass, and interrupt a compiled graph: keep
            them free of host synchronisation.
        exchange: If not None, this rank holds some columns of the values, and others the others.
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
        self._drawn_in = dtype  # whatever they are converted to later
        self.slots = slots
        self.value_dim = value_dim
        device = "meta" if _without_memory.get() else None
        self.values = nn.Parameter(torch.empty(slots, value_dim, dtype=dtype, device=device))
        self.gradient = RowGradient(slots, kernels, alone)
        self.observers: list[Callable[[Tensor, Tensor], None]] = []
        self.exchange: Exchange | None = None
        self.file_rows: FileRows | None = None

    @property
    def table(self) -> Tensor:
        """What this rank holds of the values, ``[S, V / G]``: all of them, unless they are split."""
        if self.exchange is None:
            return self.values
        values: Any = self.values
        # A leaf: through the DTensor, autograd would make a gradient of the table's size.
        return values.detach().to_local().requires_grad_(values.requires_grad)

    def initialise(self, residual_scale: float) -> None:
        """Values normal with std ``V^-1/2`` (released code of the paper), or zero.

        Of pre-values too, whose ``V`` is the model dim: dot products with a normalised input have std 1.
        Drawn by blocks of rows, of which a rank that holds some columns keeps those: each rank has its part
        of the same table, and none the whole.
        """
        table = self.table.detach()
        if table.is_meta:  # nothing to fill, in very many blocks
            return
        if self.start_at_zero:
            table.zero_()
            return
        width = table.shape[1]
        first = 0 if self.exchange is None else self.exchange.rank * width
        rows = max(_DRAWN_AT_ONCE // self.value_dim // 16 * 16, 16)
        for start in range(0, self.slots, rows):
            block = table[start : start + rows]
            drawn = torch.empty(len(block), self.value_dim, dtype=self._drawn_in, device=table.device)
            block.copy_(drawn.normal_(std=self.value_dim**-0.5)[:, first : first + width])

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
        return self.start_read(self.send(slots), weights).finish()

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
        return self.start_dot(self.send(slots), hidden).finish()

    def send(self, slots: Tensor, expansion: int = 1) -> Sent:
        """Begin to send slots to the ranks that hold other columns.

        Args:
            slots: ``[N, L]`` int32 or int64, each in ``[0, E * S)``. What is sent serves all pools of as many
                slots over the same ranks.
            expansion: ``E``, virtual tables; see :mod:`memlm.memory.value_expansion`.
        """
        if self.exchange is None:
            return Sent(slots, Alone().gather(slots), self.slots, expansion)
        arriving = self.exchange.gather(slots.to(slot_dtype(self.slots * expansion)))
        return Sent(slots, arriving, self.slots, expansion)

    def start_read(self, slots: Sent, weights: Tensor) -> Pending:
        """Begin a :meth:`read`; until its end there is time for other work.

        Args:
            slots: Of :meth:`send`.
            weights: As for :meth:`read`.

        Returns:
            Of ``[N * E, V]``; the virtual tables of a token are neighbours.

        Raises:
            ValueError: As :meth:`read`.
        """
        check_read(self.values, slots.rows_of(slots.own), weights)
        if self.observers:
            self._observe(*expanded(slots.own, weights.detach(), self.slots, slots.expansion))
        exchange = self.exchange or Alone()
        factors = exchange.gather(weights)

        def answer() -> Arriving:
            reads = expanded(slots.of_all(), factors(), self.slots, slots.expansion)
            return exchange.columns_to_tokens(self._apply_operator(operators.read, *reads))

        return Pending(answer)

    def start_dot(self, slots: Sent, hidden: Tensor) -> Pending:
        """Begin a :meth:`dot`; until its end there is time for other work.

        Args:
            slots: Of :meth:`send`; of virtual tables' the rows count.
            hidden: As for :meth:`dot`.

        Raises:
            ValueError: As :meth:`dot`.
        """
        rows = slots.rows_of(slots.own)
        check_dot(self.values, rows, hidden)
        if self.observers:
            self._observe(rows, torch.ones(rows.shape, dtype=torch.float32, device=rows.device))
        exchange = self.exchange or Alone()
        factors = exchange.tokens_to_columns(hidden)

        def answer() -> Arriving:
            products = self._apply_operator(operators.dot, slots.rows_of(slots.of_all()), factors())
            return exchange.sum_to_tokens(products)

        return Pending(answer)

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
        return operator(self.table, slots, factors, *numbers, compiling)

    @torch.compiler.disable
    def _apply_outside(self, operator: Operator, slots: Tensor, factors: Tensor) -> Tensor:
        """A compiler would drop the backward pass of an operator of which it needs no gradient."""
        return operator(self.table, slots, factors, self.gradient.kernels, self.gradient.number, False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MemoryPool":
        """``module.to(...)`` and the like: a part of a table stays where it was placed, in its dtype."""
        return self if self.exchange is not None else super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"slots={self.slots}, value_dim={self.value_dim}, dtype={self.values.dtype}"
