"""Python programs run where they can do no harm, and what became of each."""

import os
import signal
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from memlm.errors import UserError
from memlm.evaluation.sandbox.processes import START, Limits, run

LAYERS = ("namespaces", "landlock", "seccomp")
"""The defences besides resource limits. Namespaces or Landlock keep files, seccomp keeps the rest."""


class SandboxUnavailable(UserError):
    """This system does not give what it takes to run code that nobody has read."""


@dataclass(frozen=True)
class Result:
    """What became of a program.

    Args:
        verdict: ``passed``; ``failed`` (an exception, or it ended early); ``timeout``; ``memory``;
            ``forbidden`` (an exception, as something was not permitted); ``output limit`` (printed or in
            files); ``forged`` (it claims to have passed tests that nothing can pass).
        detail: The exception, or how it ended.
        seconds: Wall time.
    """

    verdict: str
    detail: str
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether the tests ran to their end without an exception."""
        return self.verdict == "passed"


class Sandbox:
    """Runs Python programs in processes that reach nothing but their own memory and an empty folder.

    Only the standard library can be imported. There is no network, no other programs or processes, at most
    256 threads and 64 open files. Files can be made in the current folder alone, which is in memory and gone
    afterwards; where the system has no namespaces, nowhere. Which defences the system has is found out in the
    constructor, and a program that tries to get past them is run there.

    Args:
        seconds: Time limit of a program, by the clock.
        memory_mb: Its address space (MiB).
        space_mb: Size of the files it makes (MiB).
        output_kb: What it may print (KiB).
        layers: The defences to use if the system has them, out of `LAYERS`.

    Attributes:
        layers: The defences in use.
        missing: Why others are not, by name.

    Raises:
        SandboxUnavailable: The system lacks too many defences, or they do not hold.
        ValueError: A limit is out of range.
    """

    def __init__(
        self,
        seconds: float = 10.0,
        memory_mb: int = 512,
        space_mb: int = 16,
        output_kb: int = 1024,
        layers: Sequence[str] = LAYERS,
    ) -> None:
        if seconds <= 0 or memory_mb < 128 or space_mb < 1 or output_kb < 1:
            raise ValueError("expected seconds > 0, memory_mb >= 128, space_mb and output_kb >= 1")
        self.limits = Limits(seconds, memory_mb << 20, space_mb << 20, output_kb << 10)
        self.layers, self.missing = _available(self.limits, layers)
        self._try_out()

    def check(self, program: str, tests: str) -> Result:
        """Run a program and then tests of it, in the same module.

        A program shares its process with the tests. It must not pass by ending the process, nor by printing
        or writing something: passing takes a message that begins with a token made for this run. As a program
        could find the token in its memory, one that passes runs a second time with a failing assertion after
        the tests, and is ``forged`` if it passes again.

        Args:
            program: Source of the program.
            tests: Source of the tests, which raise an exception where the program is wrong.

        Raises:
            SandboxUnavailable: The sandbox could not be made this time.
        """
        result = self._run(("program", program), ("tests", tests))
        if not result.passed:
            return result
        again = self._run(("program", program), ("tests", f"{tests}\n\nassert False\n"))
        if again.passed:
            return Result("forged", "also passes a test that always fails", result.seconds)
        return result

    def _run(self, *parts: tuple[str, str]) -> Result:
        told = run(parts, self.limits, self.layers)
        ended, seconds = told.ended, told.ended.get("seconds", told.seconds)
        if "layer" in ended:
            raise SandboxUnavailable(f"the sandbox could not be made: {ended['layer']}: {ended['reason']}")
        if told.flooded:
            return Result("output limit", f"more than {self.limits.output >> 10} KiB printed", seconds)
        if not ended:
            raise SandboxUnavailable(
                f"the sandbox's processes ended without a word, or did not start within {START:.0f} s"
            )
        if ended["late"] or ended["status"] == -signal.SIGXCPU:
            return Result("timeout", f"more than {self.limits.seconds:g} s", seconds)
        if told.verdict is not None:
            return Result(*told.verdict, seconds)
        status = ended["status"]
        if status < 0:
            return Result("failed", f"ended by {signal.Signals(-status).name}", seconds)
        return Result("failed", f"ended with status {status} before the end of the tests", seconds)

    def _try_out(self) -> None:
        """Refuses a sandbox in which a program reaches what it must not."""
        with tempfile.TemporaryDirectory(prefix="memlm-outside-") as folder:
            secret = Path(folder, "secret")
            secret.write_text("outside")
            os.chmod(folder, 0o777)
            os.chmod(secret, 0o666)
            result = self._run(("program", _ATTEMPTS.format(secret=str(secret), parent=os.getpid())))
            reason = "" if result.passed else result.detail
            if result.passed and (secret.read_text() != "outside" or len(os.listdir(folder)) > 1):
                reason = "a program wrote outside its folder"
        if reason.startswith(("ModuleNotFoundError", "ImportError")):
            reason += f" (can every user read {sysconfig.get_path('stdlib')}?)"
        if reason:
            raise SandboxUnavailable(f"code cannot be run safely here: {reason}")


def _available(limits: Limits, wanted: Sequence[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """The layers that this system has, and why it has not the others."""
    missing: dict[str, str] = {}
    if not sys.platform.startswith("linux"):
        missing = dict.fromkeys(LAYERS, f"needs Linux, this is {sys.platform}")
    layers = [layer for layer in LAYERS if layer in wanted and layer not in missing]
    while layers:
        told = run([("program", "")], limits, layers)
        if told.verdict is not None:
            break
        layer = told.ended.get("layer")
        if layer not in layers:
            answer = told.ended or "no answer"
            raise SandboxUnavailable(f"code cannot be run here: an empty program does not start ({answer})")
        missing[layer] = told.ended["reason"]
        layers.remove(layer)
    if "seccomp" not in layers or not {"namespaces", "landlock"} & set(layers):
        reasons = "; ".join(f"{layer}: {reason}" for layer, reason in missing.items())
        raise SandboxUnavailable(
            "code cannot be run safely here: that takes a seccomp filter, and namespaces or Landlock version "
            f"3 (Linux 6.2). Missing: {reasons or 'left out'}"
        )
    return tuple(layers), missing


_ATTEMPTS = """
import hashlib, heapq, json, os, random, re, signal, socket, sys

def attempt(what, action):
    try:
        action()
    except OSError:
        return
    raise Exception("the sandbox does not keep a program from " + what)

def fork():
    if os.fork() == 0:
        os._exit(0)

attempt("reading other files", lambda: open({secret!r}).read())
attempt("writing other files", lambda: open({secret!r}, "w"))
attempt("making files elsewhere", lambda: open({secret!r} + "2", "w"))
attempt("removing other files", lambda: os.unlink({secret!r}))
attempt("the network", lambda: socket.socket())
attempt("other processes", fork)
attempt("other programs", lambda: os.execv(sys.executable, [sys.executable, "-c", ""]))
attempt("signals to others", lambda: os.kill(os.getppid(), 0))
attempt("signals to others", lambda: os.kill({parent}, 0))
"""
