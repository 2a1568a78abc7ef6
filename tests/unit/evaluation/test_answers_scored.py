import random

import pytest
from torchmetrics.functional.text import squad

from memlm.evaluation.answers import best, exact_match, f1, normalize

PARTS = [
    "The",
    "a",
    "an",
    "anthem",
    "Paris",
    "paris,",
    "U.S.",
    "(1990)",
    " \t",
    "\u2019",
    "Über",
    "theory",
    "-",
    "1,000",
]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Quick, brown fox!", "quick brown fox"),
        ("An apple a day", "apple day"),
        ("U.S.A.", "usa"),
        ("", ""),
        ("the", ""),
        ("theory of an anthem", "theory of anthem"),
    ],
)
def test_normalisation(text, expected):
    assert normalize(text) == expected


def test_f1_counts_words_as_often_as_they_occur():
    assert f1("new york new york", "new york") == pytest.approx(2 * 0.5 * 1 / 1.5)
    assert f1("rome", "paris") == 0
    assert f1("the", "a") == 1
    assert f1("", "paris") == 0
    assert best(f1, "king George", ["George VI", "King George VI", "Albert"]) == pytest.approx(0.8)
    assert best(exact_match, "the King", ["George", "king!"]) == 1


def test_against_the_squad_metric_of_torchmetrics():
    draw = random.Random(0)
    for number in range(500):
        prediction, *answers = (" ".join(draw.choices(PARTS, k=draw.randrange(5))) for _ in range(4))
        expected = squad(
            [{"prediction_text": prediction, "id": str(number)}],
            [{"answers": {"answer_start": [0] * 3, "text": answers}, "id": str(number)}],
        )
        assert 100 * best(exact_match, prediction, answers) == float(expected["exact_match"])
        assert 100 * best(f1, prediction, answers) == pytest.approx(float(expected["f1"]), abs=1e-3)
