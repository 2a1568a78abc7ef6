import math
import random

import numpy as np
import pytest

from memlm.evaluation.intervals import student, t_quantile, wilson


def solve(function, low, high):
    """Where an increasing function crosses zero."""
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return low


@pytest.mark.parametrize("n", [1, 2, 7, 100, 12345])
def test_wilson_is_where_the_normal_test_just_does_not_reject(n):
    z = 1.959963984540054
    for successes in {0, n // 3, n // 2, n}:
        share = successes / n

        def excess(p, share=share):
            return (p - share) / math.sqrt(p * (1 - p) / n)

        low, high = wilson(successes, n)
        if successes > 0:
            assert low == pytest.approx(solve(lambda p: excess(p) + z, 1e-12, share), abs=1e-9)
        if successes < n:
            assert high == pytest.approx(solve(lambda p: excess(p) - z, share, 1 - 1e-12), abs=1e-9)
        assert 0 <= low <= share <= high <= 1
    assert wilson(0, n)[0] == 0 and wilson(n, n)[1] == 1


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 10, 29, 1000])
def test_t_quantile_against_the_integrated_density(freedom):
    half = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    scale = math.exp(half) / math.sqrt(freedom * math.pi)
    x = np.linspace(0, t_quantile(freedom), 400_001)
    density = scale * (1 + x * x / freedom) ** (-(freedom + 1) / 2)
    assert 0.5 + np.trapezoid(density, x) == pytest.approx(0.975, abs=1e-4)


def test_the_interval_of_a_mean_covers_it_95_times_in_100():
    draw = random.Random(3)
    hits = 0
    for _ in range(4000):
        sample = [draw.gauss(2, 5) for _ in range(5)]
        mean = sum(sample) / 5
        error = math.sqrt(sum((x - mean) ** 2 for x in sample) / 4 / 5)
        low, high = student(mean, error, 5)
        hits += low <= 2 <= high
    assert hits / 4000 == pytest.approx(0.95, abs=0.012)
