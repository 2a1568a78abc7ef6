"""Progress bars, for terminals and for logs."""

import sys
import threading
from typing import Any

from tqdm import tqdm


class _Bar(tqdm):
    """A bar whose lock is its process's own.

    tqdm's is shared with forked processes: one that is killed while it holds it leaves all others waiting.
    """


_Bar.set_lock(threading.RLock())


def progress_bar(total: int, done: int, name: str, unit: str) -> "tqdm[Any]":
    """A bar with the time left. Where nobody looks at a terminal it leaves a line each half minute.

    Args:
        total: What there is to do; 0 if that is not known.
        done: How much of it was done before.
        name: What is being done.
        unit: Of the numbers, such as ``B``.
    """
    _Bar.monitor_interval = 0  # its thread would be in the way of forking
    return _Bar(
        total=total or None,
        initial=done,
        desc=name,
        unit=unit,
        unit_scale=True,
        mininterval=0.2 if sys.stderr.isatty() else 30,
    )
