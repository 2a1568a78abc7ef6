"""The gradient of a value table: rows that were read, and their sums."""

import copy
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from memlm.kernels.backend import select
from memlm.kernels.interface import RowSums
from memlm.kernels.operators import register_sink


class Merging(Protocol):
    """Brings the row gradients of several ranks together; see :mod:`memlm.parallel.row_exchange`."""

    first: int
    first_column: int
    split: int

    def owned(self) -> Tensor:
        """The rows and columns that this rank updates, a DTensor."""
        ...

    def share(self, rows: Tensor) -> None:
        """Give what this rank has updated to those that hold it too, and take theirs."""
        ...

    def merge(self, own: RowSums | None) -> RowSums:
        """What the optimizer is to apply on this rank, of what each rank's reads sum up to.

        Takes ``own`` for itself: it may be overwritten.
        """
        ...

    def sum_over_owners(self, x: Tensor) -> Tensor:
        """Sum of a scalar over the ranks that apply other rows."""
        ...


class RowGradient:
    """The gradient of a value table, kept as the reads that caused it.

    A dense gradient would be as large as the table. Every backward pass of a read adds its slots, weights and
    output gradient here; layers that share the pool and the micro-batches of an accumulation add to the same
    list, and :meth:`compact` turns all of it, with one sort, into the distinct rows and their sums. A read
    that is alone is compacted at once, since one pass over its rows then gives the gradient of the read
    weights too. The optimizer takes the result in ``step`` and clears it in ``zero_grad``.

    Args:
        num_slots: ``S``, rows of the table.
        kernels: See :func:`memlm.kernels.backend.select`.
        alone: Whether one layer reads the table once in a step: its reads are compacted at once.

    Attributes:
        factor: Scalar that multiplies the gradient, None for 1: clipping changes it, not the rows.
        row_filter: ``[S]`` bool on the table's device: only these rows have a gradient, and move. None: all.
        merging: If not None, other ranks have gradients of the same rows, too.
        number: By which the operators know this object.
    """

    def __init__(self, num_slots: int, kernels: str = "auto", alone: bool = False) -> None:
        self.num_slots, self.kernels, self.alone = num_slots, kernels, alone
        self.factor: Tensor | None = None
        self.row_filter: Tensor | None = None
        self.merging: Merging | None = None
        self.number = register_sink(self)
        self._reads: list[tuple[Tensor, Tensor, Tensor]] = []
        self._compact: RowSums | None = None
        self._final: RowSums | None = None
        self._buffer: Tensor | None = None

    def __deepcopy__(self, memo: dict) -> "RowGradient":
        """The same gradient under a number of its own, to which the reads of a copied model are added."""
        twin = type(self)(self.num_slots, self.kernels, self.alone)
        twin.merging = self.merging
        for name in ("factor", "row_filter", "_reads", "_compact", "_final"):
            setattr(twin, name, copy.deepcopy(getattr(self, name), memo))
        return twin

    def __reduce__(self):
        return type(self), (self.num_slots, self.kernels, self.alone)

    def take(
        self,
        values: Tensor,
        slots: Tensor,
        weights: Tensor,
        grad_output: Tensor,
        need_weights: bool = True,
        borrowed: bool = False,
    ) -> Tensor | None:
        """Add the reads of one backward pass.

        Args:
            values: ``[S, V]``, the table.
            slots: ``[N, L]`` integer.
            weights: ``[N, L]``.
            grad_output: ``[N, V]`` gradient of the read's output.
            need_weights: Whether the gradient of the weights is wanted.
            borrowed: Whether the tensors may be overwritten after this call.

        Returns:
            Gradient of the weights, ``[N, L]`` fp32, or None.
        """
        assert self._final is None, "reads after the ranks' gradients were merged"
        backend = select(values.device, self.kernels)
        slots, weights, grad_output = slots.detach(), weights.detach(), grad_output.detach()
        nothing_yet = self._compact is None and not self._reads
        if self.alone and nothing_yet and need_weights and self.row_filter is None and slots.numel():
            buffer = self._storage(slots.numel(), values)
            grad_weights, self._compact = backend.read_backward(values, slots, weights, grad_output, buffer)
            return grad_weights
        weight_gradient = None
        if need_weights:
            weight_gradient = backend.read_weight_gradient(values, slots, grad_output)
        if borrowed:
            slots, weights, grad_output = slots.clone(), weights.clone(), grad_output.clone()
        if self.row_filter is not None:
            slots = torch.where(self.row_filter[slots.long()], slots, self.num_slots)
        self._reads.append((slots, weights, grad_output))
        return weight_gradient

    def compact(self) -> RowSums | None:
        """The distinct rows and their summed gradients, without :attr:`factor`; None if nothing was read.

        The result lies in storage that the next backward pass reuses.
        """
        if self._reads:
            parts: list[tuple[Tensor, Tensor, Tensor | int, Tensor]] = [
                (slots.flatten(), weights.flatten(), slots.shape[1], grad)
                for slots, weights, grad in self._reads
            ]
            if self._compact is not None:  # its rows are reads too, each of its own sum
                parts.append(self._as_reads(self._compact))
            slots, weights, tokens, grads = parts[0] if len(parts) == 1 else _joined(parts)
            buffer = self._storage(slots.shape[0], grads)
            backend = select(slots.device, self.kernels)
            self._compact = backend.row_sums(slots, weights, tokens, grads, self.num_slots, buffer)
            self._reads.clear()
        return self._compact

    def final(self) -> RowSums | None:
        """What the optimizer applies, without :attr:`factor`; None if nothing was read.

        That of :meth:`compact`, but where there are several ranks: then all of them must call this, and from
        then on until :meth:`clear` nothing more may be read. Once for all micro-batches of a step.
        """
        if self.merging is None:
            return self.compact()
        if self._final is None:
            self._final = self.merging.merge(self.compact())
            self._compact = None  # overwritten, it may be
        return self._final

    def _as_reads(self, sums: RowSums) -> tuple[Tensor, Tensor, Tensor | int, Tensor]:
        rows = sums.rows
        if sums.count is not None:
            beyond = torch.arange(rows.shape[0], device=rows.device) >= sums.count
            rows = rows.masked_fill(beyond, self.num_slots)
        weights = torch.ones(rows.shape, dtype=sums.sums.dtype, device=rows.device)
        if self.factor is not None:
            weights, self.factor = weights * self.factor, None
        return rows, weights, 1, sums.sums

    def norm(self) -> Tensor | None:
        """Euclidean norm of the gradient (fp32 scalar); None if nothing was read."""
        final = self.final()
        if final is None:
            return None
        squares = final.squares
        if squares.device.type == "cpu":
            # torch would split the sum among its threads, and round it by their number.
            total = torch.tensor(float(np.sum(squares.numpy(), dtype=np.float64)), dtype=torch.float64)
        else:
            total = squares.sum(dtype=torch.float64)
        if self.merging is not None:
            total = self.merging.sum_over_owners(total)
        norm = total.sqrt()
        return (norm if self.factor is None else norm * self.factor.abs()).to(squares.dtype)

    def scale_(self, factor: Tensor | float) -> None:
        """Multiply the gradient by a scalar, in place; no row is touched."""
        final = self.final()
        if final is not None:
            factor = torch.as_tensor(factor, dtype=final.sums.dtype, device=final.sums.device)
            self.factor = factor if self.factor is None else self.factor * factor

    def clear(self) -> None:
        """Forget the gradient."""
        self._reads.clear()
        self._compact = self._final = self.factor = None

    def _storage(self, reads: int, like: Tensor) -> Tensor | None:
        """Room for the sums of so many reads; kept, because fresh pages cost more than the sums do.

        Pages of it that no sum has touched take no memory on a CPU.
        """
        size = min(reads, self.num_slots) * like.shape[1]
        if like.dtype == torch.float64:
            return None
        if self._buffer is None or self._buffer.numel() < size or self._buffer.device != like.device:
            self._buffer = None
            self._buffer = torch.empty(size, dtype=torch.float32, device=like.device)
        return self._buffer


def _joined(
    parts: list[tuple[Tensor, Tensor, Tensor | int, Tensor]],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Slots, weights, tokens and output gradients of several lists of reads as those of one."""
    tokens, first = [], 0
    for slots, _, reads, grad in parts:
        rows = torch.arange(first, first + grad.shape[0], device=slots.device, dtype=torch.int32)
        tokens.append(rows.repeat_interleave(reads, output_size=slots.shape[0]))
        first += grad.shape[0]
    dtype = torch.promote_types(parts[0][3].dtype, torch.float32)
    return (
        torch.cat([slots for slots, *_ in parts]),
        torch.cat([weights.to(dtype) for _, weights, *_ in parts]),
        torch.cat(tokens),
        torch.cat([grad.to(dtype) for *_, grad in parts]),
    )
