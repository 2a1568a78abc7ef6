"""Nothing that a program does reaches beyond its sandbox, whichever of the defences the system has."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hostile_programs
import pytest

from memlm.errors import UserError
from memlm.evaluation.sandbox import processes
from memlm.evaluation.sandbox.execution import LAYERS, Sandbox, SandboxUnavailable

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")

ROOT = Path(__file__).parents[4]
OTHER_USER = 54321


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return Sandbox(seconds=5)


@pytest.fixture
def outside():
    """A folder outside of all sandboxes that everybody may write to, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="outside-") as folder:
        Path(folder, "secret").write_text("outside")
        os.chmod(folder, 0o777)
        os.chmod(f"{folder}/secret", 0o666)
        yield Path(folder)


def sandbox_processes() -> dict[int, int]:
    """The parents of the processes that make up sandboxes, by process."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if (
                entry.name.isdigit()
                and b"memlm.evaluation.sandbox.inside" in (entry / "cmdline").read_bytes()
            ):
                found[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            pass
    return found


def all_gone(processes) -> bool:
    """Whether the processes end within a few seconds."""
    deadline = time.monotonic() + 5
    while set(processes) & set(sandbox_processes()):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def check_hostile(results: dict[str, tuple[str, str]], outside: Path) -> None:
    """Checks what became of all hostile programs, and that they changed nothing."""
    wrong = {
        name: results[name]
        for name, (_, expected) in hostile_programs.programs(str(outside), os.getpid()).items()
        if results[name][0] not in expected or "REACHED" in results[name][1]
    }
    assert not wrong
    secret = outside / "secret"
    assert [path.name for path in outside.iterdir()] == ["secret"] and secret.read_text() == "outside"
    assert secret.stat().st_mode & 0o777 == 0o666 and secret.stat().st_mtime > 1e9
    assert not os.listxattr(secret)
    for folder in (
        Path.home(),
        ROOT,
        Path("/dev/shm"),
        Path("/etc"),
        Path("/var/tmp"),
        Path(os.__file__).parent,
    ):
        assert not list(folder.glob("memlm_was_here*"))
    assert all_gone(sandbox_processes())


def as_other_user(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a script with a Python that every user can read, as another user if this one is root."""
    for python in (os.path.realpath(sys.executable), "/usr/bin/python3"):
        options = {"user": OTHER_USER, "group": OTHER_USER, "extra_groups": []} if os.geteuid() == 0 else {}
        options |= {"env": {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}, "cwd": "/"}
        options |= {"capture_output": True, "text": True, "timeout": 120}
        probe = "import sys, memlm; assert sys.version_info >= (3, 11)"
        try:
            if subprocess.run([python, "-c", probe], **options).returncode == 0:
                return subprocess.run([python, "-c", script, *arguments], **options)
        except OSError:
            pass
    pytest.skip("no Python 3.11 that every user can read")


def run_as_other_user(layers: tuple[str, ...], outside: Path, before: str = "") -> dict:
    script = f"{before}\nimport runpy; runpy.run_path({hostile_programs.__file__!r}, run_name='__main__')"
    done = as_other_user(script, ",".join(layers), str(outside), str(os.getpid()))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# -- what is right passes


RIGHT = """
import collections, dataclasses, datetime, decimal, functools, hashlib, heapq, itertools, json, math, random
import re
import statistics, string, tempfile, threading, typing, copy, bisect, fractions, os, sys

@dataclasses.dataclass
class Point:
    x: "int"
    y: typing.List[float] = dataclasses.field(default_factory=list)

def f(x):
    found = []
    thread = threading.Thread(target=lambda: found.append(x + 1))
    thread.start()
    thread.join()
    return found[0]
"""


def test_what_is_right_passes(sandbox):
    result = sandbox.check(RIGHT, "assert f(1) == 2 and Point(1).y == [] and hashlib.md5(b'').hexdigest()")
    assert result.passed, result
    assert 0 < result.seconds < 5


def test_what_is_wrong_fails_with_its_exception(sandbox):
    assert sandbox.check(RIGHT, "assert f(1) == 3, 'three'").detail == "AssertionError: three"
    assert sandbox.check("x = 1", "y").detail == "NameError: name 'y' is not defined"


def test_a_limit_that_a_program_copes_with_does_not_fail_it(sandbox):
    program = "try:\n    x = bytearray(10**10)\nexcept MemoryError:\n    x = None\nprint('x' * 1000)"
    assert sandbox.check(program, "assert x is None").passed


def test_each_run_begins_in_an_empty_folder_with_an_empty_environment(sandbox):
    program = (
        "import os\nassert os.listdir() == []\nopen('x', 'w').write('1')\nassert os.listdir() == ['x']\n"
        "assert not set(os.environ) - {'LC_CTYPE'}, os.environ\n"
        "assert os.getuid() != 0 and os.geteuid() != 0\n"
        "open(os.devnull, 'w').write('x')\n"
        "held = []\nfor fd in range(64):\n"
        "    try: held.append(os.fstat(fd) and fd)\n    except OSError: pass\n"
        "assert len(held) == 4, held"
    )
    for _ in range(2):
        assert sandbox.check(program, "pass").passed


def test_nothing_of_the_sandbox_stays(sandbox):
    before = {path for path in Path(tempfile.gettempdir()).iterdir() if path.name.startswith("memlm-")}
    assert sandbox.check("open('x', 'w').write('1')", "").passed
    after = {path for path in Path(tempfile.gettempdir()).iterdir() if path.name.startswith("memlm-")}
    assert after <= before


def test_many_run_at_once(sandbox):
    def check(i):
        return sandbox.check(f"def f(): return {i}", f"assert f() == {i if i % 3 else -1}").verdict

    with ThreadPoolExecutor(4) as threads:
        verdicts = list(threads.map(check, range(24)))
    assert verdicts == ["passed" if i % 3 else "failed" for i in range(24)]


def test_the_limits_are_those_asked_for():
    small = Sandbox(seconds=0.5, memory_mb=128, space_mb=1, output_kb=2)
    start = time.monotonic()
    result = small.check("while True: pass", "")
    assert (result.verdict, result.detail) == ("timeout", "more than 0.5 s")
    assert result.seconds >= 0.5 and time.monotonic() - start < 5
    assert small.check("x = bytearray(13 * 10**7)", "").verdict == "memory"
    assert small.check("x = bytearray(10**7)", "").passed
    assert small.check("print('x' * 3000)", "").verdict == "output limit"
    assert small.check("print('x' * 2000)", "").passed
    if "namespaces" in small.layers:
        assert small.check("open('x', 'wb').write(bytes(900_000))", "").passed
        assert small.check("open('x', 'wb').write(bytes(1_200_000))", "").verdict == "output limit"
    for wrong in ({"seconds": 0}, {"memory_mb": 16}, {"space_mb": 0}, {"output_kb": 0}):
        with pytest.raises(ValueError, match="expected seconds"):
            Sandbox(**wrong)


def test_a_tests_early_end_is_no_pass(sandbox):
    result = sandbox.check("def f(): import os; os._exit(0)", "f()\nassert False")
    assert (result.verdict, result.detail) == ("failed", "ended with status 0 before the end of the tests")


# -- what means harm


@pytest.mark.slow
def test_hostile_programs(outside):
    """With all defences that this system and this user have."""
    hostile = Sandbox(seconds=1)
    check_hostile(hostile_programs.run_all(hostile, str(outside), os.getpid()), outside)


@pytest.mark.slow
@pytest.mark.parametrize("layers", [("namespaces", "seccomp"), ("landlock", "seccomp")])
def test_hostile_programs_of_a_user_without_privileges(layers, outside):
    """Each of the two defences of files holds without the other."""
    told = run_as_other_user(layers, outside)
    if "error" in told or told["layers"] != list(layers):
        pytest.skip(f"this system has not all of {layers}: {told.get('error')}")
    check_hostile(told["results"], outside)


@pytest.mark.parametrize("layers", [("namespaces", "seccomp"), LAYERS])
def test_some_hostile_programs(layers, outside):
    """The quickest of them, in every run of the tests."""
    try:
        hostile = Sandbox(seconds=1, layers=layers)
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    programs = hostile_programs.programs(str(outside), os.getpid())
    names = [
        "fork bomb",
        "endless loop",
        "10 GB",
        "TCP",
        "write a secret",
        "takes the token",
        "kill the parent",
    ]
    results = {name: hostile.check(programs[name][0], "") for name in names}
    for name, result in results.items():
        assert result.verdict in programs[name][1] and "REACHED" not in result.detail, (name, result)
    assert (outside / "secret").read_text() == "outside"
    assert all_gone(sandbox_processes())


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_nothing_goes_on_when_who_asked_is_killed(kill, tmp_path):
    script = (
        "import signal\nfrom memlm.evaluation.sandbox.execution import Sandbox\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which a job in the background ignores
        "sandbox = Sandbox(seconds=100); print('ready', flush=True); sandbox.check('while True: pass', '')"
    )
    asking = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},  # where, if killed, it leaves an empty folder
    )
    try:
        assert asking.stdout is not None and asking.stdout.readline() == "ready\n"
        deadline = time.monotonic() + 20
        mine: set[int] = set()
        while len(mine) < 3 and time.monotonic() < deadline:  # three processes
            processes = sandbox_processes()
            mine = {pid for pid, parent in processes.items() if parent == asking.pid}
            for _ in range(2):
                mine |= {pid for pid, parent in processes.items() if parent in mine}
        assert len(mine) == 3
        asking.send_signal(kill)
        assert all_gone(mine)
    finally:
        asking.kill()
        asking.wait()
        asking.stdout.close()


# -- systems that lack something


def test_too_few_defences_are_refused():
    for layers, missing in (
        (("namespaces", "landlock"), "seccomp filter"),
        (("seccomp",), "namespaces or Landlock"),
        ((), "left out"),
    ):
        with pytest.raises(SandboxUnavailable, match=missing) as caught:
            Sandbox(layers=layers)
        assert isinstance(caught.value, UserError) and "\n" not in str(caught.value)


REFUSING = """
import ctypes
from memlm.evaluation.sandbox import libc, seccomp
numbers = {numbers}
code = [(0x20, 0, 0, 0)]
for number in numbers:
    code += [(0x15, 0, 1, number), (0x06, 0, 0, 0x00050000 | {error})]
code += [(0x06, 0, 0, 0x7FFF0000)]
libc.drop_capabilities()
libc.call("prctl", libc.PR_SET_SECCOMP, 2, seccomp.as_filter(code), 0, 0)
"""
"""A script that takes system calls from itself, as containers and older kernels lack them."""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="system calls by their numbers on x86_64")
def test_a_container_without_namespaces(outside):
    told = run_as_other_user(("none",), outside, REFUSING.format(numbers=[272], error=1))
    assert "left out" in told["error"]
    script = REFUSING.format(numbers=[272], error=1) + (
        "from memlm.evaluation.sandbox.execution import Sandbox\n"
        "made = Sandbox(); print(made.layers, made.missing, made.check('x = 1', 'assert x').verdict)"
    )
    done = as_other_user(script)
    if "Landlock" in done.stderr:
        pytest.skip("this kernel has no Landlock")
    assert done.stdout.startswith("('landlock', 'seccomp')") and done.stdout.endswith("passed\n"), done
    assert "unshare: Operation not permitted" in done.stdout


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="system calls by their numbers on x86_64")
def test_a_kernel_without_both_is_refused_with_the_reasons():
    script = REFUSING.format(numbers=[272, 444], error=38) + (
        "from memlm.evaluation.sandbox.execution import Sandbox\nSandbox()"
    )
    error = as_other_user(script).stderr
    assert "code cannot be run safely here" in error
    assert "namespaces: unshare: Function not implemented" in error
    assert "landlock: landlock_create_ruleset: Function not implemented" in error


@pytest.mark.parametrize(
    "layers, reached",
    [(("seccomp",), "reading other files"), (("landlock",), "the network"), ((), "reading")],
)
def test_a_hole_is_noticed_by_trying(layers, reached):
    """Whatever is believed of the layers, the constructor tries what must not succeed."""
    script = (
        "from memlm.evaluation.sandbox import execution\n"
        f"execution._available = lambda *_: ({layers}, {{}})\n"
        "execution.Sandbox()"
    )
    error = as_other_user(script).stderr
    assert f"the sandbox does not keep a program from {reached}" in error


def test_a_library_that_the_programs_user_cannot_read_is_told(monkeypatch):
    monkeypatch.setattr(processes, "interpreter_folders", lambda: ([], []))
    with pytest.raises(SandboxUnavailable, match=r"cannot be run safely here: .*can every user read"):
        Sandbox()


def test_a_virtual_environment_where_programs_write(tmp_path):
    """An environment below /tmp, which is another folder in the sandbox."""
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    program = (
        "import sys\nfrom memlm.evaluation.sandbox.execution import Sandbox\n"
        "assert sys.prefix != sys.base_prefix\n"
        "print(Sandbox().check('import json, hashlib', 'assert json').verdict)"
    )
    root = Path(processes.__file__).parents[3]
    done = subprocess.run(
        [environment / "bin" / "python", "-c", program],
        env={"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("passed\n", "")
