"""Ranks of a run that are killed, at random moments of steps and of saves; what becomes of the run.

    python benchmarks/kills.py --json benchmarks/results/kills.json

trains a small memory model on two processes, ``memlm fit``, without interruption; then the same with a rank
killed (SIGKILL) again and again, every other time while a checkpoint is being written, every other pair of
times by an asynchronous save. Each time the job must end within a minute and say which rank it was; then it
goes on from ``last.ckpt``. In the end losses and tensors must be those of the uninterrupted run, bit for bit.
"""

import argparse
import csv
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import yaml

from memlm.parallel.checkpoint_folder import read_whole

ROOT = Path(__file__).resolve().parent.parent
OVERLAY = ROOT / "configs" / "parallel" / "memory_parallel.yaml"
STEPS_OF_A_LIFE = (4, 16)
SAVE_EVERY = 5
_CONSTANT = {"schedule": {"shape": "constant"}}
CONFIG: dict[str, Any] = {
    "trainer": {
        "accelerator": "cpu",
        "devices": 2,
        "val_check_interval": SAVE_EVERY,
        "limit_val_batches": 1,
        "log_every_n_steps": 1,
        "gradient_clip_val": 1.0,
        "enable_progress_bar": False,
    },
    "model": {
        "class_path": "memlm.MemoryLM",
        "init_args": {
            "transformer": {"dim": 32, "layers": 2, "heads": 2},
            # Large enough that a save takes a while: 4 MB of values, 8 MB of moments.
            "memory": {"half_keys": 180, "heads": 2, "reads": 4, "key_dim": 8, "layers": [1]},
            "optimizer": {"learning_rate": 0.005} | _CONSTANT,
            "values_optimizer": {"learning_rate": 0.01, "clip": None} | _CONSTANT,
        },
    },
    "data": {
        "class_path": "SyntheticFacts",
        "init_args": {"people": 40, "name_vocabulary": 20, "batch_size": 4},
    },
}
_MEASURED = re.compile(r"seconds|per_second|utilisation|share")
"""Columns that differ between any two runs."""


@dataclass
class Kill:
    """One of them, and what came of it."""

    rank: int
    asynchronous: bool
    wanted: str
    step: int
    """Of the last row of metrics at that moment."""
    saving: bool
    """Whether the folder of a checkpoint that is not whole was left behind."""
    seconds: float
    """Until all processes had ended."""
    named: str
    """The line that names the rank."""
    resumes_at: int | None
    """The step of ``last.ckpt``; None if there was none yet."""


class Job:
    """``memlm fit`` on two processes.

    Args:
        folder: Of the runs.
        name: Of the run.
        steps: In all.
        asynchronous: Whether it saves while it trains.
    """

    def __init__(self, folder: Path, name: str, steps: int, asynchronous: bool = False) -> None:
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump({"run": {"root": str(folder)}} | CONFIG))
        self.directory = folder / name
        self.last = self.directory / "checkpoints" / "last.ckpt"
        self.unfinished = self.last.with_name(".last.ckpt.tmp")
        words = [sys.executable, "-m", "memlm", "fit", "--config", str(config), "--config", str(OVERLAY)]
        words += ["--run.name", name, "--trainer.max_steps", str(steps)]
        words += ["--trainer.strategy.init_args.asynchronous_save", str(asynchronous).lower()]
        if self.last.exists():
            words += ["--ckpt_path", "last"]
        elif self.directory.exists():  # killed before the first checkpoint
            shutil.rmtree(self.directory)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MEMLM_KERNELS": "reference"}
        self.output = folder / "output.txt"
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                words, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment
            )

    def pid(self, rank: int) -> int:
        """Of a rank's process; rank 0 has started the other."""
        own = self.process.pid
        if rank == 0:
            return own
        children = Path(f"/proc/{own}/task/{own}/children").read_text().split()
        return next(
            int(child) for child in children if b"memlm" in Path(f"/proc/{child}/cmdline").read_bytes()
        )

    def step(self) -> int:
        """The last that is in metrics.csv."""
        path = self.directory / "metrics.csv"
        lines = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
        return int(lines[-1].split(",")[0]) if len(lines) > 1 else 0

    def wait_for(self, condition: Any, seconds: float = 300) -> None:
        """Wait until something is so, while the job goes on."""
        until = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the job has ended or hangs:\n{self.output.read_text()[-4000:]}")
            time.sleep(0.001)

    def finish(self) -> None:
        """Wait for its end, which must be a good one."""
        if self.process.wait(timeout=600) != 0:
            raise RuntimeError(f"the job has failed:\n{self.output.read_text()[-4000:]}")


def alive(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def kill(job: Job, rank: int, asynchronous: bool, during_save: bool, chance: random.Random) -> Kill:
    """Kill a rank some steps after the job has begun to train, or in the first save from then on."""
    first = job.step()
    after = first + chance.randint(*STEPS_OF_A_LIFE)
    job.wait_for(lambda: job.step() >= after)
    pids = [job.pid(other) for other in range(2)]
    if during_save:
        job.wait_for(job.unfinished.exists)
        time.sleep(chance.uniform(0, 0.02))
    else:
        time.sleep(chance.uniform(0, 0.1))
    step = job.step()
    os.kill(pids[rank], 9)
    start = time.monotonic()
    while any(alive(pid) for pid in pids) and time.monotonic() - start < 120:
        job.process.poll()
        time.sleep(0.05)
    seconds = time.monotonic() - start
    for pid in pids:  # none is left, unless this has failed
        if alive(pid):
            os.kill(pid, 9)
    job.process.wait()
    said = job.output.read_text(errors="replace")
    named = re.search(rf"^memlm: rank {1 - rank} ends: rank {rank}\b.*$", said, re.M) or re.search(
        rf"^\[rank: {rank}\] Child process.*terminated with code -9.*$", said, re.M
    )
    found = torch.load(job.last / "meta.pt")["global_step"] if job.last.exists() else None
    return Kill(
        rank,
        asynchronous,
        "save" if during_save else "step",
        step,
        job.unfinished.exists(),
        round(seconds, 2),
        named[0] if named else "",
        found,
    )


def differences(one: Job, other: Job) -> list[str]:
    """Where two runs differ, in metrics and in their checkpoints, the last and the best."""
    found = []
    rows = []
    for job in (one, other):
        with (job.directory / "metrics.csv").open() as file:
            rows.append(list(csv.DictReader(file)))
    if len(rows[0]) != len(rows[1]):
        found.append(f"{len(rows[0])} rows and {len(rows[1])}")
    for mine, theirs in zip(*rows, strict=False):
        for name in mine.keys() | theirs.keys():
            if not _MEASURED.search(name) and mine.get(name) != theirs.get(name):
                found.append(f"{name} at step {mine['step']}: {mine.get(name)} and {theirs.get(name)}")
    for which in ("last.ckpt", "best.ckpt"):
        mine, theirs = (_tensors(read_whole(job.last.with_name(which))) for job in (one, other))
        if mine.keys() != theirs.keys():
            found.append(f"names of tensors of {which}")
        found += [f"{name} of {which}" for name in mine if not torch.equal(mine[name], theirs[name])]
    return found


def _tensors(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    found = dict(checkpoint["state_dict"])
    for number, state in checkpoint["optimizer_states"][0]["state"].items():
        found |= {f"state of {number}: {kind}": tensor for kind, tensor in state.items()}
    return found


def main() -> int:
    """The comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    steps = (STEPS_OF_A_LIFE[1] + 2 * SAVE_EVERY) * options.kills + SAVE_EVERY
    start = time.monotonic()
    kills = []
    with tempfile.TemporaryDirectory(prefix="memlm_kills_") as name:
        folder = Path(name)
        whole = Job(folder, "whole", steps)
        whole.finish()
        print(
            "| kill | rank | wanted in | asynchronous | step | save unfinished | ends after s | resumes at |"
        )
        print("|---|---|---|---|---|---|---|---|")
        for number in range(options.kills):
            asynchronous = number % 4 >= 2
            job = Job(folder, "killed", steps, asynchronous)
            found = kill(job, chance.randrange(2), asynchronous, number % 2 == 0, chance)
            kills.append(found)
            print(
                f"| {number} | {found.rank} | {found.wanted} | {found.asynchronous} | {found.step} | "
                f"{found.saving} | {found.seconds} | {found.resumes_at} |",
                flush=True,
            )
        job = Job(folder, "killed", steps)
        job.finish()
        different = differences(whole, job)
    failures = [f"kill {n} took {k.seconds} s" for n, k in enumerate(kills) if k.seconds > 60]
    failures += [f"kill {n}: no line names rank {k.rank}" for n, k in enumerate(kills) if not k.named]
    failures += different[:20]
    print(f"{steps} steps, {len(kills)} kills, {sum(k.saving for k in kills)} of them in a save;", end=" ")
    print("as the uninterrupted run, bit for bit" if not failures else "; ".join(failures))
    if options.json is not None:
        result = {
            "command": "python benchmarks/kills.py " + " ".join(sys.argv[1:]),
            "steps": steps,
            "seconds": round(time.monotonic() - start, 1),
            "failures": failures,
            "kills": [asdict(found) for found in kills],
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return int(bool(failures))


if __name__ == "__main__":
    raise SystemExit(main())
