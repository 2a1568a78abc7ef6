"""What every backend offers: six functions on the value table, and the types they exchange.

Shape letters: ``N`` tokens, ``L`` reads of a token (heads * reads per head), ``S`` slots, ``V`` value dim,
``M`` reads in all, ``U`` distinct rows among them, ``H`` heads, ``K0`` and ``K1`` half keys of the two sets,
``R`` reads per head. No operation allocates memory of the table's size: temporaries grow with the reads.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

Method = Literal["adamw", "adamw_rowwise", "sgd"]


class RowSums(NamedTuple):
    """The compact gradient of a table: the rows touched and their summed gradients.

    A backend that must not wait for its device gives buffers of the largest possible size, and says on the
    device how many rows of them count.
    """

    rows: Tensor
    """``[U]`` int32 or int64, distinct, ascending; beyond ``count`` undefined."""
    sums: Tensor
    """``[U, V]`` fp32 (fp64 for fp64 tables); beyond ``count`` undefined."""
    squares: Tensor
    """``[U]`` sum of squares of each row of ``sums``, in its dtype; beyond ``count`` zero."""
    count: Tensor | None = None  # type: ignore[assignment]  # hides tuple.count, which nobody wants of this
    """Scalar int64 on the device: how many rows count. None: all."""


@dataclass(frozen=True)
class RowUpdate:
    """One step of the row optimizer: what is the same for all rows.

    With ``p`` the row, ``g`` its gradient times the clipping factor, ``t`` the optimizer's step:

    - decay, where the state has ``decayed_at``: ``p *= exp(decay_log - decayed_at[row])``, the product of
      ``1 - lr_s * weight_decay`` over all steps ``s`` since the row last moved, this one included;
    - ``adamw``: ``m = beta1^d m + (1 - beta1) g``, ``v = beta2^d v + (1 - beta2) g^2``,
      ``p -= lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)``. ``d`` is 1 (lazy moments), or
      ``t - last_step[row]`` where the state has ``last_step`` (moments caught up). Without ``exp_avg`` in
      the state ``m = g``, and ``beta1`` must be 0;
    - ``adamw_rowwise``: the same, but ``v`` is one number a row, the mean of ``g^2`` over its elements;
    - ``sgd``: ``p -= lr * g``.

    A bf16 table takes the result by stochastic rounding (see :func:`memlm.kernels.update.rounding_bits`), or,
    where the state has ``master``, keeps ``p`` there in fp32 and rounds to nearest.
    """

    method: Method
    step: int
    """``t``, from 1."""
    lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    decay_log: float = 0.0
    """Sum of ``log(1 - lr_s * weight_decay)`` over all steps so far, this one included."""
    seed: int = 0
    """Of the stochastic rounding; below 2^63."""
    first_row: int = 0
    """Where the rows of ``values`` lie in a larger table, for the stochastic rounding."""
    first_column: int = 0
    """The same of their columns."""


class RowState(NamedTuple):
    """State of the row optimizer; None where the options need none."""

    exp_avg: Tensor | None = None
    """``[S, V]`` fp32 first moments."""
    exp_avg_sq: Tensor | None = None
    """``[S, V]`` (adamw) or ``[S]`` (adamw_rowwise) fp32 second moments."""
    last_step: Tensor | None = None
    """``[S]`` int32: the step that last moved the row, 0 for none."""
    decayed_at: Tensor | None = None
    """``[S]`` fp64: the value of ``decay_log`` when the row last moved."""
    master: Tensor | None = None
    """``[S, V]`` fp32 values of a bf16 table."""


class Backend(Protocol):
    """The functions of a backend; each is a module that has them. :mod:`memlm.kernels.reference` is the twin
    that all others are tested against."""

    def weighted_read(self, values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        """``out[n] = sum_l weights[n, l] * values[slots[n, l]]``.

        Args:
            values: ``[S, V]`` floating point.
            slots: ``[N, L]`` int32 or int64, each in ``[0, S)``.
            weights: ``[N, L]`` floating point.

        Returns:
            ``[N, V]`` in the dtype of ``values``, accumulated in at least fp32.
        """
        ...

    def read_weight_gradient(self, values: Tensor, slots: Tensor, grad_output: Tensor) -> Tensor:
        """Gradient of the read with respect to its weights, ``<grad_output[n], values[slots[n, l]]>``.

        Returns:
            ``[N, L]`` fp32 (fp64 for fp64 values).
        """
        ...

    def row_sums(
        self,
        slots: Tensor,
        weights: Tensor,
        tokens: Tensor | int,
        grad_output: Tensor,
        num_slots: int,
        buffer: Tensor | None = None,
    ) -> RowSums:
        """Gradient of the read with respect to the values, for the rows read and no others.

        The reads are sorted by slot, stably: the order of summation, and with it every bit of the result,
        depends on the reads alone, not on threads or scheduling.

        Args:
            slots: ``[M]`` int32 or int64 in ``[0, num_slots]``; ``num_slots`` marks a read to leave out.
            weights: ``[M]`` floating point.
            tokens: ``[M]`` the row of ``grad_output`` of each read; or ``L``, if it is ``m // L``.
            grad_output: ``[N, V]`` floating point.
            num_slots: ``S``.
            buffer: 1-d fp32 storage that ``sums`` may lie in, if it is large enough (saves the page faults of
                a fresh one).
        """
        ...

    def read_backward(
        self,
        values: Tensor,
        slots: Tensor,
        weights: Tensor,
        grad_output: Tensor,
        buffer: Tensor | None = None,
    ) -> tuple[Tensor, RowSums]:
        """``read_weight_gradient`` and ``row_sums`` of one read, in one pass over the distinct rows.

        Args:
            values: ``[S, V]``.
            slots: ``[N, L]``, each in ``[0, S)``.
            weights: ``[N, L]``.
            grad_output: ``[N, V]``.
            buffer: As in ``row_sums``.
        """
        ...

    def best_slots(self, first: Tensor, second: Tensor, reads: int) -> tuple[Tensor, Tensor]:
        """The ``R`` best sums of one half score of each set.

        Args:
            first: ``[H, N, K0]`` half scores of the first set, without NaN.
            second: ``[H, N, K1]``.
            reads: ``R``, at most ``K0`` and at most ``K1``.

        Returns:
            slots: ``[N, H, R]``, ``i * K1 + j``, by descending sum; int32 if ``K0 * K1 < 2^31``, else int64.
            sums: ``[N, H, R]`` fp32 (fp64 for fp64 scores). Within a set equal half scores rank by index;
                among equal sums the pair ``(i, j)`` of lower ranks in row-major order is first.
        """
        ...

    def update_rows(
        self, values: Tensor, state: RowState, gradient: RowSums, factor: Tensor | None, update: RowUpdate
    ) -> None:
        """Move the rows of ``gradient``, in place; all others keep every bit of value and state.

        Args:
            values: ``[S, V]`` fp32, bf16 (fp64 where the backend can).
            state: Tensors on the device of ``values``.
            gradient: As :meth:`row_sums` gives it.
            factor: Scalar on the device, multiplies the gradient (clipping); None for 1.
            update: Everything else.
        """
        ...


def slot_dtype(slots: int) -> torch.dtype:
    """The integer type that slots, and the mark of a read to leave out, fit in."""
    return torch.int32 if slots < 2**31 else torch.int64
