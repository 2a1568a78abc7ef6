"""Loader processes end with the one that started them, and their deaths are one line."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_modules import TextStream
from memlm.errors import ConfigError, UserError

ROOT = Path(__file__).parents[3]


def stream(folder, **options):
    (folder / "a.jsonl").write_text("".join(f'{{"text": "number {i}"}}\n' for i in range(2000)))
    options = {"lanes": 2, "num_workers": 2, "sequence_length": 16, "batch_size": 2} | options
    return TextStream([str(folder / "*.jsonl")], validation_fraction=0.0, **options)


def children(pid):
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked for in /proc")
def test_loader_processes_end_with_a_killed_trainer(tmp_path):
    """Those that wait to hand over a batch, too: nobody will ever take it."""
    stream(tmp_path)
    code = (
        "import sys, time; from data_modules import TextStream\n"
        "data = TextStream([sys.argv[1]], validation_fraction=0.0, lanes=2, num_workers=2)\n"
        "batches = iter(data.train_dataloader()); next(batches); print(flush=True); time.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "a.jsonl")],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    with process:
        try:
            assert process.stdout.readline() == b"\n"
            workers = children(process.pid)
            assert len(workers) >= 2
        finally:
            process.kill()
    end = time.monotonic() + 20
    while any(map(is_alive, workers)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(is_alive, workers))


def test_a_loader_process_that_is_killed(tmp_path):
    batches = iter(stream(tmp_path).train_dataloader())
    next(batches)
    os.kill(children(os.getpid())[-1], signal.SIGKILL)
    with pytest.raises(ConfigError, match=r"data\.num_workers: a loader process was killed"):
        for _ in range(10_000):
            next(batches)


def test_what_is_wrong_in_a_loader_process_comes_out_of_it(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pa.table({"body": ["a"] * 9}), tmp_path / "b.parquet")
    data = TextStream([str(tmp_path / "b.parquet")], validation_fraction=0.0, lanes=2, num_workers=2)
    batches = iter(data.train_dataloader())
    with pytest.raises(UserError, match=r"b\.parquet: has no column 'text'"):
        next(batches)
