"""Processes that must not outlive the one that started them."""

import ctypes
import os
import signal
import sys

_SET_PARENT_DEATH_SIGNAL = 1


def end_with_parent(parent: int) -> None:
    """Have this process killed as soon as its parent has ended, however that came about.

    Args:
        parent: The parent's process id.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    end_without(parent)


def end_without(parent: int) -> None:
    """End if the parent is gone: the signal comes only to those who asked for it before, on Linux alone."""
    if os.getppid() != parent:
        os._exit(1)
