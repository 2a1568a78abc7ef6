"""Products of grouped rows: copy tokens into groups, multiply each by a matrix of its own, add up again.

``M`` rows are sorted by expert; expert ``e`` has rows ``ends[e-1]`` to ``ends[e]``. Each row is a copy of a
token. All sums are taken in a fixed order, without atomics, and nothing waits for the device.
"""

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

_CACHED_BYTES = 2**19
"""Of each temporary on a CPU; a core's own cache holds one or two MB."""


class Groups(NamedTuple):
    """Which token each row is a copy of, and where the rows of an expert and of a token lie."""

    tokens: Tensor
    """``[M]`` int64: token of each row."""
    ends: Tensor
    """``[E]`` int32: end of each expert's rows."""
    rows: Tensor
    """``[M]`` int64: all rows, those of token 0 first."""
    starts: Tensor
    """``[N]`` int64: where in ``rows`` each token's begin."""

    def counts(self) -> Tensor:
        """Rows of each expert, ``[E]`` int64."""
        return self.ends.long().diff(prepend=self.ends.new_zeros(1, dtype=torch.int64))

    def unchosen(self) -> Tensor:
        """Tokens without rows, a scalar."""
        return (self.starts.diff(append=self.starts.new_full((1,), len(self.rows))) == 0).sum()


def copy_tokens(tokens: Tensor, groups: Groups) -> Tensor:
    """Rows ``[M, D]`` of tokens ``[N, D]``; its gradient is :func:`add_rows`."""
    return cast(Tensor, _CopyTokens.apply(tokens, groups))


def add_rows(rows: Tensor, groups: Groups) -> Tensor:
    """Tokens ``[N, D]``, each the sum of its rows ``[M, D]``, if any; its gradient is :func:`copy_tokens`."""
    return cast(Tensor, _AddRows.apply(rows, groups))


def product(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Each row times the matrix of its group.

    Args:
        rows: ``[M, I]``, sorted by group.
        matrices: ``[E, O, I]``, output first as in ``nn.Linear``.
        ends: ``[E]`` int32, end of each group's rows; the last is ``M``.

    Returns:
        ``[M, O]``.
    """
    if torch.compiler.is_compiling() and rows.dtype != torch.bfloat16:
        return _product_outside(rows, matrices, ends)
    if rows.dtype == torch.float64 or not rows.shape[0]:
        # torch's grouped product has no float64, and no gradient for zero rows.
        parts = rows.tensor_split(ends[:-1].tolist())
        return torch.cat([part @ matrix.T for part, matrix in zip(parts, matrices, strict=True)])
    return F.grouped_mm(rows, matrices.transpose(1, 2), offs=ends)


@torch.compiler.disable
def _product_outside(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """torch (2.13) can run grouped products of fp32 and not compile them."""
    return product(rows, matrices, ends)


def gated(gate_up: Tensor, weights: Tensor) -> Tensor:
    """``silu(gate) * up * weight`` of each row.

    Weights here, not on the rows that come out of an expert: these need not be kept for the gradient then.

    Args:
        gate_up: ``[M, 2F]``, the gate first.
        weights: ``[M]``; rounded to the dtype of ``gate_up``.

    Returns:
        ``[M, F]``.
    """
    if torch.compiler.is_compiling():  # a compiler fuses these itself
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up * weights.to(gate_up.dtype).unsqueeze(1)
    return cast(Tensor, _Gated.apply(gate_up, weights))


class _CopyTokens(torch.autograd.Function):
    """The gradient of indexing would add rows one by one, on a GPU in any order."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, groups: Groups) -> Tensor:
        ctx.save_for_backward(groups.rows, groups.starts)
        return tokens.index_select(0, groups.tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        rows, starts = ctx.saved_tensors
        return F.embedding_bag(rows, grad, starts, mode="sum"), None


class _AddRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, groups: Groups) -> Tensor:
        ctx.save_for_backward(groups.tokens)
        return F.embedding_bag(groups.rows, rows, groups.starts, mode="sum")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (tokens,) = ctx.saved_tensors
        return grad.index_select(0, tokens), None


class _Gated(torch.autograd.Function):
    """Keeps its inputs alone, and on a CPU works on few rows at a time.

    There a temporary too large for a cache, or for memory that is kept, costs more than the arithmetic.
    """

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up, weights)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up).mul_(weights.to(gate_up.dtype).unsqueeze(1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate_up, weights = ctx.saved_tensors
        inputs = (gate_up, weights.to(gate_up.dtype).unsqueeze(1), grad)
        results = (torch.empty_like(gate_up), torch.empty_like(weights))
        rows = max(len(grad), 1)
        if grad.device.type == "cpu":
            rows = max(_CACHED_BYTES // (grad.shape[1] * grad.itemsize), 1)
        for part in zip(*(tensor.split(rows) for tensor in (*inputs, *results)), strict=True):
            gate_up, weight, grad, grad_gate_up, grad_weights = part
            gate, up = gate_up.chunk(2, dim=-1)
            grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
            silu = F.silu(gate)
            grad_weights.copy_((grad * silu).mul_(up).sum(-1))
            torch.mul(silu.mul_(weight), grad, out=grad_up)
            torch.ops.aten.silu_backward.grad_input((grad * up).mul_(weight), gate, grad_input=grad_gate)
        return results


def _grouped_mm_flops(a: torch.Size, b: torch.Size, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """FLOPs of a grouped product, as if the groups filled the dimension that they share."""
    groups = a[0] if len(a) == len(b) == 3 else 1
    return 2 * groups * a[-2] * a[-1] * b[-1]


if torch.ops.aten._grouped_mm not in flop_registry:  # a later torch may have a formula of its own
    register_flop_formula(torch.ops.aten._grouped_mm)(_grouped_mm_flops)
