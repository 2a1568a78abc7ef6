"""Clipping: dense gradients as torch does, row gradients apart and exactly."""

import pytest
import torch
from torch import nn

from memlm.memory import MemoryPool
from memlm.optim import MemoryAdamW, clip_gradients


def build(clip, pools=1):
    torch.manual_seed(0)
    linears = [nn.Linear(4, 3), nn.Linear(3, 2)]
    tables = [MemoryPool(12, 4) for _ in range(pools)]
    groups = [{"params": list(linear.parameters()), "name": f"dense{i}"} for i, linear in enumerate(linears)]
    groups.append({"params": [t.values for t in tables], "kind": "memory", "name": "values", "clip": clip})
    optimizer = MemoryAdamW(groups, {t.values: t.gradient for t in tables})
    for linear in linears:
        for parameter in linear.parameters():
            parameter.grad = 10 * torch.randn_like(parameter)
    linears[1].bias.grad = None
    dense = []
    for table in tables:
        slots = torch.randint(12, (6, 5))
        weights, grad = torch.rand(6, 5), torch.randn(6, 4)
        table.gradient.add(slots[:2], weights[:2], grad[:2])  # two micro-batches
        table.gradient.add(slots[2:], weights[2:], grad[2:])
        part = torch.zeros(12, 4)
        part.index_add_(0, slots.flatten(), (weights.unsqueeze(-1) * grad.unsqueeze(1)).flatten(0, 1))
        dense.append(part)
    return optimizer, [p for linear in linears for p in linear.parameters()], tables, dense


def as_dense(table):
    rows, sums = table.gradient.compact()
    return torch.zeros(12, 4).index_copy_(0, rows, sums)


@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_dense_gradients_are_clipped_like_torch_over_all_groups(limit):
    optimizer, parameters, tables, dense = build(clip=None)
    twins = [nn.Parameter(p.detach().clone()) for p in parameters]
    for twin, parameter in zip(twins, parameters, strict=True):
        twin.grad = None if parameter.grad is None else parameter.grad.clone()
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


@pytest.mark.parametrize("clip", [None, 1e6])
def test_null_clip_and_small_norms_leave_values_untouched(clip):
    optimizer, _, tables, dense = build(clip=clip)
    norms = clip_gradients(optimizer, None)
    torch.testing.assert_close(norms["values"], dense[0].norm())
    torch.testing.assert_close(as_dense(tables[0]), dense[0])


def test_nothing_to_clip():
    optimizer, *_ = build(clip=1.0)
    optimizer.zero_grad()
    assert clip_gradients(optimizer, 1.0) == {}
