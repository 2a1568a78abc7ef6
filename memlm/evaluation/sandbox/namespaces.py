"""A system of its own for some processes: files, processes, network and shared memory of nobody else."""

import os
from collections.abc import Sequence

from memlm.evaluation.sandbox.libc import call, system_call

NOBODY = 65534
"""The user and group that the code runs as: no other user's, in whichever system it is."""

WORK = "/tmp"
"""The folder that can be written to."""

_NEW_MOUNTS, _NEW_NAMES, _NEW_IPC, _NEW_USERS, _NEW_PROCESSES, _NEW_NETWORK = (
    0x00020000,
    0x04000000,
    0x08000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
_READ_ONLY, _NO_SETUID, _NO_DEVICES, _NO_PROGRAMS, _REMOUNT, _BIND, _RECURSIVE, _PRIVATE = (
    1,
    2,
    4,
    8,
    32,
    4096,
    16384,
    1 << 18,
)
_DETACH = 2


def enter() -> None:
    """Put this process, and those that it forks, into namespaces of their own.

    Root needs no namespace of users for that and gets none, so that it can become `NOBODY` later; any other
    user is `NOBODY` within.

    Raises:
        OSError: The system does not allow it.
    """
    kinds = _NEW_MOUNTS | _NEW_NAMES | _NEW_IPC | _NEW_PROCESSES | _NEW_NETWORK
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        call("unshare", kinds)
        return
    call("unshare", kinds | _NEW_USERS)
    for file, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{NOBODY} {user} 1"),
        ("gid_map", f"{NOBODY} {group} 1"),
    ):
        with open(f"/proc/self/{file}", "w") as mapping:
            mapping.write(text)


def replace_root(place: str, readable: Sequence[str], hidden: Sequence[str], space: int) -> None:
    """Leave this process with a file system of some folders that can be read and one that can be written to.

    Args:
        place: An empty folder, over which it is built; on the disk it stays empty.
        readable: Folders that can be read; those that do not exist are passed over.
        hidden: Folders in those that are empty.
        space: Size of what can be written to `WORK`, which is in memory (bytes).

    Raises:
        OSError: The system does not allow it.
    """
    safe = _NO_SETUID | _NO_DEVICES
    call("mount", None, b"/", None, _RECURSIVE | _PRIVATE, None)
    _mount_memory(place, safe, "size=1m,mode=755")
    os.makedirs(place + WORK)
    options = f"size={space},nr_inodes=4096,mode=700,uid={NOBODY},gid={NOBODY}"
    _mount_memory(place + WORK, safe | _NO_PROGRAMS, options)
    for path in _outermost(readable):  # after it, for a Python may lie in it
        _show(path, place + path)
    for path in hidden:
        if os.path.isdir(place + path):
            _mount_memory(place + path, safe | _READ_ONLY, "size=4k,mode=755")
    os.makedirs(place + "/dev")
    os.close(os.open(place + os.devnull, os.O_CREAT, 0o600))
    call("mount", os.devnull.encode(), (place + os.devnull).encode(), None, _BIND, None)
    call("mount", None, place.encode(), None, _REMOUNT | _BIND | _READ_ONLY | safe, None)
    os.chdir(place)
    # The old root comes to lie over the new one, and is taken off.
    system_call("pivot_root", b".", b".")
    call("umount2", b".", _DETACH)
    os.chdir(WORK)


def _show(path: str, place: str) -> None:
    """Shows a folder at a place, read-only; a symbolic link as such."""
    os.makedirs(os.path.dirname(place), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), place)
    elif os.path.isdir(path):
        os.makedirs(place, exist_ok=True)
        call("mount", path.encode(), place.encode(), None, _BIND, None)
        # What a mount forbids already must be said again: without it, the kernel refuses.
        kept = os.statvfs(place).f_flag & (_NO_PROGRAMS | os.ST_NOATIME | os.ST_NODIRATIME | os.ST_RELATIME)
        relative = 1 << 21 if kept & os.ST_RELATIME else 0
        flags = (kept & ~os.ST_RELATIME) | relative | _NO_SETUID | _NO_DEVICES
        call("mount", None, place.encode(), None, _REMOUNT | _BIND | _READ_ONLY | flags, None)


def _mount_memory(place: str, flags: int, options: str) -> None:
    call("mount", b"tmpfs", place.encode(), b"tmpfs", flags, options.encode())


def _outermost(paths: Sequence[str]) -> list[str]:
    """Those that exist and are in no other, each once, in order of length."""
    kept: list[str] = []
    for path in sorted({os.path.normpath(path) for path in paths if os.path.lexists(path)}, key=len):
        if not any(path.startswith(other + "/") for other in kept):
            kept.append(path)
    return kept
