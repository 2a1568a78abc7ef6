"""The Triton backend: CUDA tensors, or CPU tensors under Triton's interpreter. Imports need triton."""

from memlm.kernels.triton_reads import read_weight_gradient, weighted_read
from memlm.kernels.triton_row_sums import read_backward, row_sums
from memlm.kernels.triton_search import best_slots
from memlm.kernels.triton_update import update_rows

__all__ = [
    "best_slots",
    "read_backward",
    "read_weight_gradient",
    "row_sums",
    "update_rows",
    "weighted_read",
]
