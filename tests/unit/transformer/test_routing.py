"""Choices and losses against loops in Python."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlm.transformer.grouped import Groups
from memlm.transformer.routing import (
    balance_loss,
    expert_choice,
    expert_scores,
    router_logits,
    token_choice,
    z_loss,
)


def pairs(groups: Groups, weights: torch.Tensor) -> dict[tuple[int, int], float]:
    """Weight of every chosen (token, expert); checks that the four index tensors agree."""
    ends, tokens = groups.ends.tolist(), groups.tokens.tolist()
    experts = [e for e, (a, b) in enumerate(zip([0, *ends], ends, strict=False)) for _ in range(a, b)]
    assert len(experts) == len(tokens) == len(weights)
    assert groups.ends.dtype == torch.int32
    rows, starts = groups.rows.tolist(), [*groups.starts.tolist(), len(tokens)]
    assert sorted(rows) == list(range(len(tokens)))
    for token in range(len(starts) - 1):
        mine = rows[starts[token] : starts[token + 1]]
        assert sorted(mine) == [row for row, owner in enumerate(tokens) if owner == token]
    chosen = dict(zip(zip(tokens, experts, strict=True), weights.tolist(), strict=True))
    assert len(chosen) == len(tokens)
    return chosen


sizes = st.tuples(st.integers(0, 20), st.integers(2, 9), st.integers(1, 9)).map(
    lambda size: (size[0], size[1], min(size[1], size[2]))
)


@settings(max_examples=60, deadline=None)
@given(sizes, st.booleans(), st.booleans(), st.integers(0, 2**31))
def test_every_token_takes_its_best_experts(size, normalise, biased, seed):
    number, experts, top_k = size
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(number, experts, generator=generator, dtype=torch.float64)
    bias = torch.randn(experts, generator=generator) if biased else None
    expected = {}
    for token, row in enumerate(scores.tolist()):
        shift = [0.0] * experts if bias is None else bias.tolist()
        best = sorted(range(experts), key=lambda e: -(row[e] + shift[e]))[:top_k]
        total = sum(row[e] for e in best) if normalise else 1.0
        expected |= {(token, e): row[e] / total for e in best}
    groups, weights = token_choice(scores, top_k, normalise, bias)
    assert pairs(groups, weights) == pytest.approx(expected)
    assert groups.counts().sum() == number * top_k
    assert groups.unchosen() == 0


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(0, 2**31))
def test_every_expert_takes_its_best_tokens(size, seed):
    number, experts, top_k = size
    scores = torch.rand(
        number, experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).softmax(-1)
    capacity = math.ceil(number * top_k / experts)
    expected = {}
    for expert, column in enumerate(scores.t().tolist()):
        best = sorted(range(number), key=lambda n: -column[n])[:capacity]
        expected |= {(token, expert): column[token] for token in best}
    groups, weights = expert_choice(scores, top_k)
    assert pairs(groups, weights) == pytest.approx(expected)
    assert groups.counts().tolist() == [capacity] * experts
    assert groups.unchosen() == number - len({token for token, _ in expected})


def test_weights_have_the_gradient_of_their_scores():
    torch.manual_seed(0)
    scores = torch.rand(7, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: token_choice(s, 2)[1], scores)
    assert torch.autograd.gradcheck(lambda s: token_choice(s, 3, normalise=True)[1], scores)
    assert torch.autograd.gradcheck(lambda s: expert_choice(s, 2)[1], scores)


def test_a_bias_chooses_and_does_not_weigh():
    scores = torch.tensor([[0.6, 0.3, 0.1]])
    chosen = pairs(*token_choice(scores, 1, bias=torch.tensor([0.0, 0.0, 0.9])))
    assert chosen == {(0, 2): pytest.approx(0.1)}


def test_sigmoids_that_underflow_have_finite_weights():
    scores = expert_scores(torch.full((2, 3), -200.0), "sigmoid")
    assert (scores == 0).all()
    assert token_choice(scores, 2, normalise=True)[1].isfinite().all()


def test_scores():
    logits = torch.tensor([[0.0, math.log(3)]])
    torch.testing.assert_close(expert_scores(logits, "softmax"), torch.tensor([[0.25, 0.75]]))
    torch.testing.assert_close(expert_scores(logits, "sigmoid"), torch.tensor([[0.5, 0.75]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_logits_are_of_fp32_at_least_even_under_autocast(dtype):
    torch.manual_seed(0)
    tokens, weight = torch.randn(6, 64).to(dtype), torch.randn(4, 64).to(dtype)
    exact = tokens.double() @ weight.double().T
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = router_logits(tokens, weight)
    assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_balance_loss_is_switch_s_formula(score, top_k):
    torch.manual_seed(top_k)
    logits = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    scores = expert_scores(logits, score)
    counts = token_choice(scores, top_k)[0].counts()
    loss = 0.0
    for e in range(5):
        f = p = 0.0
        for row in scores.tolist():
            f += (e in sorted(range(5), key=lambda i: -row[i])[:top_k]) / (11 * top_k)
            p += row[e] / sum(row) / 11
        loss += 5 * f * p
    assert balance_loss(scores, counts).item() == pytest.approx(loss)
    # Its gradient is that of the probabilities, the shares being constants.
    assert torch.autograd.gradcheck(lambda x: balance_loss(expert_scores(x, score), counts), logits)


def test_balance_loss_is_one_for_an_even_load_and_experts_for_a_collapsed_one():
    even = torch.full((8, 4), 0.25)
    assert balance_loss(even, torch.tensor([4, 4, 4, 4])).item() == pytest.approx(1)
    collapsed = torch.tensor([[1.0, 0, 0, 0]]).expand(8, 4)
    assert balance_loss(collapsed, torch.tensor([8, 0, 0, 0])).item() == pytest.approx(4)


def test_z_loss():
    logits = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    expected = sum(math.log(sum(math.exp(x) for x in row)) ** 2 for row in logits.tolist()) / 5
    assert z_loss(logits).item() == pytest.approx(expected)
    assert torch.autograd.gradcheck(z_loss, logits)


def test_losses_of_no_tokens_are_zero():
    none = torch.zeros(0, 3)
    assert balance_loss(none, torch.zeros(3, dtype=torch.int64)) == 0
    assert z_loss(none) == 0
