"""The filter of system calls: its numbers against the kernel's headers, its jumps by interpreting it."""

import errno
import re
from pathlib import Path

import pytest

from memlm.evaluation.sandbox import seccomp
from memlm.evaluation.sandbox.libc import MACHINES, NUMBERS

HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}
ALLOW, KILL, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
PROCESS = 4711


def header_numbers(machine: str) -> dict[str, int]:
    if not HEADERS[machine].exists():
        pytest.skip(f"no {HEADERS[machine]}")
    found = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", HEADERS[machine].read_text())
    numbers = {name: int(number) for name, number in found}
    if machine == "aarch64":
        numbers["newfstatat"] = 79  # named fstatat there, and defined by way of a macro
    return numbers


def answer(machine: str, number: int, *arguments: int, architecture: int | None = None) -> int:
    """What the filter says to a system call, by the rules of classic BPF."""
    words = {0: number, 4: ARCHITECTURE[machine] if architecture is None else architecture}
    for i, argument in enumerate(arguments):
        words[16 + 8 * i], words[20 + 8 * i] = argument & 0xFFFFFFFF, argument >> 32 & 0xFFFFFFFF
    code = seccomp.program(MACHINES.index(machine), PROCESS)
    place, value = 0, 0
    while True:
        operation, if_true, if_false, operand = code[place]
        place += 1
        if operation == 0x20:
            value = words[operand]
        elif operation == 0x06:
            return operand
        else:
            holds = {
                0x15: value == operand,
                0x35: value >= operand,
                0x45: bool(value & operand),
            }[operation]
            place += if_true if holds else if_false


@pytest.mark.parametrize("machine", MACHINES)
def test_numbers_are_the_kernels(machine):
    numbers, index = header_numbers(machine), MACHINES.index(machine)
    for entry in seccomp.ALLOWED.split(","):
        name, *own = entry.split()
        assert own[index] == str(numbers.get(name, "-")), name
    for name, pair in {**seccomp.CONDITIONAL, **NUMBERS}.items():
        assert pair[index] == numbers[name], name


@pytest.mark.parametrize("machine", MACHINES)
def test_every_call_without_conditions_is_answered_as_listed(machine):
    index = MACHINES.index(machine)
    allowed = set(seccomp.allowed_numbers(index))
    conditional = {pair[index] for pair in seccomp.CONDITIONAL.values()}
    assert len(allowed) == len(seccomp.allowed_numbers(index)) and not allowed & conditional
    for number in set(range(600)) - conditional:
        expected = ALLOW if number in allowed else EPERM if number <= seccomp.NEWEST else ENOSYS
        assert answer(machine, number) == expected, number
    assert answer(machine, 0x40000001) == ENOSYS  # x32's write
    for other in set(ARCHITECTURE.values()) - {ARCHITECTURE[machine]} | {0x40000003}:
        assert answer(machine, min(allowed), architecture=other) == KILL


@pytest.mark.parametrize("machine", MACHINES)
def test_conditions(machine):
    number = {name: pair[MACHINES.index(machine)] for name, pair in seccomp.CONDITIONAL.items()}

    def says(name, *arguments):
        return answer(machine, number[name], *arguments)

    assert says("clone", 0x3D0F00) == ALLOW  # pthread_create of glibc
    assert says("clone", 0x7D0F00) == ALLOW  # and of musl
    assert says("clone", 0x01200011) == EPERM  # fork
    assert says("clone", 0x4111) == EPERM  # vfork
    for namespace in (0x80, 0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert says("clone", 0x3D0F00 | namespace) == EPERM
    assert says("clone3", 0, 88) == says("openat2", 0) == ENOSYS
    for name in ("kill", "tgkill"):
        assert says(name, PROCESS, 9) == ALLOW
        for other in (0, 1, PROCESS + 1, 0xFFFFFFFF, -1 & (1 << 64) - 1):
            assert says(name, other, 9) == EPERM
    assert says("fcntl", 5, 1030) == ALLOW
    assert says("fcntl", 5, 8) == says("fcntl", 5, 10) == says("fcntl", 5, 15) == EPERM  # whom to signal
    assert says("ioctl", 0, 0x5401) == ALLOW
    assert says("ioctl", 0, 0x5412) == says("ioctl", 0, 0x5452) == EPERM  # typing; asynchronous
    assert says("prctl", 15) == ALLOW
    assert says("prctl", 1) == says("prctl", 22) == EPERM
    assert says("prlimit64", 0, 9, 0, 1) == ALLOW
    assert says("prlimit64", 0, 9, 1, 0) == says("prlimit64", 0, 9, 1 << 40, 0) == EPERM
