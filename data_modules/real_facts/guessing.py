"""How many facts can be told right without knowing them: what a recall figure must be compared with."""

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Answered(Protocol):
    """A fact, as far as guessing is concerned."""

    @property
    def field(self) -> str: ...
    @property
    def question(self) -> str: ...
    @property
    def answer(self) -> str: ...


def majority_guesses(trained: Sequence[Answered], asked: Sequence[Answered]) -> NDArray[np.bool_]:
    """Whether the most common answer among the trained facts of the same field is right, bool [asked]."""
    answers: dict[str, Counter[str]] = {}
    for fact in trained:
        answers.setdefault(fact.field, Counter())[fact.answer] += 1
    most_common = {field: count.most_common(1)[0][0] for field, count in answers.items()}
    return np.array([most_common.get(fact.field) == fact.answer for fact in asked], dtype=bool)


def nearest_guesses(trained: Sequence[Answered], asked: Sequence[Answered]) -> NDArray[np.bool_]:
    """Whether the answer of the most similar other trained question of the same field is right, bool [asked].

    Similarity is the Jaccard index of the sets of character trigrams, case ignored. It finds what a spelling
    gives away: a model may learn that too, without any fact.
    """
    known: dict[str, list[Answered]] = {}
    for fact in trained:
        known.setdefault(fact.field, []).append(fact)
    fields = {fact.field for fact in asked} & known.keys()
    indices = {field: _TrigramIndex([fact.question for fact in known[field]]) for field in fields}
    right = np.zeros(len(asked), dtype=bool)
    for i, fact in enumerate(asked):
        if fact.field in indices:
            nearest = indices[fact.field].nearest(fact.question)
            right[i] = nearest is not None and known[fact.field][nearest].answer == fact.answer
    return right


class _TrigramIndex:
    """Finds similar texts by the texts that hold each trigram."""

    def __init__(self, texts: list[str]) -> None:
        self.number = {text: i for i, text in enumerate(texts)}
        holders: dict[str, list[int]] = {}
        for i, text in enumerate(texts):
            for trigram in _trigrams(text):
                holders.setdefault(trigram, []).append(i)
        self.holders = {trigram: np.array(numbers) for trigram, numbers in holders.items()}
        self.sizes = np.array([len(_trigrams(text)) for text in texts])

    def nearest(self, text: str) -> int | None:
        """Number of the most similar other text (the first of several), None if none shares a trigram."""
        trigrams = _trigrams(text)
        found = [self.holders[trigram] for trigram in trigrams if trigram in self.holders]
        if not found:
            return None
        shared = np.bincount(np.concatenate(found), minlength=len(self.sizes))
        similarity = shared / (self.sizes + len(trigrams) - shared)
        if text in self.number:
            similarity[self.number[text]] = 0
        best = int(similarity.argmax())
        return best if similarity[best] > 0 else None


def _trigrams(text: str) -> set[str]:
    bounded = f"\x02{text.lower()}\x03"
    return {bounded[i : i + 3] for i in range(max(len(bounded) - 2, 1))}
