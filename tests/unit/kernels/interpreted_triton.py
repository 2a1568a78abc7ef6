"""The Triton kernels under Triton's interpreter. Run by test_triton.py in a process of its own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlm.kernels import reference, triton_row_sums
from memlm.kernels import triton as backend
from memlm.kernels.interface import RowState, RowSums, RowUpdate
from memlm.kernels.triton_tiles import tile
from memlm.kernels.update import rounding_bits

DIMS = [1, 3, 17, 64, 130, 257]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def draw(tokens, reads, num_slots, dim, dtype=torch.float32, slot_dtype=torch.int32, seed=0):
    """A skewed read: two of three reads fall on one row."""
    generator = torch.Generator().manual_seed(seed + dim)
    values = torch.randn(num_slots, dim, generator=generator).to(dtype)
    slots = torch.randint(num_slots, (tokens, reads), generator=generator)
    hot = torch.rand(tokens, reads, generator=generator) < 0.67
    slots = torch.where(hot, num_slots // 2, slots).to(slot_dtype)
    weights = torch.randn(tokens, reads, generator=generator)
    grad = torch.randn(tokens, dim, generator=generator).to(dtype)
    return values, slots, weights, grad


def dense_sums(slots, weights, tokens, grad, num_slots):
    """Gradient of the whole table in float64, marks left out."""
    kept = slots < num_slots
    terms = weights[kept].double().unsqueeze(1) * grad[tokens[kept].long()].double()
    return torch.zeros(num_slots, grad.shape[1], dtype=torch.float64).index_add_(0, slots[kept].long(), terms)


def check_sums(result: RowSums, expected: torch.Tensor, read: torch.Tensor) -> None:
    rows = read.unique().tolist()
    count = int(result.count) if result.count is not None else len(result.rows)
    assert result.rows[:count].tolist() == rows
    assert len(result.rows) >= count and result.sums.dtype == result.squares.dtype == torch.float32
    torch.testing.assert_close(result.sums[:count].double(), expected[rows], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        result.squares[:count].double(), expected[rows].square().sum(1), rtol=1e-4, atol=1e-3
    )
    assert not result.squares[count:].any()


def tensors(result: RowSums) -> list[torch.Tensor]:
    count = int(result.count)
    return [result.rows[:count], result.sums[:count], result.squares]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


@DTYPES
@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dim", [*DIMS, 1100])
def test_read_and_its_weight_gradient(dim, slot_dtype, dtype):
    values, slots, weights, grad = draw(3, 7, 20, dim, dtype, slot_dtype)
    rows = values.double()[slots.long()]
    read = backend.weighted_read(values, slots, weights)
    expected = torch.bmm(weights.double().unsqueeze(1), rows).squeeze(1)
    assert read.dtype == dtype
    # The sum's own rounding, and half a unit of bf16.
    torch.testing.assert_close(
        read.double(), expected, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5, atol=1e-5
    )
    products = backend.read_weight_gradient(values, slots, grad)
    assert products.dtype == torch.float32
    expected = torch.bmm(rows, grad.double().unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(products.double(), expected, rtol=1e-5, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(0, 5),
    reads=st.integers(0, 9),
    num_slots=st.integers(1, 12),
    dim=st.integers(1, 70),
    seed=st.integers(0, 99),
)
def test_any_shape(tokens, reads, num_slots, dim, seed):
    values, slots, weights, grad = draw(tokens, reads, num_slots, dim, seed=seed)
    read = backend.weighted_read(values, slots, weights)
    torch.testing.assert_close(
        read, (weights.unsqueeze(-1) * values[slots.long()]).sum(1), rtol=1e-4, atol=1e-5
    )
    products, sums = backend.read_backward(values, slots, weights, grad)
    torch.testing.assert_close(
        products, (values[slots.long()] * grad.unsqueeze(1)).sum(-1), rtol=1e-4, atol=1e-4
    )
    token = torch.arange(tokens).repeat_interleave(reads)
    flat = slots.flatten()
    check_sums(sums, dense_sums(flat, weights.flatten(), token, grad, num_slots), flat)


def test_bf16_result_is_rounded_to_nearest_even():
    # Halfway between two bf16 numbers, above and below halfway, overflow to infinity, NaN.
    exact = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-8, 3.4e38, float("nan")])
    values = torch.ones(1, 6, dtype=torch.bfloat16)
    read = [backend.weighted_read(values, torch.zeros(1, 1).int(), x.view(1, 1))[0, 0] for x in exact]
    torch.testing.assert_close(torch.stack(read), exact.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "dim,segment,fan_in,dtype",
    [
        (1, 2, 2, torch.float32),
        (3, 3, 2, torch.bfloat16),
        (17, 2, 3, torch.float32),
        (64, 4, 16, torch.bfloat16),
        (130, 4, 2, torch.float32),
        (257, 5, 3, torch.bfloat16),
        (257, 128, 128, torch.float32),
    ],
)
def test_row_sums_of_split_rows(dim, segment, fan_in, dtype, monkeypatch):
    """A row of some 27 reads: up to 13 extras, four levels of the tree."""
    monkeypatch.setattr(triton_row_sums, "_SEGMENT", segment)
    monkeypatch.setattr(triton_row_sums, "_FAN_IN", fan_in)
    values, slots, weights, grad = draw(10, 4, 6, dim, dtype)
    products, sums = backend.read_backward(values, slots, weights, grad)
    flat, token = slots.flatten(), torch.arange(10).repeat_interleave(4)
    check_sums(sums, dense_sums(flat, weights.flatten(), token, grad, 6), flat)
    rows = values.double()[slots.long()]
    expected = torch.bmm(rows, grad.double().unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(products.double(), expected, rtol=1e-5, atol=1e-4)

    again, same = backend.read_backward(values, slots, weights, grad)
    alone = backend.row_sums(flat, weights.flatten(), 4, grad, 6)
    assert torch.equal(again, products)
    for one, two, three in zip(tensors(sums), tensors(same), tensors(alone), strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)


def test_rows_wider_than_a_tile(monkeypatch):
    monkeypatch.setattr(triton_row_sums, "_SEGMENT", 4)
    values, slots, weights, grad = draw(6, 5, 4, 1100)
    assert tile(1100).columns < 1100
    products, sums = backend.read_backward(values, slots, weights, grad)
    flat, token = slots.flatten(), torch.arange(6).repeat_interleave(5)
    check_sums(sums, dense_sums(flat, weights.flatten(), token, grad, 4), flat)
    torch.testing.assert_close(
        products, reference.read_weight_gradient(values, slots, grad), rtol=1e-4, atol=1e-4
    )


def test_a_run_of_the_usual_segments():
    _, slots, weights, grad = draw(1, 700, 3, 5)
    sums = backend.row_sums(slots.flatten(), weights.flatten(), 700, grad, 3)
    assert slots.flatten().bincount().max() > 3 * triton_row_sums._SEGMENT
    check_sums(sums, dense_sums(slots.flatten(), weights.flatten(), torch.zeros(700), grad, 3), slots)


@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("left_out", [0.3, 1.0])
def test_marks_tokens_and_buffer(left_out, slot_dtype, monkeypatch):
    monkeypatch.setattr(triton_row_sums, "_SEGMENT", 4)
    generator = torch.Generator().manual_seed(1)
    _, slots, weights, grad = draw(10, 6, 9, 17, slot_dtype=slot_dtype)
    slots = torch.where(torch.rand(60, generator=generator) < left_out, 9, slots.flatten())
    tokens = torch.randint(10, (60,), generator=generator)
    buffer = torch.full((9 * 17 + 5,), float("nan"))
    sums = backend.row_sums(slots, weights.flatten(), tokens, grad, 9, buffer)
    assert sums.sums.data_ptr() == buffer.data_ptr()
    check_sums(sums, dense_sums(slots, weights.flatten(), tokens, grad, 9), slots[slots < 9])
    small = backend.row_sums(slots, weights.flatten(), tokens.int(), grad, 9, buffer[:100])
    assert small.sums.data_ptr() != buffer.data_ptr()
    for one, two in zip(tensors(sums), tensors(small), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_empty_reads(shape):
    values, slots, weights = torch.randn(5, 3), torch.empty(shape, dtype=torch.int32), torch.empty(shape)
    assert torch.equal(backend.weighted_read(values, slots, weights), torch.zeros(shape[0], 3))
    products, sums = backend.read_backward(values, slots, weights, torch.randn(shape[0], 3))
    assert products.shape == shape and sums.sums.shape == (0, 3) and len(sums.rows) == len(sums.squares) == 0
    backend.update_rows(values, RowState(), sums, None, RowUpdate("sgd", 1, 0.1))


def test_tables_that_cannot_be_read_in_place():
    slots, weights = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1)
    with pytest.raises(TypeError, match="float64"):
        backend.weighted_read(torch.ones(2, 2).double(), slots, weights)
    with pytest.raises(ValueError, match="strides are \\(1, 2\\)"):
        backend.weighted_read(torch.ones(2, 2).t(), slots, weights)
    with pytest.raises(TypeError, match="float64"):
        backend.best_slots(torch.ones(1, 1, 2).double(), torch.ones(1, 1, 2).double(), 1)
    one = RowSums(torch.zeros(1).int(), torch.ones(1, 2), torch.ones(1))
    state = RowState(exp_avg_sq=torch.ones(2, 2).t())
    with pytest.raises(ValueError, match="exp_avg_sq"):
        backend.update_rows(torch.ones(2, 2), state, one, None, RowUpdate("adamw", 1, 0.1, (0.0, 0.9)))


@pytest.mark.parametrize(
    "dim,rows,columns,warps",
    [
        (1, 64, 16, 1),
        (64, 16, 64, 1),
        (1000, 4, 1024, 4),
        (1536, 4, 512, 2),
        (1100, 4, 256, 1),
        (8192, 4, 1024, 4),
    ],
)
def test_tiles_pad_little(dim, rows, columns, warps):
    assert tile(dim) == (rows, columns, warps)


@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "wide", "bf16"])
@pytest.mark.parametrize(
    "heads,tokens,width0,width1,reads",
    [
        (1, 1, 1, 1, 1),
        (2, 1, 9, 9, 9),
        (2, 1, 40, 77, 16),
        (1, 1, 130, 33, 1),
        (1, 1, 1024, 300, 32),
        (1, 1, 513, 20, 11),
    ],
)
def test_search_equals_the_reference(heads, tokens, width0, width1, reads, kind):
    generator = torch.Generator().manual_seed(width0)
    first = torch.randn(heads, tokens, width0, generator=generator)
    second = torch.randn(heads, tokens, width1, generator=generator)
    if kind == "ties":  # small integers, both zeros among them
        first, second = first.round(), second.round()
    elif kind == "equal":
        first, second = torch.zeros_like(first), torch.full_like(second, -0.0)
    elif kind == "wide":  # far apart exponents, infinities
        first, second = first * 1e30, second.abs() * -1e-30
        first[0, 0, width0 // 2] = float("inf")
        first[-1, -1, : width0 // 2] = -float("inf")
    elif kind == "bf16":
        first, second = first.bfloat16(), second.bfloat16()
    slots, sums = backend.best_slots(first, second, reads)
    expected = reference.best_slots(first, second, reads)
    assert torch.equal(slots, expected[0]) and torch.equal(sums, expected[1])
    assert slots.dtype == torch.int32 and sums.dtype == torch.float32


def test_search_of_strided_scores():
    first, second = torch.randn(4, 2, 20).transpose(0, 1), torch.randn(30, 4, 2).permute(2, 1, 0)
    for one, two in zip(
        backend.best_slots(first, second, 5), reference.best_slots(first, second, 5), strict=True
    ):
        assert torch.equal(one, two)


def test_search_of_more_slots_than_int32_holds():
    first, second = torch.randn(1, 1, 46_341), torch.randn(1, 1, 46_341)
    first[0, 0, -1] = 100.0
    slots, sums = backend.best_slots(first, second, 2)
    expected = reference.best_slots(first, second, 2)
    assert slots.dtype == torch.int64 and slots.min() > 2**31 - 46_341
    assert torch.equal(slots, expected[0]) and torch.equal(sums, expected[1])


METHODS = {
    "sgd": ("sgd", []),
    "sgd-decay": ("sgd", ["decayed_at"]),
    "adamw": ("adamw", ["exp_avg"]),
    "adamw-all": ("adamw", ["exp_avg", "last_step", "decayed_at"]),
    "adamw-no-momentum": ("adamw", ["decayed_at"]),
    "rowwise": ("adamw_rowwise", ["exp_avg"]),
    "rowwise-no-momentum": ("adamw_rowwise", ["last_step"]),
}


def draw_update(name, dim, dtype, master):
    """Values, state, gradient of 5 of 9 rows in buffers of 7, and the step."""
    method, options = METHODS[name]
    generator = torch.Generator().manual_seed(dim)

    def table():
        return torch.randn(9, dim, generator=generator)

    values = table()
    moments = None if method == "sgd" else table().square()
    state = RowState(
        exp_avg=table() if "exp_avg" in options else None,
        exp_avg_sq=moments if method != "adamw_rowwise" else moments.mean(1),
        last_step=torch.tensor([0, 1, 2, 3, 4, 5, 6, 6, 6], dtype=torch.int32)
        if "last_step" in options
        else None,
        decayed_at=-0.01 * torch.rand(9, generator=generator, dtype=torch.float64)
        if "decayed_at" in options
        else None,
        master=values.clone() if master else None,
    )
    sums = torch.randn(7, dim, generator=generator)
    squares = sums.square().sum(1)
    squares[5:] = 0.0
    rows = torch.tensor([0, 2, 3, 6, 8, 1, 1], dtype=torch.int32)
    betas = (0.9 if "exp_avg" in options else 0.0, 0.95)
    update = RowUpdate(method, 7, 0.01, betas, decay_log=-0.03, seed=2**40 + 3)
    return values.to(dtype), state, RowSums(rows, sums, squares, torch.tensor(5)), update


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ["fp32", "bf16", "bf16-master"])
def test_update_equals_the_reference(name, dim, kind):
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    values, state, gradient, update = draw_update(name, dim, dtype, kind == "bf16-master")
    before = values.clone()
    expected_values = values.clone()
    expected_state = RowState(*(None if tensor is None else tensor.clone() for tensor in state))
    factor = torch.tensor(0.7) if dim % 2 else None
    reference.update_rows(expected_values, expected_state, gradient, factor, update)
    backend.update_rows(values, state, gradient, factor, update)

    for field, tensor, expected in zip(RowState._fields, state, expected_state, strict=True):
        if tensor is not None:
            torch.testing.assert_close(
                tensor, expected, rtol=1e-6, atol=1e-7, msg=lambda text, f=field: f"{f}: {text}"
            )
    if dtype == torch.float32:
        torch.testing.assert_close(values, expected_values, rtol=1e-6, atol=1e-7)
    else:
        # The same random bits: but for sums that arithmetic left a bit beside a boundary, equal.
        assert (values != expected_values).float().mean() <= 0.01
        torch.testing.assert_close(values.float(), expected_values.float(), rtol=2**-7, atol=1e-7)
    still = [1, 4, 5, 7]
    assert torch.equal(bits(values[still]), bits(before[still]))


@pytest.mark.parametrize("dim", [1, 17, 300, 1100])
def test_stochastic_rounding_uses_the_bits_of_the_contract(dim):
    """1 and a known fraction of a bf16 step, in exact arithmetic: up where fraction and random bits carry."""
    generator = torch.Generator().manual_seed(dim)
    fraction = torch.randint(2**16, (3, dim), generator=generator)
    values = torch.ones(9, dim, dtype=torch.bfloat16)
    rows = torch.tensor([1, 4, 8])
    gradient = RowSums(rows, -fraction * 2.0**-23, torch.zeros(3))
    update = RowUpdate("sgd", 12345, 1.0, seed=2**62 + 987654321)
    backend.update_rows(values, RowState(), gradient, None, update)
    up = fraction + rounding_bits(rows, dim, update.seed, update.step) >= 2**16
    assert torch.equal(values[rows], torch.where(up, 1 + 2**-7, 1.0).bfloat16())
    assert up.any() or dim == 1


def test_rounding_keeps_infinities_and_nan():
    values = torch.tensor([[float("inf"), -float("inf"), float("nan"), 3.3e38]], dtype=torch.bfloat16)
    before = values.clone()
    gradient = RowSums(torch.zeros(1).int(), torch.zeros(1, 4), torch.zeros(1))
    backend.update_rows(values, RowState(), gradient, None, RowUpdate("sgd", 1, 1.0))
    assert torch.equal(bits(values), bits(before))


def test_no_count_updates_all_rows():
    values = torch.zeros(4, 2)
    gradient = RowSums(torch.tensor([0, 3]), torch.ones(2, 2), torch.ones(2))
    backend.update_rows(values, RowState(), gradient, None, RowUpdate("sgd", 1, 0.5))
    assert values.tolist() == [[-0.5, -0.5], [0, 0], [0, 0], [-0.5, -0.5]]


def test_search_takes_both_zeros_for_equal():
    first, second = torch.tensor([[[-0.0, 0.0, -1.0]]]), torch.tensor([[[1.0, 0.5, 0.2]]])
    assert backend.best_slots(first, second, 2)[0].tolist() == [[[0, 3]]]
