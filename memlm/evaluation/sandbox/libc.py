"""Calls of the Linux kernel that Python has no function for."""

import ctypes
import os
import platform

NUMBERS = {  # of system calls, on x86_64 and on aarch64
    "pivot_root": (155, 41),
    "landlock_create_ruleset": (444, 444),
    "landlock_add_rule": (445, 445),
    "landlock_restrict_self": (446, 446),
}
MACHINES = ("x86_64", "aarch64")
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38

_libc = ctypes.CDLL(None, use_errno=True)


def call(function: str, *arguments: int | bytes | ctypes.Array | ctypes.Structure | None) -> int:
    """Call a function of the C library.

    Raises:
        OSError: It failed; the message begins with the function's name.
    """
    ctypes.set_errno(0)
    result = getattr(_libc, function)(*map(_argument, arguments))
    if result == -1:
        error = ctypes.get_errno()
        raise OSError(error, f"{function}: {os.strerror(error)}")
    return result


def system_call(name: str, *arguments: int | bytes | ctypes.Array | ctypes.Structure | None) -> int:
    """Make a system call of `NUMBERS`, for those that the C library has no function for.

    Raises:
        OSError: It failed.
    """
    try:
        return call("syscall", NUMBERS[name][machine()], *arguments)
    except OSError as error:
        raise OSError(error.errno, f"{name}: {os.strerror(error.errno or 0)}") from None


def machine() -> int:
    """The index of this machine's kind in `MACHINES`.

    Raises:
        OSError: It is another kind of machine.
    """
    if platform.machine() not in MACHINES:
        raise OSError(0, f"system calls are known of {' and '.join(MACHINES)}, not {platform.machine()}")
    return MACHINES.index(platform.machine())


def die_with_parent() -> None:
    """The kernel kills this process when its parent ends."""
    call("prctl", PR_SET_PDEATHSIG, 9, 0, 0, 0)


def drop_capabilities() -> None:
    """Give up all privileges, those over this process's own namespaces included, for good."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    call("capset", header, (ctypes.c_uint32 * 6)())
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def _argument(value: int | bytes | ctypes.Array | ctypes.Structure | None) -> object:
    if isinstance(value, int):
        return ctypes.c_long(value)  # a plain int would be passed as 32 bits
    return ctypes.byref(value) if isinstance(value, (ctypes.Array, ctypes.Structure)) else value
