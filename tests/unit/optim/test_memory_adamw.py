"""MemoryAdamW against torch's dense and sparse optimizers."""

import copy
import io

import pytest
import torch
from torch import nn

from memlm.memory import MemoryPool
from memlm.optim import MemoryAdamW

SLOTS, DIM = 40, 6


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_pool(dtype=torch.float64) -> MemoryPool:
    pool = MemoryPool(SLOTS, DIM)
    pool.values.data = torch.randn(SLOTS, DIM, generator=generator(), dtype=torch.float64).to(dtype)
    return pool


def make_optimizer(pool: MemoryPool, **options) -> MemoryAdamW:
    group = {"params": [pool.values], "kind": "memory", "name": "values", **options}
    return MemoryAdamW([group], {pool.values: pool.gradient})


def record(pool: MemoryPool, slots: torch.Tensor, seed: int) -> torch.Tensor:
    """Adds a random gradient to the rows read (twice each); returns it as a dense table."""
    dtype = torch.promote_types(pool.values.dtype, torch.float32)
    dense = torch.zeros(SLOTS, DIM, dtype=dtype)
    for part in (0, 1):
        grad = torch.randn(len(slots), DIM, generator=generator(10 * seed + part), dtype=dtype)
        weights = torch.rand(len(slots), 1, generator=generator(10 * seed + part), dtype=dtype)
        pool.gradient.add(slots.unsqueeze(1), weights, grad)
        dense.index_add_(0, slots, weights * grad)
    return dense


OPTIONS = {"lr": 0.03, "betas": (0.8, 0.9), "eps": 1e-6}


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equals_adamw_when_every_row_is_read_in_every_step(dtype, tolerance, weight_decay):
    pool = make_pool(dtype)
    ours = make_optimizer(pool, **OPTIONS, weight_decay=weight_decay)
    dense = nn.Parameter(pool.values.detach().clone())
    theirs = torch.optim.AdamW([dense], **OPTIONS, weight_decay=weight_decay)
    for step in range(6):
        ours.zero_grad()
        dense.grad = record(pool, torch.randperm(SLOTS, generator=generator(step)), step).to(dtype)
        ours.step()
        theirs.step()
        torch.testing.assert_close(pool.values, dense, rtol=tolerance, atol=tolerance)
    state = ours.state[pool.values]
    torch.testing.assert_close(
        state["exp_avg_sq"], theirs.state[dense]["exp_avg_sq"], rtol=1e-6, atol=tolerance
    )


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_equals_sparse_adam_when_few_rows_are_read(dtype, tolerance):
    pool = make_pool(dtype)
    # SparseAdam adds epsilon before the bias correction, AdamW after it: so small it makes no difference.
    options = {**OPTIONS, "eps": 1e-20}
    ours = make_optimizer(pool, **options)
    dense = nn.Parameter(pool.values.detach().clone())
    theirs = torch.optim.SparseAdam([dense], **options)
    for step in range(8):
        ours.zero_grad()
        slots = torch.randint(SLOTS, (5,), generator=generator(step))  # repeated rows too
        rows = slots.unique()
        gradient = record(pool, slots, step).to(dtype)[rows]
        dense.grad = torch.sparse_coo_tensor(rows.unsqueeze(0), gradient, (SLOTS, DIM), check_invariants=True)
        ours.step()
        theirs.step()
        torch.testing.assert_close(pool.values, dense, rtol=tolerance, atol=tolerance)


def test_rows_not_read_keep_every_bit_of_values_and_moments():
    pool = make_pool(torch.float32)
    optimizer = make_optimizer(pool, lr=0.1, weight_decay=0.5)
    record(pool, torch.arange(SLOTS), 0)
    optimizer.step()
    state = optimizer.state[pool.values]
    before = [t.clone() for t in (pool.values.detach(), state["exp_avg"], state["exp_avg_sq"])]
    optimizer.zero_grad()
    read = torch.tensor([3, 17, 3])
    record(pool, read, 1)
    optimizer.step()
    idle = torch.ones(SLOTS, dtype=torch.bool)
    idle[read] = False
    for old, new in zip(before, (pool.values, state["exp_avg"], state["exp_avg_sq"]), strict=True):
        assert torch.equal(old[idle], new[idle])
        assert (old[~idle] != new[~idle]).all()


def test_dense_groups_equal_fused_adamw_to_the_bit():
    modules = [nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(2, 2)]
    twins = copy.deepcopy(modules)
    groups = [
        {"params": list(modules[0].parameters()), "lr": 0.01, "weight_decay": 0.1},
        {"params": list(modules[1].parameters()), "lr": 0.003, "betas": (0.5, 0.99), "eps": 1e-4},
        {"params": list(modules[2].parameters())},  # never has a gradient
    ]
    ours = MemoryAdamW(groups, lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    theirs = torch.optim.AdamW(
        [{**group, "params": list(twin.parameters())} for group, twin in zip(groups, twins, strict=True)],
        lr=0.1, betas=(0.9, 0.95), weight_decay=0.0, fused=True,
    )  # fmt: skip
    for step in range(5):
        x = torch.randn(4, 5, generator=generator(step))
        for optimizer, (first, second, _) in ((ours, modules), (theirs, twins)):
            optimizer.zero_grad()
            second(first(x).tanh()).square().sum().backward()
            optimizer.step()
        for module, twin in zip(modules, twins, strict=True):
            for a, b in zip(module.parameters(), twin.parameters(), strict=True):
                assert torch.equal(a, b)


def test_bf16_values_have_fp32_moments_and_round_once():
    pool = make_pool(torch.bfloat16)
    start = pool.values.detach().float()
    optimizer = make_optimizer(pool, **OPTIONS)
    state = optimizer.state[pool.values]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
    dense = nn.Parameter(start.clone())
    theirs = torch.optim.AdamW([dense], **OPTIONS, weight_decay=0.0)
    dense.grad = record(pool, torch.arange(SLOTS), 0)
    optimizer.step()
    theirs.step()
    assert torch.equal(pool.values, dense.bfloat16())


def both_kinds(seed: int, dtype=torch.float32):
    """A pool and a linear layer under one optimizer."""
    pool, linear = make_pool(dtype), nn.Linear(DIM, DIM)
    nn.init.normal_(linear.weight, generator=generator(seed))
    nn.init.zeros_(linear.bias)
    groups = [
        {"params": [pool.values], "kind": "memory", "name": "values", "lr": 0.05, "weight_decay": 0.01},
        {"params": list(linear.parameters()), "name": "decay", "lr": 0.02, "weight_decay": 0.1},
    ]
    return pool, linear, MemoryAdamW(groups, {pool.values: pool.gradient})


def train(pool, linear, optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        slots = torch.randint(SLOTS, (4, 3), generator=generator(step))
        read = pool.read(slots, torch.rand(4, 3, generator=generator(step)))
        linear(read.float()).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_it_continues_to_the_bit(dtype):
    pool, linear, optimizer = both_kinds(0, dtype)
    train(pool, linear, optimizer, range(3))
    file = io.BytesIO()
    torch.save([pool.state_dict(), linear.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    train(pool, linear, optimizer, range(3, 6))

    states = torch.load(file, weights_only=True)
    resumed_pool, resumed_linear, resumed = both_kinds(1, dtype)
    for part, state in zip((resumed_pool, resumed_linear, resumed), states, strict=True):
        part.load_state_dict(state)
    train(resumed_pool, resumed_linear, resumed, range(3, 6))
    assert torch.equal(pool.values, resumed_pool.values)
    assert torch.equal(linear.weight, resumed_linear.weight)
    for a, b in zip(optimizer.state.values(), resumed.state.values(), strict=True):
        for name in ("step", "exp_avg", "exp_avg_sq"):
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


def test_a_state_of_another_shape_is_refused_with_both_sizes():
    pool, _, optimizer = both_kinds(0)
    small = nn.Parameter(torch.zeros(SLOTS, DIM + 1))
    linear = nn.Linear(DIM, DIM)
    other = MemoryAdamW([{"params": [small]}, {"params": list(linear.parameters())}])
    with pytest.raises(ValueError, match=r"\(40, 6\).*\(40, 7\)"):
        other.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"\[1, 2\] parameters.*\[1\]"):
        make_optimizer(pool).load_state_dict(optimizer.state_dict())
    empty = optimizer.state_dict() | {"state": {}}
    with pytest.raises(ValueError, match="None"):
        optimizer.load_state_dict(empty)


def test_a_step_without_reads_changes_nothing_but_the_count():
    pool = make_pool()
    optimizer = make_optimizer(pool, lr=0.1, weight_decay=0.5)
    before = pool.values.detach().clone()
    optimizer.step()
    assert torch.equal(pool.values, before)
    assert optimizer.state[pool.values]["step"] == 1


def test_zero_grad_clears_dense_and_row_gradients():
    pool, linear, optimizer = both_kinds(0)
    linear(pool.read(torch.tensor([[1]]), torch.tensor([[1.0]]))).sum().backward()
    assert pool.gradient.compact() is not None and linear.weight.grad is not None
    optimizer.zero_grad()
    assert pool.gradient.compact() is None and linear.weight.grad is None


def test_closure_and_wrong_groups():
    pool, linear, optimizer = both_kinds(0)

    def closure():
        loss = linear(pool.read(torch.tensor([[1]]), torch.tensor([[1.0]]))).sum()
        loss.backward()
        return loss

    before = pool.values.detach().clone()
    assert optimizer.step(closure).requires_grad
    assert (pool.values[1] != before[1]).all()
    with pytest.raises(ValueError, match="no row gradient"):
        MemoryAdamW([{"params": [pool.values], "kind": "memory"}])
    with pytest.raises(ValueError, match="'sparse'"):
        MemoryAdamW([{"params": [pool.values], "kind": "sparse"}])
