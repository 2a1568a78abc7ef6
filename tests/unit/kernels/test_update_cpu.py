"""The row optimizer's numba kernel against its PyTorch twin, and what only the kernel promises."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from memlm.kernels import cpu_update, update
from memlm.kernels.interface import RowState, RowSums, RowUpdate

SLOTS, READ = 40, 23
DIMS = [1, 3, 17, 64, 130, 257]

OPTIONS = [
    (method, momentum, caught_up)
    for method, momentum, caught_up in itertools.product(
        ("adamw", "adamw_rowwise", "sgd"), (False, True), (False, True)
    )
    if method != "sgd" or not (momentum or caught_up)
]
TABLES = [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]


def draw(dim, dtype, master, method="adamw", momentum=True, caught_up=False, decay=False, slots=SLOTS):
    """Values and a state in the middle of a run."""
    generator = torch.Generator().manual_seed(dim)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    values = normal(slots, dim).to(dtype)
    adam = method != "sgd"
    state = RowState(
        exp_avg=normal(slots, dim) if momentum and adam else None,
        exp_avg_sq=(normal(slots, dim) if method == "adamw" else normal(slots)).square() if adam else None,
        last_step=torch.randint(20, (slots,), generator=generator, dtype=torch.int32) if caught_up else None,
        decayed_at=-torch.rand(slots, generator=generator, dtype=torch.float64) if decay else None,
        master=values.float() + 1e-3 * normal(slots, dim) if master else None,
    )
    return values, state


def gradient(dim, rows=None, dtype=torch.int32) -> RowSums:
    generator = torch.Generator().manual_seed(7 * dim)
    if rows is None:
        rows = torch.randperm(SLOTS, generator=generator)[:READ].sort().values
    sums = torch.randn(len(rows), dim, generator=generator)
    return RowSums(rows.to(dtype), sums, sums.square().sum(1))


def copied(values, state):
    return values.clone(), RowState(*(None if tensor is None else tensor.clone() for tensor in state))


@pytest.mark.parametrize("dtype,master", TABLES)
@pytest.mark.parametrize("method,momentum,caught_up", OPTIONS)
def test_equals_the_reference(method, momentum, caught_up, dtype, master):
    for dim, decay, factor in itertools.product(DIMS, (False, True), (None, torch.tensor(0.3))):
        values, state = draw(dim, dtype, master, method, momentum, caught_up, decay)
        ours, theirs = copied(values, state), copied(values, state)
        grad = gradient(dim)
        step = RowUpdate(method, 20, 0.01, (0.9 * momentum, 0.95), 1e-8, -1.5, seed=2**62 + 12345)
        cpu_update.update_rows(*ours, grad, factor, step)
        update.update_rows(*theirs, grad, factor, step)
        idle = torch.ones(SLOTS, dtype=torch.bool)
        idle[grad.rows] = False
        for before, mine, other in zip(
            (values, *state), (ours[0], *ours[1]), (theirs[0], *theirs[1]), strict=True
        ):
            if before is None:
                continue
            assert torch.equal(before[idle], mine[idle])
            if mine.dtype == torch.bfloat16:
                # An fp32 result one bit off may cross a boundary of rounding, but hardly ever does.
                torch.testing.assert_close(mine, other, rtol=2**-7, atol=0.0)
                assert (mine != other).sum() <= 1 + mine.numel() // 1000
            else:
                torch.testing.assert_close(mine, other, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("rows", [torch.int32, torch.int64])
def test_random_bits_are_those_of_the_reference(dim, rows):
    values, state = draw(dim, torch.bfloat16, False, method="sgd")
    ours, theirs = values.clone(), values.clone()
    grad = gradient(dim, dtype=rows)
    # Small multiples of a power of two: the arithmetic is exact, only the rounding is left.
    grad = grad._replace(sums=(grad.sums * 8).round() / 8)
    for step in range(1, 30):
        moved = RowUpdate("sgd", step, lr=2.0**-10, seed=3)
        cpu_update.update_rows(ours, state, grad, None, moved)
        update.update_rows(theirs, state, grad, None, moved)
        assert torch.equal(ours, theirs)
    assert not torch.equal(ours, values)


def test_stochastic_rounding_drifts_like_fp32():
    slots, dim = 4096, 256
    generator = torch.Generator().manual_seed(0)
    start = (torch.rand(slots, dim, generator=generator) + 0.5).bfloat16()
    sums = torch.rand(slots, dim, generator=generator)
    grad = RowSums(torch.arange(slots), sums, sums.square().sum(1))
    drift = {}
    for dtype in (torch.float32, torch.bfloat16):
        values = start.to(dtype, copy=True)
        state = RowState(torch.zeros(slots, dim), torch.zeros(slots, dim))
        for step in range(1, 51):
            cpu_update.update_rows(values, state, grad, None, RowUpdate("adamw", step, lr=1e-5))
        drift[dtype] = (values.double() - start.double()).mean()
    assert drift[torch.float32] < -4e-4
    # Rounding to nearest would move nothing: the updates are far below half the distance of two values.
    torch.testing.assert_close(drift[torch.bfloat16], drift[torch.float32], rtol=0.02, atol=0.0)


def test_masters_are_rounded_to_nearest_even():
    bits = torch.randint(-(2**31), 2**31 - 1, (SLOTS, 64), generator=torch.Generator().manual_seed(0))
    bits[0] = torch.tensor([0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001] * 16)  # ties, and beside them
    master = bits.to(torch.int32).view(torch.float32)
    assert master.isnan().any()
    master[1, :3] = torch.tensor([float("inf"), -float("inf"), float("nan")])
    values, state = torch.zeros(SLOTS, 64, dtype=torch.bfloat16), RowState(master=master)
    zeros = torch.zeros(SLOTS, 64)
    grad = RowSums(torch.arange(SLOTS), zeros, zeros.sum(1))
    cpu_update.update_rows(values, state, grad, None, RowUpdate("sgd", 1, lr=0.0))
    torch.testing.assert_close(values, master.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_infinities_and_nan_survive_stochastic_rounding():
    values = torch.tensor([[float("inf"), -float("inf"), float("nan"), -0.0, 0.0, 3e38]] * SLOTS).bfloat16()
    expected = values.clone()
    zeros = torch.zeros(SLOTS, 6)
    grad = RowSums(torch.arange(SLOTS), zeros, zeros.sum(1))
    cpu_update.update_rows(values, RowState(), grad, None, RowUpdate("sgd", 1, lr=0.0))
    assert torch.equal(
        values.view(torch.int16)[:, [0, 1, 3, 4, 5]], expected.view(torch.int16)[:, [0, 1, 3, 4, 5]]
    )
    assert values[:, 2].isnan().all()


def test_rows_beyond_the_count_stay():
    values, state = draw(17, torch.float32, False)
    grad = gradient(17)
    whole, part = copied(values, state), copied(values, state)
    step = RowUpdate("adamw", 3, 0.1)
    cpu_update.update_rows(*whole, RowSums(*(tensor[:9] for tensor in grad[:3])), None, step)
    cpu_update.update_rows(*part, grad._replace(count=torch.tensor(9)), None, step)
    assert torch.equal(whole[0], part[0]) and not torch.equal(part[0], values)
    nothing = grad._replace(count=torch.tensor(0))
    cpu_update.update_rows(*part, nothing, None, step)
    assert torch.equal(whole[0], part[0])


@pytest.mark.parametrize("how", ["fp64", "strided"])
def test_tables_that_the_kernel_does_not_know_take_the_reference(how):
    values, state = draw(6, torch.float32, False)
    grad = gradient(6)
    if how == "fp64":
        values, grad = values.double(), RowSums(grad.rows, grad.sums.double(), grad.squares.double())
        state = RowState(state.exp_avg.double(), state.exp_avg_sq.double())
    else:
        values = values.t().contiguous().t()
    ours, theirs = copied(values, state), copied(values, state)
    step = RowUpdate("adamw", 3, 0.1)
    cpu_update.update_rows(*ours, grad, None, step)
    update.update_rows(*theirs, grad, None, step)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1].exp_avg, theirs[1].exp_avg)


def test_autograd_notices_a_table_that_moved_under_a_graph():
    values = torch.randn(SLOTS, 4, requires_grad=True)
    loss = values.square().sum()
    cpu_update.update_rows(values, RowState(), gradient(4), None, RowUpdate("sgd", 1, lr=0.1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


THREADS = """
import hashlib, itertools, sys
import torch
sys.path.insert(0, sys.argv[1])
from test_update_cpu import OPTIONS, TABLES, draw, gradient
import numba
from memlm.kernels import cpu_update
from memlm.kernels.interface import RowUpdate
from memlm.kernels.numba_threads import torch_threads

for threads in (1, 2, 3, 4):
    torch.set_num_threads(threads)
    with torch_threads():
        assert numba.get_num_threads() == threads
    digest = hashlib.sha256()
    for (dtype, master), options in itertools.product(TABLES, OPTIONS):
        values, state = draw(33, dtype, master, *options, decay=True, slots=1000)
        step = RowUpdate(options[0], 20, 0.01, (0.9 * options[1], 0.95), 1e-8, -1.5, seed=5)
        rows = torch.arange(0, 1000, 3)
        cpu_update.update_rows(values, state, gradient(33, rows), torch.tensor(0.7), step)
        for tensor in (values, *state):
            if tensor is not None:
                digest.update(tensor.view(torch.uint8).numpy().tobytes())
    print(digest.hexdigest())
"""


def test_bits_do_not_depend_on_the_number_of_threads():
    environment = os.environ | {"NUMBA_NUM_THREADS": "4", "OMP_NUM_THREADS": "4"}
    run = subprocess.run(
        [sys.executable, "-c", THREADS, os.path.dirname(__file__)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    digests = run.stdout.split()
    assert len(digests) == 4 and len(set(digests)) == 1
