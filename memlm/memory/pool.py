"""The pool of values: the one owner of the value table, and of its row gradient."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from memlm.kernels import reference


class RowGradient:
    """The gradient of a value table, kept as the reads that caused it.

    A dense gradient would be as large as the table. Every backward pass of a read adds its slots,
    weights and output gradient here; layers that share the pool and the micro-batches of an
    accumulation add to the same list, and :meth:`compact` turns all of it, with one sort, into the
    distinct rows and their sums. The optimizer reads it in ``step`` and clears it in ``zero_grad``.
    """

    def __init__(self) -> None:
        self._reads: list[tuple[Tensor, Tensor, Tensor]] = []
        self._compact: tuple[Tensor, Tensor] | None = None

    def add(self, slots: Tensor, weights: Tensor, grad_output: Tensor) -> None:
        """Add the reads of one backward pass.

        Args:
            slots: ``[N, L]`` integer.
            weights: ``[N, L]``.
            grad_output: ``[N, V]`` gradient of the read's output.
        """
        if self._compact is not None:  # somebody looked at it between two micro-batches
            rows, sums = self._compact
            self._reads.append(
                (rows.unsqueeze(1), torch.ones_like(rows, dtype=sums.dtype).unsqueeze(1), sums)
            )
            self._compact = None
        # Detached: the weights would keep the graph of the whole forward pass alive until zero_grad.
        self._reads.append((slots, weights.detach(), grad_output.detach()))

    def compact(self) -> tuple[Tensor, Tensor] | None:
        """The distinct rows ``[U]`` int64 and their summed gradients ``[U, V]``; None if nothing was read."""
        if self._compact is None and self._reads:
            slots, weights, grads = zip(*self._reads, strict=True)
            self._reads.clear()
            # Read m belongs to row tokens[m] of the concatenated output gradients.
            tokens, first = [], 0
            for part in slots:
                rows = torch.arange(first, first + part.shape[0], device=part.device)
                tokens.append(rows.repeat_interleave(part.shape[1]))
                first += part.shape[0]
            self._compact = reference.row_gradients(
                torch.cat([part.flatten() for part in slots]),
                torch.cat([part.flatten() for part in weights]),
                torch.cat(tokens),
                torch.cat(grads),
            )
        return self._compact

    def norm(self) -> Tensor | None:
        """Euclidean norm of the gradient (scalar); None if nothing was read."""
        compact = self.compact()
        return None if compact is None else torch.linalg.vector_norm(compact[1])

    def scale_(self, factor: Tensor | float) -> None:
        """Multiply the gradient by a scalar, in place."""
        compact = self.compact()
        if compact is not None:
            compact[1].mul_(factor)

    def clear(self) -> None:
        """Forget the gradient."""
        self._reads.clear()
        self._compact = None


class _Read(torch.autograd.Function):
    """Weighted read whose gradient for the values goes to a RowGradient instead of ``values.grad``."""

    @staticmethod
    def forward(ctx, values: Tensor, slots: Tensor, weights: Tensor, gradient: RowGradient) -> Tensor:
        ctx.save_for_backward(values, slots, weights)
        ctx.gradient = gradient
        return reference.weighted_read(values, slots, weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output: Tensor):
        values, slots, weights = ctx.saved_tensors
        grad_output = grad_output.contiguous()
        if ctx.needs_input_grad[0]:
            ctx.gradient.add(slots, weights, grad_output)
        grad_weights = None
        if ctx.needs_input_grad[2]:
            grad_weights = reference.read_weight_gradient(values, slots, grad_output).to(weights.dtype)
        return None, None, grad_weights, None


class MemoryPool(nn.Module):
    """The values of one or more memory layers (Memory Layers at Scale, section 3.1, "shared memory").

    The pool belongs to the model; layers receive it when they are called, so that the table has one
    owner, one state-dict key and one gradient. ``values.grad`` stays None: the gradient is
    :attr:`gradient`, a list of touched rows, and :class:`memlm.optim.MemoryAdamW` consumes it.

    Args:
        slots: ``S``, rows of the table.
        value_dim: ``V``, elements of a row.

    Attributes:
        values: ``[S, V]`` parameter.
        gradient: The compact gradient of the values.
        observers: Functions called with ``(slots [N, L], weights [N, L])``, without gradient, at every
            read. They run inside the forward pass: keep them free of host synchronisation.
    """

    def __init__(self, slots: int, value_dim: int) -> None:
        super().__init__()
        self.slots = slots
        self.value_dim = value_dim
        self.values = nn.Parameter(torch.empty(slots, value_dim))
        self.gradient = RowGradient()
        self.observers: list[Callable[[Tensor, Tensor], None]] = []

    # The gradient of a read is appended to a Python list, which a compiled graph cannot hold.
    @torch.compiler.disable
    def read(self, slots: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum of the rows that each token reads.

        Args:
            slots: ``[N, L]`` int64, each in ``[0, S)``.
            weights: ``[N, L]``.

        Returns:
            ``[N, V]`` in the dtype of the values.
        """
        for observe in self.observers:
            observe(slots.detach(), weights.detach())
        return _Read.apply(self.values, slots, weights, self.gradient)

    def extra_repr(self) -> str:
        return f"slots={self.slots}, value_dim={self.value_dim}"
