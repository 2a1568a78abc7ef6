from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_modules.mixture import BLOCK, Mixture, checked_weights
from memlm.errors import ConfigError

WEIGHTS = st.lists(st.floats(0.01, 10), min_size=1, max_size=6)


@settings(max_examples=25, deadline=None)
@given(WEIGHTS, st.integers(0, 5 * BLOCK), st.integers(0, 2 * BLOCK), st.integers(0, 99))
@example([1.0], 0, 0, 0)
def test_ordinals_count_what_the_source_gave_before(weights, first, count, seed):
    mixture = Mixture(weights, seed)
    source, ordinal = mixture.assign(first, count)
    before, after = mixture.counts(first), mixture.counts(first + count)
    for number in range(len(weights)):
        assert np.array_equal(ordinal[source == number], np.arange(before[number], after[number]))


@settings(max_examples=25, deadline=None)
@given(WEIGHTS, st.integers(0, 3 * BLOCK), st.integers(1, 999))
def test_any_position_continues_the_same_sequence(weights, first, step):
    whole = Mixture(weights, 1).assign(0, first + 2 * step)
    mixture = Mixture(weights, 1)
    for start in [first + step, first]:  # also backwards
        for a, b in zip(mixture.assign(start, step), whole, strict=True):
            assert np.array_equal(a, b[start : start + step])


@given(WEIGHTS, st.sampled_from([1, 2, 3, 1000, 10**9, 2**46]))
def test_shares_are_exact_after_whole_blocks(weights, blocks):
    counts = Mixture(weights, 1).counts(blocks * BLOCK)
    shares = [Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
    assert counts.sum() == blocks * BLOCK
    for count, share in zip(counts.tolist(), shares, strict=True):
        assert abs(count - share * blocks * BLOCK) < 1


def test_largest_remainders_are_rounded_up():
    # Quotas 21845.33 each: the one row left over goes to one of them, and in the next blocks to others.
    counts = [Mixture([1, 1, 1], 1).counts(n * BLOCK).tolist() for n in (1, 2, 3)]
    assert [sorted(c) for c in counts] == [[21845, 21845, 21846], [43690, 43691, 43691], [65536] * 3]
    # Quotas 45875.2, 13107.2 and 6553.6.
    assert Mixture([0.7, 0.2, 0.1], 1).counts(BLOCK).tolist() == [45875, 13107, 6554]


def test_sources_are_mixed_within_a_block():
    source, _ = Mixture([3, 1], 4).assign(0, BLOCK)
    shares = (source == 1).reshape(64, -1).mean(axis=1)
    assert abs(shares - 0.25).max() < 0.08  # 6 standard deviations
    runs = np.diff(np.flatnonzero(np.diff(source)))
    assert runs.max() < 60
    assert not np.array_equal(source, Mixture([3, 1], 4).assign(BLOCK, BLOCK)[0])
    assert not np.array_equal(source, Mixture([3, 1], 5).assign(0, BLOCK)[0])


def test_only_ratios_count():
    a, b = Mixture([0.75, 0.25], 1).assign(100, 1000), Mixture([3, 1], 1).assign(100, 1000)
    assert all(map(np.array_equal, a, b))


def test_the_least_weight():
    counts = Mixture([BLOCK - 1, 1], 1).counts(7 * BLOCK)
    assert counts.tolist() == [7 * (BLOCK - 1), 7]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": BLOCK, "b": 1}, r"data\.weights\.b: is 1\.53e-05 of all weights; expected at least 1/65,536"),
        ({"a": 1.0, "b": 0.0}, r"data\.weights\.b: is 0\.0; expected a positive number"),
        ({"a": 1.0, "b": -1.0}, r"data\.weights\.b: is -1\.0; expected a positive number"),
        ({"a": float("nan"), "b": 1}, r"data\.weights\.a: is nan; expected a positive number"),
        ({"a": 1, "b": float("inf")}, r"data\.weights\.b: is inf; expected a positive number"),
        ({"a": 1}, r"data\.weights: has none for 'b' of data\.folders; expected one for each"),
        ({"a": 1, "b": 1, "c": 1}, r"data\.weights\.c: is the weight of no source; data\.folders has a, b$"),
        ({}, r"data\.weights: has none for 'a'"),
    ],
)
def test_weights_that_are_none(weights, message):
    with pytest.raises(ConfigError, match=message):
        checked_weights(weights, ["a", "b"], "data.folders")


def test_weights_are_given_in_the_order_of_the_sources():
    assert checked_weights({"b": 3, "a": 1}, ["a", "b"], "data.folders") == [0.25, 0.75]


def test_weights_of_the_same_ratios_are_the_same():
    weights = [{"a": 0.8, "b": 0.2}, {"a": 8, "b": 2}, {"a": 0.08, "b": 0.02}, {"a": 80 / 3, "b": 20 / 3}]
    found = [checked_weights(some, ["a", "b"], "data.paths") for some in weights]
    assert found == [[0.8, 0.2]] * 4
    assert checked_weights({"a": BLOCK - 1, "b": 1}, ["a", "b"], "k") == [1 - 1 / BLOCK, 1 / BLOCK]
