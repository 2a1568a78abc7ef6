"""A world of made-up people: names, attributes, the clauses that state them, and who is never mentioned."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_modules.hashed_random import draw, hashed
from memlm.errors import ConfigError
from memlm.tokenizers import word_tokenizer

PHRASINGS = {
    "birthplace": ("comes from", "hails from", "left", "calls home", "misses"),
    "employer": ("works for", "joined", "reports to", "serves", "leads"),
    "profession": ("works as", "trained as", "became", "practises as", "retired as"),
    "university": ("studied at", "attended", "graduated from", "taught at", "enrolled at"),
    "language": ("speaks", "talks in", "writes in", "thinks in", "dreams in"),
    "instrument": ("plays", "performs on", "mastered", "owns", "practises"),
    "dish": ("eats", "cooks", "orders", "loves", "dines on"),
    "dog": ("walks", "feeds", "brushes", "trains", "pets"),
}
"""Phrasings of each attribute: what stands between the person's name and the value."""

NOTHING = -1
"""Marks the unused end of a clause."""
_VALUE = -2

_SYLLABLES = [consonant + vowel for consonant in "bdfgjklmnprstvz" for vowel in "aeiou"]
WORDS = len(_SYLLABLES) ** 3
"""Number of made-up words there are."""


def made_up_word(number: int) -> str:
    """The number-th made-up word, of three syllables with a capital; all are different."""
    n, base = number * 156_253 % WORDS, len(_SYLLABLES)  # coprime to WORDS: neighbours look unalike
    return (_SYLLABLES[n % base] + _SYLLABLES[n // base % base] + _SYLLABLES[n // base**2]).capitalize()


@dataclass
class Facts:
    """Who there is, and what is true of them.

    People 0 .. people - 1 are trained, the ``control`` people after them never. The words are the same for
    every seed, so the vocabulary depends only on the sizes. n = people + control, A = attributes,
    P = phrasings, W = name_words.

    Args:
        people: People whose biographies are trained.
        control: People who are never mentioned in training.
        attributes: Attributes of each person.
        values: Values an attribute can take.
        phrasings: Phrasings of each attribute.
        held_out_phrasings: Phrasings of each fact that are never trained for it.
        name_words: Words of a name.
        name_vocabulary: Different words at each position of a name.
        seed: Chooses names, values and held-out phrasings.

    Attributes:
        names: Token ids of the name words, int32 [n, W].
        values_of: Token ids of the values, int32 [n, A].
        held_out: Numbers of the phrasings held out for a fact, int8 [n, A, held_out_phrasings].
        trained: Numbers of the phrasings trained for a fact, int8 [n, A, P - held_out_phrasings].
        clause_lengths: Tokens of a clause, phrasing and value, int64 [A, P].
        comma: Token id of the comma after a clause.
        stop: Token id of the full stop after the last one.
    """

    people: int
    control: int
    attributes: int
    values: int
    phrasings: int
    held_out_phrasings: int
    name_words: int
    name_vocabulary: int
    seed: int

    def __post_init__(self) -> None:
        self._check()
        rows = [row[: self.phrasings] for row in list(PHRASINGS.values())[: self.attributes]]
        english = sorted({word for row in rows for phrasing in row for word in phrasing.split()} | {",", "."})
        made_up = [made_up_word(i) for i in range(self._made_up_words())]
        self.tokenizer = word_tokenizer(english + made_up, "vocabulary of SyntheticFacts")
        self._first_name = len(english)
        self.first_value = self._first_name + self.name_words * self.name_vocabulary
        self.comma, self.stop = english.index(","), english.index(".")

        ids = [[[*map(english.index, phrasing.split()), _VALUE] for phrasing in row] for row in rows]
        self.clause_lengths = np.array([[len(clause) for clause in row] for row in ids])
        self._templates = np.full((*self.clause_lengths.shape, self.clause_lengths.max()), NOTHING, np.int32)
        for a, row in enumerate(ids):
            for p, clause in enumerate(row):
                self._templates[a, p, : len(clause)] = clause

        self.names = self._make_names()
        person, attribute = np.arange(len(self.names))[:, None], np.arange(self.attributes)
        chosen = draw(self.values, self.seed, 1, person, attribute)
        self.values_of = (self.first_value + attribute * self.values + chosen).astype(np.int32)
        order = hashed(self.seed, 2, person[..., None], attribute[:, None], np.arange(self.phrasings))
        ranked = np.argsort(order, axis=-1).astype(np.int8)
        self.held_out = ranked[..., : self.held_out_phrasings]
        self.trained = ranked[..., self.held_out_phrasings :]

    def clauses(self, person: NDArray, attribute: NDArray, phrasing: NDArray) -> NDArray[np.int32]:
        """Token ids of phrasing and value, int32 [..., L], filled up with `NOTHING`; arguments [...]."""
        tokens = self._templates[attribute, phrasing]
        return np.where(tokens == _VALUE, self.values_of[person, attribute][..., None], tokens)

    def document_length(self, over_phrasings: Callable[..., NDArray]) -> int:
        """Tokens of a biography whose clauses are the longest (np.max) or shortest (np.min) there are."""
        clauses = over_phrasings(self.clause_lengths, axis=1) + 1  # and the comma
        return 1 + self.name_words + int(clauses.sum())

    def is_value(self, tokens: NDArray) -> NDArray[np.bool_]:
        """Which tokens are the values of attributes."""
        return (tokens >= self.first_value) & (tokens != self.tokenizer.eos_id)

    @property
    def majority_baseline(self) -> float:
        """Recall of who answers each attribute with its most common value among the trained people."""
        counts = [np.unique(column, return_counts=True)[1] for column in self.values_of[: self.people].T]
        return float(np.mean([count.max() for count in counts]) / self.people)

    def _make_names(self) -> NDArray[np.int32]:
        """Distinct names; those of the control are made of words that trained people have in theirs."""
        numbers = self._distinct(self.people, self.name_vocabulary**self.name_words, 3)
        scale = self.name_vocabulary ** np.arange(self.name_words)
        trained = numbers[:, None] // scale % self.name_vocabulary
        used = [np.unique(column) for column in trained.T]
        control, attempt = np.empty((0, self.name_words), dtype=np.int64), 0
        if self.control and np.prod([len(words) for words in used]) < self.people + 2 * self.control:
            raise ConfigError(
                "data.control",
                f"{self.control} more names cannot be made of the words in {self.people} names",
            )
        while len(control) < self.control:
            columns = [
                words[draw(len(words), self.seed, 4, attempt, j, np.arange(64 + 2 * self.control))]
                for j, words in enumerate(used)
            ]
            fresh = np.unique(np.concatenate([control, np.stack(columns, axis=1)]), axis=0)
            fresh = fresh[~np.isin(fresh @ scale, numbers)]
            control = fresh[np.argsort(hashed(self.seed, 5, fresh @ scale))][: self.control]
            attempt += 1
        offsets = self._first_name + self.name_vocabulary * np.arange(self.name_words)
        return (np.concatenate([trained, control]) + offsets).astype(np.int32)

    def _distinct(self, count: int, limit: int, tag: int) -> NDArray[np.int64]:
        """``count`` distinct numbers below ``limit`` in random order."""
        drawn = draw(limit, self.seed, tag, np.arange(64 + 4 * count))
        _, first = np.unique(drawn, return_index=True)  # at most half are taken: four draws each are ample
        return drawn[np.sort(first)][:count]

    def _made_up_words(self) -> int:
        return self.name_words * self.name_vocabulary + self.attributes * self.values

    def _check(self) -> None:
        limits = {
            "people": (1, None),
            "control": (0, None),
            "attributes": (1, len(PHRASINGS)),
            "values": (2, None),
            "phrasings": (2, min(len(row) for row in PHRASINGS.values())),
            "held_out_phrasings": (1, self.phrasings - 1),
            "name_words": (2, 3),
            "name_vocabulary": (2, None),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value < low or (high is not None and value > high):
                expected = f"at least {low}" if high is None else f"{low} to {high}"
                raise ConfigError(f"data.{name}", f"is {value}; expected {expected}")
        if 2 * (self.people + self.control) > (names := self.name_vocabulary**self.name_words):
            raise ConfigError(
                "data.name_vocabulary",
                f"{self.name_vocabulary} makes only {names} names of {self.name_words} words; expected at "
                f"least twice as many as there are people ({self.people} and {self.control} of the control)",
            )
        if self._made_up_words() > WORDS:
            raise ConfigError(
                "data.values",
                f"name words and values are {self._made_up_words()}; at most {WORDS} words exist",
            )
