"""Calls of numba kernels: on as many threads as torch has, and never two at once where that crashes."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numba
import torch

# Numba's own pool, its last resort where neither TBB nor OpenMP is found, aborts the process when two
# threads of Python launch kernels at the same time; the backward pass runs in a thread of its own.
_workqueue = threading.Lock()


@contextmanager
def torch_threads() -> Iterator[None]:
    """Run the numba kernels inside on as many threads as torch would use.

    Numba's count is one of the calling thread and knows nothing of ``torch.set_num_threads``, nor of the
    single thread that torch gives a worker of a data loader.
    """
    # Launches the pool, too: only then is its kind known.
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
    with _workqueue if numba.threading_layer() == "workqueue" else nullcontext():
        yield
