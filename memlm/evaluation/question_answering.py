"""Open-domain questions, answered from what the model knows: NQ-open, TriviaQA, HotpotQA."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from memlm.evaluation.answers import best, exact_match, f1
from memlm.evaluation.estimates import Measure
from memlm.evaluation.evaluator import Evaluator
from memlm.evaluation.few_shot import Question, QuestionTask
from memlm.evaluation.rows import Row, read_rows
from memlm.evaluation.task import Outcome
from memlm.tokenizers import Tokenizer


@dataclass(frozen=True)
class AnsweredQuestion(Question):
    """A question with its right answers, the canonical one first.

    Args:
        answers: The answers, all of which count as right; at least one.
    """

    answers: tuple[str, ...]

    @property
    def solution(self) -> str:
        return f" {self.answers[0]}"


class QuestionAnswering(QuestionTask[AnsweredQuestion]):
    """Questions whose answers the model writes.

    - ``exact_match``: share of the written answers that equal a right one, both normalised as by SQuAD;
    - ``f1``: overlap in words with the right answer that it is largest with, mean over the questions;
    - ``answer_nll``: negative log-likelihood (nats) of the canonical answer, the first of several, mean over
      the questions.

    The prompt gives the questions no passage to read. Answers are written greedily and end at ``stop``.

    Args:
        path: The file of the questions.
        name: The task's name in tables and files; by default that of the class in lower case.
        shots: Solved examples in every prompt.
        shots_path: File that they are drawn from; by default the file of the questions, without the question
            that is asked itself.
        limit: Ask the first so many questions only.
        seed: Draws the shots, of each question others.
        max_new_tokens: Most tokens of an answer.
        stop: Texts at which an answer ends; [] for the end of the document alone.
    """

    measures = (Measure("exact_match", "share"), Measure("f1"), Measure("answer_nll"))
    form: ClassVar[str] = "Question: {}\nAnswer:"
    """How a question is asked."""

    def __init__(
        self,
        path: str,
        name: str | None = None,
        shots: int = 5,
        shots_path: str | None = None,
        limit: int | None = None,
        seed: int = 0,
        max_new_tokens: int = 32,
        stop: list[str] = ["\n"],  # noqa: B006 (a tuple would read worse in a YAML)
    ) -> None:
        super().__init__(path, name, shots, shots_path, limit, seed)
        self.max_new_tokens, self.stop = max_new_tokens, list(stop)
        self.check_least("max_new_tokens", max_new_tokens, 1)
        if "" in stop:
            self.fail("stop", "holds an empty text, at which everything would end")

    @abstractmethod
    def answered(self, row: Row) -> tuple[str, list[str]]:
        """A row's question and its right answers."""

    def read(self, path: str) -> list[AnsweredQuestion]:
        examples = []
        for row in read_rows(path, "Data"):
            question, answers = self.answered(row)
            question = question.strip()
            question += "" if question.endswith("?") else "?"
            stripped = tuple(dict.fromkeys(answer.strip() for answer in answers))
            examples.append(AnsweredQuestion(self.form.format(question), stripped))
        return examples

    def evaluate(
        self, evaluator: Evaluator, examples: Sequence[tuple[int, AnsweredQuestion]]
    ) -> list[Outcome]:
        prompts = [self.prompt(number, example) for number, example in examples]
        written = evaluator.generate(prompts, self.max_new_tokens, self.stop)
        asked = [example.asked for _, example in examples]
        scored = evaluator.log_likelihoods(list(zip(prompts, asked, strict=True)))
        outcomes = []
        for (_, example), reply, scores in zip(examples, written, scored, strict=True):
            prediction = reply.texts[0].strip()
            values = {
                "exact_match": best(exact_match, prediction, example.answers),
                "f1": best(f1, prediction, example.answers),
                "answer_nll": -scores.scores[0].log_likelihood,
            }
            record = {"prompt": reply.prompt, "answers": list(example.answers), "prediction": prediction}
            outcomes.append(Outcome(values, record | values, (reply, scores)))
        return outcomes

    def check(self, tokenizer: Tokenizer, context: int) -> None:
        super().check(tokenizer, context)
        if self.max_new_tokens >= context:
            self.fail(
                "max_new_tokens",
                f"is {self.max_new_tokens}; expected less than {context} tokens, the model's context, to "
                "leave room for a question",
            )


class NQOpen(QuestionAnswering):
    """NQ-open: rows of ``question`` and ``answer``, a list of strings (NQ-open.dev.jsonl)."""

    description = "Answer these questions:\n\n"
    form = "Q: {}\nA:"
    between = "\n"

    def answered(self, row: Row) -> tuple[str, list[str]]:
        return row.text("question"), row.texts("answer")


class TriviaQA(QuestionAnswering):
    """TriviaQA, without its documents: the release's JSON (``Data``: ``Question``, ``Answer`` with ``Value``,
    ``Aliases``, ``NormalizedAliases``) or rows with the same names in lower case, joined by ``_``.
    """

    def answered(self, row: Row) -> tuple[str, list[str]]:
        names = ("Question", "Answer.Value", "Answer.Aliases", "Answer.NormalizedAliases")
        if not row.has(names[0]):
            names = ("question", "answer.value", "answer.aliases", "answer.normalized_aliases")
        question, value, *aliases = names
        others = [text for key in aliases if row.has(key) for text in row.texts(key, least=0, empty=True)]
        return row.text(question), [row.text(value), *(text for text in others if text.strip())]


class HotpotQA(QuestionAnswering):
    """HotpotQA, without its paragraphs: a JSON list, or rows, of ``question`` and ``answer``, a string."""

    def answered(self, row: Row) -> tuple[str, list[str]]:
        return row.text("question"), [row.text("answer")]
