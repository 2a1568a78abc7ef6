"""When a rank is killed, hangs or fails, the others end within a minute and name it."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

SCRIPT = Path(__file__).with_name("dying.py")


OVERLAY = SCRIPT.parents[2] / "configs" / "parallel" / "memory_parallel.yaml"
CONFIG = {
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 1_000_000,
        "val_check_interval": 100_000,
        "log_every_n_steps": 1,
    },
    "model": {
        "class_path": "memlm.MemoryLM",
        "init_args": {
            "transformer": {"dim": 16, "layers": 2, "heads": 2},
            "memory": {"half_keys": 16, "heads": 2, "reads": 4, "key_dim": 8, "layers": [1]},
        },
    },
    "data": {
        "class_path": "SyntheticFacts",
        "init_args": {"people": 40, "name_vocabulary": 20, "batch_size": 4},
    },
}


def meeting(world):
    """The environment in which ranks meet."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}


def run(world, how, who, patience=30):
    """Exit codes, outputs and errors of all ranks but the one that hangs; seconds until they had ended."""
    place = meeting(world)
    words = [sys.executable, str(SCRIPT), json.dumps({"how": how, "who": who, "patience": patience})]
    processes = [
        subprocess.Popen(
            words, env=os.environ | place | {"RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(world)
    ]  # fmt: skip
    start = time.monotonic()
    try:
        results = {}
        for rank, process in enumerate(processes):
            if how == "stop" and rank == who:
                continue
            output, errors = process.communicate(timeout=90)
            results[rank] = process.returncode, output, errors
        return results, processes[who].pid, time.monotonic() - start
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.distributed
@pytest.mark.parametrize(("world", "who"), [(2, 1), (3, 1)])
def test_a_killed_rank_is_named(world, who):
    results, pid, seconds = run(world, "kill", who)
    for rank in set(range(world)) - {who}:
        code, output, errors = results[rank]
        assert code == 1
        assert f"explained: rank {who} (process {pid} on " in output, output + errors
        assert "it was killed, or hangs" in output
    assert seconds < 60


@pytest.mark.distributed
def test_the_rank_with_the_store_is_killed():
    results, _, seconds = run(2, "kill", 0)
    code, output, errors = results[1]
    assert code == 1
    assert "explained: rank 0" in output, output + errors
    assert seconds < 60


@pytest.mark.distributed
def test_a_rank_that_hangs_is_named_though_no_collective_fails():
    results, pid, seconds = run(2, "stop", 1, patience=5)
    code, _, errors = results[0]
    assert code == 1
    assert f"memlm: rank 0 ends: rank 1 (process {pid} on " in errors
    assert seconds < 60


@pytest.mark.distributed
def test_a_rank_that_fails_is_named_with_its_reason():
    results, *_ = run(3, "raise", 1)
    for rank in (0, 2):
        assert "explained: rank 1 failed first: ValueError: a shard is missing" in results[rank][1], results
    assert "explained: None" in results[1][1]


@pytest.mark.distributed
def test_all_end_where_one_refuses_though_no_collective_fails():
    results, _, seconds = run(3, "refuse", 1)
    assert [code for code, *_ in results.values()] == [2, 2, 2], results
    assert results[1][1] == "said: True False\n"
    assert not any("memlm:" in errors for *_, errors in results.values())
    assert seconds < 60


@pytest.mark.distributed
def test_nothing_is_said_where_nothing_fails():
    results, *_ = run(3, "not at all", 1)
    assert [(code, output) for code, output, _ in results.values()] == [(0, "done\n")] * 3
    assert not any("memlm:" in errors for *_, errors in results.values())


@pytest.mark.distributed
def test_a_killed_rank_of_a_fit_is_named(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"run": {"root": str(tmp_path), "name": "killed"}} | CONFIG))
    words = [sys.executable, "-m", "memlm", "fit", "--config", str(config), "--config", str(OVERLAY)]
    environment = os.environ | meeting(2) | {"MEMLM_KERNELS": "reference"}
    errors = tmp_path / "errors.txt"
    with errors.open("w") as file:
        ranks = [
            subprocess.Popen(
                [*words, "--trainer.devices", "2"],
                env=environment | {"LOCAL_RANK": str(rank), "NODE_RANK": "0"},
                stdout=subprocess.DEVNULL,
                stderr=file if rank == 0 else subprocess.DEVNULL,
            )
            for rank in range(2)
        ]
        try:
            metrics, start = tmp_path / "killed" / "metrics.csv", time.monotonic()
            while not metrics.exists() or metrics.read_text().count("\n") < 5:
                assert ranks[0].poll() is None, errors.read_text()
                assert time.monotonic() - start < 180
                time.sleep(0.2)
            ranks[1].kill()
            assert ranks[0].wait(timeout=60) == 1, errors.read_text()
        finally:
            for process in ranks:
                process.kill()
                process.wait()
    assert f"memlm: rank 0 ends: rank 1 (process {ranks[1].pid} on " in errors.read_text()
