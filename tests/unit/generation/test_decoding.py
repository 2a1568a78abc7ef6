import math

import pytest
import torch
from torch import nn

from memlm.generation.decoding import Sampling, choose, generate
from memlm.memory import EngramConfig, MemoryConfig, PEERConfig
from memlm.transformer import MoEConfig, Transformer, TransformerConfig


class Counting(nn.Module):
    """After token t the likeliest is t + 1 (mod 10); looks at nothing else."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 1)
        self.blocks = nn.ModuleList()
        self.dropout = nn.Dropout()
        self.modes = []
        self.rows = []

    def forward(self, tokens, cache, counts=None, last=False):
        assert last
        self.modes.append(self.training)
        self.rows.append(len(tokens))
        cache.advance(counts, tokens.shape[1])
        ends = torch.full((len(tokens),), tokens.shape[1]) if counts is None else counts
        newest = tokens[torch.arange(len(tokens)), ends - 1].unsqueeze(1)
        return nn.functional.one_hot((newest + 1) % 10, 10).float()


PLANS = {
    "dense": (None, None),
    "memory": (MemoryConfig(half_keys=8, heads=2, reads=4, key_dim=8, layers=[1]), None),
    "peer": (PEERConfig(half_keys=8, heads=2, reads=4, key_dim=8, layers=[0, 1]), None),
    "engram": (EngramConfig(slots=500, heads=2, layers=[0, 2], orders=[2, 3]), None),
    "experts": (None, MoEConfig(experts=4, top_k=2)),
}


@pytest.fixture(params=PLANS)
def transformer(request):
    torch.manual_seed(0)
    config = TransformerConfig(16, 3, 4, kv_heads=2, feed_forward_dim=16)
    model = Transformer(30, config, *PLANS[request.param])
    for parameter in model.parameters():  # far from uniform, so that greedy choices are no ties
        nn.init.normal_(parameter, std=0.5)
    return model


def brute_force(model, prompt, new):
    """Every token computed from the whole sequence again."""
    ids = list(prompt)
    modes = model.training
    model.eval()
    with torch.no_grad():
        for _ in range(new):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    model.train(modes)
    return ids[len(prompt) :]


def test_counts_on_from_ragged_prompts():
    assert generate(Counting(), [[3], [9, 8, 7, 1], [5, 5]], 3) == [[4, 5, 6], [2, 3, 4], [6, 7, 8]]


def test_a_document_ends_with_eos():
    assert generate(Counting(), [[3], [0]], 5, eos_id=6) == [[4, 5, 6], [1, 2, 3, 4, 5]]
    model = Counting()
    assert generate(model, [[3], [4]], 100, eos_id=6) == [[4, 5, 6], [5, 6]]
    assert model.rows == [2, 2, 1]  # and not a hundred; an ended row is not computed


def test_a_continuation_stops_where_the_caller_says():
    told = []

    def take(number, token):
        told.append((number, token))
        return token in (4, 9)

    assert generate(Counting(), [[1], [7]], 9, on_token=take) == [[2, 3, 4], [8, 9]]
    assert told == [(0, 2), (1, 8), (0, 3), (1, 9), (0, 4)]


def test_tokens_are_reported_as_they_come():
    told = []
    new = generate(Counting(), [[1, 1], [7], [3, 3]], 2, on_token=lambda *at: told.append(at), batch_size=2)
    assert told == [(1, 8), (0, 2), (1, 9), (0, 3), (2, 4), (2, 5)]  # the shortest prompts come first
    assert new == [[2, 3], [8, 9], [4, 5]]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_greedy_against_the_whole_sequence_again(transformer, batch_size):
    torch.manual_seed(1)
    prompts = [torch.randint(30, (n,)).tolist() for n in (5, 1, 70, 2, 5)]
    expected = [brute_force(transformer, prompt, 8) for prompt in prompts]
    assert generate(transformer, prompts, 8, batch_size=batch_size) == expected
    assert len({tuple(ids) for ids in expected}) > 2


def test_greedy_where_rows_end_at_different_times(transformer):
    prompts = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]]
    expected = []
    for prompt in prompts:
        ids = brute_force(transformer, prompt, 12)
        ends = [place for place, token in enumerate(ids) if token % 3 == 0]
        expected.append(ids[: ends[0] + 1] if ends else ids)
    assert generate(transformer, prompts, 12, on_token=lambda _, token: token % 3 == 0) == expected
    assert len({len(ids) for ids in expected}) > 1


def test_a_seed_decides_and_the_global_state_stays(transformer):
    prompts = [[1], [2, 3], [4, 5]]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = generate(transformer, prompts, 8, Sampling(1.0, seed=3))
    generate(transformer, prompts, 8, Sampling(1.0))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert generate(transformer, prompts, 8, Sampling(1.0, seed=3)) == first
    assert generate(transformer, prompts, 8, Sampling(1.0, seed=4)) != first


def test_a_prompt_is_sampled_alike_in_any_batch(transformer):
    prompts = [[1], [2, 3], [4, 5, 6]]
    first = generate(transformer, prompts, 8, Sampling(1.0, seed=3))
    assert generate(transformer, prompts, 8, Sampling(1.0, seed=3), batch_size=1) == first
    assert generate(transformer, prompts[:1], 8, Sampling(1.0, seed=3)) == first[:1]
    same = generate(transformer, [[1], [1]], 8, Sampling(1.0, seed=3))
    assert same[0] == first[0]
    assert same[1] != same[0]


def test_without_a_seed_samples_differ(transformer):
    sampling = Sampling(5.0)
    assert generate(transformer, [[0]], 20, sampling) != generate(transformer, [[0]], 20, sampling)


def shares(logits, sampling, draws=4001):
    """How often each token is chosen, over evenly spread draws."""
    points = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    chosen = choose(torch.tensor(logits).expand(draws, -1), sampling, points)
    return (torch.bincount(chosen, minlength=len(logits)) / draws).tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax(temperature):
    logits = [1.0, 0.0, -1.0, float("-inf")]
    weights = [math.exp(logit / temperature) for logit in logits]
    expected = [weight / sum(weights) for weight in weights]
    assert shares(logits, Sampling(temperature)) == pytest.approx(expected, abs=1e-3)


def logs(*probabilities):
    return [math.log(probability) for probability in probabilities]


@pytest.mark.parametrize(
    ("limits", "kept"),
    [
        ({"top_k": 2}, [0, 2]),
        ({"top_k": 99}, [0, 1, 2, 3]),
        ({"top_p": 0.5}, [0]),  # alone it reaches one half
        ({"top_p": 0.51}, [0, 2]),
        ({"top_p": 0.80}, [0, 2]),
        ({"top_p": 0.81}, [0, 2, 3]),
        ({"top_p": 1.0}, [0, 1, 2, 3]),
        ({"min_p": 0.25}, [0, 2, 3]),
        ({"min_p": 0.31}, [0, 2]),
        ({"min_p": 0.0}, [0, 1, 2, 3]),
        ({"top_k": 2, "top_p": 0.6}, [0]),  # of the two that are left the first has 5 / 8
        ({"top_p": 0.9, "min_p": 0.5}, [0, 2]),
    ],
)
def test_limits(limits, kept):
    probabilities = [0.5, 0.05, 0.3, 0.15]
    expected = [p if token in kept else 0 for token, p in enumerate(probabilities)]
    expected = [p / sum(expected) for p in expected]
    assert shares(logs(*probabilities), Sampling(1.0, **limits)) == pytest.approx(expected, abs=1e-3)


def test_limits_hold_after_the_temperature():
    # At temperature 1/2 the probabilities 0.6, 0.3, 0.1 become their squares' shares: 0.78, 0.20, 0.02.
    assert shares(logs(0.6, 0.3, 0.1), Sampling(0.5, top_p=0.75)) == [1, 0, 0]
    assert shares(logs(0.6, 0.3, 0.1), Sampling(0.5, min_p=0.3)) == [1, 0, 0]
    assert shares(logs(0.6, 0.3, 0.1), Sampling(1.0, min_p=0.3))[1] > 0


def test_equals_are_all_kept_by_top_k():
    assert min(shares([0.0, 0.0, -9.0, 0.0], Sampling(1.0, top_k=2))[place] for place in (0, 1, 3)) > 0.3


@pytest.mark.parametrize(("draw", "token"), [(0.0, 1), (0.25, 1), (0.5, 2), (1.0, 2)])
def test_tokens_without_probability_are_never_drawn(draw, token):
    logits = torch.tensor([[float("-inf"), 2.0, 2.0]])
    assert choose(logits, Sampling(1.0), torch.tensor([draw], dtype=torch.float64)).tolist() == [token]


def test_a_tiny_temperature_is_greedy():
    assert shares([500.0, 501.0, 500.5], Sampling(1e-6)) == [0, 1, 0]


def test_logits_that_are_no_numbers_do_not_fail():
    (token,) = choose(torch.full((1, 4), float("nan")), Sampling(1.0), torch.tensor([0.5]).double()).tolist()
    assert 0 <= token < 4


def test_every_module_returns_to_its_mode():
    model = Counting()
    model.dropout.eval()  # a part that is frozen in evaluation mode
    generate(model, [[1]], 2)
    assert model.modes == [False, False]
    assert (model.training, model.dropout.training) == (True, False)


def test_modes_return_after_a_failure():
    class Breaks(Counting):
        def forward(self, tokens, **options):
            raise RuntimeError("broken")

    model = Breaks()
    with pytest.raises(RuntimeError, match="broken"):
        generate(model, [[1]], 2)
    assert model.training
    assert model.dropout.training


@pytest.mark.parametrize("transformer", ["memory"], indirect=True)
def test_no_gradient_is_recorded(transformer):
    generate(transformer, [[1]], 2)
    assert transformer.pools["main"].gradient.compact() is None


def test_nothing_to_do():
    assert generate(Counting(), [], 5) == []
    assert generate(Counting(), [[1], [2]], 0) == [[], []]


def test_wrong_arguments():
    with pytest.raises(ValueError, match="a prompt is empty"):
        generate(Counting(), [[1], []], 1)
    with pytest.raises(ValueError, match="batch_size is 0"):
        generate(Counting(), [[1]], 1, batch_size=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_wrong_sampling(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
