"""Preparations that are killed, interrupted, or meet a full disk, and then go on."""

import errno
import fcntl
import gzip
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from data_modules.prepared import preparation, work
from memlm import __main__ as entry
from memlm.errors import DataError

FORK = multiprocessing.get_context("fork")
OPTIONS = [{}, {"deduplicate": True, "compress": True}]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Work for about a second."""
    folder = tmp_path_factory.mktemp("text")
    texts = [part for name in sorted(topics) for part in topics[name].split("\n\n") if part.strip()]
    for number in range(4):
        records = [json.dumps({"text": text + "\n" * (i % 2)}) for i, text in enumerate(texts * 2)]
        (folder / f"{number}.jsonl").write_text("\n".join(records))
    return folder


@pytest.fixture
def reference(tmp_path, prepare, text, bpe, contents):
    """What an uninterrupted preparation makes, and the seconds it takes."""

    def make(**options):
        began = time.monotonic()
        prepare(tmp_path / "reference", text, tokenizer=bpe, shard_megabytes=0.1, **options)
        return contents(tmp_path / "reference"), time.monotonic() - began

    return make


def children_of(pid):
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def opened(lock):
    return lock.stat().st_mtime_ns if lock.exists() else 0


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("options", OPTIONS)
def test_killed_at_random_moments_and_resumed(tmp_path, prepare, text, bpe, contents, reference, options):
    expected, seconds = reference(**options)
    draw = random.Random(7)
    output = tmp_path / "o"

    def run():
        prepare(output, text, tokenizer=bpe, shard_megabytes=0.1, workers=draw.choice([1, 2, 3]), **options)

    for moment in [0.3, 0.6, draw.random()]:
        process = FORK.Process(target=run)
        process.start()
        time.sleep(moment * seconds)
        workers = children_of(process.pid)
        process.kill()
        process.join()
        wait_until(lambda workers=workers: not any(map(is_running, workers)))
    run()
    assert contents(output) == expected


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
def test_the_command_killed_twenty_times(tmp_path, text, bpe, contents, reference, options):
    expected, seconds = reference(**options)
    draw = random.Random(11)
    output, kills = tmp_path / "o", 0
    lock = output / ".preparing" / "lock"
    command = [sys.executable, "-m", "memlm", "prepare", f"--paths=['{text}']", f"--tokenizer={bpe}"]
    command += ["--shard_megabytes=0.1", "--validation_fraction=0.1", f"--output={output}"]
    command += [f"--{name}={str(value).lower()}" for name, value in options.items()]
    while True:
        workers = draw.choice([1, 2, 3])
        before = opened(lock)
        process = subprocess.Popen([*command, f"--workers={workers}"], stderr=subprocess.DEVNULL)
        # Killed while it works, not while it imports: the lock file is opened anew when it begins.
        while process.poll() is None and opened(lock) == before:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, seconds / 8))
        if kills == 20:
            assert process.wait() == 0
            break
        kills += process.poll() is None
        process.kill()
        process.wait()
        assert not (output / "manifest.json").exists() or contents(output) == expected
        if (output / "manifest.json").exists():
            shutil.rmtree(output)  # done too soon: begin again
    assert contents(output) == expected


def test_ctrl_c_ends_it_promptly_and_says_how_to_go_on(tmp_path, prepare, text, bpe, contents, reference):
    expected, _ = reference()
    output = tmp_path / "o"
    tokenize_unit = preparation.tokenize_unit

    def unhurried(*arguments):
        tokenize_unit(*arguments)
        time.sleep(0.5)  # or all may be done before the interruption comes

    def run():
        preparation.tokenize_unit = unhurried
        os.setsid()
        sys.stderr = open(tmp_path / "err", "w", buffering=1)  # noqa: SIM115
        arguments = [f"--paths=['{text}']", f"--tokenizer={bpe}", f"--output={output}"]
        options = ["--shard_megabytes=0.1", "--validation_fraction=0.1", "--workers=2"]
        os._exit(entry.main(["prepare", *arguments, *options]))

    process = FORK.Process(target=run)
    process.start()
    wait_until(lambda: (output / ".preparing" / "unit-00000.json").exists())
    os.killpg(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    message = (tmp_path / "err").read_text()
    assert f"{output}: finished shards are kept; the same command goes on\n" in message
    assert message.endswith("memlm: interrupted\n") and "Traceback" not in message
    names = contents(output)
    assert "manifest.json" not in names and not [name for name in names if "partial" in name]
    prepare(output, text, tokenizer=bpe, shard_megabytes=0.1)
    assert contents(output) == expected


def test_a_full_disk_keeps_what_is_finished(tmp_path, prepare, contents):
    """A limit on the size of files stops the one shard that outgrows its compressed input."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.txt").write_text(f"file {number} " * 500)
    (folder / "3.txt").unlink()
    (folder / "3.txt.gz").write_bytes(gzip.compress(b"long " * 50_000))
    options = {"shard_megabytes": 0.004, "validation_fraction": 0.0, "workers": 1}
    prepare(tmp_path / "reference", folder, **options)

    def run():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            prepare(tmp_path / "o", folder, **options)
        except DataError as error:
            (tmp_path / "error").write_text(str(error))

    process = FORK.Process(target=run)
    process.start()
    process.join()
    message = (tmp_path / "error").read_text()
    assert message.startswith(f"{tmp_path}/o/train-0000")
    assert message.endswith(
        ".tokens: cannot be written (File too large); finished shards are kept: make room and run the same "
        "command again"
    )
    kept = contents(tmp_path / "o")
    expected = contents(tmp_path / "reference")
    shards = {name: content for name, content in kept.items() if name.endswith(".tokens")}
    assert len(shards) == 2 and all(expected[name] == content for name, content in shards.items())
    assert not [name for name in kept if "partial" in name]
    times = {name: (tmp_path / "o" / name).stat().st_mtime_ns for name in shards}
    prepare(tmp_path / "o", folder, **options)
    assert contents(tmp_path / "o") == expected
    assert {name: (tmp_path / "o" / name).stat().st_mtime_ns for name in shards} == times


@pytest.mark.parametrize(
    "name",
    [
        "plan.json",
        "hashes-00002",
        "duplicates",
        "train-00003.tokens",
        "train-00003.tokens.zst",
        "unit-00001.json",
        "manifest.json",
    ],
)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_whatever_file_the_disk_has_no_room_for(tmp_path, prepare, inputs, contents, monkeypatch, name, code):
    options = {"deduplicate": True, "compress": True}
    prepare(tmp_path / "reference", inputs, **options)
    replace = Path.replace

    def fail(path, target):
        if Path(target).name == name:
            raise OSError(code, os.strerror(code))
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(DataError, match=rf"{name}: cannot be written \({os.strerror(code)}\); finished"):
            prepare(tmp_path / "o", inputs, **options)
    kept = contents(tmp_path / "o")
    assert not [file for file in kept if "partial" in file or file.endswith(name)]
    prepare(tmp_path / "o", inputs, **options)
    assert contents(tmp_path / "o") == contents(tmp_path / "reference")


@pytest.mark.parametrize("function", ["hash_unit", "tokenize_unit"])
def test_a_worker_that_dies_is_an_error_and_not_a_wait(
    tmp_path, prepare, inputs, contents, monkeypatch, function
):
    prepare(tmp_path / "reference", inputs, deduplicate=True)
    do = getattr(work, function)

    def die(job, unit, progress):
        if unit == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        do(job, unit, progress)

    with monkeypatch.context() as patch:
        patch.setattr(preparation, function, die)
        with pytest.raises(DataError, match=r"o: a worker process died.*run the same command again"):
            prepare(tmp_path / "o", inputs, deduplicate=True)
    prepare(tmp_path / "o", inputs, deduplicate=True)
    assert contents(tmp_path / "o") == contents(tmp_path / "reference")


def test_an_error_of_our_own_is_not_hidden(tmp_path, prepare, inputs, monkeypatch):
    monkeypatch.setattr(preparation, "tokenize_unit", lambda job, unit, progress: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(tmp_path / "o", inputs)


def test_two_at_a_time_are_refused(tmp_path, prepare, inputs, monkeypatch):
    monkeypatch.setattr(preparation, "LOCK_SECONDS", 0)
    (tmp_path / "o" / ".preparing").mkdir(parents=True)
    with open(tmp_path / "o" / ".preparing" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match=r"o: is being prepared by another process \(output\)"):
            prepare(tmp_path / "o", inputs)
    prepare(tmp_path / "o", inputs)


def test_shards_lost_while_it_was_interrupted_are_made_again(
    tmp_path, prepare, inputs, contents, monkeypatch, capsys
):
    prepare(tmp_path / "reference", inputs)
    with monkeypatch.context() as patch:
        patch.setattr(preparation.Manifest, "save", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(tmp_path / "o", inputs)
    (tmp_path / "o" / "train-00001.tokens").unlink()
    (tmp_path / "o" / "train-00003.tokens").write_bytes(b"cut")
    (tmp_path / "o" / ".train-00004.tokens.partial").write_bytes(b"left")
    kept = (tmp_path / "o" / "train-00002.tokens").stat().st_mtime_ns
    prepare(tmp_path / "o", inputs)
    assert contents(tmp_path / "o") == contents(tmp_path / "reference")
    assert (tmp_path / "o" / "train-00002.tokens").stat().st_mtime_ns == kept
    err = capsys.readouterr().err
    assert "made again: " in err and "train-00001.tokens" in err and "train-00003.tokens" in err


def test_interrupted_between_the_manifest_and_the_end(tmp_path, prepare, inputs, contents, monkeypatch):
    prepare(tmp_path / "reference", inputs)
    with monkeypatch.context() as patch:
        patch.setattr(preparation.shutil, "rmtree", lambda path: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(tmp_path / "o", inputs)
    assert (tmp_path / "o" / ".preparing").exists()
    assert prepare(tmp_path / "o", inputs) is None
    assert contents(tmp_path / "o") == contents(tmp_path / "reference")
