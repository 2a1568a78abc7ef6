"""The program that runs in the sandbox's processes: it gives up all it can do, then runs the code.

Three processes: the first enters the namespaces; the second is the first process in them, whose end is the
end of all others there, and keeps the time; the third runs the code. Only the standard library is imported.
"""

import errno
import json
import os
import resource
import select
import signal
import sys
import time
import types
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, NoReturn

from memlm.evaluation.sandbox import landlock, namespaces, seccomp
from memlm.evaluation.sandbox.libc import die_with_parent, drop_capabilities

THREADS = 256
OPEN_FILES = 64
MESSAGE = 500
"""Most characters that are told of an exception."""


class Job(NamedTuple):
    """What is asked of the processes; it comes as JSON on standard input.

    Args:
        parts: Pieces of source, each with a name for tracebacks, which run one after the other in one module.
        token: What a verdict must begin with.
        parent: The process that asks.
        layers: The defences to put up besides resource limits; failing to is an error.
        place: An empty folder.
        readable: Folders that the code may read.
        hidden: Folders in those that it may not.
        seconds: Time limit, by the clock.
        memory: Address space (bytes).
        space: Bytes of files.
    """

    parts: list[list[str]]
    token: str
    parent: int
    layers: list[str]
    place: str
    readable: list[str]
    hidden: list[str]
    seconds: float
    memory: int
    space: int


class Layer(Exception):
    """A defence cannot be put up on this system: its name, and the reason."""


def main(reports: int, verdicts: int) -> int:
    """Run the job on standard input.

    Args:
        reports: Where to write what became of the processes, in JSON lines; the code cannot.
        verdicts: Where the code's process writes what became of the code.
    """
    die_with_parent()
    job = Job(**json.load(sys.stdin))
    if os.getppid() != job.parent:
        return 1  # it ended before it could be told
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    # Whatever the process that asks does with signals.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [signal.SIGCHLD])
    del sys.path[0]  # the code can import the standard library only
    try:
        if "namespaces" in job.layers:
            _layer("namespaces", namespaces.enter)
        alive, life = os.pipe()
        second = os.fork()
        if second == 0:
            os.close(life)
            die_with_parent()
            if select.select([alive], [], [], 0)[0]:
                os._exit(1)  # the first process has already ended
            os.close(alive)
            _keep(job, reports, verdicts)
        os.waitpid(second, 0)
    except Layer as layer:
        _report(reports, *layer.args)
    return 0


def _keep(job: Job, reports: int, verdicts: int) -> NoReturn:
    """What the second process does: starts the code, ends it in time and reports how it ended."""
    try:
        if "namespaces" in job.layers:
            _layer(
                "namespaces",
                lambda: namespaces.replace_root(job.place, job.readable, job.hidden, job.space),
            )
        else:
            os.chdir(job.place)
        keeper = os.getpid()
        start = time.monotonic()
        code = os.fork()
        if code == 0:
            _confine(job, keeper, reports)
            os.close(reports)
            _run(job.parts, job.token, verdicts)
        os.close(verdicts)
        late = False
        while True:
            ended, status, usage = os.wait4(code, 0 if late else os.WNOHANG)
            if ended:
                break
            left = start + job.seconds - time.monotonic()
            if left <= 0:
                os.kill(code, signal.SIGKILL)
                late = True
            else:
                signal.sigtimedwait([signal.SIGCHLD], left)
        used = usage.ru_utime + usage.ru_stime
        told = {
            "status": os.waitstatus_to_exitcode(status),
            "late": late or used >= job.seconds,
            "seconds": round(time.monotonic() - start, 3),
        }
        os.write(reports, (json.dumps(told) + "\n").encode())
    except Layer as layer:
        _report(reports, *layer.args)
    finally:
        os._exit(0)


def _confine(job: Job, keeper: int, reports: int) -> None:
    """Takes everything from this process that the code does not need."""
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        os.setsid()
        os.umask(0o077)
        if os.geteuid() == 0:
            os.setgroups([])
            os.setresgid(*[namespaces.NOBODY] * 3)
            os.setresuid(*[namespaces.NOBODY] * 3)
        drop_capabilities()
        die_with_parent()
        if os.getppid() != keeper:
            os._exit(1)  # it ended before it could be told
        for limit, value in (
            (resource.RLIMIT_CPU, int(job.seconds) + 2),
            (resource.RLIMIT_AS, job.memory),
            (resource.RLIMIT_FSIZE, job.space),
            (resource.RLIMIT_NOFILE, OPEN_FILES),
            (resource.RLIMIT_NPROC, THREADS),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_MEMLOCK, 0),
            (resource.RLIMIT_MSGQUEUE, 0),
        ):
            _layer("resource limits", partial(_limit, limit, value))
        if "landlock" in job.layers:
            # On the disk nothing may be written, as nothing would limit how much in how many files.
            work = [namespaces.WORK] if "namespaces" in job.layers else []
            readable = [*job.readable, *([] if work else [job.place])]
            _layer("landlock", lambda: landlock.restrict(readable, [*work, os.devnull]))
        if "seccomp" in job.layers:
            _layer("seccomp", lambda: seccomp.restrict(os.getpid()))
    except Layer as layer:
        _report(reports, *layer.args)
        os._exit(1)


def _limit(limit: int, value: int) -> None:
    hard = resource.getrlimit(limit)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(limit, (value, value))


def _layer(name: str, put_up: Callable[[], None]) -> None:
    try:
        put_up()
    except (OSError, ValueError) as error:
        raise Layer(name, getattr(error, "strerror", None) or str(error)) from None


def _report(reports: int, layer: str, reason: str) -> None:
    os.write(reports, (json.dumps({"layer": layer, "reason": reason}) + "\n").encode())


def _run(parts: list[list[str]], token: str, verdicts: int) -> NoReturn:
    """Runs the parts in a module of their own and writes the verdict, if the code lets it come to that.

    The code shares this process, so that it could find the token and write a verdict of its own; whoever asks
    has to run it again with tests that must fail.
    """
    module = types.ModuleType("solution")
    sys.modules["__main__"] = sys.modules["solution"] = module
    for name in [name for name in sys.modules if name.partition(".")[0] == "memlm"]:
        del sys.modules[name]
    write, leave, dumps = os.write, os._exit, json.dumps  # as they are before the code
    verdict, detail = "passed", ""
    try:
        for name, source in parts:
            exec(compile(source, name, "exec", dont_inherit=True), module.__dict__)
    except BaseException as error:
        verdict, detail = _judge(error)
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        pass  # whatever the code has made of them
    write(verdicts, (token + dumps([verdict, detail]) + "\n").encode("utf-8", "replace"))
    leave(0)


def _judge(error: BaseException) -> tuple[str, str]:
    try:
        detail = f"{type(error).__name__}: {error}".removesuffix(": ")[:MESSAGE]
    except BaseException:
        detail = "an exception that has no message"
    number: Any = getattr(error, "errno", None) if isinstance(error, OSError) else None
    if isinstance(error, MemoryError) or number == errno.ENOMEM:
        return "memory", detail
    if number in (errno.EPERM, errno.EACCES, errno.EROFS):
        return "forbidden", detail
    if number in (errno.EFBIG, errno.ENOSPC, errno.EDQUOT):
        return "output limit", detail
    return "failed", detail
