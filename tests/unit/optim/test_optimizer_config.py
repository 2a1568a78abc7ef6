"""Options of the value rows' optimizer: checked, and handed to its parameter group."""

import pytest
import torch

from memlm import MemoryLM
from memlm.errors import ConfigError
from memlm.memory import MemoryConfig
from memlm.optim import ValuesOptimizerConfig
from memlm.transformer import TransformerConfig


@pytest.mark.parametrize(
    "options,key,words",
    [
        ({"learning_rate": 2.0, "weight_decay": 0.5}, "weight_decay", "is 1.0, must be below 1"),
        ({"clip": 0.0}, "clip", "must be positive"),
        ({"clip": float("nan")}, "clip", "must be positive"),
        ({"seed": -1}, "seed", "is -1"),
        ({"seed": 2**63}, "seed", "below 2^63"),
        ({"betas": (0.9, 1.0)}, "betas", "below 1"),
    ],
)
def test_values_out_of_range_are_named(options, key, words):
    with pytest.raises(ConfigError) as error:
        ValuesOptimizerConfig(**options).validate("model.values_optimizer")
    assert error.value.key == f"model.values_optimizer.{key}"
    assert words in str(error.value)


@pytest.mark.parametrize("clip", [None, "global", 0.5])
def test_every_clip_there_is_passes(clip):
    ValuesOptimizerConfig(clip=clip, learning_rate=1.9, weight_decay=0.5).validate("key")


def build(**options) -> MemoryLM:
    return MemoryLM(
        20,
        TransformerConfig(dim=16, layers=1, heads=2, feed_forward_dim=16),
        MemoryConfig(half_keys=8, heads=1, reads=2, layers=[0]),
        values_optimizer=ValuesOptimizerConfig(**options),
    )


class Trainer:
    """What configuring the optimizers and checking the options ask of a Trainer."""

    gradient_clip_algorithm = None
    precision = "32-true"
    world_size = 1
    max_steps = 10
    strategy = None
    datamodule = None

    def __init__(self, clip: float | None = None) -> None:
        self.gradient_clip_val = clip


def configured(model: MemoryLM):
    model._trainer = Trainer()
    return model.configure_optimizers()["optimizer"]


def test_options_reach_the_memory_group_alone():
    options = {"method": "adamw_rowwise", "moments": "caught_up", "rounding": "stochastic", "seed": 5}
    model = build(**options, clip="global")
    groups = {group["name"]: group for group in configured(model).param_groups}
    assert {name: groups["values"][name] for name in options} == options
    assert groups["values"]["clip"] == "global"
    assert all(group["clip"] is None for name, group in groups.items() if name != "values")


@pytest.mark.parametrize("clip", [None, 0.0])
def test_a_global_clip_needs_a_value(clip):
    model = build(clip="global")
    model._trainer = Trainer(clip)
    with pytest.raises(ConfigError, match=rf"is {clip}, must be positive") as error:
        model._check_trainer()
    assert error.value.key == "trainer.gradient_clip_val"
    model._trainer = Trainer(1.0)
    model._check_trainer()


def test_masters_of_fp32_values_get_a_warning(recwarn):
    with pytest.warns(UserWarning, match="rounding is master, which does nothing"):
        configured(build(rounding="master"))
    recwarn.clear()
    model = build(rounding="master")
    model.pools["main"].values.data = model.pools["main"].values.data.bfloat16()
    optimizer = configured(model)
    assert not [warning for warning in recwarn if "master" in str(warning.message)]
    assert optimizer.state[model.pools["main"].values]["master"].dtype == torch.float32
