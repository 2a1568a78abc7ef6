"""Grouped rows against loops in Python, and the FLOPs that a counter sees."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from memlm.transformer import grouped
from memlm.transformer.grouped import Groups, add_rows, copy_tokens, gated, product


def random_groups(number: int, experts: int, rows: int) -> Groups:
    """Rows of random experts and tokens, of which some have none."""
    tokens = torch.randint(number, (rows,))
    ends = torch.randint(rows + 1, (experts,)).sort().values.int()
    ends[-1] = rows
    by_token = [row for token in range(number) for row in range(rows) if tokens[row] == token]
    starts = [sum(int(t) < token for t in tokens) for token in range(number)]
    return Groups(tokens, ends, torch.tensor(by_token), torch.tensor(starts))


def test_counts_and_tokens_without_rows():
    groups = Groups(
        torch.tensor([1, 3, 1]), torch.tensor([0, 2, 2, 3]).int(), torch.tensor([0, 2, 1]),
        torch.tensor([0, 0, 2, 2, 3]),
    )  # fmt: skip
    assert groups.counts().tolist() == [0, 2, 0, 1]
    assert groups.counts().dtype == torch.int64
    assert groups.unchosen() == 3  # tokens 0, 2 and 4


@pytest.mark.parametrize("seed", range(4))
def test_copies_and_sums_are_each_other_s_gradient(seed):
    torch.manual_seed(seed)
    number, rows = int(torch.randint(1, 9, ())), int(torch.randint(1, 30, ()))
    groups = random_groups(number, 3, rows)
    tokens = torch.randn(number, 5, dtype=torch.float64, requires_grad=True)
    values = torch.randn(rows, 5, dtype=torch.float64, requires_grad=True)
    copies, sums = copy_tokens(tokens, groups), add_rows(values, groups)
    assert torch.equal(copies, tokens[groups.tokens])
    expected = torch.zeros_like(tokens)
    for row, token in enumerate(groups.tokens.tolist()):
        expected[token] += values.detach()[row]
    torch.testing.assert_close(sums, expected)
    assert torch.autograd.gradcheck(lambda x: copy_tokens(x, groups), tokens)
    assert torch.autograd.gradcheck(lambda x: add_rows(x, groups), values)


def test_a_sum_of_many_bf16_rows_is_rounded_once():
    rows = torch.full((3000, 8), 1.0, dtype=torch.bfloat16)
    every = torch.arange(3000)
    groups = Groups(torch.zeros_like(every), torch.tensor([3000]).int(), every, torch.tensor([0]))
    assert (add_rows(rows, groups) == 3008).all()  # 256 if every sum were rounded
    token = torch.ones(1, 8, dtype=torch.bfloat16, requires_grad=True)
    copy_tokens(token, groups).backward(rows)
    assert (token.grad == 3008).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 37])
def test_products_against_a_loop(dtype, rows):
    torch.manual_seed(rows)
    groups = random_groups(4, 6, rows)
    x = torch.randn(rows, 16).to(dtype).requires_grad_()
    matrices = torch.randn(6, 24, 16).to(dtype).requires_grad_()
    output = product(x, matrices, groups.ends)
    assert output.dtype == dtype
    x_twin, twin = (value.detach().double().requires_grad_() for value in (x, matrices))
    starts = [0, *groups.ends.tolist()[:-1]]
    expected = torch.cat(
        [x_twin[a:b] @ twin[e].T for e, (a, b) in enumerate(zip(starts, groups.ends.tolist(), strict=True))]
    )
    grad = torch.randn(rows, 24).to(dtype)
    output.backward(grad)
    expected.backward(grad.double())
    tolerance = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    for ours, theirs in ((output, expected), (x.grad, x_twin.grad), (matrices.grad, twin.grad)):
        torch.testing.assert_close(ours.double(), theirs, **tolerance)


@pytest.mark.parametrize("cached_bytes", [1, 2**10, 2**19])
def test_gated_against_its_formula_in_blocks_of_any_size(monkeypatch, cached_bytes):
    monkeypatch.setattr(grouped, "_CACHED_BYTES", cached_bytes)
    torch.manual_seed(0)
    gate_up = torch.randn(23, 16, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(23, dtype=torch.float64, requires_grad=True)
    gate, up = gate_up.chunk(2, dim=1)
    torch.testing.assert_close(gated(gate_up, weights), F.silu(gate) * up * weights[:, None])
    assert torch.autograd.gradcheck(gated, (gate_up, weights))


def test_gated_in_bf16_with_fp32_weights():
    torch.manual_seed(0)
    gate_up, weights, grad = torch.randn(50, 32), torch.rand(50), torch.randn(50, 16)
    ours = [gate_up.bfloat16().requires_grad_(), weights.clone().requires_grad_()]
    twins = [ours[0].detach().double().requires_grad_(), weights.bfloat16().double().requires_grad_()]
    output = gated(*ours)
    gate, up = twins[0].chunk(2, dim=1)
    expected = F.silu(gate) * up * twins[1][:, None]
    output.backward(grad.bfloat16())
    expected.backward(grad.bfloat16().double())
    assert output.dtype == ours[0].grad.dtype == torch.bfloat16
    assert ours[1].grad.dtype == torch.float32
    for a, b in ((output, expected), (ours[0].grad, twins[0].grad), (ours[1].grad, twins[1].grad)):
        torch.testing.assert_close(a.double(), b, rtol=2e-2, atol=5e-2)


def test_a_gradient_of_one_number_everywhere():
    """Such a gradient has strides of zero, which torch's grouped product refuses."""
    groups = random_groups(4, 3, 10)
    x, matrices = torch.randn(4, 8, requires_grad=True), torch.randn(3, 16, 8, requires_grad=True)
    down = torch.randn(3, 8, 8, requires_grad=True)
    inner = gated(product(copy_tokens(x, groups), matrices, groups.ends), torch.ones(10))
    add_rows(product(inner, down, groups.ends), groups).sum().backward()
    assert all(value.grad.abs().sum() > 0 for value in (x, matrices, down))


def test_flops_of_grouped_products_by_any_counter():
    operator = torch.ops.aten._grouped_mm
    rows, matrices = torch.randn(12, 16, requires_grad=True), torch.randn(3, 24, 16, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        output = F.grouped_mm(rows, matrices.transpose(1, 2), offs=torch.tensor([4, 4, 12]).int())
    assert counter.get_flop_counts()["Global"] == {operator: 2 * 12 * 16 * 24}
    with FlopCounterMode(display=False) as counter:
        output.backward(torch.ones_like(output))
    assert counter.get_flop_counts()["Global"] == {operator: 4 * 12 * 16 * 24}
    with FlopCounterMode(display=False) as counter:
        F.grouped_mm(torch.randn(3, 4, 16), matrices.detach().transpose(1, 2))
    assert counter.get_total_flops() == 2 * 3 * 4 * 16 * 24


def test_a_formula_that_torch_has_already_is_left_alone(monkeypatch):
    import importlib

    monkeypatch.setitem(flop_registry, torch.ops.aten._grouped_mm, torchs := object())
    importlib.reload(grouped)
    assert flop_registry[torch.ops.aten._grouped_mm] is torchs
