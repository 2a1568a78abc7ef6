"""The system calls that remain: a seccomp filter which lists what one process needs for itself alone."""

import ctypes
import errno

from memlm.evaluation.sandbox.libc import MACHINES, PR_SET_SECCOMP, call, machine

ALLOWED = """
read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, preadv 295 69,
pwritev 296 70, preadv2 327 286, pwritev2 328 287, lseek 8 62, sendfile 40 71, copy_file_range 326 285,
open 2 -, openat 257 56, creat 85 -, close 3 57, close_range 436 436, dup 32 23, dup2 33 -, dup3 292 24,
pipe 22 -, pipe2 293 59, ftruncate 77 46, truncate 76 45, fallocate 285 47, fsync 74 82, fdatasync 75 83,
flock 73 32, stat 4 -, fstat 5 80, lstat 6 -, newfstatat 262 79, statx 332 291, statfs 137 43,
fstatfs 138 44, access 21 -, faccessat 269 48, faccessat2 439 439, getdents 78 -, getdents64 217 61,
readlink 89 -, readlinkat 267 78, getcwd 79 17, chdir 80 49, fchdir 81 50, umask 95 166, mkdir 83 -,
mkdirat 258 34, rmdir 84 -, unlink 87 -, unlinkat 263 35, rename 82 -, renameat 264 38, renameat2 316 276,
link 86 -, linkat 265 37, symlink 88 -, symlinkat 266 36, brk 12 214, mmap 9 222, munmap 11 215,
mprotect 10 226, mremap 25 216, madvise 28 233, msync 26 227, membarrier 324 283, poll 7 -, ppoll 271 73,
select 23 -, pselect6 270 72, epoll_create 213 -, epoll_create1 291 20, epoll_ctl 233 21,
epoll_wait 232 -, epoll_pwait 281 22, eventfd 284 -, eventfd2 290 19, futex 202 98,
set_robust_list 273 99, get_robust_list 274 100, set_tid_address 218 96, rseq 334 293, sched_yield 24 124,
sched_getaffinity 204 123, exit 60 93, exit_group 231 94, restart_syscall 219 128, rt_sigaction 13 134,
rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigsuspend 130 133, rt_sigpending 127 136,
rt_sigtimedwait 128 137, sigaltstack 131 132, pause 34 -, alarm 37 -, setitimer 38 103, getitimer 36 102,
nanosleep 35 101, clock_nanosleep 230 115, clock_gettime 228 113, clock_getres 229 114,
gettimeofday 96 169, time 201 -, times 100 153, getpid 39 172, getppid 110 173, gettid 186 178,
getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177, getresuid 118 148, getresgid 120 150,
getgroups 115 158, getpgrp 111 -, getpgid 121 155, getsid 124 156, getrlimit 97 163, getrusage 98 165,
sysinfo 99 179, uname 63 160, getcpu 309 168, getrandom 318 278, wait4 61 260, waitid 247 95
"""
"""Each with its number on x86_64 and on aarch64.

Not among them, so that they fail with "Operation not permitted": whatever makes sockets, processes or memory
that no limit counts (memfd, System V), runs programs, looks into or signals other processes, changes owners,
modes and times of files (which Landlock does not govern), mounts, makes namespaces, or raises limits.
"""

CONDITIONAL = {
    "clone": (56, 220),
    "kill": (62, 129),
    "tgkill": (234, 131),
    "fcntl": (72, 25),
    "ioctl": (16, 29),
    "prctl": (157, 167),
    "prlimit64": (302, 261),
    "clone3": (435, 435),
    "openat2": (437, 437),
}
"""Those that depend on their arguments, or that must seem not to exist: the C library then takes others."""

NEWEST = 450
"""The newest call that the lists were made in view of; a newer one seems not to exist."""

_CLONE_THREAD, _CLONE_NAMESPACES = 0x00010000, 0x7E020080
# Duplicating, flags, locks, the size of a pipe; not: whom to signal.
_FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 1030, 1032)
_IOCTL = (
    0x5401,
    0x5413,
    0x541B,
    0x5421,
    0x5450,
    0x5451,
)  # terminal? its size; bytes to read; (non)blocking; exec
_PRCTL = (15, 16, 0x53564D41)  # names of threads and of memory

_LOAD, _EQUAL, _GREATER_EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _FAIL = 0x7FFF0000, 0x80000000, 0x00050000
_AUDIT_ARCHITECTURE = (0xC000003E, 0xC00000B7)
_NUMBER, _ARCHITECTURE = 0, 4

Instruction = tuple[int, int, int, int]
"""Operation, instructions to skip if true, if false, operand."""


def program(machine_index: int, process: int) -> list[Instruction]:
    """The filter, as instructions of the kernel's classic BPF.

    Args:
        machine_index: Of the kind of machine in `MACHINES`.
        process: The only process that may be signalled.
    """
    refuse, absent = _FAIL | errno.EPERM, _FAIL | errno.ENOSYS
    number = {name: pair[machine_index] for name, pair in CONDITIONAL.items()}
    # A program may also make the calls of another architecture (32-bit ones on x86_64), numbered otherwise.
    code: list[Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, _AUDIT_ARCHITECTURE[machine_index]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
    ]
    for allowed in allowed_numbers(machine_index):
        code += [(_EQUAL, 0, 1, allowed), (_RETURN, 0, 0, _ALLOW)]

    def rule(name: str, body: list[Instruction]) -> None:
        code.extend([(_EQUAL, 0, len(body), number[name]), *body])

    def one_of(argument: int, values: tuple[int, ...]) -> list[Instruction]:
        body = [(_LOAD, 0, 0, _low(argument))]
        for value in values:
            body += [(_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ALLOW)]
        return [*body, (_RETURN, 0, 0, refuse)]

    threads = [
        (_LOAD, 0, 0, _low(0)),
        (_ANY_BIT, 2, 0, _CLONE_NAMESPACES),
        (_ANY_BIT, 0, 1, _CLONE_THREAD),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, refuse),
    ]
    reading_limits = [
        (_LOAD, 0, 0, _low(2)),
        (_EQUAL, 0, 3, 0),
        (_LOAD, 0, 0, _low(2) + 4),
        (_EQUAL, 0, 1, 0),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, refuse),
    ]
    rule("clone", threads)
    rule("kill", one_of(0, (process,)))
    rule("tgkill", one_of(0, (process,)))
    rule("fcntl", one_of(1, _FCNTL))
    rule("ioctl", one_of(1, _IOCTL))
    rule("prctl", one_of(0, _PRCTL))
    rule("prlimit64", reading_limits)
    rule("clone3", [(_RETURN, 0, 0, absent)])
    rule("openat2", [(_RETURN, 0, 0, absent)])
    # The numbers of x32, which have bit 30 set, are among those that seem not to exist.
    return [*code, (_GREATER_EQUAL, 0, 1, NEWEST + 1), (_RETURN, 0, 0, absent), (_RETURN, 0, 0, refuse)]


def allowed_numbers(machine_index: int) -> list[int]:
    """The numbers of the calls of `ALLOWED` on a kind of machine, those that it lacks left out."""
    numbers = [entry.split()[1 + machine_index] for entry in ALLOWED.split(",")]
    return [int(number) for number in numbers if number != "-"]


def restrict(process: int) -> None:
    """Refuse all other system calls to this thread, and to those it makes, for good.

    Args:
        process: The only process that may be signalled.

    Raises:
        OSError: The kernel has no seccomp filters, or the machine is of another kind than `MACHINES`.
    """
    instructions = program(machine(), process)
    call("prctl", PR_SET_SECCOMP, 2, as_filter(instructions), 0, 0)


def as_filter(instructions: list[Instruction]) -> ctypes.Structure:
    """Instructions as the kernel takes them."""
    array = (_Instruction * len(instructions))(*(_Instruction(*fields) for fields in instructions))
    return _Filter(len(instructions), array)


def _low(argument: int) -> int:
    """Where the low 32 bits of an argument are; both kinds of machine are little-endian."""
    return 16 + 8 * argument


class _Instruction(ctypes.Structure):
    _fields_ = [
        ("operation", ctypes.c_uint16),
        ("if_true", ctypes.c_uint8),
        ("if_false", ctypes.c_uint8),
        ("operand", ctypes.c_uint32),
    ]


class _Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(_Instruction))]


assert len(_AUDIT_ARCHITECTURE) == len(MACHINES)
