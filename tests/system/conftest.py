"""A tiny run: the real command line, model and data, in a fraction of a second."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from memlm.__main__ import main

TINY = {
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 10,
        "val_check_interval": 4,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
    },
    "model": {
        "class_path": "memlm.MemoryLM",
        "init_args": {
            "transformer": {"dim": 16, "layers": 2, "heads": 2, "feed_forward_dim": 16},
            "memory": {"half_keys": 8, "heads": 2, "reads": 4, "key_dim": 8, "layers": [1]},
        },
    },
    "data": {
        "class_path": "SyntheticFacts",
        "init_args": {
            "people": 40,
            "control": 5,
            "batch_size": 4,
            "name_vocabulary": 20,
            "values": 5,
            "attributes": 2,
            "evaluation_facts": 10,
        },
    },
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with tiny.yaml in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEMLM_TRACEBACK", raising=False)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    return tmp_path


@pytest.fixture
def memlm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs a command in that folder, in this process; returns the exit code."""

    def run(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["memlm", *arguments])
        return main(list(arguments))

    return run
