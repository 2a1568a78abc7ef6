"""Runs of the command line, one or several processes each, and what they leave."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml

from memlm.parallel.checkpoint_folder import read_whole

OVERLAYS = Path(__file__).parents[2] / "configs" / "parallel"
CONSTANT = {"schedule": {"shape": "constant"}}
DATA = {"people": 40, "name_vocabulary": 20, "batch_size": 4}
CONFIG = {
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 12,
        "val_check_interval": 6,
        "log_every_n_steps": 1,
        "gradient_clip_val": 1.0,
        "enable_progress_bar": False,
    },
    "model": {
        "class_path": "memlm.MemoryLM",
        "init_args": {
            "transformer": {"dim": 16, "layers": 2, "heads": 2},
            "memory": {"half_keys": 16, "heads": 2, "reads": 4, "key_dim": 8, "layers": [1]},
            "optimizer": {"learning_rate": 0.005} | CONSTANT,
            "values_optimizer": {"learning_rate": 0.01, "clip": None} | CONSTANT,
        },
    },
    "data": {"class_path": "SyntheticFacts", "init_args": DATA},
}
TWO = ["--config", str(OVERLAYS / "memory_parallel.yaml"), "--trainer.devices", "2"]
ONE = ["--data.init_args.batch_size", "8"]
GROUP = "--trainer.strategy.init_args.memory_group"


class Place:
    """A folder of runs.

    Args:
        folder: Of the runs.
        config: Of all of them.
    """

    def __init__(self, folder: Path, config: dict) -> None:
        self.runs = folder / "runs"
        self.config = folder / "config.yaml"
        self.config.write_text(yaml.safe_dump({"run": {"root": str(self.runs)}} | config))

    def words(self, verb, name, *words):
        return ["-m", "memlm", verb, "--config", str(self.config), "--run.name", name, *words]

    def start(self, words):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MEMLM_KERNELS": "reference"}
        environment.pop("PYTEST_XDIST_WORKER", None)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, *words], env=environment, **pipes, start_new_session=True)

    def run(self, verb, name, *words, code=0):
        process = self.start(self.words(verb, name, *words))
        out, error = process.communicate(timeout=240)
        assert process.returncode == code, error[-4000:]
        return out + error

    def checkpoint(self, name, which="last"):
        return self.runs / name / "checkpoints" / f"{which}.ckpt"

    def column(self, name, column):
        with open(self.runs / name / "metrics.csv", encoding="utf-8") as file:
            return [float(row[column]) for row in csv.DictReader(file) if row[column]]

    def tensors(self, name, which="last"):
        path = self.checkpoint(name, which)
        whole = read_whole(path) if path.is_dir() else torch.load(path)
        found = {f"weight {key}": tensor for key, tensor in whole["state_dict"].items()}
        for number, state in whole["optimizer_states"][0]["state"].items():
            found |= {f"state {number} {kind}": tensor for kind, tensor in state.items()}
        return found
