"""What cannot work is refused at the start on every rank, in one line with the key and the numbers."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

pytestmark = pytest.mark.distributed

HERE = Path(__file__).parent
STRATEGIES = "memlm.parallel.strategy."
GROUP = "--trainer.strategy.init_args.memory_group"
RATE = "--model.init_args.optimizer.learning_rate"
CONFIG = {
    "trainer": {
        "accelerator": "cpu",
        "devices": 2,
        "max_steps": 2,
        "val_check_interval": 2,
        "enable_progress_bar": False,
        "strategy": {"class_path": STRATEGIES + "MemoryParallelStrategy", "init_args": {"memory_group": 2}},
    },
    "model": {
        "class_path": "memlm.MemoryLM",
        "init_args": {
            "transformer": {"dim": 16, "layers": 2, "heads": 2},
            "memory": {"half_keys": 8, "heads": 2, "reads": 4, "key_dim": 8, "layers": [1]},
        },
    },
    "data": {
        "class_path": "SyntheticFacts",
        "init_args": {"people": 40, "name_vocabulary": 20, "batch_size": 4},
    },
}
TEXT = {
    "class_path": "TextStream",
    "init_args": {"paths": ["text/*.txt"], "sequence_length": 16, "batch_size": 4, "validation_fraction": 0},
}


def torchrun(folder, words, ranks=2):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MEMLM_KERNELS": "reference"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    words = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *words]
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=environment, timeout=240, cwd=folder
    )


class Place:
    """A folder with a configuration for each kind of data, and with checkpoints."""

    def __init__(self, folder):
        self.folder = folder
        self.config, self.text = self.write("facts", CONFIG), self.write("text", CONFIG | {"data": TEXT})
        for rank, words in enumerate(("one two", "one three")):
            (folder / f"{rank}/text").mkdir(parents=True)
            for number in range(20):
                (folder / f"{rank}/text/{number:02d}.txt").write_text(f"{number} {words}\n" * 20)

    def write(self, name, config):
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"run": {"root": str(self.folder / "runs")}} | config))
        return str(path)

    def run(self, cases):
        """Results of the cases by name, of both ranks."""
        options = json.dumps({"folder": str(self.folder), "cases": cases})
        done = torchrun(self.folder, [str(HERE / "unlike.py"), options])
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
        ranks = [json.loads((self.folder / f"{rank}/results.json").read_text()) for rank in range(2)]
        return {name: [rank[name] for rank in ranks] for name in cases}

    def fit(self, name, *words, config=None, **more):
        return {"all": ["fit", "--config", config or self.config, "--run.name", name, *words]} | more


def said(results):
    return [line for rank in results for line in rank["lines"] if line.startswith("memlm:")]


UNLIKE = {
    "rate": (
        {"1": [RATE, "0.5"]},
        "model.init_args.optimizer.learning_rate",
        "0.001 on rank 0, 0.5 on rank 1",
    ),
    "dim": (
        {"1": ["--model.init_args.transformer.dim", "32"]},
        "model.init_args.transformer.dim",
        "16 on rank 0",
    ),
    "steps": ({"0": ["--trainer.max_steps", "3"]}, "trainer.max_steps", "3 on rank 0, 2 on rank 1"),
    "precision": (
        {"1": ["--trainer.precision", "bf16-mixed"]},
        "trainer.precision",
        '"32-true" on rank 0, "bf16-mixed" on rank 1',
    ),
    "group": ({"1": [GROUP, "1"]}, "trainer.strategy.init_args.memory_group", "2 on rank 0, 1 on rank 1"),
    "strategy": (
        {"1": ["--trainer.strategy", "memory_ddp"]},
        "trainer.strategy.class_path",
        "not set on rank 1",
    ),
    "seed": ({"1": ["--data.init_args.seed", "1"]}, "data.init_args.seed", "0 on rank 0, 1 on rank 1"),
    "batch": (
        {"1": ["--data.init_args.batch_size", "8"]},
        "data.init_args.batch_size",
        "4 on rank 0, 8 on rank 1",
    ),
    "order": ({"1": ["--seed_everything", "7"]}, "seed_everything", "0 on rank 0, 7 on rank 1"),
    "root": ({"1": ["--run.root", "elsewhere"]}, "run.root", '"elsewhere" on rank 1'),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("unlike"))


@pytest.fixture(scope="module")
def unlike(place):
    cases = {name: place.fit(name, words=words) for name, (words, *_) in UNLIKE.items()}
    cases["version"] = place.fit("version", versions={"1": "0.0.9"})
    cases["files"] = place.fit("files", config=place.text)
    cases["alike"] = place.fit("alike")
    return place.run(cases)


@pytest.mark.parametrize("name", UNLIKE)
def test_unlike_settings(unlike, place, name):
    _, key, values = UNLIKE[name]
    assert [rank["code"] for rank in unlike[name]] == [2, 2]
    (line,) = said(unlike[name])
    assert line.startswith(f"memlm: error: {key}: differs between the processes"), line
    assert values in line
    assert not (place.folder / "runs" / name).exists()
    assert max(rank["seconds"] for rank in unlike[name]) < 30


def test_unlike_versions(unlike):
    (line,) = said(unlike["version"])
    assert line.startswith("memlm: error: memlm: differs")
    assert '"0.1.0, source' in line
    assert '"0.0.9, source' in line


def test_unlike_files(unlike):
    assert [rank["code"] for rank in unlike["files"]] == [2, 2]
    (line,) = said(unlike["files"])
    assert line.startswith("memlm: error: data (fingerprint of its files and options): differs"), line


def test_the_same_on_all_is_no_difference(unlike, place):
    assert [rank["code"] for rank in unlike["alike"]] == [0, 0], unlike["alike"]
    assert (place.folder / "runs" / "alike" / "checkpoints" / "last.ckpt").is_dir()


# -- meshes and checkpoints, all ranks started at once


@pytest.fixture(scope="module")
def impossible(place, unlike):
    """Of the run that went through, copies that are damaged in some way."""
    folder = place.folder / "runs" / "alike" / "checkpoints" / "last.ckpt"
    damages = {}

    def damaged(name):
        path = place.folder / f"{name}.ckpt"
        shutil.copytree(folder, path)
        damages[name] = place.fit(name, "--ckpt_path", str(path), "--trainer.max_steps", "4")
        return path

    (damaged("no part") / "__1_0.distcp").unlink()
    part = damaged("cut") / "__1_0.distcp"
    part.write_bytes(part.read_bytes()[:100])
    (damaged("no meta") / "meta.pt").unlink()
    (damaged("no metadata") / ".metadata").unlink()
    garbage = damaged("garbage") / ".metadata"
    garbage.write_bytes(b"no pickle at all")
    other = ["--model.init_args.transformer.dim", "32"]
    file = place.folder / "file.ckpt"
    torch.save(torch.load(folder / "meta.pt") | {"state_dict": {}}, file)
    return place.run(
        {
            "group": place.fit("mesh", GROUP, "3"),
            "columns": place.fit("mesh", "--model.init_args.memory.value_dim", "15"),
            "devices": place.fit("mesh", "--trainer.devices", "4"),
            "nodes": place.fit("mesh", "--trainer.num_nodes", "2"),
            "folder": place.fit("other", *other, "--ckpt_path", str(folder), "--trainer.max_steps", "4"),
            "file": place.fit("other", *other, "--ckpt_path", str(file), "--trainer.max_steps", "4"),
            "empty": place.fit("empty", "--ckpt_path", str(file), "--trainer.max_steps", "4"),
            **damages,
        }
    )


IMPOSSIBLE = {
    "group": "trainer.strategy.init_args.memory_group: is 3, must divide the number of processes (2)",
    "columns": "trainer.strategy.init_args.memory_group: is 2, must divide the 15 elements of a value of",
    "devices": "trainer.devices: is 4, and trainer.num_nodes 1, which makes 4 processes; torchrun has",
    "nodes": "trainer.devices: is 2, and trainer.num_nodes 2, which makes 4 processes; torchrun has",
    "folder": "model.transformer.dim: is set to 32, but checkpoint",
    "file": "model.transformer.dim: is set to 32, but checkpoint",
    "empty": "does not fit the model",
    "no part": "__1_0.distcp",
    "cut": "is",
    "no meta": "meta.pt",
    "no metadata": "lacks .metadata",
    "garbage": "is damaged",
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible(impossible, name):
    assert [rank["code"] for rank in impossible[name]] == [2, 2], impossible[name]
    (line,) = said(impossible[name])
    assert line.startswith("memlm: error: ")
    assert IMPOSSIBLE[name] in line
    assert max(rank["seconds"] for rank in impossible[name]) < 30
