"""Learning-rate schedules at hand-computed points."""

import pytest
import torch
from torch import nn

from memlm.errors import ConfigError
from memlm.optim import MemoryAdamW, Schedule, ScheduleConfig


@pytest.mark.parametrize(
    "config,expected",
    [
        # 11 steps, no warm-up: step 10 is the last.
        (ScheduleConfig("linear", 0, 0.1), {0: 1.0, 5: 0.55, 10: 0.1}),
        (ScheduleConfig("cosine", 0, 0.1), {0: 1.0, 5: 0.55, 10: 0.1, 1: 0.1 + 0.9 * 0.9755282581}),
        (ScheduleConfig("constant", 0, 0.1), {0: 1.0, 5: 1.0, 10: 1.0}),
        # Decay over the last round(0.4 * 11) = 4 steps, 7 to 10.
        (ScheduleConfig("wsd", 0, 0.1, 0.4), {0: 1.0, 6: 1.0, 7: 1.0, 8: 0.7, 9: 0.4, 10: 0.1}),
        # Warm-up of 2 steps: half rate, full rate; the decay starts at step 2.
        (ScheduleConfig("linear", 2, 0.0), {0: 0.5, 1: 1.0, 2: 1.0, 6: 0.5, 10: 0.0}),
        (ScheduleConfig("cosine", 2, 0.0), {0: 0.5, 1: 1.0, 2: 1.0, 6: 0.5, 10: 0.0}),
        (ScheduleConfig("constant", 4, 0.0), {0: 0.25, 3: 1.0, 10: 1.0}),
        (ScheduleConfig("wsd", 4, 0.5, 1.0), {0: 0.25, 3: 1.0, 4: 1.0, 7: 0.75, 10: 0.5}),
        # Steps beyond the run stay at the final ratio; a warm-up as long as the run just rises.
        (ScheduleConfig("linear", 0, 0.1), {11: 0.1, 100: 0.1}),
        (ScheduleConfig("linear", 11, 0.1), {0: 1 / 11, 10: 1.0}),
        (ScheduleConfig("wsd", 0, 0.1, 0.01), {0: 1.0, 9: 1.0, 10: 1.0}),  # a decay of no step
    ],
)  # fmt: skip
def test_factors(config, expected):
    for step, factor in expected.items():
        assert config.factor(step, 11) == pytest.approx(factor, abs=1e-9), step


@pytest.mark.parametrize("shape", ["linear", "cosine", "wsd", "constant"])
def test_a_run_of_one_step(shape):
    assert 0 <= ScheduleConfig(shape, final_ratio=0.3).factor(0, 1) <= 1


def build(base: float, total: int = 5):
    groups = [
        {"params": [nn.Parameter(torch.zeros(1))], "lr": base},
        {"params": [nn.Parameter(torch.zeros(1))], "lr": 10 * base},
    ]
    optimizer = MemoryAdamW(groups)
    return optimizer, Schedule(
        optimizer, [ScheduleConfig("linear", 0, 0.0), ScheduleConfig("constant", 2)], total
    )


def rates(optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


def test_each_group_has_its_own_schedule():
    optimizer, schedule = build(1.0)
    seen = []
    for _ in range(5):
        seen.append(rates(optimizer))
        optimizer.step()
        schedule.step()
    assert seen == [[1.0, 5.0], [0.75, 10.0], [0.5, 10.0], [0.25, 10.0], [0.0, 10.0]]


def test_resuming_takes_the_step_from_the_state_and_the_rates_from_the_configuration():
    optimizer, schedule = build(1.0)
    for _ in range(3):
        optimizer.step()
        schedule.step()
    state = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    resumed, resumed_schedule = build(2.0, total=9)
    resumed.load_state_dict(state["optimizer"])
    resumed_schedule.load_state_dict(state["schedule"])
    assert rates(resumed) == [2.0 * (1 - 3 / 8), 20.0]
    assert resumed_schedule.get_last_lr() == rates(resumed)
    resumed.step()
    resumed_schedule.step()
    assert rates(resumed) == [2.0 * (1 - 4 / 8), 20.0]


@pytest.mark.parametrize(
    "options,key",
    [
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"final_ratio": 1.5}, "final_ratio"),
        ({"final_ratio": -0.1}, "final_ratio"),
        ({"decay_share": 0.0}, "decay_share"),
        ({"decay_share": 1.1}, "decay_share"),
    ],
)
def test_errors_name_key_and_value(options, key):
    with pytest.raises(ConfigError) as error:
        ScheduleConfig(**options).validate("model.optimizer.schedule")
    assert error.value.key == f"model.optimizer.schedule.{key}"
    assert str(next(iter(options.values()))) in str(error.value)
