"""Multiple choice by likelihood: how the choice of a model is found, and scored."""

from collections.abc import Sequence
from dataclasses import dataclass

from memlm.evaluation.estimates import Estimate, Figures, Measure
from memlm.evaluation.evaluator import Evaluator
from memlm.evaluation.few_shot import Question, QuestionTask
from memlm.evaluation.task import Outcome


@dataclass(frozen=True)
class ChoiceQuestion(Question):
    """A question with its choices.

    Args:
        choices: What may follow the question, without the space that separates them.
        answer: Which of them is right.
    """

    choices: tuple[str, ...]
    answer: int

    @property
    def solution(self) -> str:
        return self.asked[self.answer]

    @property
    def asked(self) -> Sequence[str]:
        return [f" {choice}" for choice in self.choices]


class MultipleChoice(QuestionTask[ChoiceQuestion]):
    """Questions of which the model finds one choice likelier than the others.

    - ``acc``: share of the questions whose right choice has the highest log-likelihood after the prompt;
    - ``acc_norm``: the same of the log-likelihood by the choice's length in characters, so that a choice is
      not the less likely for being long. (Both are those of lm-evaluation-harness; the first of equals wins.)
    """

    measures: Sequence[Measure] = (Measure("acc", "share"), Measure("acc_norm", "share"))

    def evaluate(self, evaluator: Evaluator, examples: Sequence[tuple[int, ChoiceQuestion]]) -> list[Outcome]:
        replies = evaluator.log_likelihoods(
            [(self.prompt(n, example), example.asked) for n, example in examples]
        )
        names = [measure.name for measure in self.measures]
        outcomes = []
        for (_, example), reply in zip(examples, replies, strict=True):
            scores = [scored.log_likelihood for scored in reply.scores]
            normed = [score / len(c) for score, c in zip(scores, example.choices, strict=True)]
            chosen = {"acc": scores.index(max(scores)), "acc_norm": normed.index(max(normed))}
            values = {name: float(chosen[name] == example.answer) for name in names}
            record = {
                "prompt": reply.prompt,
                "choices": list(example.choices),
                "answer": example.answer,
                "prediction": chosen["acc"],
                "log_likelihoods": scores,
            }
            outcomes.append(Outcome(values, record | values, (reply,)))
        return outcomes


class LetterChoice(MultipleChoice):
    """Questions whose choices are listed in the prompt and named by letters, of which one is the answer.

    ``acc`` is over all questions, ``acc_macro`` the mean of the subjects' own.
    """

    measures = (Measure("acc", "share"),)

    def summary(self, figures: Figures) -> dict[str, Estimate]:
        return {**figures.overall(), "acc_macro": figures.macro("acc")}
