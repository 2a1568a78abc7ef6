import math
import random
import statistics

import pytest
import torch

from memlm.evaluation.estimates import Estimate, Estimates, Measure
from memlm.evaluation.intervals import t_quantile, wilson

SHARE, MEAN, RATIO = Measure("acc", "share"), Measure("f1"), Measure("loss", "ratio")
PERPLEXITY = Measure("perplexity", "ratio", exponential=True)


def samples(n, seed=0):
    draw = random.Random(seed)
    return [
        {
            "acc": float(draw.random() < 0.3),
            "f1": draw.random(),
            "loss": (nats := draw.uniform(1, 90), tokens := float(draw.randrange(1, 40))),
            "perplexity": (nats, tokens),
        }
        for _ in range(n)
    ]


def estimates(rows, groups=("all",), measures=(SHARE, MEAN, RATIO, PERPLEXITY)):
    made = Estimates(measures, groups)
    for number, row in enumerate(rows):
        made.update(row, groups[number % len(groups)])
    return made


def test_figures_against_statistics():
    rows = samples(37)
    figures = estimates(rows).compute().overall()
    right = sum(row["acc"] for row in rows)
    assert figures["acc"] == (pytest.approx(right / 37), *map(pytest.approx, wilson(right, 37)), 37)
    f1 = [row["f1"] for row in rows]
    half = t_quantile(36) * statistics.stdev(f1) / math.sqrt(37)
    mean = statistics.mean(f1)
    assert figures["f1"] == tuple(map(pytest.approx, (mean, mean - half, mean + half, 37)))
    nats, tokens = zip(*(row["loss"] for row in rows), strict=True)
    loss = sum(nats) / sum(tokens)
    assert figures["loss"].value == pytest.approx(loss)
    assert figures["perplexity"].value == pytest.approx(math.exp(loss))
    assert figures["perplexity"].high == pytest.approx(math.exp(figures["loss"].high))


def test_the_error_of_a_ratio_is_about_that_of_leaving_each_example_out():
    rows = samples(400, seed=5)
    loss = estimates(rows).compute().overall()["loss"]
    nats, tokens = zip(*(row["loss"] for row in rows), strict=True)
    without = [(sum(nats) - y) / (sum(tokens) - x) for y, x in zip(nats, tokens, strict=True)]
    middle = statistics.mean(without)
    jackknife = math.sqrt(399 / 400 * sum((value - middle) ** 2 for value in without))
    assert (loss.high - loss.low) / 2 == pytest.approx(t_quantile(399) * jackknife, rel=0.02)


def test_groups_and_their_average():
    rows = [row | {"acc": float(number % 3 == 0)} for number, row in enumerate(samples(40))]
    figures = estimates(rows, ("a", "b", "c", "none")[:3]).compute()
    by_group = figures.by_group()
    assert {name: by_group[name]["acc"].value for name in by_group} == {"a": 1.0, "b": 0.0, "c": 0.0}
    macro = figures.macro("f1")
    parts = [[row["f1"] for row in rows[k::3]] for k in range(3)]
    assert macro.value == pytest.approx(statistics.mean(map(statistics.mean, parts)))
    error = math.sqrt(sum(statistics.variance(part) / len(part) for part in parts)) / 3
    assert macro.high - macro.value == pytest.approx(t_quantile(39) * error)
    assert macro.n == 40


def test_one_example_has_no_interval_and_none_no_figure():
    figures = estimates(samples(1)).compute().overall()
    assert figures["f1"][1:] == figures["loss"][1:] == (None, None, 1)
    assert figures["acc"].low is not None
    assert estimates([]).compute().overall() == {}
    assert estimates(samples(2), ("a", "b")).compute().macro("f1").low is None


def test_a_measure_left_out_does_not_count_the_example():
    rows = [{"f1": 0.25}, {"acc": 1.0}, {"f1": 0.75, "acc": 1.0}]
    figures = estimates(rows).compute().overall()
    assert (figures["f1"].value, figures["f1"].n, figures["acc"].n) == (0.5, 2, 2)
    assert set(figures) == {"f1", "acc"}
    with pytest.raises(ValueError, match=r"no such measure: bleu"):
        estimates([{"bleu": 1.0}])


def test_parts_add_up_to_the_whole():
    rows = samples(21)
    whole, parts = estimates(rows), [estimates(rows[k::2]) for k in range(2)]
    whole.moments, total = sum(part.moments for part in parts), whole.compute().overall()
    whole._computed = None
    assert whole.compute().overall() == {key: tuple(map(pytest.approx, total[key])) for key in total}


def test_an_overflowing_perplexity_is_infinite():
    figures = estimates([{"perplexity": (900.0, 1.0)}, {"perplexity": (1000.0, 1.0)}]).compute().overall()
    assert figures["perplexity"].value == math.inf


def test_an_estimate_is_of_plain_numbers():
    estimate = estimates(samples(3)).compute().overall()["f1"]
    assert isinstance(estimate, Estimate) and not any(isinstance(part, torch.Tensor) for part in estimate)
