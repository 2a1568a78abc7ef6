import io
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from callbacks.random_state import RandomState, random_state, set_random_state

CPU = torch.device("cpu")
MODULE = SimpleNamespace(device=CPU)


def draw() -> list[float]:
    return [torch.rand(()).item(), np.random.rand(), random.random(), random.gauss(0, 1), np.random.randn()]


@pytest.fixture(autouse=True)
def own_generators():
    before = random_state(CPU)
    yield
    set_random_state(before, CPU)


def saved(world_size: int = 1) -> dict:
    """The checkpoint entry, through a file, as it is loaded."""
    checkpoint: dict = {}
    RandomState().on_save_checkpoint(SimpleNamespace(world_size=1), MODULE, checkpoint)
    checkpoint["random_state"] *= world_size
    file = io.BytesIO()
    torch.save(checkpoint, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_every_generator_continues():
    draw()  # leaves a cached gaussian in both normal generators
    checkpoint = saved()
    expected = [draw() for _ in range(3)]
    draw()
    callback = RandomState()
    trainer = SimpleNamespace(world_size=1, global_rank=0)
    callback.on_load_checkpoint(trainer, MODULE, checkpoint)
    callback.on_train_start(trainer, MODULE)
    assert [draw() for _ in range(3)] == expected


def test_a_fresh_run_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    RandomState().on_train_start(SimpleNamespace(world_size=1, global_rank=0), MODULE)
    assert torch.equal(torch.rand(3), expected)


def test_another_number_of_processes_starts_anew(caplog):
    caplog.set_level("INFO", "lightning.pytorch")
    callback = RandomState()
    trainer = SimpleNamespace(world_size=1, global_rank=0)
    callback.on_load_checkpoint(trainer, MODULE, saved(world_size=2))
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    callback.on_train_start(trainer, MODULE)
    assert torch.equal(torch.rand(3), expected)
    assert "the random state of 2 processes, this run has 1" in caplog.text


def test_each_rank_takes_its_own():
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(random_state(CPU))
    callback = RandomState()
    trainer = SimpleNamespace(world_size=2, global_rank=1)
    callback.on_load_checkpoint(trainer, MODULE, {"random_state": states})
    callback.on_train_start(trainer, MODULE)
    drawn = torch.rand(3)
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(2)))
