"""A corner of the grid of benchmarks/strategies.py: losses are those of one process, or it would be seen."""

import importlib.util
from itertools import pairwise

import pytest

from benchmarks import strategies

pytestmark = pytest.mark.distributed


def test_two_processes():
    rows = strategies.measure([2], ("Memory+",), ("DDP", "FSDP2", "ZeRO 2"))
    expected = {(name, group) for name in ("DDP", "FSDP2") for group in (1, 2)}
    if importlib.util.find_spec("deepspeed") is not None:
        expected |= {("ZeRO 2", 1), ("ZeRO 2", 2)}
    assert {(row["strategy"], row["group"]) for row in rows} == expected
    assert {row["rows"] for row in rows if row["group"] == 1} == {"sparse", "dense"}
    assert max(row["deviation"] for row in rows) <= strategies.BAR
    text = strategies.table(rows)
    assert "| Memory+ | 2 | 1 |" in text
    assert text.count("\n") == 3


def test_models_learn_in_those_steps_so_that_a_wrong_update_shows():
    (losses,) = strategies.launch(None, strategies.MODELS, ())
    for name, of_steps in losses.items():
        assert of_steps[-1] < of_steps[0] - 0.2, name
        apart = [abs(later - loss) / loss for loss, later in pairwise(of_steps)]
        assert max(apart) > 100 * strategies.BAR, name
