"""Made-up biographies that measure how many facts a model has memorised, and nothing else.

Every person has a name of made-up words and several attributes, each with a value drawn uniformly at random,
so no fact can be guessed from another. A training document is one person's biography: one clause for each
attribute, in random order and each in a random phrasing, drawn afresh in every epoch::

    <|eos|> Kovali Rumedo Tisabe comes from Tasifu , reports to Benolu , studied at Mevaru , became Dokira .

For each fact some phrasings are held out: never trained for this fact, though other people's facts use them.
A prompt is a name and a phrasing, as if the biography began with it, and the answer is one word, the value:

- ``recall`` (group 0): trained facts in a held-out phrasing. It can only be right if the fact itself was
  stored, as this phrase never followed this name.
- ``recall_seen_phrasing`` (group 1): the same facts in a trained phrasing; the excess over ``recall`` was
  memorised as strings.
- ``recall_control`` (group 2): facts about people who are never trained. Their names are made of the words
  in other people's names and their values come from the same lists, so anything above chance would be a
  fault of the measurement.

Chance level is 1 / ``values``; answering each attribute with its most common value gets ``recall_majority``
(0.013 with 5,000 people and 100 values).

``val/loss`` is over the prompts and answers of group 0. With ``loss_on: all`` it includes the words of the
name, which cannot be predicted and dominate it; with ``loss_on: answers`` it is the loss of the value alone.
"""

import hashlib
import json
from typing import Literal

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from data_modules.base import BatchSource, LanguageDataModule
from data_modules.exposures import Exposures
from data_modules.made_up_facts.biographies import Biographies, Prompts
from data_modules.made_up_facts.facts import Facts
from data_modules.packing import Packing
from memlm.errors import ConfigError


class SyntheticFacts(LanguageDataModule):
    """Biographies of made-up people, to measure how many facts a model memorises.

    The tokenizer has one token for each word and is built with the data; nothing is read or downloaded.
    Evaluation batches hold about as many tokens as training batches.

    Args:
        people: People whose facts are trained.
        attributes: Facts about each person, 1 to 8: birthplace, employer, profession, university, language,
            instrument, dish, dog.
        values: Values an attribute can take; chance level of recall is 1 / values.
        phrasings: Phrasings of each attribute, 2 to 5.
        held_out_phrasings: Phrasings of each fact that are never trained for it, 1 to phrasings - 1.
        control: People whose facts are never trained, in any phrasing.
        name_words: Words (tokens) of a name, 2 or 3.
        name_vocabulary: Different words at each position of a name.
        exposures_per_epoch: How often a person's biography occurs in an epoch. With several numbers people
            take them in turn, for instance [1, 2, 4] to see how recall depends on exposures: it is then also
            measured by them (``recall_4x``).
        sequence_length: Tokens in a training row. By default the longest biography.
        batch_size: Sequences per step on each device.
        packing: 'documents' puts one biography in each row and pads it, 'concatenate' cuts the stream of all
            biographies into rows without padding.
        loss_on: 'all' trains on every token, 'answers' on the values only.
        confine_attention: Whether attention is confined to the documents of a row.
        evaluation_facts: Facts in each group that validation looks at; a fixed random choice.
        test_facts: The same for test and predict. By default all.
        seed: Chooses names, values, held-out phrasings and the order of training.

    Raises:
        ConfigError: A number is out of range, or ``sequence_length`` is too short for a biography.
    """

    def __init__(
        self,
        people: int = 5000,
        attributes: int = 4,
        values: int = 100,
        phrasings: int = 4,
        held_out_phrasings: int = 1,
        control: int = 250,
        name_words: int = 3,
        name_vocabulary: int = 200,
        exposures_per_epoch: list[int] = [1],  # noqa: B006 (a tuple would read worse in a YAML)
        sequence_length: int | None = None,
        batch_size: int = 128,
        packing: Packing = "documents",
        loss_on: Literal["all", "answers"] = "all",
        confine_attention: bool = False,
        evaluation_facts: int = 1000,
        test_facts: int | None = None,
        seed: int = 0,
    ) -> None:
        if not exposures_per_epoch or min(exposures_per_epoch) < 1:
            raise ConfigError(
                "data.exposures_per_epoch", f"is {exposures_per_epoch}; expected numbers of at least 1"
            )
        for key, count in {"evaluation_facts": evaluation_facts, "test_facts": test_facts}.items():
            if count is not None and count < 1:
                raise ConfigError(f"data.{key}", f"is {count}; expected at least 1")
        self.facts = Facts(
            people,
            control,
            attributes,
            values,
            phrasings,
            held_out_phrasings,
            name_words,
            name_vocabulary,
            seed,
        )
        self.exposures_per_epoch = list(exposures_per_epoch)
        self.packing, self.loss_on, self.confine_attention = packing, loss_on, confine_attention
        self.evaluation_facts, self.test_facts = evaluation_facts, test_facts
        longest = self.facts.document_length(np.max)
        if sequence_length is None:
            sequence_length = longest
        if packing == "documents" and sequence_length < longest:
            raise ConfigError(
                "data.sequence_length",
                f"is {sequence_length}; the longest biography needs {longest} tokens (or set data.packing to "
                "concatenate)",
            )
        super().__init__(self.facts.tokenizer, sequence_length, batch_size)

    def start(self) -> int:
        return 0

    def fingerprint(self) -> str:
        facts = self.facts
        meaning = [facts.people, facts.control, facts.attributes, facts.values, facts.phrasings]
        meaning += [facts.held_out_phrasings, facts.name_words, facts.name_vocabulary, facts.seed]
        return hashlib.sha256(
            json.dumps([meaning, self.exposures_per_epoch, self.packing]).encode()
        ).hexdigest()

    @property
    def chance(self) -> float:
        """Recall of guessing: 1 / values."""
        return 1 / self.facts.values

    @property
    def majority_baseline(self) -> float:
        """Recall of answering each attribute with its most common value."""
        return self.facts.majority_baseline

    @property
    def exposure_levels(self) -> tuple[int, ...]:
        return Exposures(self.exposures_per_epoch).levels

    def baselines(self, test: bool) -> dict[str, float]:
        return {"recall_majority": self.majority_baseline}

    def exposures(self, steps: int) -> list[float]:
        """How often a fact is trained within that many steps, for each entry of ``exposures_per_epoch``.

        An expectation with packing ``concatenate``, where a row holds no whole number of documents.
        """
        source = self.training_source()
        rows = steps * self.batch_size * self.world[0]
        mean_length = 1 + self.facts.name_words + float((self.facts.clause_lengths + 1).mean(axis=1).sum())
        documents = rows if self.packing == "documents" else rows * self.sequence_length / mean_length
        return [documents / len(source.occurrences) * times for times in self.exposures_per_epoch]

    def setup(self, stage: str) -> None:
        """Report what there is to learn and how often it will be seen."""
        if stage != "fit":
            return
        facts = self.facts
        steps = self.trainer.max_steps if self.trainer else -1
        seen = ""
        if steps > 0:
            times = " / ".join(f"{count:.1f}" for count in self.exposures(steps))
            seen = f"{times} exposures of each by step {steps:,}; "
        rank_zero_info(
            f"SyntheticFacts: {facts.people * facts.attributes:,} trained facts ({facts.people:,} people x "
            f"{facts.attributes}), {facts.control * facts.attributes:,} control facts; {seen}recall by "
            f"chance {self.chance:.3f}, by the most common value {self.majority_baseline:.3f}"
        )

    def training_source(self) -> Biographies:
        people = np.arange(self.facts.people)
        times = Exposures(self.exposures_per_epoch).of(people)
        return Biographies(
            self.facts,
            np.repeat(people, times),
            self.sequence_length,
            self.batch_size,
            self.packing,
            self.loss_on == "answers",
            self.confine_attention,
        )

    def evaluation_sources(self, test: bool) -> dict[str, BatchSource]:
        length = self.facts.name_words + int(self.facts.clause_lengths.max())
        prompts = Prompts(
            self.facts,
            self.test_facts if test else self.evaluation_facts,
            length,
            self.batch_size * max(1, self.sequence_length // length),
            self.loss_on == "answers",
            self.confine_attention,
            Exposures(self.exposures_per_epoch),
        )
        return {"all": prompts}
