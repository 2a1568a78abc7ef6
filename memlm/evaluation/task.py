"""The base of all tasks: reading the examples, sharing them among processes, summing up the figures."""

import random
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, NoReturn, TypeVar

from memlm.errors import ConfigError, DataError
from memlm.evaluation.estimates import Estimate, Estimates, Figures, Measure
from memlm.evaluation.evaluator import AnswerTooLong, Evaluator, Reply
from memlm.tokenizers import Tokenizer

Example = TypeVar("Example")


@dataclass(frozen=True)
class Outcome:
    """What came of one example.

    Args:
        values: Of each measure; of a ratio numerator and denominator.
        record: What ``records`` shows of the example, as JSON.
        replies: What the model was asked, for the count of shots dropped and prompts cut.
    """

    values: Mapping[str, float | tuple[float, float]]
    record: Mapping[str, Any]
    replies: Sequence[Reply] = ()


@dataclass(frozen=True)
class TaskResult:
    """The figures of a task, the same in all processes.

    Args:
        name: The task's name.
        metrics: Figures with their confidence intervals.
        examples: Number of examples.
        seconds: Wall time.
        groups: The figures of each group of examples, where there are several.
        notes: What else is to be known, such as how many examples had shots dropped; nothing that is 0.
        records: One for each example, if asked for.
    """

    name: str
    metrics: dict[str, Estimate]
    examples: int
    seconds: float
    groups: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)


class Task(ABC, Generic[Example]):
    """A set of examples in a local file, and how a model is measured on them.

    A subclass gives ``measures``, reads its examples in `read` and evaluates some of them in `evaluate`.

    Args:
        path: The file of the examples.
        name: The task's name in tables and files; by default that of the class in lower case.
        shots: Solved examples in every prompt.
        shots_path: File that they are drawn from; by default the file of the examples, without the example
            that is asked itself.
        limit: Evaluate the first so many examples only.
        seed: Draws the shots, of each example others.

    Raises:
        ConfigError: A number is out of range.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        shots: int = 0,
        shots_path: str | None = None,
        limit: int | None = None,
        seed: int = 0,
    ) -> None:
        self.path = path
        self.name = type(self).__name__.lower() if name is None else name
        if not self.name or not all(c.isalnum() or c in "_-." for c in self.name) or self.name[0] == ".":
            self.fail("name", f"is {name!r}; expected letters, digits, '_', '-' and '.', as it names a file")
        self.shots, self.shots_path = shots, shots_path
        self.limit, self.seed = limit, seed
        self.check_least("shots", shots, 0)
        if limit is not None:
            self.check_least("limit", limit, 1)

    @property
    @abstractmethod
    def measures(self) -> Sequence[Measure]:
        """What is measured of an example."""

    @abstractmethod
    def read(self, path: str) -> list[Example]:
        """The examples of a file (the task's own, or the one that shots are drawn from).

        Raises:
            DataError: The file is missing or malformed, naming the line and the field.
        """

    @abstractmethod
    def evaluate(self, evaluator: Evaluator, examples: Sequence[tuple[int, Example]]) -> list[Outcome]:
        """What comes of some of the examples, each with its number in the task; one outcome for each."""

    def group(self, example: Example) -> str:
        """The group that an example is counted in; figures are given of each group, and over all examples."""
        return "all"

    def summary(self, figures: Figures) -> dict[str, Estimate]:
        """Which figures to report; by default those over all examples."""
        return figures.overall()

    @cached_property
    def examples(self) -> list[Example]:
        """The examples of the task, at most ``limit``.

        Raises:
            DataError: The file is missing, malformed or has no examples.
        """
        return self.read(self.path)[: self.limit]

    def load(self) -> None:
        """Read all files, so that what is wrong with them is known before a model is asked.

        Raises:
            ConfigError: There are fewer examples to draw shots from than ``shots``.
            DataError: A file is missing or malformed.
        """
        _ = self.examples

    def check(self, tokenizer: Tokenizer, context: int) -> None:
        """Check options and examples against what the model can take, before it is asked; by default nothing.

        Args:
            tokenizer: The model's.
            context: Most tokens that it can look at.

        Raises:
            ConfigError: An option does not go with the context.
            DataError: An example does not fit into it, or the tokenizer cannot encode it.
        """

    def run(self, evaluator: Evaluator, records: bool = False) -> TaskResult:
        """Evaluate the task; every process calls it and evaluates its share.

        Args:
            evaluator: The model.
            records: Whether the result holds a record of every example.

        Raises:
            ConfigError: An option does not go with the model's context.
            DataError: A file is malformed, or an answer is longer than the context.
        """
        start = time.perf_counter()
        self.load()
        self.check(evaluator.tokenizer, evaluator.context)
        groups = [self.group(example) for example in self.examples]
        numbers = evaluator.share(range(len(self.examples)))
        try:
            with evaluator.apart():
                outcomes = self.evaluate(evaluator, [(number, self.examples[number]) for number in numbers])
        except AnswerTooLong as error:
            raise DataError(self.path, str(error)) from None
        assert len(outcomes) == len(numbers)
        estimates = Estimates(self.measures, list(dict.fromkeys(groups))).to(evaluator.device)
        estimates.update({}, groups[0])  # adds nothing; a process without a share need not be warned of
        for number, outcome in zip(numbers, outcomes, strict=True):
            estimates.update(outcome.values, groups[number])
        figures = estimates.compute()
        told = evaluator.gather([_told(outcome, records) for outcome in outcomes])
        totals = {key: sum(notes[key] for notes, _ in told) for key in _NOTES}
        return TaskResult(
            name=self.name,
            metrics=self.summary(figures),
            examples=len(self.examples),
            seconds=time.perf_counter() - start,
            groups=figures.by_group() if len(figures.groups) > 1 else {},
            notes={key: total for key, total in totals.items() if total},
            records=[{"index": i, **record} for i, (_, record) in enumerate(told)] if records else [],
        )

    # -- for subclasses

    def draw(self, candidates: Sequence[Example], number: int, count: int) -> list[Example]:
        """So many of the candidates, at random; the choice depends on the seed and the number alone."""
        return random.Random(f"{self.seed}:{number}").sample(candidates, count)

    def fail(self, option: str, message: str) -> NoReturn:
        """Raises the ConfigError of an option of this task."""
        raise ConfigError(f"{type(self).__name__}.{option}", message)

    def check_least(self, option: str, value: float, least: float) -> None:
        """Raises a ConfigError if the value of an option is too small."""
        if value < least:
            self.fail(option, f"is {value}; expected at least {least}")


_NOTES = ("examples_with_dropped_shots", "dropped_shots", "cut_prompts")


def _told(outcome: Outcome, records: bool) -> tuple[dict[str, int], Mapping[str, Any]]:
    dropped = max((reply.dropped_shots for reply in outcome.replies), default=0)
    cut = any(reply.cut for reply in outcome.replies)
    notes = dict(zip(_NOTES, (int(dropped > 0), dropped, int(cut)), strict=True))
    return notes, outcome.record if records else {}
