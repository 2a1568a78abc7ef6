"""MemoryAdamW against torch's dense and sparse optimizers, and brute force in float64."""

import copy
import math

import pytest
import torch
from torch import nn

from memlm.memory import MemoryPool
from memlm.optim import MemoryAdamW

SLOTS, DIM = 40, 6
OPTIONS = {"lr": 0.03, "betas": (0.8, 0.9), "eps": 1e-6}
PRECISIONS = [(torch.float32, 2e-6), (torch.float64, 1e-12)]


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
    """Adds a random gradient to the rows read (twice each); returns it as a dense float64 table."""
    dense = torch.zeros(SLOTS, DIM, dtype=torch.float64)
    for part in (0, 1):
        grad = torch.randn(len(slots), DIM, generator=generator(10 * seed + part)).to(pool.values.dtype)
        weights = torch.rand(len(slots), 1, generator=generator(10 * seed + part)).to(pool.values.dtype)
        pool.read(slots.unsqueeze(1), weights).backward(grad)
        dense.index_add_(0, slots, weights.double() * grad.double())
    return dense


def in_float64(pool: MemoryPool) -> torch.Tensor:
    return pool.values.detach().to(torch.float64, copy=True)


def some_rows(step: int) -> torch.Tensor:
    """Few rows, repeated ones among them; those above 30 are never read."""
    return torch.randint(30, (5,), generator=generator(step))


def rate(step: int) -> float:
    return 0.05 / (1 + step)


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype,tolerance", PRECISIONS)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("moments", ["lazy", "caught_up"])
def test_equals_adamw_when_every_row_is_read_in_every_step(dtype, tolerance, weight_decay, moments):
    pool = make_pool(dtype)
    ours = make_optimizer(pool, **OPTIONS, weight_decay=weight_decay, moments=moments)
    dense = nn.Parameter(in_float64(pool))
    theirs = torch.optim.AdamW([dense], **OPTIONS, weight_decay=weight_decay)
    for step in range(6):
        ours.zero_grad()
        dense.grad = record(pool, torch.randperm(SLOTS, generator=generator(step)), step)
        ours.param_groups[0]["lr"] = theirs.param_groups[0]["lr"] = rate(step)
        ours.step()
        theirs.step()
        close(pool.values, dense, tolerance)
    close(ours.state[pool.values]["exp_avg_sq"], theirs.state[dense]["exp_avg_sq"], tolerance)


@pytest.mark.parametrize("dtype,tolerance", PRECISIONS)
def test_equals_sparse_adam_when_few_rows_are_read(dtype, tolerance):
    pool = make_pool(dtype)
    # SparseAdam adds epsilon before the bias correction, AdamW after it: so small it makes no difference.
    options = {**OPTIONS, "eps": 1e-20}
    ours = make_optimizer(pool, **options)
    dense = nn.Parameter(in_float64(pool))
    theirs = torch.optim.SparseAdam([dense], **options)
    for step in range(8):
        ours.zero_grad()
        slots = some_rows(step)
        rows = slots.unique()
        gradient = record(pool, slots, step)[rows]
        dense.grad = torch.sparse_coo_tensor(rows.unsqueeze(0), gradient, (SLOTS, DIM), check_invariants=True)
        ours.step()
        theirs.step()
        close(pool.values, dense, tolerance)


@pytest.mark.parametrize("dtype,tolerance", PRECISIONS)
def test_without_momentum_equals_adamw_for_any_rows_once_decay_is_settled(dtype, tolerance):
    pool = make_pool(dtype)
    options = {"lr": 0.1, "betas": (0.0, 0.9), "eps": 1e-6, "weight_decay": 0.5}
    ours = make_optimizer(pool, **options, moments="caught_up")
    assert "exp_avg" not in ours.state[pool.values]
    dense = nn.Parameter(in_float64(pool))
    theirs = torch.optim.AdamW([dense], **options)
    for step in range(20):
        ours.zero_grad()
        dense.grad = record(pool, some_rows(step), step)
        ours.param_groups[0]["lr"] = theirs.param_groups[0]["lr"] = rate(step)
        ours.step()
        theirs.step()
        read = some_rows(step)
        close(pool.values[read], dense[read], tolerance)  # these have just paid
        if step in (7, 8, 19):
            ours.settle()
            close(pool.values, dense, tolerance)


@pytest.mark.parametrize("dtype,tolerance", PRECISIONS)
def test_caught_up_moments_equal_adamw_s_and_idle_rows_lack_only_its_drift(dtype, tolerance):
    pool = make_pool(dtype)
    ours = make_optimizer(pool, **OPTIONS, moments="caught_up")
    dense = nn.Parameter(in_float64(pool))
    theirs = torch.optim.AdamW([dense], **OPTIONS, weight_decay=0.0)
    (lr, (beta1, beta2), eps), idle = OPTIONS.values(), 5
    for step in range(3):  # one row is read in every step
        ours.zero_grad()
        dense.grad = record(pool, torch.tensor([4]), step)
        ours.step()
        theirs.step()
    close(pool.values, dense, tolerance)
    m, v = (theirs.state[dense][name][4].clone() for name in ("exp_avg", "exp_avg_sq"))
    for _ in range(idle):  # then none for a while
        ours.zero_grad()
        dense.grad = torch.zeros_like(dense)
        ours.step()
        theirs.step()
    drift = sum(
        lr * beta1**j * m / (1 - beta1 ** (3 + j)) / ((beta2**j * v / (1 - beta2 ** (3 + j))).sqrt() + eps)
        for j in range(1, idle + 1)
    )
    close(pool.values[4] - dense[4], drift, 10 * tolerance)
    assert drift.abs().max() > 2 * lr  # it is no small thing
    # Late in training the bound of the docstring holds, and is reached.
    ratio = beta1 / math.sqrt(beta2)
    late = sum(lr * beta1**j * m / (beta2**j * v).sqrt() for j in range(1, 400))
    close(late, lr * m / v.sqrt() * ratio / (1 - ratio), 1e-9)

    ours.zero_grad()
    dense.grad = record(pool, torch.tensor([4]), 9)
    ours.step()
    theirs.step()
    for name in ("exp_avg", "exp_avg_sq"):
        close(ours.state[pool.values][name][4], theirs.state[dense][name][4], tolerance)


@pytest.mark.parametrize("dtype,tolerance", PRECISIONS)
@pytest.mark.parametrize("moments", ["lazy", "caught_up"])
@pytest.mark.parametrize("beta1", [0.0, 0.8])
def test_row_wise_second_moment_equals_a_loop_in_float64(dtype, tolerance, moments, beta1):
    pool = make_pool(dtype)
    beta2, eps, weight_decay = 0.9, 1e-6, 0.3
    ours = make_optimizer(
        pool,
        method="adamw_rowwise",
        betas=(beta1, beta2),
        eps=eps,
        weight_decay=weight_decay,
        moments=moments,
    )
    assert ours.state[pool.values]["exp_avg_sq"].shape == (SLOTS,)
    p = in_float64(pool)
    m, v = torch.zeros_like(p), torch.zeros(SLOTS, dtype=torch.float64)
    last = [0] * SLOTS
    for step in range(1, 16):
        lr = ours.param_groups[0]["lr"] = rate(step)
        ours.zero_grad()
        slots = some_rows(step)
        g = record(pool, slots, step)
        ours.step()
        p *= 1 - lr * weight_decay
        for row in slots.unique().tolist():
            slept = step - last[row] if moments == "caught_up" else 1
            last[row] = step
            m[row] = beta1**slept * m[row] + (1 - beta1) * g[row]
            v[row] = beta2**slept * v[row] + (1 - beta2) * (g[row] ** 2).mean()
            root = math.sqrt(v[row] / (1 - beta2**step)) + eps
            p[row] -= lr / (1 - beta1**step) * m[row] / root
    ours.settle()
    close(pool.values, p, tolerance)
    close(ours.state[pool.values]["exp_avg_sq"], v, tolerance)


@pytest.mark.parametrize("dtype,tolerance", PRECISIONS)
def test_sgd_with_decoupled_decay(dtype, tolerance):
    pool = make_pool(dtype)
    ours = make_optimizer(pool, method="sgd", weight_decay=0.4)
    p = in_float64(pool)
    for step in range(12):
        lr = ours.param_groups[0]["lr"] = rate(step)
        ours.zero_grad()
        p -= lr * 0.4 * p + lr * record(pool, some_rows(step), step)
        ours.step()
    ours.settle()
    close(pool.values, p, tolerance)
    assert set(ours.state[pool.values]) == {"step", "decay_log", "decayed_at"}


def test_weight_decay_is_owed_for_the_steps_a_row_slept():
    pool = make_pool()
    before = pool.values.detach().clone()
    optimizer = make_optimizer(pool, method="sgd", weight_decay=0.5)
    rates = [0.1, 0.3, 0.02, 0.7]
    for lr in rates:
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        if lr == rates[-1]:
            pool.read(torch.tensor([[3]]), torch.zeros(1, 1).double()).sum().backward()  # a gradient of zero
        optimizer.step()
    close(pool.values[3], before[3] * math.prod(1 - lr * 0.5 for lr in rates), 1e-14)
    assert torch.equal(pool.values[4:], before[4:])
    optimizer.zero_grad()
    optimizer.settle()
    close(pool.values, before * math.prod(1 - lr * 0.5 for lr in rates), 1e-14)
    after = pool.values.detach().clone()
    optimizer.settle()  # nothing is owed any more
    assert torch.equal(pool.values, after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["adamw", "adamw_rowwise", "sgd"])
def test_rows_not_read_keep_every_bit_of_values_and_state(method, dtype):
    pool = make_pool(dtype)
    optimizer = make_optimizer(pool, lr=0.1, weight_decay=0.5, method=method, moments="caught_up")
    record(pool, torch.arange(SLOTS), 0)
    optimizer.step()
    tables = {name: tensor for name, tensor in optimizer.state[pool.values].items() if tensor.ndim}
    tables["values"] = pool.values.detach()
    before = {name: tensor.clone() for name, tensor in tables.items()}
    optimizer.zero_grad()
    read = torch.tensor([3, 17, 3])
    record(pool, read, 1)
    optimizer.step()
    idle = torch.ones(SLOTS, dtype=torch.bool)
    idle[read] = False
    for name, old in before.items():
        assert torch.equal(old[idle], tables[name][idle])
        moved = old[~idle] != tables[name][~idle]
        assert moved.all() if name != "values" else moved.any(1).all()  # bf16 can stay by chance


def test_only_rows_that_the_filter_lets_through_move():
    pool = make_pool(torch.float32)
    optimizer = make_optimizer(pool, lr=0.1, weight_decay=0.5)
    for step in range(2):
        optimizer.zero_grad()
        record(pool, torch.arange(0, SLOTS, 2), step)
        optimizer.step()
    optimizer.settle()
    free = torch.arange(SLOTS) % 3 == 0
    pool.gradient.row_filter = free
    before = pool.values.detach().clone()
    for step in range(2):
        optimizer.zero_grad()
        record(pool, torch.arange(0, SLOTS, 2), step)
        optimizer.step()
    read = torch.arange(SLOTS) % 2 == 0
    assert torch.equal(pool.values[~(free & read)], before[~(free & read)])
    assert (pool.values[free & read] != before[free & read]).all()
    optimizer.settle()
    assert torch.equal(pool.values[~free], before[~free])
    close(pool.values[free & ~read], before[free & ~read] * 0.95**2, 1e-6)
    # What the filter held still owes nothing for that time.
    pool.gradient.row_filter = None
    optimizer.settle()
    assert torch.equal(pool.values[~free], before[~free])


def test_bf16_values_with_masters_round_once():
    pool = make_pool(torch.bfloat16)
    optimizer = make_optimizer(pool, **OPTIONS, rounding="master", weight_decay=0.2)
    state = optimizer.state[pool.values]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == state["master"].dtype == torch.float32
    dense = nn.Parameter(in_float64(pool))
    theirs = torch.optim.AdamW([dense], **OPTIONS, weight_decay=0.2)
    for step in range(4):
        optimizer.zero_grad()
        dense.grad = record(pool, torch.arange(SLOTS), step)
        optimizer.step()
        theirs.step()
        close(state["master"], dense, 2e-6)
        assert torch.equal(pool.values, state["master"].bfloat16())


def test_stochastic_rounding_follows_its_seed_and_differs_between_tables():
    def train(*seeds):
        pools = [make_pool(torch.bfloat16), make_pool(torch.bfloat16)]
        groups = [
            {"params": [pool.values], "kind": "memory", "lr": 1e-3, "seed": seed}
            for pool, seed in zip(pools, seeds, strict=True)
        ]
        optimizer = MemoryAdamW(groups, {pool.values: pool.gradient for pool in pools})
        for step in range(3):
            optimizer.zero_grad()
            for pool in pools:
                record(pool, torch.arange(SLOTS), step)
            optimizer.step()
        return [pool.values for pool in pools]

    first, second = train(1, 1)
    again, other = train(1, 2)
    assert torch.equal(first, again)
    assert not torch.equal(first, second) and not torch.equal(second, other)


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


def test_a_step_without_reads_changes_no_row_but_counts():
    pool = make_pool()
    optimizer = make_optimizer(pool, lr=0.1, weight_decay=0.5)
    before = pool.values.detach().clone()
    optimizer.step()
    assert torch.equal(pool.values, before)
    state = optimizer.state[pool.values]
    assert state["step"] == 1
    assert state["decay_log"].item() == pytest.approx(math.log(0.95))


def test_zero_grad_clears_dense_and_row_gradients():
    pool, linear = make_pool(torch.float32), nn.Linear(DIM, DIM)
    groups = [{"params": [pool.values], "kind": "memory"}, {"params": list(linear.parameters())}]
    optimizer = MemoryAdamW(groups, {pool.values: pool.gradient})
    linear(pool.read(torch.tensor([[1]]), torch.tensor([[1.0]]))).sum().backward()
    assert pool.gradient.compact() is not None and linear.weight.grad is not None
    optimizer.zero_grad()
    assert pool.gradient.compact() is None and linear.weight.grad is None


def test_a_closure_is_run_with_gradients():
    pool = make_pool(torch.float32)
    optimizer = make_optimizer(pool)

    def closure():
        loss = pool.read(torch.tensor([[1]]), torch.tensor([[1.0]])).sum()
        loss.backward()
        return loss

    before = pool.values.detach().clone()
    assert optimizer.step(closure).requires_grad
    assert (pool.values[1] != before[1]).all()


def test_wrong_options_are_refused():
    pool = make_pool()
    with pytest.raises(ValueError, match="no row gradient"):
        MemoryAdamW([{"params": [pool.values], "kind": "memory"}])
    with pytest.raises(ValueError, match="'sparse'"):
        MemoryAdamW([{"params": [pool.values], "kind": "sparse"}])
    for option in ("method", "moments", "rounding"):
        with pytest.raises(ValueError, match=f"{option} is 'adam'"):
            make_optimizer(pool, **{option: "adam"})
    optimizer = make_optimizer(pool, lr=2.0, weight_decay=0.5)
    with pytest.raises(ValueError, match=r"lr \* weight_decay is 1\.0"):
        optimizer.step()
