import importlib
import os
import subprocess
import sys
import time

import pytest

import memlm
from memlm import __main__ as entry
from memlm.errors import ConfigError


def run(*arguments: str) -> tuple[int, str, str, float]:
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "memlm", *arguments], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr, time.perf_counter() - began


def test_help_and_version_need_nothing_but_the_standard_library():
    """In a process that refuses every import of what is installed."""
    program = (
        "import sys\n"
        "installed = {'torch', 'lightning', 'jsonargparse', 'yaml', 'numpy'}\n"
        "class Refuse:\n"
        "    def find_spec(self, name, *args):\n"
        "        assert name.split('.')[0] not in installed, name\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "from memlm.__main__ import main\n"
        "assert [main([]), main(['--help']), main(['--version']), main(['nope'])] == [0, 0, 0, 2]\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"memlm {memlm.__version__}" in done.stdout


def test_help_is_fast_and_lists_every_verb():
    code, out, err, seconds = min((run("--help") for _ in range(3)), key=lambda result: result[-1])
    assert (code, err) == (0, "")
    assert seconds < 0.3
    for verb in entry.VERBS:
        assert f"  {verb.name} " in out


def test_unknown_verb():
    code, out, err, _ = run("fti")
    assert (code, out) == (2, "")
    assert err == (
        "memlm: error: unknown verb 'fti'; "
        "the verbs are fit, validate, test, predict, generate, lm-eval, inspect, export, import, "
        "consolidate, compare, params, tokenizer, prepare, verify, completion\n"
    )


@pytest.mark.parametrize("verb", entry.VERBS, ids=lambda verb: verb.name)
def test_every_verb_has_a_function(verb):
    module, function = verb.target.split(":")
    assert callable(getattr(importlib.import_module(module), function))


def fail_with(monkeypatch, error: BaseException) -> None:
    def verb(arguments):
        raise error

    monkeypatch.setattr(entry, "VERBS", (entry.Verb("go", "", "memlm.__main__:go"),))
    monkeypatch.setattr(entry, "go", verb, raising=False)
    monkeypatch.setitem(sys.modules, "memlm.__main__", entry)


def test_users_errors_are_one_line(monkeypatch, capsys):
    monkeypatch.delenv("MEMLM_TRACEBACK", raising=False)
    fail_with(monkeypatch, ConfigError("data.x", "is\n  wrong"))
    assert entry.main(["go"]) == 2
    assert capsys.readouterr().err == "memlm: error: data.x: is wrong\n"


def test_traceback_on_request(monkeypatch):
    monkeypatch.setenv("MEMLM_TRACEBACK", "1")
    fail_with(monkeypatch, ConfigError("data.x", "is wrong"))
    with pytest.raises(ConfigError):
        entry.main(["go"])


def test_bugs_are_not_hidden(monkeypatch):
    fail_with(monkeypatch, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        entry.main(["go"])


def test_interrupt(monkeypatch):
    fail_with(monkeypatch, KeyboardInterrupt())
    assert entry.main(["go"]) == 130


def test_completion_completes_verbs_and_options():
    script = subprocess.run(
        [sys.executable, "-m", "memlm", "completion"], capture_output=True, text=True
    ).stdout

    def complete(*words: str) -> list[str]:
        line = " ".join(f"'{word}'" for word in words)
        program = (
            f"{script}\nCOMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _memlm; echo ${{COMPREPLY[@]}}"
        )
        return subprocess.run(["bash", "-c", program], capture_output=True, text=True).stdout.split()

    assert complete("memlm", "co") == ["consolidate", "compare", "completion"]
    assert complete("memlm", "fit", "--ck") == ["--ckpt_path"]
    assert complete("memlm", "fit", "configs/") == []


def test_waiting_threads_sleep_early_unless_the_environment_says_otherwise(monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    entry.main(["completion"])
    assert os.environ.pop("GOMP_SPINCOUNT") == "20000"
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    entry.main(["completion"])
    assert "GOMP_SPINCOUNT" not in os.environ
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setenv("GOMP_SPINCOUNT", "5")
    entry.main(["completion"])
    assert os.environ["GOMP_SPINCOUNT"] == "5"


NOISY = """
import sys, types
from memlm import __main__ as entry
noisy = types.ModuleType("noisy")
noisy.main = lambda arguments: print("x" * int(arguments[0]))
sys.modules["noisy"] = noisy
entry.VERBS = (entry.Verb("noisy", "", "noisy:main"),)
sys.exit(entry.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("length", [10, 1_000_000])
def test_nobody_reads_the_output_any_more(length):
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-c", NOISY, "noisy", str(length)],
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("code", [1, 2])
def test_what_several_processes_have_said_already_is_not_said_again(monkeypatch, capsys, code):
    def fail(arguments):
        error = RuntimeError("Connection closed by peer")
        error.exit_code = code
        raise error

    monkeypatch.setattr("memlm.compare.main", fail)
    assert entry.main(["compare"]) == code
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("MEMLM_TRACEBACK", "1")
    with pytest.raises(RuntimeError):
        entry.main(["compare"])
