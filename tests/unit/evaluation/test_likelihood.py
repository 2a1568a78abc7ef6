import random

import pytest
import torch
from torch import nn

from memlm.evaluation.likelihood import Scored, score, score_texts
from memlm.memory import EngramConfig, MemoryConfig
from memlm.transformer import Transformer, TransformerConfig

CONTEXT = 45
PLANS = {
    "dense": None,
    "memory": MemoryConfig(half_keys=8, heads=2, reads=4, key_dim=8, layers=[1]),
    "engram": EngramConfig(slots=500, heads=2, layers=[0, 2]),
}


@pytest.fixture(params=PLANS)
def model(request):
    torch.manual_seed(0)
    made = Transformer(30, TransformerConfig(16, 3, 4, kv_heads=2, feed_forward_dim=16), PLANS[request.param])
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


def ids(draw, least, most):
    return [draw.randrange(30) for _ in range(draw.randint(least, most))]


@torch.no_grad()
def brute_force(model, prefix, continuation):
    model.eval()
    whole = (prefix + continuation)[-CONTEXT - 1 :]
    chances = model(torch.tensor([whole[:-1]]))[0].double().log_softmax(-1)[-len(continuation) :]
    likelihood = sum(float(row[token]) for row, token in zip(chances, continuation, strict=True))
    return Scored(likelihood, chances.argmax(-1).tolist() == continuation, len(continuation))


def check(model, pairs, **options):
    got = score(model, pairs, CONTEXT, **options)
    for pair, scored in zip(pairs, got, strict=True):
        expected = brute_force(model, *pair)
        assert scored.log_likelihood == pytest.approx(expected.log_likelihood, abs=2e-5)
        assert scored[1:] == expected[1:]


@pytest.mark.parametrize("batch_tokens", [1, 100, 4096])
def test_against_each_pair_alone(model, batch_tokens):
    draw = random.Random(0)
    pairs = [(ids(draw, 1, 60), ids(draw, 1, 9)) for _ in range(25)]
    check(model, [*pairs, pairs[0]], batch_tokens=batch_tokens)


@pytest.mark.parametrize("batch_tokens", [64, 400])
def test_shared_beginnings(model, batch_tokens):
    """Examples before each question, several answers to a question, one of one token, one too long."""
    draw = random.Random(1)
    pairs = []
    for _ in range(3):
        examples = ids(draw, 20, 25)
        for _ in range(5):
            question = examples + ids(draw, 0, 18)
            pairs += [(question, ids(draw, 1, 9)) for _ in range(draw.randint(1, 4))]
    pairs += [(examples, ids(draw, CONTEXT, CONTEXT)), (examples[:1], [3]), (examples[:1], [4])]
    draw.shuffle(pairs)
    check(model, pairs, batch_tokens=batch_tokens)


def test_shared_beginnings_are_computed_once(model, monkeypatch):
    computed = 0
    forward = model.hidden_states

    def counting(tokens, *rest, **options):
        nonlocal computed
        computed += tokens.numel()
        return forward(tokens, *rest, **options)

    monkeypatch.setattr(model, "hidden_states", counting)
    examples = list(range(25))
    pairs = [([*examples, a, b], [a + b]) for a in range(6) for b in range(6)]
    score(model, pairs, CONTEXT, batch_tokens=200)
    # The examples once, and of each pair the two tokens that follow them.
    assert computed == 25 + 2 * len(pairs)
    computed = 0
    score(model, [(examples, [1, 2]), (examples, [3])], CONTEXT, batch_tokens=4096)
    assert computed == 24 + 2 * 2


def test_answers_that_differ_in_their_last_token_are_one_row(model, monkeypatch):
    computed = []
    forward = model.hidden_states

    def counting(tokens, *rest, **options):
        computed.append(tokens.numel())
        return forward(tokens, *rest, **options)

    draw = random.Random(3)
    question, longer = ids(draw, 20, 20), ids(draw, 24, 24)
    pairs = [(question, [letter]) for letter in (4, 5, 6, 6)] + [(longer, [1, 2]), (longer, [1, 3])]
    # The same inputs as the two before, but with both of their last tokens to be predicted.
    pairs.append(([*longer, 1], [3]))
    monkeypatch.setattr(model, "hidden_states", counting)
    told = []
    score(model, pairs[:4], CONTEXT, report=told.append)
    assert computed == [20] and told == [4]
    monkeypatch.undo()
    check(model, pairs)


@pytest.mark.parametrize("answer", [1, 3])
def test_what_is_shared_is_not_held_for_all_rows_at_once(model, monkeypatch, answer):
    most = 0
    forward = model.hidden_states

    def measuring(tokens, *rest, cache=None, **options):
        nonlocal most
        hidden = forward(tokens, *rest, cache=cache, **options)
        if cache is not None:
            most = max(most, *(b.shape[0] * b.shape[1] for b in cache.blocks[0]._buffers.values()))
        return hidden

    draw = random.Random(4)
    examples = ids(draw, 40 - answer, 40 - answer)
    pairs = [([*examples, *ids(draw, 2, 4)], ids(draw, answer, answer)) for _ in range(40)]
    pairs += [(examples, ids(draw, answer + 1, answer + 1)) for _ in range(40)]
    monkeypatch.setattr(model, "hidden_states", measuring)
    score(model, pairs, CONTEXT, batch_tokens=100)
    # Buffers have room for 64 positions at least, where 45 are used.
    assert 64 < most <= 4 * 100 * 64 / 40
    monkeypatch.undo()
    check(model, pairs, batch_tokens=100)


def test_a_greedy_continuation_is_one(model):
    prefix = [3, 4, 5]
    chain = list(prefix)
    model.eval()
    with torch.no_grad():
        for _ in range(4):
            chain.append(int(model(torch.tensor([chain]))[0, -1].argmax()))
    other = [*chain[3:6], (chain[6] + 1) % 30]
    right, wrong = score(model, [(prefix, chain[3:]), (prefix, other)], CONTEXT)
    assert right.greedy
    assert not wrong.greedy


def test_long_texts_in_windows(model):
    draw = random.Random(2)
    texts = [ids(draw, n, n) for n in (1, 44, 45, 46, 90, 131, 0)]
    got = score_texts(model, texts, CONTEXT, prefix_id=7, batch_tokens=150)
    for text, scored in zip(texts, got, strict=True):
        whole, expected, predicted = [7, *text], 0.0, 0
        while predicted < len(text):
            now = min(CONTEXT, len(text) - predicted)
            first = max(predicted + now - CONTEXT, 0)
            part = brute_force(model, whole[first : predicted + 1], text[predicted : predicted + now])
            expected, predicted = expected + part.log_likelihood, predicted + now
        assert scored.log_likelihood == pytest.approx(expected, abs=1e-4)
        assert scored.tokens == len(text)


def test_reports_every_pair(model):
    told = []
    score(model, [([1], [2])] * 7, CONTEXT, batch_tokens=2, report=told.append)
    assert sum(told) == 7


def test_nothing_to_score(model):
    assert score(model, [], CONTEXT) == []
    assert score_texts(model, [], CONTEXT, 0) == []


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (([], [1]), "pair 1 has an empty prefix"),
        (([1], []), "pair 1 has an empty continuation"),
        (([1], [2] * 46), "pair 1 has a continuation of 46 tokens, more than the context of 45"),
    ],
)
def test_wrong_pairs(model, pair, message):
    with pytest.raises(ValueError, match=message):
        score(model, [([1], [2]), pair], CONTEXT)


def test_the_model_is_left_as_it_was(model):
    model.train()
    score(model, [([1], [2])], CONTEXT)
    assert model.training
