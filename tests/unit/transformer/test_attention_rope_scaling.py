"""Scaled rotary positions against the formulas of their papers, written out pair by pair."""

import math

import pytest
import torch

from memlm.transformer.attention import rotary_table
from memlm.transformer.config import RopeScaling


def llama3_frequency(plain, factor, length, low, high):
    """By wavelengths, as Llama 3.1's description puts it."""
    wavelength = 2 * math.pi / plain
    if wavelength > length / low:
        return plain / factor
    if wavelength < length / high:
        return plain
    smooth = (length / wavelength - low) / (high - low)
    return (1 - smooth) * plain / factor + smooth * plain


def yarn_frequency(pair, head_dim, theta, factor, length, slow, fast):
    """By the number of the pair that turns ``n`` times, as the code released with the paper."""

    def number(turns):
        return head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(number(fast)), 0), min(math.ceil(number(slow)), head_dim - 1)
    ramp = min(max((pair - low) / (high - low), 0), 1) if high > low else float(pair > low)
    plain = theta ** (-2 * pair / head_dim)
    return plain / factor * ramp + plain * (1 - ramp)


def table_of(frequencies, length, size=1.0):
    angle = torch.outer(torch.arange(length).double(), torch.tensor(frequencies, dtype=torch.float64))
    angle = torch.cat((angle, angle), -1)
    return size * angle.cos(), size * angle.sin()


def assert_same(table, expected):
    for part, exact in zip(table, expected, strict=True):
        assert part.dtype == torch.float32
        # Angles up to 200 radians, in fp32.
        torch.testing.assert_close(part.double(), exact, rtol=0, atol=5e-5)


def test_linear_scaling_is_positions_divided():
    table = rotary_table(torch.arange(61), 12, 100.0, RopeScaling("linear", 4.0))
    plain = rotary_table(torch.arange(16), 12, 100.0)
    for scaled, part in zip(table, plain, strict=True):
        torch.testing.assert_close(scaled[::4], part, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("head_dim,theta,length", [(16, 100.0, 32), (32, 10_000.0, 64), (64, 500_000.0, 128)])
@pytest.mark.parametrize("turns", [(None, None), (0.5, 3.0)])
def test_llama3_scaling(head_dim, theta, length, turns):
    table = rotary_table(torch.arange(200), head_dim, theta, RopeScaling("llama3", 8.0, length, *turns))
    low, high = turns[0] or 1.0, turns[1] or 4.0
    plain = [theta ** (-2 * d / head_dim) for d in range(head_dim // 2)]
    scaled = [llama3_frequency(frequency, 8.0, length, low, high) for frequency in plain]
    kinds = {round(new / old, 6) for new, old in zip(scaled, plain, strict=True)}
    assert {1.0, 0.125} < kinds  # all three cases are met
    assert_same(table, table_of(scaled, 200))


@pytest.mark.parametrize(
    "head_dim,theta,length,turns",
    [
        (32, 10_000.0, 512, (None, None)),
        (64, 500_000.0, 4096, (None, None)),
        (16, 100.0, 64, (0.5, 3.0)),
        (16, 100.0, 3, (None, None)),  # no pair turns even once: all are slowed
        (16, 100.0, 4096, (None, None)),  # the ramp ends beyond the last pair
        (16, 100.0, 1_000_000, (None, 1e5)),  # and beyond the last element
    ],
)
def test_yarn_scaling(head_dim, theta, length, turns):
    table = rotary_table(torch.arange(200), head_dim, theta, RopeScaling("yarn", 16.0, length, *turns))
    slow, fast = turns[0] or 1.0, turns[1] or 32.0
    scaled = [yarn_frequency(d, head_dim, theta, 16.0, length, slow, fast) for d in range(head_dim // 2)]
    assert_same(table, table_of(scaled, 200, size=0.1 * math.log(16) + 1))


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_a_factor_of_one_changes_nothing(kind):
    length = None if kind == "linear" else 32
    scaled = rotary_table(torch.arange(50), 16, 100.0, RopeScaling(kind, 1.0, length))
    for part, plain in zip(scaled, rotary_table(torch.arange(50), 16, 100.0), strict=True):
        torch.testing.assert_close(part, plain, rtol=1e-6, atol=1e-6)
