"""The CPU backend, numba kernels: see :class:`memlm.kernels.interface.Backend`."""

from memlm.kernels.cpu_reads import read_backward, read_weight_gradient, row_sums, weighted_read
from memlm.kernels.cpu_search import best_slots
from memlm.kernels.cpu_update import update_rows

__all__ = [
    "best_slots",
    "read_backward",
    "read_weight_gradient",
    "row_sums",
    "update_rows",
    "weighted_read",
]
