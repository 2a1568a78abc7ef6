"""The Triton kernels on a GPU against the reference; no waiting, no compiling anew, the same bits."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from memlm.kernels import reference
from memlm.kernels.interface import Backend, RowState, RowSums, RowUpdate
from memlm.kernels.update import rounding_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"
TOKENS, READS, SLOTS = 2048, 128, 20_000
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(scope="module")
def backend() -> Backend:
    from memlm.kernels import triton  # needs triton

    return triton  # type: ignore[return-value]


@contextmanager
def no_waiting() -> Iterator[None]:
    """Anything that waits for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def draw(tokens: int, reads: int, slots: int, dim: int, dtype: torch.dtype):
    """One read in ten falls on one row."""
    generator = torch.Generator(DEVICE).manual_seed(dim)
    place = {"generator": generator, "device": DEVICE}
    index = torch.randint(slots, (tokens, reads), **place)
    index = torch.where(torch.rand(tokens, reads, **place) < 0.1, slots // 2, index).int()
    values = torch.randn(slots, dim, **place).to(dtype)
    weights = torch.rand(tokens, reads, **place)
    return values, index, weights, torch.randn(tokens, dim, **place).to(dtype)


def close(result: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Relative to the norm: sums of a hundred thousand terms cancel."""
    result, expected = result.double(), expected.double()
    assert result.isfinite().all()
    assert (result - expected).norm() <= tolerance * expected.norm()


@DTYPES
@pytest.mark.parametrize("dim", [64, 1000, 1024, 1536, 4096])
def test_reads_and_their_gradients(backend, dim, dtype):
    values, slots, weights, grad = draw(TOKENS, READS, SLOTS, dim, dtype)
    with no_waiting():
        read = backend.weighted_read(values, slots, weights)
        products = backend.read_weight_gradient(values, slots, grad)
        fused, sums = backend.read_backward(values, slots, weights, grad)
        again = backend.row_sums(slots.flatten(), weights.flatten(), READS, grad, SLOTS)
    close(read, reference.weighted_read(values, slots, weights), 4e-3 if dtype == torch.bfloat16 else 1e-5)
    expected = reference.read_weight_gradient(values, slots, grad)
    close(products, expected)
    close(fused, expected)

    token = torch.arange(TOKENS, device=DEVICE).repeat_interleave(READS)
    dense = torch.zeros(SLOTS, dim, dtype=torch.float64, device=DEVICE)
    for part in torch.arange(TOKENS * READS, device=DEVICE).split(16_384):
        terms = weights.flatten()[part].double().unsqueeze(1) * grad[token[part]].double()
        dense.index_add_(0, slots.flatten()[part].long(), terms)
    rows, count = slots.unique(), int(sums.count)
    assert torch.equal(sums.rows[:count].long(), rows.long())
    close(sums.sums[:count], dense[rows.long()])
    close(sums.squares[:count], dense[rows.long()].square().sum(1))
    assert not sums.squares[count:].any()
    hot = rows.long() == SLOTS // 2
    close(sums.sums[:count][hot], dense[SLOTS // 2 : SLOTS // 2 + 1])
    assert torch.equal(sums.sums[:count], again.sums[:count]) and torch.equal(sums.squares, again.squares)


def test_marks_are_left_out(backend):
    _, slots, weights, grad = draw(500, 16, 3000, 96, torch.float32)
    marked = torch.where(slots % 3 == 0, 3000, slots).flatten()
    with no_waiting():
        sums = backend.row_sums(marked, weights.flatten(), 16, grad, 3000)
    expected = reference.row_sums(marked, weights.flatten(), 16, grad, 3000)
    count = int(sums.count)
    assert torch.equal(sums.rows[:count], expected.rows.to(sums.rows.dtype))
    close(sums.sums[:count], expected.sums)


def test_rows_beyond_two_billion_elements(backend):
    if torch.cuda.mem_get_info()[0] < 8e9:
        pytest.skip("needs 8 GB")
    values = torch.empty(2**21 + 8, 1024, dtype=torch.bfloat16, device=DEVICE)
    slots = torch.tensor([[2**21 + 5, 2**21 + 7]], dtype=torch.int32, device=DEVICE)
    values[-8:] = torch.randn(8, 1024, device=DEVICE)
    weights, grad = torch.rand(1, 2, device=DEVICE), torch.randn(1, 1024, device=DEVICE)
    expected = (weights[0].unsqueeze(1) * values[slots[0].long()].float()).sum(0)
    close(backend.weighted_read(values, slots, weights)[0], expected, 4e-3)
    products, sums = backend.read_backward(values, slots, weights, grad)
    close(products, reference.read_weight_gradient(values, slots, grad))
    before = values[-8:].clone()
    backend.update_rows(values, RowState(), sums, None, RowUpdate("sgd", 1, 1.0))
    assert (values[-8:] != before).any(1).tolist() == [False] * 5 + [True, False, True]


@pytest.mark.parametrize("kind", ["normal", "ties", "bf16"])
@pytest.mark.parametrize("width0,width1,reads", [(1024, 1024, 32), (512, 300, 16), (5000, 77, 33), (9, 9, 1)])
def test_search(backend, width0, width1, reads, kind):
    generator = torch.Generator(DEVICE).manual_seed(width0)
    halves = [torch.randn(4, 256, width, generator=generator, device=DEVICE) for width in (width0, width1)]
    if kind == "ties":
        halves = [half.round() for half in halves]
    elif kind == "bf16":
        halves = [half.bfloat16() for half in halves]
    with no_waiting():
        slots, sums = backend.best_slots(*halves, reads)
    expected_slots, expected_sums = reference.best_slots(*halves, reads)
    assert torch.equal(slots, expected_slots) and torch.equal(sums, expected_sums)


def make_state(method: str, dim: int, values: torch.Tensor, *, everything: bool) -> RowState:
    shape = (SLOTS, dim)
    second = None if method == "sgd" else torch.rand(shape if method == "adamw" else SLOTS, device=DEVICE)
    return RowState(
        exp_avg=torch.randn(shape, device=DEVICE) if everything and second is not None else None,
        exp_avg_sq=second,
        last_step=torch.randint(7, (SLOTS,), dtype=torch.int32, device=DEVICE) if everything else None,
        decayed_at=-torch.rand(SLOTS, dtype=torch.float64, device=DEVICE) / 100 if everything else None,
        master=values.float() if everything and values.dtype == torch.bfloat16 else None,
    )


@DTYPES
@pytest.mark.parametrize("method", ["adamw", "adamw_rowwise", "sgd"])
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("dim", [1000, 1024, 4096])
def test_update(backend, dim, everything, method, dtype):
    torch.manual_seed(dim)
    values = torch.randn(SLOTS, dim, device=DEVICE).to(dtype)
    state = make_state(method, dim, values, everything=everything)
    rows = torch.randperm(SLOTS, device=DEVICE)[:3000].sort().values.int()
    sums = torch.randn(3000, dim, device=DEVICE)
    gradient = RowSums(rows, sums, sums.square().sum(1), torch.tensor(2900, device=DEVICE))
    betas = (0.9 if everything else 0.0, 0.95)
    update = RowUpdate(method, 7, 0.01, betas, decay_log=-0.03, seed=2**40 + 3)  # type: ignore[arg-type]
    factor = torch.tensor(0.7, device=DEVICE)
    before, expected = values.clone(), values.clone()
    expected_state = RowState(*(None if tensor is None else tensor.clone() for tensor in state))
    reference.update_rows(expected, expected_state, gradient, factor, update)
    with no_waiting():
        backend.update_rows(values, state, gradient, factor, update)
    for tensor, wanted in zip(state, expected_state, strict=True):
        if tensor is not None:
            torch.testing.assert_close(tensor, wanted, rtol=1e-5, atol=1e-6)
    if dtype == torch.float32:
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)
    else:
        assert (values != expected).float().mean() <= 0.01
        torch.testing.assert_close(values.float(), expected.float(), rtol=2**-7, atol=1e-5)
    still = torch.ones(SLOTS, dtype=torch.bool, device=DEVICE)
    still[rows[:2900].long()] = False
    assert torch.equal(values[still], before[still])


def test_stochastic_rounding_uses_the_bits_of_the_contract(backend):
    fraction = torch.randint(2**16, (3, 1000), device=DEVICE)
    values = torch.ones(9, 1000, dtype=torch.bfloat16, device=DEVICE)
    rows = torch.tensor([1, 4, 8], device=DEVICE)
    gradient = RowSums(rows, -fraction * 2.0**-23, torch.zeros(3, device=DEVICE))
    update = RowUpdate("sgd", 12345, 1.0, seed=2**62 + 987654321)
    backend.update_rows(values, RowState(), gradient, None, update)
    up = fraction + rounding_bits(rows, 1000, update.seed, update.step) >= 2**16
    assert torch.equal(values[rows], torch.where(up, 1 + 2**-7, 1.0).bfloat16())


def step(backend: Backend, tokens: int, number: int) -> list[torch.Tensor]:
    """A read, its backward pass, a search and an update."""
    values, slots, weights, grad = draw(tokens, 8, 3000, 256, torch.bfloat16)
    read = backend.weighted_read(values, slots, weights)
    products, sums = backend.read_backward(values, slots, weights, grad)
    scores = torch.randn(2, tokens, 64, generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE)
    found, best = backend.best_slots(scores, scores, 8)
    state = RowState(exp_avg_sq=torch.zeros(3000, device=DEVICE))
    update = RowUpdate("adamw_rowwise", number, 0.1 / number, (0.0, 0.95), seed=number)
    backend.update_rows(values, state, sums, sums.squares.sum().rsqrt(), update)
    count = int(sums.count)  # type: ignore[arg-type]
    return [read, products, sums.rows[:count], sums.sums[:count], sums.squares, found, best, values]


def test_same_bits_every_time(backend):
    first = step(backend, 1000, 3)
    for _ in range(5):
        for one, two in zip(first, step(backend, 1000, 3), strict=True):
            assert torch.equal(one, two)


def test_no_batch_compiles_anew(backend):
    from triton import knobs

    compiled: list[str] = []

    def record(*, repr: str, **_: object) -> None:
        compiled.append(repr)

    step(backend, 320, 1)
    previous = knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = record
    try:
        for number, tokens in enumerate([1, 17, 333, 1024, 4096], start=2):
            step(backend, tokens, number)
    finally:
        knobs.runtime.jit_post_compile_hook = previous
    assert not compiled
