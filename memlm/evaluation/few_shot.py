"""Tasks of questions: how a prompt with solved examples before the question is made."""

import dataclasses
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar, TypeVar

from memlm.errors import DataError
from memlm.evaluation.evaluator import AnswerTooLong, Prompt
from memlm.evaluation.task import Task
from memlm.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class Question(ABC):
    """What is asked.

    Args:
        text: The question as it stands in the prompt, up to where the answer begins.
        subject: The group it is counted in.
    """

    text: str
    subject: str = dataclasses.field(default="all", kw_only=True)

    @property
    @abstractmethod
    def solution(self) -> str:
        """What follows the question in a solved example."""

    @property
    def asked(self) -> Sequence[str]:
        """The continuations whose likelihood is asked for."""
        return [self.solution]


Asked = TypeVar("Asked", bound=Question)


class QuestionTask(Task[Asked]):
    """A task whose prompts are solved examples (shots) and the question.

    Shots are drawn at random for every question, from ``shots_path`` or else from the task's own file, but
    never an example with the same text as the question, which would give the answer away. Drawn from the
    own file, they show the answers of other examples of the test: figures of different models can be
    compared, but a model is better asked with shots of another file.
    """

    description: ClassVar[str] = ""
    """What stands before the first shot."""

    between: ClassVar[str] = "\n\n"
    """What stands between a shot and what follows it."""

    @abstractmethod
    def read(self, path: str) -> list[Asked]: ...

    def group(self, example: Asked) -> str:
        return example.subject

    def load(self) -> None:
        super().load()
        for number, example in enumerate(self.examples):
            self._shots(number, example)

    def check(self, tokenizer: Tokenizer, context: int) -> None:
        tokenizer.encode(self.examples[0].text)  # one of a few words raises an error that shows the text
        for answer in (answer for example in self.examples for answer in example.asked):
            # A token stands for a byte or more: encoding all answers of a large task would take seconds.
            if len(answer.encode()) > context and (tokens := len(tokenizer.encode(answer))) > context:
                raise DataError(self.path, str(AnswerTooLong(answer, tokens, context)))

    def prompt(self, number: int, example: Asked) -> Prompt:
        """The prompt of an example with its number in the task."""
        shots = tuple(shot.text + shot.solution + self.between for shot in self._shots(number, example))
        return Prompt(example.text, shots, self.description_of(example))

    def description_of(self, example: Asked) -> str:
        """What stands before the first shot of an example."""
        return self.description

    def choose(self, number: int, candidates: Sequence[Asked], count: int) -> list[Asked]:
        """So many of the candidates for the shots of an example, in the order in which they are taken."""
        return self.draw(candidates, number, count)

    def _shots(self, number: int, example: Asked) -> list[Asked]:
        if not self.shots:
            return []
        pool, same = self._pool
        candidates, alike = pool[example.subject], same[example.subject, example.text]
        if len(candidates) - alike < self.shots:
            source = self.path if self.shots_path is None else self.shots_path
            of = "" if example.subject == "all" else f" of {example.subject}"
            self.fail(
                "shots",
                f"is {self.shots}, but {source} has only {len(candidates) - alike} examples{of} other than "
                f"the question {example.text[:40]!r}",
            )
        # As many more as might have to be left out, rather than a search through all for each question.
        chosen = self.choose(number, candidates, self.shots + alike)
        return [other for other in chosen if other.text != example.text][: self.shots]

    @cached_property
    def _pool(self) -> tuple[dict[str, list[Asked]], Counter[tuple[str, str]]]:
        """The examples that shots are drawn from, by subject, and how often each subject and text occur."""
        pool: dict[str, list[Asked]] = {example.subject: [] for example in self.examples}
        for example in self.read(self.path if self.shots_path is None else self.shots_path):
            pool.setdefault(example.subject, []).append(example)
        return pool, Counter((e.subject, e.text) for examples in pool.values() for e in examples)
