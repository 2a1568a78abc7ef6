"""Whether a written answer is right: exact match and F1 as SQuAD defines them."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """Lower case, without (ASCII) punctuation, the articles a, an and the, and superfluous white space.

    Source: Rajpurkar et al. (2016), SQuAD, section 6.1, and its evaluation script.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answer: str) -> float:
    """1 if the two are the same once normalised, else 0."""
    return float(normalize(prediction) == normalize(answer))


def f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall of the words of the prediction, each counted as often as it is.

    Two texts without a word once normalised are the same, hence 1.
    """
    found, expected = normalize(prediction).split(), normalize(answer).split()
    if not found or not expected:
        return float(found == expected)
    common = (Counter(found) & Counter(expected)).total()
    return 2 * common / (len(found) + len(expected))


def best(metric: Callable[[str, str], float], prediction: str, answers: Sequence[str]) -> float:
    """A metric's value for that of several right answers which it is highest for."""
    return max(metric(prediction, answer) for answer in answers)
