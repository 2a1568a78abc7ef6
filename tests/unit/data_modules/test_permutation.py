from collections import Counter
from itertools import permutations
from math import factorial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_modules.permutation import Permutation


def improbable(counts, expected):
    """Whether counts differ from what is expected more than chance does in 1 of 10,000 cases."""
    freedom = len(counts) - 1
    # That quantile of chi-squared, by Wilson and Hilferty's approximation.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3
    return ((np.asarray(counts) - expected) ** 2 / expected).sum() > limit


@given(st.integers(1, 20_000), st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=3))
def test_every_index_is_the_image_of_one(count, parts):
    images = Permutation(count, *parts)(np.arange(count))
    assert images.dtype == np.int64
    assert np.array_equal(np.bincount(images, minlength=count), np.ones(count, np.int64))


@pytest.mark.parametrize("count", [1023, 1024, 1025, 2**16, 2**16 + 1, 255**2, 1_000_003])
def test_every_index_is_the_image_of_one_at_edges(count):
    assert np.bincount(Permutation(count, 1)(np.arange(count)), minlength=count).max() == 1


@pytest.mark.parametrize("count", [2**40 + 7, 2**53 + 1, 2**62 - 1, 2**62])
def test_large_counts(count):
    index = [0, *np.random.default_rng(0).integers(0, count, 50_000).tolist(), count - 1]
    images = Permutation(count, 3)(index)
    assert images.min() >= 0 and images.max() < count and len(np.unique(images)) == len(np.unique(index))
    assert not improbable(np.histogram(images.astype(float), 20, (0, count))[0], len(images) / 20)


@given(st.integers(1, 3000), st.integers(0, 2999), st.integers(0, 9))
def test_an_image_does_not_depend_on_what_else_is_asked(count, index, part):
    index %= count
    whole = Permutation(count, part)(np.arange(count))
    assert Permutation(count, part)(index) == whole[index]
    assert np.array_equal(Permutation(count, part)([[index, 0]]), [[whole[index], whole[0]]])


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_all_orders_of_few_are_equally_frequent(count):
    found = Counter(tuple(Permutation(count, 5, key)(np.arange(count))) for key in range(6000))
    assert not improbable([found[order] for order in permutations(range(count))], 6000 / factorial(count))


@pytest.mark.parametrize("count", [1000, 1025, 2000])
def test_pairs_of_images_are_independent(count):
    images = np.array([Permutation(count, 5, key)([0, 1, count - 1]) for key in range(4000)])
    for a, b in [(0, 1), (0, 2), (1, 2)]:
        pairs = images[:, a] * 8 // count * 8 + images[:, b] * 8 // count
        assert not improbable(np.bincount(pairs, minlength=64), 4000 / 64)
        pairs = images[:, a] % 8 * 8 + images[:, b] % 8
        assert not improbable(np.bincount(pairs, minlength=64), 4000 / 64)


def test_neighbours_do_not_stay_neighbours():
    images = Permutation(200_000, 1)(np.arange(200_000))
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.01
    assert (np.diff(images) == 1).sum() < 10


def test_other_parts_give_another_order():
    orders = {tuple(Permutation(50, *parts)(np.arange(50))) for parts in [(0,), (1,), (0, 0), (0, 1), (1, 0)]}
    assert len(orders) == 5


def test_what_is_out_of_range():
    for count in [0, -1, 2**62 + 1]:
        with pytest.raises(ValueError, match="expected 1 to"):
            Permutation(count, 0)
    for index in [-1, 7]:
        with pytest.raises(IndexError, match=r"range\(7\)"):
            Permutation(7, 0)([0, index])
