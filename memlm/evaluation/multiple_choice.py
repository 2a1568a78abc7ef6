"""Multiple-choice tasks in the formats of their public releases: HellaSwag, PIQA, OpenBookQA, ARC, MMLU."""

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from memlm.errors import DataError
from memlm.evaluation.choices import ChoiceQuestion, LetterChoice, MultipleChoice
from memlm.evaluation.rows import Row, kind, read_rows, read_table, read_text


class HellaSwag(MultipleChoice):
    """HellaSwag: rows of ``activity_label``, ``ctx_a``, ``ctx_b`` (or ``ctx``), ``endings`` and ``label``.

    The prompt is ``ACTIVITY: CONTEXT``, and WikiHow's marks in brackets are taken away.

    Source: Zellers et al. (2019), HellaSwag; the prompt is that of lm-evaluation-harness.
    """

    def read(self, path: str) -> list[ChoiceQuestion]:
        examples = []
        for row in read_rows(path):
            if row.has("ctx_a"):
                context = f"{row.text('ctx_a', empty=True)} {row.text('ctx_b', empty=True).capitalize()}"
            else:
                context = row.text("ctx")
            endings = tuple(without_marks(ending) for ending in row.texts("endings", least=2))
            prompt = without_marks(f"{row.text('activity_label')}: {context}")
            examples.append(ChoiceQuestion(prompt, endings, row.index("label", len(endings))))
        return examples


def without_marks(text: str) -> str:
    """A text of HellaSwag without WikiHow's marks: ``[title]`` ends a sentence, others (``[step]``) go."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


class PIQA(MultipleChoice):
    """PIQA: rows of ``goal``, ``sol1``, ``sol2`` and ``label``. Without labels these are the lines of the
    file ``NAME-labels.lst`` beside ``NAME.jsonl``.

    Source: Bisk et al. (2020), PIQA; the prompt is that of lm-evaluation-harness.
    """

    def read(self, path: str) -> list[ChoiceQuestion]:
        rows = read_rows(path)
        if not rows[0].has("label"):
            self._add_labels(rows, Path(path))
        return [
            ChoiceQuestion(
                f"Question: {row.text('goal')}\nAnswer:",
                (row.text("sol1"), row.text("sol2")),
                row.index("label", 2),
            )
            for row in rows
        ]

    @staticmethod
    def _add_labels(rows: list[Row], path: Path) -> None:
        beside = path.with_name(f"{path.name.split('.')[0]}-labels.lst")
        if not beside.exists():
            raise rows[0].fault(f"has no field 'label', and there is no file {beside} with the labels")
        labels = read_text(beside).split()
        if len(labels) != len(rows):
            raise DataError(beside, f"has {len(labels)} labels; expected {len(rows)}, one for each example")
        for line, (row, label) in enumerate(zip(rows, labels, strict=True), 1):
            if label not in ("0", "1"):
                raise DataError(beside, f"is {label!r}; expected 0 or 1", line)
            row.fields["label"] = label


class OpenBookQA(MultipleChoice):
    """OpenBookQA: rows of ``question`` with ``stem`` and ``choices`` (``text``, ``label``), ``answerKey``; or
    of ``question_stem`` and ``choices`` apart. The prompt is the stem alone, a sentence to continue.

    Source: Mihaylov et al. (2018), OpenBookQA; the prompt is that of lm-evaluation-harness.
    """

    form = "{}"

    def read(self, path: str) -> list[ChoiceQuestion]:
        return [_lettered(row, self.form) for row in read_rows(path)]


class ARC(MultipleChoice):
    """ARC, easy or challenge: rows as of OpenBookQA, with choices labelled by letters or digits.

    Source: Clark et al. (2018), ARC; the prompt is that of lm-evaluation-harness.
    """

    form = "Question: {}\nAnswer:"

    def read(self, path: str) -> list[ChoiceQuestion]:
        return [_lettered(row, self.form) for row in read_rows(path)]


def _lettered(row: Row, form: str) -> ChoiceQuestion:
    """A question whose choices have labels, one of which is the answer."""
    nested = isinstance(row.fields.get("question"), dict)
    stem = next((key for key in ("question.stem", "question_stem") if row.has(key)), "question")
    key = "question.choices" if nested else "choices"
    choices = row.value(key, "choices with text and label")
    if isinstance(choices, list):
        parts = [
            Row(choice, row.path, row.line, f"{row.place} {key}[{i}]") for i, choice in enumerate(choices)
        ]
        texts, labels = [part.text("text") for part in parts], [part.text("label") for part in parts]
    elif isinstance(choices, dict):
        texts, labels = row.texts(f"{key}.text"), row.texts(f"{key}.label")
    else:
        raise row.fault(f"field {key!r} is a {kind(choices)}; expected choices with text and label")
    if len(texts) < 2 or len(texts) != len(labels):
        raise row.fault(f"has {len(texts)} choices and {len(labels)} labels; expected as many, at least 2")
    answer = row.text("answerKey").strip()
    if answer not in labels:
        raise row.fault(f"field 'answerKey' is {answer!r}; expected one of {', '.join(labels)}")
    return ChoiceQuestion(form.format(row.text(stem)), tuple(texts), labels.index(answer))


class MMLU(LetterChoice):
    """MMLU: a folder of CSV files, one a subject (``SUBJECT_test.csv``: question, four choices, letter of the
    answer), such a file, or rows of ``question``, ``choices``, ``answer`` (0 to 3) and ``subject``.

    Shots are the first examples of the subject in ``shots_path``, for which the release has the folder
    ``dev``. ``limit`` counts the examples of each subject.

    Source: Hendrycks et al. (2021), Measuring massive multitask language understanding; the prompt is theirs.
    """

    letters = "ABCD"

    @cached_property
    def examples(self) -> list[ChoiceQuestion]:
        by_subject: dict[str, list[ChoiceQuestion]] = {}
        for example in self.read(self.path):
            by_subject.setdefault(example.subject, []).append(example)
        return [example for group in by_subject.values() for example in group[: self.limit]]

    def read(self, path: str) -> list[ChoiceQuestion]:
        where = Path(path)
        if where.is_dir():
            files = sorted(where.glob("*.csv"))
            if not files:
                raise DataError(where, "is a folder without a file named *.csv")
            return [example for file in files for example in self._read_table(file)]
        if where.suffix == ".csv":
            return self._read_table(where)
        examples = []
        for row in read_rows(where):
            choices = row.texts("choices", least=len(self.letters))
            if len(choices) != len(self.letters):
                raise row.fault(f"has {len(choices)} choices; expected {len(self.letters)}")
            answer = row.index("answer", len(self.letters))
            examples.append(self._example(row.text("question"), choices, answer, row.text("subject")))
        return examples

    def description_of(self, example: ChoiceQuestion) -> str:
        subject = example.subject.replace("_", " ")
        return f"The following are multiple choice questions (with answers) about {subject}.\n\n"

    def choose(self, number: int, candidates: Sequence[ChoiceQuestion], count: int) -> list[ChoiceQuestion]:
        return list(candidates[:count])

    def _read_table(self, file: Path) -> list[ChoiceQuestion]:
        subject = re.sub("_(test|dev|val)$", "", file.stem)
        examples = []
        for row in read_table(file, ("question", *self.letters, "answer")):
            letter = row.text("answer").strip()
            if letter not in tuple(self.letters):
                raise row.fault(f"field 'answer' is {letter!r}; expected one of {', '.join(self.letters)}")
            choices = [row.text(key) for key in self.letters]
            examples.append(self._example(row.text("question"), choices, self.letters.index(letter), subject))
        return examples

    def _example(self, question: str, choices: Sequence[str], answer: int, subject: str) -> ChoiceQuestion:
        listed = "".join(f"\n{letter}. {text}" for letter, text in zip(self.letters, choices, strict=True))
        prompt = f"{question.strip()}{listed}\nAnswer:"
        return ChoiceQuestion(prompt, tuple(self.letters), answer, subject=subject)
