"""Which files remain: a Landlock ruleset, the kernel's own file sandbox (Linux 5.13 and later)."""

import ctypes
import os
import stat
from collections.abc import Sequence

from memlm.evaluation.sandbox.libc import system_call

LEAST_VERSION = 3
"""The first that also governs the truncation of files (Linux 6.2)."""

_WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 1, 1 << 2, 1 << 3
_REMOVE_DIR, _REMOVE_FILE, _MAKE_DIR, _MAKE_REG, _MAKE_SYM, _REFER, _TRUNCATE = (
    1 << bit for bit in (4, 5, 7, 8, 12, 13, 14)
)
_READ = _READ_FILE | _READ_DIR
_WRITE = _WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _MAKE_SYM | _REFER | _TRUNCATE
_OF_FILES = _WRITE_FILE | _READ_FILE | _TRUNCATE


def restrict(readable: Sequence[str], writable: Sequence[str]) -> None:
    """Refuse this process all other files, TCP, and what it could signal or connect to, for good.

    Args:
        readable: Files, and folders with all that is in them; those that do not exist are passed over.
        writable: Likewise; in these files can be made, too.

    Raises:
        OSError: The kernel has no Landlock, or too old a one.
    """
    version = system_call("landlock_create_ruleset", None, 0, 1)
    if version < LEAST_VERSION:
        raise OSError(0, f"Landlock has version {version}; expected at least {LEAST_VERSION} (Linux 6.2)")
    rights = (1 << (16 if version >= 5 else 15)) - 1
    network = 0b11 if version >= 4 else 0  # binding and connecting TCP
    scope = 0b11 if version >= 6 else 0  # abstract UNIX sockets and signals
    attributes = [rights, network, scope]
    size = 8 * (3 if version >= 6 else 2 if version >= 4 else 1)
    ruleset = system_call("landlock_create_ruleset", (ctypes.c_uint64 * 3)(*attributes), size, 0)
    for paths, allowed in ((readable, _READ), (writable, _READ | _WRITE)):
        for path in paths:
            _allow(ruleset, path, allowed)
    system_call("landlock_restrict_self", ruleset, 0)
    os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    if not stat.S_ISDIR(os.fstat(beneath).st_mode):
        rights &= _OF_FILES
    system_call("landlock_add_rule", ruleset, 1, _Beneath(rights, beneath), 0)
    os.close(beneath)


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("rights", ctypes.c_uint64), ("folder", ctypes.c_int32)]
