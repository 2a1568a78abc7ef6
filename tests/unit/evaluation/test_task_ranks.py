"""Tasks over several processes give what they give in one."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def run(folder, world):
    command = [sys.executable, str(HERE / "task_ranks.py")]
    processes = [subprocess.Popen([*command, str(rank), str(world), str(folder)]) for rank in range(world)]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0] * world
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)]


def near(value, other):
    if isinstance(value, dict):
        return value.keys() == other.keys() and all(near(value[key], other[key]) for key in value)
    if isinstance(value, list):
        return len(value) == len(other) and all(map(near, value, other))
    return value == (pytest.approx(other, abs=2e-5) if isinstance(other, float) else other)


@pytest.mark.slow
def test_two_processes_give_the_figures_and_records_of_one(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{HERE}:{HERE.parents[2]}")
    draw = random.Random(0)

    def word():
        return "".join(draw.choices("abcdefgh", k=draw.randint(2, 7)))

    nq = [{"question": f"{word()} {n}", "answer": [word(), word()]} for n in range(7)]
    mmlu = [
        {"question": word(), "choices": [word() for _ in range(4)], "answer": n % 4, "subject": "ab"[n > 3]}
        for n in range(9)
    ]
    for name, rows in {"nq": nq, "mmlu": mmlu}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "one.txt").write_text("A single document, so that the second process has nothing to do.")
    [alone] = run(tmp_path, 1)
    both = run(tmp_path, 2)
    assert both[0] == both[1]
    assert near(both[0], alone)
    assert [len(result["records"]) for result in alone] == [7, 9, 1]
    assert alone[0]["notes"]["dropped_shots"] > 0 and set(alone[1]["groups"]) == {"a", "b"}
