"""Facts as sentences of tokens: which are trained, in which phrasings, and where their answers lie."""

import hashlib
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from data_modules.real_facts.fact_sources import Fact
from memlm.errors import ConfigError
from memlm.tokenizers import Tokenizer

CHUNK = 4096
"""Sentences tokenized at a time."""


@dataclass
class StatedFacts:
    """Facts in a random order that depends on what they say alone, the trained ones before the control.

    A *statement* is a fact in one of its phrasings, as a document: ``eos``, the sentence, a full stop. Its
    answer is what comes after the tokens that it has in common with its prompt alone: where one token holds
    the end of the prompt and the beginning of the answer, that token is a part of the answer. So is the full
    stop, without which "San Jose" would count as knowing "San".

    n facts, S statements, N tokens of all of them.

    Args:
        all_facts: All facts there are; different ones.
        tokenizer: Makes tokens of sentences.
        limit: How many facts to take, None for all. Those of a smaller limit are among those of a larger one.
        control: Share of them, 0 <= control < 1, that is never trained, and at least one if above 0.
        held_out_phrasings: Phrasings of a fact that are never trained for it. One is always trained.
        seed: Chooses the facts, the control and the phrasings that are held out.

    Attributes:
        facts: The facts that were taken; the first ``trained`` of them are trained.
        trained: Number of trained facts.
        first: A fact's first statement; its statements follow one another, int64 [n + 1].
        trained_phrasings: How many of a fact's statements, from the first on, are trained, int64 [n]. (A fact
            of the control has them too, but they are not.)
        tokens: Tokens of all statements, int32 [N].
        is_answer: Which of them belong to answers, bool [N].
        starts: Where each statement starts in them, int64 [S + 1].
    """

    all_facts: list[Fact]
    tokenizer: Tokenizer
    limit: int | None
    control: float
    held_out_phrasings: int
    seed: int
    facts: list[Fact] = field(init=False)

    def __post_init__(self) -> None:
        self.facts = sorted(self.all_facts, key=lambda fact: self._hash(fact.field, fact.question))
        self.facts = self.facts[: self.limit]
        self.trained = len(self.facts) - min(
            int(np.ceil(self.control * len(self.facts))), len(self.facts) - 1
        )
        counts = np.array([len(fact.phrasings) for fact in self.facts], dtype=np.int64)
        self.first = np.concatenate([[0], np.cumsum(counts)])
        self.trained_phrasings = np.maximum(counts - self.held_out_phrasings, 1)
        statements = [(fact, phrasing) for fact in self.facts for phrasing in self._shuffled(fact)]
        tokens, is_answer = [], []
        for begin in range(0, len(statements), CHUNK):
            for sentence, start in self._tokenize(statements[begin : begin + CHUNK]):
                tokens.append(sentence)
                is_answer.append(np.arange(len(sentence)) >= start)
        self.starts = np.concatenate([[0], np.cumsum([len(sentence) for sentence in tokens])])
        self.tokens, self.is_answer = np.concatenate(tokens), np.concatenate(is_answer)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each statement, int64 [S]."""
        return np.diff(self.starts)

    @property
    def has_held_out(self) -> NDArray[np.bool_]:
        """Which facts have a phrasing that is held out, bool [n]."""
        return np.diff(self.first) > self.trained_phrasings

    def fact_of(self, statement: int) -> Fact:
        """The fact that a statement states."""
        return self.facts[int(np.searchsorted(self.first, statement, side="right")) - 1]

    def fingerprint(self) -> str:
        """Names the statements, their order and which are trained."""
        digest = hashlib.sha256(f"{self.trained} {self.held_out_phrasings} {self.seed}".encode())
        for fact in self.facts:
            digest.update(repr((fact.field, fact.question, fact.answer, fact.phrasings)).encode())
        return digest.hexdigest()

    def _tokenize(self, statements: list[tuple[Fact, str]]) -> list[tuple[NDArray[np.int32], int]]:
        """Each statement's document and the place of its answer's first token."""
        prompts = [fact.prompt(phrasing) for fact, phrasing in statements]
        sentences = [
            f"{prompt} {fact.answer}." for prompt, (fact, _) in zip(prompts, statements, strict=True)
        ]
        result = []
        encoded = zip(
            self.tokenizer.encode_batch(prompts), self.tokenizer.encode_batch(sentences), strict=True
        )
        for i, (prompt, sentence) in enumerate(encoded):
            common = min(len(prompt), len(sentence))
            differs = np.asarray(prompt[:common]) != np.asarray(sentence[:common])
            start = int(differs.argmax()) if differs.any() else common
            if start == len(sentence):
                raise ConfigError("data.tokenizer", f"makes no tokens of the answer in {sentences[i]!r}")
            result.append((np.array([self.tokenizer.eos_id, *sentence], np.int32), 1 + start))
        return result

    def _shuffled(self, fact: Fact) -> list[str]:
        return sorted(fact.phrasings, key=lambda phrasing: self._hash(fact.field, fact.question, phrasing))

    def _hash(self, *texts: str) -> bytes:
        return hashlib.blake2b("\0".join([str(self.seed), *texts]).encode(), digest_size=8).digest()
