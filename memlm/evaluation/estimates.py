"""Figures of a task over its examples, summed over ranks, with their confidence intervals."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from memlm.evaluation.intervals import student, wilson


@dataclass(frozen=True)
class Measure:
    """A figure that a task reports.

    Args:
        name: Its name.
        kind: ``share`` of examples that are right (values 0 and 1), ``mean`` over examples, or ``ratio``: the
            sum of one quantity over the examples by the sum of another, such as nats by tokens.
        exponential: Whether the figure is e to the power of that (perplexity from a loss).
    """

    name: str
    kind: Literal["share", "mean", "ratio"] = "mean"
    exponential: bool = False


class Estimate(NamedTuple):
    """A figure with its 95 % confidence interval, with ends None where only one example was measured."""

    value: float
    low: float | None
    high: float | None
    n: int


class Figures:
    """The figures of measures over groups of examples.

    A share has Wilson's interval. A mean has Student's. So has a ratio of sums, with the standard error of a
    ratio estimator: ``sqrt(n / (n - 1) * sum((y - r x)^2)) / sum(x)`` (Cochran, Sampling Techniques, 1977,
    6.4), of which the mean is the case ``x = 1``. Examples are taken to be independent of each other.

    Args:
        measures: What is measured (M).
        groups: Names of the groups (G).
        moments: n and the sums of x, y, xx, xy, yy, float64 [G, M, 6].
    """

    def __init__(self, measures: Sequence[Measure], groups: Sequence[str], moments: Tensor) -> None:
        self.measures, self.groups, self.moments = measures, groups, moments.cpu()

    def overall(self) -> dict[str, Estimate]:
        """The figures over the examples of all groups; those without an example are left out."""
        return self._estimates(self.moments.sum(0))

    def by_group(self) -> dict[str, dict[str, Estimate]]:
        """The figures of each group."""
        return {
            name: self._estimates(moments) for name, moments in zip(self.groups, self.moments, strict=True)
        }

    def macro(self, name: str) -> Estimate:
        """A share's or mean's average over the groups that have examples, each counted once.

        Its standard error comes of those of the groups: ``sqrt(sum(e_g^2)) / G``. A group of a single example
        has none of its own: then there is no interval.
        """
        index = [measure.name for measure in self.measures].index(name)
        rows = [row for row in self.moments[:, index] if row[0] > 0]
        value = sum(float(row[2] / row[1]) for row in rows) / len(rows)
        n = int(sum(float(row[0]) for row in rows))
        if any(row[0] < 2 for row in rows):
            return Estimate(value, None, None, n)
        error = math.sqrt(sum(_standard_error(row) ** 2 for row in rows)) / len(rows)
        return Estimate(value, *student(value, error, n), n)

    def _estimates(self, moments: Tensor) -> dict[str, Estimate]:
        return {
            measure.name: _estimate(measure, row)
            for measure, row in zip(self.measures, moments, strict=True)
            if row[0] > 0 and row[1] > 0
        }


class Estimates(Metric):
    """Sums over examples, of which `Figures` are made; they add up over ranks.

    Args:
        measures: What is measured.
        groups: Names of the groups of examples, such as the subjects of an exam.
    """

    full_state_update = False
    moments: Tensor

    def __init__(self, measures: Sequence[Measure], groups: Sequence[str] = ("all",)) -> None:
        super().__init__()
        self.measures, self.groups = tuple(measures), tuple(groups)
        zeros = torch.zeros(len(groups), len(self.measures), 6, dtype=torch.float64)
        self.add_state("moments", zeros, dist_reduce_fx="sum")

    def update(self, values: Mapping[str, float | tuple[float, float]], group: str = "all") -> None:
        """Add an example.

        Args:
            values: Of each measure; of a ratio the numerator and the denominator. A measure that is left out
                does not count this example.
            group: The example's group.
        """
        rest = dict(values)
        row = torch.zeros(len(self.measures), 6, dtype=torch.float64)
        for index, measure in enumerate(self.measures):
            if measure.name in rest:
                value = rest.pop(measure.name)
                y, x = value if isinstance(value, tuple) else (value, 1.0)
                row[index] = torch.tensor([1, x, y, x * x, x * y, y * y], dtype=torch.float64)
        if rest:
            raise ValueError(f"no such measure: {', '.join(rest)}")
        self.moments[self.groups.index(group)] += row.to(self.moments.device)

    def compute(self) -> Figures:
        """The figures over the examples of all ranks."""
        return Figures(self.measures, self.groups, self.moments)


def _estimate(measure: Measure, row: Tensor) -> Estimate:
    n, x, y = int(row[0]), float(row[1]), float(row[2])
    value = y / x
    low: float | None
    high: float | None
    if measure.kind == "share":
        low, high = wilson(y, n)
    elif n > 1:
        low, high = student(value, _standard_error(row), n)
    else:
        low = high = None
    if not measure.exponential:
        return Estimate(value, low, high, n)
    return Estimate(_exp(value), low if low is None else _exp(low), high if high is None else _exp(high), n)


def _standard_error(row: Tensor) -> float:
    n, x, y, xx, xy, yy = row.tolist()
    ratio = y / x
    residuals = max(yy - 2 * ratio * xy + ratio * ratio * xx, 0.0)  # below 0 only by rounding
    return math.sqrt(n / (n - 1) * residuals) / x


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
