"""The sandbox's processes as seen from outside: starting them, hearing them out, ending them."""

import json
import os
import secrets
import selectors
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

START = 30.0
"""Seconds that the processes may take to start, on a busy machine."""

_LONGEST = 1 << 16  # bytes of a verdict
_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from memlm.evaluation.sandbox.inside import main; "
_SYSTEM = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo")


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Args:
        seconds: Time, by the clock.
        memory: Address space (bytes).
        space: Files that it makes (bytes).
        output: What it prints (bytes).
    """

    seconds: float
    memory: int
    space: int
    output: int


@dataclass(frozen=True)
class Told:
    """What the processes have told.

    Args:
        ended: Of the process that ran the code: ``status``, whether it was ended as it was ``late``, and
            ``seconds``; or the ``layer`` that could not be put up and the ``reason``; empty if nothing came.
        verdict: What became of the code and the exception, as the code's own process tells it; None if it
            did not come to that.
        flooded: Whether the code printed more than its limit, and was ended for it.
        seconds: Wall time with all that was before and after.
    """

    ended: dict[str, Any] = field(default_factory=dict)
    verdict: tuple[str, str] | None = None
    flooded: bool = False
    seconds: float = 0.0


def run(parts: Sequence[tuple[str, str]], limits: Limits, layers: Sequence[str]) -> Told:
    """Run pieces of source, one after the other, in a sandbox that is made for them and gone afterwards.

    Args:
        parts: The pieces, each with a name for tracebacks.
        limits: What they may use together.
        layers: The defences to put up besides resource limits.
    """
    token = secrets.token_hex(16)
    start = time.monotonic()
    with _folder() as place, _pipe() as reports, _pipe() as verdicts:
        readable, hidden = interpreter_folders()
        job = {
            "parts": parts,
            "token": token,
            "parent": os.getpid(),
            "layers": layers,
            "place": place,
            "readable": readable,
            "hidden": hidden,
            "seconds": limits.seconds,
            "memory": limits.memory,
            "space": limits.space,
        }
        root = str(Path(__file__).resolve().parents[3])
        boot = f"{_BOOT}sys.exit(main({reports[1]}, {verdicts[1]}))"
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c", boot, root],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(reports[1], verdicts[1]),
            env={},
            start_new_session=True,
        )
        assert process.stdout is not None
        try:
            os.close(reports.pop())
            os.close(verdicts.pop())
            _send(process, json.dumps(job))
            report, written, flooded = _listen(process.stdout.fileno(), reports[0], verdicts[0], limits)
        finally:
            # The kernel kills the others when this one ends.
            process.kill()
            process.wait()
            process.stdout.close()
    lines = [line[len(token) :] for line in written.splitlines() if line.startswith(token)]
    return Told(_json(report) or {}, _verdict(lines), flooded, round(time.monotonic() - start, 3))


def interpreter_folders() -> tuple[list[str], list[str]]:
    """Folders with what Python's standard library needs, and those in them that hold other packages."""
    # Of a virtual environment those of the Python that it is made from.
    prefixes = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    libraries = [sysconfig.get_path(name, vars=prefixes) for name in ("stdlib", "platstdlib")]
    readable = [*_SYSTEM, *libraries, *map(os.path.dirname, libraries)]
    hidden = [os.path.join(path, name) for path in libraries for name in ("site-packages", "dist-packages")]
    return readable, [*hidden, "/usr/lib/python3/dist-packages"]


def _listen(output: int, reports: int, verdicts: int, limits: Limits) -> tuple[str, str, bool]:
    """Reports, verdict and whether it was a flood, until all end, print too much or are far too late."""
    held = {reports: b"", verdicts: b""}
    printed = 0
    deadline = time.monotonic() + START + limits.seconds
    with selectors.DefaultSelector() as selector:
        for source in (reports, verdicts, output):
            selector.register(source, selectors.EVENT_READ)
        while selector.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                read = os.read(key.fd, 65536)
                if not read:
                    selector.unregister(key.fd)
                elif key.fd in held:
                    held[key.fd] += read
                else:
                    printed += len(read)
            if printed > limits.output or len(held[verdicts]) > _LONGEST:
                return held[reports].decode(), "", True
            if held[reports]:
                # All have ended. Should another process that was forked meanwhile hold an end of a pipe, it
                # is not waited for.
                deadline = min(deadline, time.monotonic() + 1)
    return held[reports].decode(), held[verdicts].decode("utf-8", "replace"), False


def _send(process: subprocess.Popen, text: str) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(text.encode())
        process.stdin.close()
    except BrokenPipeError:
        pass  # it has ended; that it tells nothing is noticed


def _json(text: str) -> Any:
    try:
        return json.loads(text.splitlines()[0])
    except (ValueError, IndexError):
        return None


def _verdict(lines: Sequence[str]) -> tuple[str, str] | None:
    """The only verdict; None if there is none, or one that the sandbox would not have written."""
    content = _json(lines[0]) if len(lines) == 1 else None
    if isinstance(content, list) and len(content) == 2 and all(isinstance(part, str) for part in content):
        return content[0], content[1]
    return None


@contextmanager
def _folder() -> Iterator[str]:
    """An empty folder that every user may enter."""
    with tempfile.TemporaryDirectory(prefix="memlm-sandbox-") as path:
        os.chmod(path, 0o755)  # the code's user is another one
        yield os.path.realpath(path)


@contextmanager
def _pipe() -> Iterator[list[int]]:
    """The ends of a pipe, reading and writing; those still in the list are closed in the end."""
    ends = list(os.pipe())
    try:
        yield ends
    finally:
        for end in ends:
            os.close(end)
