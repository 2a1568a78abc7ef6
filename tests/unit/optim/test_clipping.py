"""Clipping: dense gradients as torch does, row gradients apart or with them, and exactly."""

import pytest
import torch
from torch import nn

from memlm.memory import MemoryPool
from memlm.optim import MemoryAdamW, clip_gradients


def build(clip, pools=1, slots=12):
    """Two linear layers and some pools with gradients; those of the pools also as dense tables."""
    torch.manual_seed(0)
    linears = [nn.Linear(4, 3), nn.Linear(3, 2)]
    tables = [MemoryPool(slots, 4) for _ in range(pools)]
    groups = [{"params": list(linear.parameters()), "name": f"dense{i}"} for i, linear in enumerate(linears)]
    groups.append({"params": [t.values for t in tables], "kind": "memory", "name": "values", "clip": clip})
    optimizer = MemoryAdamW(groups, {t.values: t.gradient for t in tables})
    for linear in linears:
        for parameter in linear.parameters():
            parameter.grad = 10 * torch.randn_like(parameter)
    linears[1].bias.grad = None
    dense = []
    for table in tables:
        nn.init.normal_(table.values)
        read = torch.randint(slots, (6, 5))
        weights, grad = torch.rand(6, 5), torch.randn(6, 4)
        table.read(read[:2], weights[:2]).backward(grad[:2])  # two micro-batches
        table.read(read[2:], weights[2:]).backward(grad[2:])
        part = torch.zeros(slots, 4)
        part.index_add_(0, read.flatten(), (weights.unsqueeze(-1) * grad.unsqueeze(1)).flatten(0, 1))
        dense.append(part)
    return optimizer, [p for linear in linears for p in linear.parameters()], tables, dense


def as_dense(table):
    compact, factor = table.gradient.compact(), table.gradient.factor
    scaled = compact.sums if factor is None else compact.sums * factor
    return torch.zeros(table.slots, 4).index_copy_(0, compact.rows.long(), scaled)


def twins_of(parameters):
    twins = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    for twin, parameter in zip(twins, parameters, strict=True):
        twin.grad = None if parameter.grad is None else parameter.grad.clone()
    return twins


@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_dense_gradients_are_clipped_like_torch_over_all_groups(limit):
    optimizer, parameters, tables, dense = build(clip=None)
    twins = twins_of(parameters)
    expected = torch.nn.utils.clip_grad_norm_(twins, limit)
    norms = clip_gradients(optimizer, limit)
    assert torch.equal(norms["dense"], expected)
    for twin, parameter in zip(twins, parameters, strict=True):
        assert (twin.grad is None) == (parameter.grad is None)
        assert twin.grad is None or torch.equal(twin.grad, parameter.grad)
    torch.testing.assert_close(as_dense(tables[0]), dense[0])  # the values are not dense parameters


@pytest.mark.parametrize("pools", [1, 2])
def test_values_are_clipped_apart_by_their_own_norm(pools):
    optimizer, parameters, tables, dense = build(clip=0.7, pools=pools)
    before = [None if p.grad is None else p.grad.clone() for p in parameters]
    norms = clip_gradients(optimizer, None)
    total = torch.stack(dense).norm()
    torch.testing.assert_close(norms["values"], total)
    for table, gradient in zip(tables, dense, strict=True):
        torch.testing.assert_close(as_dense(table), gradient * 0.7 / total, rtol=1e-5, atol=1e-6)
    for old, parameter in zip(before, parameters, strict=True):
        assert old is None or torch.equal(old, parameter.grad)


@pytest.mark.parametrize("pools", [1, 2])
@pytest.mark.parametrize("limit", [0.5, 1e6, None])
def test_global_clip_equals_torch_s_over_dense_gradients_of_all(pools, limit):
    optimizer, parameters, tables, dense = build(clip="global", pools=pools)
    twins = twins_of(parameters) + [nn.Parameter(torch.zeros_like(part)) for part in dense]
    for twin, part in zip(twins[len(parameters) :], dense, strict=True):
        twin.grad = part.clone()
    expected = torch.nn.utils.clip_grad_norm_(twins, limit or 1e9)
    norms = clip_gradients(optimizer, limit)
    torch.testing.assert_close(norms["global"], expected)
    torch.testing.assert_close(norms["global"] ** 2, norms["dense"] ** 2 + norms["values"] ** 2)
    ours = [parameter.grad for parameter in parameters] + [as_dense(table) for table in tables]
    for twin, gradient in zip(twins, ours, strict=True):
        assert (twin.grad is None) == (gradient is None)
        if gradient is not None:
            torch.testing.assert_close(gradient, twin.grad, rtol=1e-5, atol=1e-6)


def test_global_clip_without_dense_gradients_clips_the_rows():
    optimizer, parameters, tables, dense = build(clip="global")
    for parameter in parameters:
        parameter.grad = None
    norms = clip_gradients(optimizer, 0.5)
    assert set(norms) == {"values", "global"}
    torch.testing.assert_close(as_dense(tables[0]), dense[0] * 0.5 / dense[0].norm(), rtol=1e-5, atol=1e-6)


def test_a_clipped_step_moves_rows_by_the_scaled_gradient():
    optimizer, _, tables, dense = build(clip=0.7)
    optimizer.param_groups[-1] |= {"method": "sgd", "lr": 0.5}
    before = tables[0].values.detach().clone()
    clip_gradients(optimizer, None)
    optimizer.step()
    expected = before - 0.5 * dense[0] * 0.7 / dense[0].norm()
    torch.testing.assert_close(tables[0].values.detach(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clip", [None, 1e6])
def test_null_clip_and_small_norms_leave_values_untouched(clip):
    optimizer, _, tables, dense = build(clip=clip)
    norms = clip_gradients(optimizer, None)
    torch.testing.assert_close(norms["values"], dense[0].norm())
    torch.testing.assert_close(as_dense(tables[0]), dense[0])


def test_nothing_to_clip():
    for clip in (1.0, "global"):
        optimizer, *_ = build(clip=clip)
        optimizer.zero_grad()
        assert clip_gradients(optimizer, 1.0) == {}


def test_the_norm_of_rows_does_not_depend_on_the_number_of_threads():
    pool = MemoryPool(200_000, 1)
    nn.init.zeros_(pool.values)
    slots = torch.arange(200_000).unsqueeze(1)
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(200_000, 1, generator=generator)
    pool.read(slots, weights).backward(torch.randn(200_000, 1, generator=generator))
    optimizer = MemoryAdamW(
        [{"params": [pool.values], "kind": "memory", "name": "values"}], {pool.values: pool.gradient}
    )
    threads, norms = torch.get_num_threads(), set()
    try:
        for count in (1, 2, 3, 5, 8):
            torch.set_num_threads(count)
            norms.add(clip_gradients(optimizer, None)["values"].item())
    finally:
        torch.set_num_threads(threads)
    assert len(norms) == 1
