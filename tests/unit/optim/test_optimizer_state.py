"""Saving, loading and resuming MemoryAdamW, and states that do not fit."""

import io
import itertools

import pytest
import torch
from torch import nn

from memlm.errors import UserError
from memlm.memory import MemoryPool
from memlm.optim import MemoryAdamW

SLOTS, DIM = 40, 6


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def both_kinds(draw: int = 0, dtype=torch.float32, slots=SLOTS, **options):
    """A pool and a linear layer under one optimizer."""
    pool, linear = MemoryPool(slots, DIM, dtype=dtype), nn.Linear(DIM, DIM)
    for parameter in (pool.values, linear.weight, linear.bias):
        nn.init.normal_(parameter, generator=generator(draw))
    values = {"lr": 0.05, "weight_decay": 0.01, **options}
    groups = [
        {"params": [pool.values], "kind": "memory", "name": "values", **values},
        {"params": list(linear.parameters()), "name": "decay", "lr": 0.02, "weight_decay": 0.1},
    ]
    return pool, linear, MemoryAdamW(groups, {pool.values: pool.gradient})


def train(pool, linear, optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        slots = torch.randint(pool.slots, (4, 3), generator=generator(step))
        read = pool.read(slots, torch.rand(4, 3, generator=generator(step)))
        linear(read.float()).square().sum().backward()
        optimizer.param_groups[0]["lr"] = 0.05 / (1 + step)
        optimizer.step()


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "method,moments,rounding",
    [
        *itertools.product(["adamw", "adamw_rowwise"], ["lazy", "caught_up"], ["stochastic", "master"]),
        ("sgd", "lazy", "stochastic"),
        ("sgd", "lazy", "master"),
    ],
)
def test_saved_and_loaded_it_continues_to_the_bit(dtype, method, moments, rounding):
    options = {"method": method, "moments": moments, "rounding": rounding, "seed": 11}
    pool, linear, optimizer = both_kinds(0, dtype, **options)
    train(pool, linear, optimizer, range(3))
    states = through_a_file([pool.state_dict(), linear.state_dict(), optimizer.state_dict()])
    train(pool, linear, optimizer, range(3, 6))
    optimizer.settle()

    resumed_pool, resumed_linear, resumed = both_kinds(1, dtype, **options)
    for part, state in zip((resumed_pool, resumed_linear, resumed), states, strict=True):
        part.load_state_dict(state)
    train(resumed_pool, resumed_linear, resumed, range(3, 6))
    resumed.settle()
    assert torch.equal(pool.values, resumed_pool.values)
    assert torch.equal(linear.weight, resumed_linear.weight)
    for a, b in zip(optimizer.state.values(), resumed.state.values(), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype


def test_loading_keeps_the_constructor_s_hyper_parameters_and_copies_the_state():
    pool, linear, optimizer = both_kinds(0)
    train(pool, linear, optimizer, range(2))
    other_pool, other_linear, other = both_kinds(1)
    for group in other.param_groups:
        group.update(lr=0.5, betas=(0.1, 0.2), eps=1.0, weight_decay=0.7, clip=3.0)
    other.load_state_dict(optimizer.state_dict())
    for group in other.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.5, (0.1, 0.2), 1.0)
        assert (group["weight_decay"], group["clip"]) == (0.7, 3.0)
    before = optimizer.state[pool.values]["exp_avg"].clone()
    train(other_pool, other_linear, other, range(5, 7))
    assert torch.equal(optimizer.state[pool.values]["exp_avg"], before)


@pytest.mark.parametrize("decay_before,decay_after", [(0.0, 0.5), (0.5, 0.0), (0.5, 0.2)])
@pytest.mark.parametrize("resumed", [False, True])
def test_a_change_of_weight_decay_keeps_what_is_owed_and_adds_nothing_to_it(
    decay_before, decay_after, resumed
):
    pool, _, optimizer = both_kinds(method="sgd", weight_decay=decay_before)
    before = pool.values.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.1
    for _ in range(3):
        optimizer.step()
    if resumed:
        state = through_a_file(optimizer.state_dict())
        later_pool, _, later = both_kinds(method="sgd", weight_decay=decay_after)
        later_pool.values.data.copy_(pool.values)
        later.load_state_dict(state)
    else:
        later_pool, later = pool, optimizer
        later.param_groups[0]["weight_decay"] = decay_after
    later.param_groups[0]["lr"] = 0.1
    for _ in range(2):
        later.step()
    assert torch.equal(later_pool.values, before)
    later.settle()
    expected = before * (1 - 0.1 * decay_before) ** 3 * (1 - 0.1 * decay_after) ** 2
    torch.testing.assert_close(later_pool.values.detach(), expected, rtol=1e-6, atol=1e-7)


def test_a_state_saved_before_decay_was_owed_is_loaded():
    pool, linear, optimizer = both_kinds()
    train(pool, linear, optimizer, range(3))
    state = optimizer.state_dict()
    old = {name: state["state"][0][name] for name in ("step", "exp_avg", "exp_avg_sq")}
    later_pool, _, later = both_kinds()
    later_pool.values.data.copy_(pool.values)
    later.load_state_dict(state | {"state": state["state"] | {0: old}})
    assert torch.equal(later.state[later_pool.values]["exp_avg"], old["exp_avg"])
    later.settle()
    assert torch.equal(later_pool.values, pool.values)


def test_a_state_of_another_shape_is_refused_with_both_sizes():
    pool, _, optimizer = both_kinds()
    _, _, other = both_kinds(slots=SLOTS + 1)
    with pytest.raises(UserError, match=r"\(40, 6\), expected \(41, 6\)") as error:
        other.load_state_dict(optimizer.state_dict())
    assert "group 'values'" in str(error.value) and "option" not in str(error.value)
    alone = MemoryAdamW([{"params": [pool.values], "kind": "memory"}], {pool.values: pool.gradient})
    with pytest.raises(ValueError, match=r"\[1, 2\] parameters.*\[1\]"):
        alone.load_state_dict(optimizer.state_dict())
    empty = optimizer.state_dict() | {"state": {}}
    with pytest.raises(ValueError, match="None"):
        optimizer.load_state_dict(empty)


@pytest.mark.parametrize(
    "saved_with,loaded_with,found",
    [
        ({}, {"method": "sgd"}, r"has exp_avg, has exp_avg_sq .*exp_avg_sq depends on method"),
        ({"method": "sgd"}, {}, r"lacks exp_avg, lacks exp_avg_sq .*exp_avg_sq depends on method"),
        (
            {},
            {"method": "adamw_rowwise"},
            r"shape \(40, 6\), expected \(40,\) .*exp_avg_sq depends on method",
        ),
        ({"moments": "caught_up"}, {}, r"has last_step .*last_step depends on moments"),
        ({}, {"moments": "caught_up"}, r"lacks last_step .*last_step depends on moments"),
        ({}, {"betas": (0.0, 0.9)}, r"has exp_avg .*exp_avg depends on betas\[0\]"),
        ({}, {"rounding": "master"}, r"lacks master .*master depends on rounding"),
    ],
)
def test_a_state_of_other_options_is_refused_and_nothing_is_loaded(saved_with, loaded_with, found):
    pool, linear, optimizer = both_kinds(dtype=torch.bfloat16, **saved_with)
    train(pool, linear, optimizer, range(2))
    _, _, other = both_kinds(dtype=torch.bfloat16, **loaded_with)
    with pytest.raises(UserError, match=found) as error:
        other.load_state_dict(optimizer.state_dict())
    assert "give the options it was saved with" in str(error.value)
    assert all(state["step"] == 0 for state in other.state.values())


def test_nothing_as_large_as_a_row_is_allocated_for_options_that_need_none():
    pool, linear, optimizer = both_kinds(method="adamw_rowwise", betas=(0.0, 0.9), weight_decay=0.0)
    assert {name: tuple(t.shape) for name, t in optimizer.state[pool.values].items()} == {
        "step": (), "decay_log": (), "exp_avg_sq": (SLOTS,),
    }  # fmt: skip
    train(pool, linear, optimizer, range(2))
    assert set(optimizer.state[pool.values]) == {"step", "decay_log", "exp_avg_sq"}
