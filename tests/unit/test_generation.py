import math
from collections import Counter

import pytest
import torch
from torch import nn

from memlm.generation import generate
from memlm.memory import MemoryConfig
from memlm.transformer import Transformer, TransformerConfig


class Counting(nn.Module):
    """After token t the likeliest is t + 1 (mod 10); looks at nothing else."""

    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))
        self.dropout = nn.Dropout()
        self.modes = []

    def forward(self, tokens):
        self.modes.append(self.training)
        return nn.functional.one_hot((tokens + 1) % 10, 10) * self.one


class Fixed(nn.Module):
    """The same logits everywhere."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, tokens):
        return self.logits.expand(*tokens.shape, -1)


@pytest.fixture
def transformer():
    torch.manual_seed(0)
    config = TransformerConfig(16, 2, 2, feed_forward_dim=16)
    model = Transformer(30, config, MemoryConfig(half_keys=8, heads=2, reads=4, key_dim=8, layers=[1]))
    nn.init.normal_(model.output.weight)  # far from uniform, so that greedy choices are no ties
    return model


def test_counts_on_from_ragged_prompts():
    assert generate(Counting(), [[3], [9, 8, 7, 1], [5, 5]], 3) == [[4, 5, 6], [2, 3, 4], [6, 7, 8]]


def test_a_document_ends_with_eos():
    assert generate(Counting(), [[3], [0]], 5, eos_id=6) == [[4, 5, 6], [1, 2, 3, 4, 5]]
    model = Counting()
    assert generate(model, [[3], [4]], 100, eos_id=6) == [[4, 5, 6], [5, 6]]
    assert len(model.modes) == 3  # and not a hundred


def test_greedy_against_one_prompt_at_a_time(transformer):
    prompts = [[1, 2, 3, 4, 5], [6], [7, 8]]
    expected = []
    transformer.eval()
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(6):
            ids.append(int(transformer(torch.tensor([ids]))[0, -1].argmax()))
        expected.append(ids[len(prompt) :])
    assert generate(transformer, prompts, 6) == expected
    assert len({tuple(ids) for ids in expected}) == 3


def test_a_seed_decides_and_the_global_state_stays(transformer):
    prompts = [[1], [2, 3]]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = generate(transformer, prompts, 8, temperature=1.0, seed=3)
    generate(transformer, prompts, 8, temperature=1.0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert generate(transformer, prompts, 8, temperature=1.0, seed=3) == first
    assert generate(transformer, prompts, 8, temperature=1.0, seed=4) != first


def test_without_a_seed_samples_differ():
    model = Fixed([0.0] * 50)
    assert generate(model, [[0]], 20, temperature=1.0) != generate(model, [[0]], 20, temperature=1.0)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_frequencies_follow_the_softmax(temperature):
    logits = [1.0, 0.0, -1.0, float("-inf")]
    drawn = Counter(
        ids[0] for ids in generate(Fixed(logits), [[0]] * 20_000, 1, temperature=temperature, seed=0)
    )
    weights = [math.exp(logit / temperature) for logit in logits]
    for token, weight in enumerate(weights):
        # Four standard deviations of a share of 20,000 draws are below 0.0142.
        assert drawn[token] / 20_000 == pytest.approx(weight / sum(weights), abs=0.0142)
    assert drawn[3] == 0


def test_top_k_leaves_the_likeliest_only():
    model = Fixed([0.0, 3.0, 1.0, 2.9, -1.0])
    drawn = [ids[0] for ids in generate(model, [[0]] * 500, 1, temperature=3.0, top_k=2, seed=0)]
    assert set(drawn) == {1, 3}
    everything = [ids[0] for ids in generate(model, [[0]] * 500, 1, temperature=3.0, top_k=99, seed=0)]
    assert set(everything) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(("draw", "token"), [(0.0, 1), (0.25, 1), (0.5, 2), (1.0, 2)])
def test_tokens_without_probability_are_never_drawn(monkeypatch, draw, token):
    monkeypatch.setattr(torch, "rand", lambda *shape, dtype, **options: torch.full(shape, draw, dtype=dtype))
    model = Fixed([float("-inf"), 2.0, 2.0])
    assert generate(model, [[0]], 1, temperature=1.0) == [[token]]


def test_a_tiny_temperature_is_greedy():
    logits = [500.0, 501.0, 500.5]
    assert generate(Fixed(logits), [[0]], 5, temperature=1e-6, seed=0) == [[1] * 5]


def test_logits_that_are_no_numbers_do_not_fail():
    ((token,),) = generate(Fixed([float("nan")] * 4), [[0]], 1, temperature=1.0, seed=0)
    assert 0 <= token < 4


def test_every_module_returns_to_its_mode():
    model = Counting()
    model.dropout.eval()  # a part that is frozen in evaluation mode
    generate(model, [[1]], 2)
    assert model.modes == [False, False]
    assert (model.training, model.dropout.training) == (True, False)


def test_modes_return_after_a_failure():
    class Breaks(Counting):
        def forward(self, tokens):
            raise RuntimeError("broken")

    model = Breaks()
    with pytest.raises(RuntimeError, match="broken"):
        generate(model, [[1]], 2)
    assert model.training
    assert model.dropout.training


def test_no_gradient_is_recorded(transformer):
    generate(transformer, [[1]], 2)
    assert transformer.pools["main"].gradient.compact() is None


def test_nothing_to_do():
    assert generate(Counting(), [], 5) == []
    assert generate(Counting(), [[1], [2]], 0) == [[], []]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "a prompt is empty"),
        ([[1]], {"temperature": -0.1}, "temperature is -0.1"),
        ([[1]], {"top_k": 0}, "top_k is 0"),
    ],
)
def test_wrong_arguments(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(Counting(), prompts, 1, **options)
