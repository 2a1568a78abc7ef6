import json
import random
from pathlib import Path

import pytest
from byte_model import evaluator, log_likelihood

from memlm.errors import ConfigError, DataError
from memlm.evaluation.multiple_choice import ARC, MMLU, PIQA, HellaSwag, OpenBookQA, without_marks

WORDS = ["a", "man", "dog", "is", "runs", "very quickly", "over", "the old", "bridge", "[step]", "Ünter"]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def say(draw, least=1, most=9):
    return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))


def hellaswag_rows(n, seed=0):
    draw = random.Random(seed)
    return [
        {
            "ind": number,
            "activity_label": "Baking",
            "ctx_a": f"{say(draw)} [header] {say(draw)} [title] {say(draw)}.",
            "ctx_b": draw.choice(["", "the woman", "SHE Then"]),
            "ctx": "unused",
            "split": "val",
            "label": draw.choice([0, "1", 2, 3]),
            "endings": [f"{say(draw)}. [substeps]  {say(draw)}" for _ in range(4)],
        }
        for number in range(n)
    ]


def check_against_brute_force(task, ask, shots=0):
    """Every choice scored alone by the whole model, and the best of them found anew."""
    result = task.run(ask, records=True)
    right, right_normed = 0, 0
    for number, example in enumerate(task.examples):
        prompt = task.prompt(number, example)
        assert len(prompt.shots) == shots
        scores = [log_likelihood(ask.model, prompt.text(), f" {choice}") for choice in example.choices]
        record = result.records[number]
        assert record["log_likelihoods"] == pytest.approx(scores, abs=1e-4)
        assert (record["prompt"], record["index"]) == (prompt.text(), number)
        right += max(range(len(scores)), key=scores.__getitem__) == example.answer
        normed = [score / len(choice) for score, choice in zip(scores, example.choices, strict=True)]
        right_normed += max(range(len(scores)), key=normed.__getitem__) == example.answer
    assert result.metrics["acc"].value == pytest.approx(right / len(task.examples))
    assert result.metrics["acc_norm"].value == pytest.approx(right_normed / len(task.examples))
    return result


def test_hellaswag_against_brute_force(tmp_path):
    path = write(tmp_path / "hellaswag_val.jsonl", hellaswag_rows(24))
    result = check_against_brute_force(HellaSwag(path), evaluator())
    assert result.metrics["acc"].value not in (0, 1)
    check_against_brute_force(HellaSwag(path, shots=2, limit=4), evaluator(4000), shots=2)


def test_hellaswag_prompt(tmp_path):
    row = hellaswag_rows(1)[0] | {
        "ctx_a": "[header] How to swim [title] Go in. [step] Move.",
        "ctx_b": "the Water",
        "endings": [" [step] Cold.  Wet [title] Deep ", "b", "c", "d"],
        "label": "1",
    }
    [example] = HellaSwag(write(tmp_path / "a.jsonl", [row])).examples
    assert example.text == "Baking:  How to swim. Go in. Move. The water".replace("  ", " ")
    assert example.choices[0] == " Cold. Wet. Deep"
    assert example.answer == 1
    without = {key: value for key, value in row.items() if key not in ("ctx_a", "ctx_b")} | {"ctx": "He"}
    assert HellaSwag(write(tmp_path / "b.jsonl", [without])).examples[0].text == "Baking: He"


def test_hellaswag_marks_as_lm_eval_takes_them_away():
    utils = pytest.importorskip("lm_eval.tasks.hellaswag.utils")
    draw = random.Random(4)
    parts = [" [title]", "[title]", "[step]", " ", "  ", "[", "]", "word", ". ", "\n", "[a b]"]
    for _ in range(300):
        text = "".join(draw.choices(parts, k=draw.randrange(9)))
        assert without_marks(text) == utils.preprocess(text)


def test_piqa_with_labels_beside_or_within(tmp_path):
    draw = random.Random(1)
    rows = [{"goal": say(draw), "sol1": say(draw), "sol2": say(draw)} for _ in range(10)]
    labels = [draw.randrange(2) for _ in rows]
    path = write(tmp_path / "valid.jsonl", rows)
    (tmp_path / "valid-labels.lst").write_text("".join(f"{label}\n" for label in labels))
    task = PIQA(path)
    assert task.examples[0].text == f"Question: {rows[0]['goal']}\nAnswer:"
    assert [example.answer for example in task.examples] == labels
    check_against_brute_force(task, evaluator())
    within = write(tmp_path / "hub.jsonl", [r | {"label": a} for r, a in zip(rows, labels, strict=True)])
    assert PIQA(within).examples == task.examples

    (tmp_path / "valid-labels.lst").write_text("0\n1\n")
    with pytest.raises(DataError, match=r"valid-labels.lst: has 2 labels; expected 10"):
        PIQA(path).load()
    (tmp_path / "valid-labels.lst").write_text("0\n" * 8 + "2\n0\n")
    with pytest.raises(DataError, match=r"valid-labels.lst:9: is '2'; expected 0 or 1"):
        PIQA(path).load()
    (tmp_path / "valid-labels.lst").unlink()
    with pytest.raises(
        DataError, match=r"valid.jsonl:1: has no field 'label', and there is no file .*labels.lst"
    ):
        PIQA(path).load()


def test_openbookqa_and_arc_as_released_and_as_rows(tmp_path):
    released = {
        "id": "7",
        "question": {
            "stem": "The sun is",
            "choices": [{"text": "hot", "label": "A"}, {"text": "cold", "label": "B"}],
        },
        "answerKey": "B",
    }
    apart = {"text": ["hot", "cold"], "label": ["A", "B"]}
    for cls, row, text in [
        (OpenBookQA, released, "The sun is"),
        (OpenBookQA, {"question_stem": "The sun is", "choices": apart, "answerKey": "B"}, "The sun is"),
        (ARC, released, "Question: The sun is\nAnswer:"),
        (
            ARC,
            {"question": "The sun is", "choices": apart, "answerKey": "B"},
            "Question: The sun is\nAnswer:",
        ),
    ]:
        [example] = cls(write(tmp_path / "a.jsonl", [row])).examples
        assert (example.text, example.choices, example.answer) == (text, ("hot", "cold"), 1)


def test_arc_has_three_to_five_choices_with_letters_or_digits(tmp_path):
    draw = random.Random(2)
    rows = []
    for number in range(12):
        labels = ["12345", "ABCDE", "1234", "ABC"][number % 4]
        choices = [{"text": say(draw), "label": label} for label in labels]
        rows.append({"question": {"stem": say(draw), "choices": choices}, "answerKey": draw.choice(labels)})
    task = ARC(write(tmp_path / "ARC-Challenge-Test.jsonl", rows), name="arc_challenge")
    assert [len(example.choices) for example in task.examples] == [5, 5, 4, 3] * 3
    assert check_against_brute_force(task, evaluator()).name == "arc_challenge"


@pytest.fixture
def mmlu(tmp_path):
    """Two subjects of unequal size, and their dev sets."""
    draw = random.Random(5)
    for split, sizes in {"test": (6, 2), "dev": (5, 5)}.items():
        (tmp_path / split).mkdir()
        for subject, size in zip(["us_history", "anatomy"], sizes, strict=True):
            lines = [
                f'"{say(draw)}, {n}?",{",".join(say(draw) for _ in range(4))},{draw.choice("ABCD")}'
                for n in range(size)
            ]
            (tmp_path / split / f"{subject}_{split}.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_mmlu(mmlu):
    task, ask = MMLU(str(mmlu / "test"), shots=3, shots_path=str(mmlu / "dev")), evaluator(3000)
    result = task.run(ask, records=True)
    assert result.examples == 8
    rights = {"anatomy": [], "us_history": []}
    for number, example in enumerate(task.examples):
        prompt = task.prompt(number, example).text()
        subject = example.subject.replace("_", " ")
        assert prompt.startswith(
            f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        )
        assert prompt.count("\nAnswer: ") == 3 and prompt.endswith("\nAnswer:")
        scores = [log_likelihood(ask.model, prompt, f" {letter}") for letter in "ABCD"]
        rights[example.subject].append(scores.index(max(scores)) == example.answer)
    acc = {subject: sum(right) / len(right) for subject, right in rights.items()}
    assert {s: figures["acc"].value for s, figures in result.groups.items()} == pytest.approx(acc)
    assert result.metrics["acc"].value == pytest.approx(sum(map(sum, rights.values())) / 8)
    assert result.metrics["acc_macro"].value == pytest.approx(sum(acc.values()) / 2)
    assert list(result.metrics) == ["acc", "acc_macro"]


def test_mmlu_prompt_and_shots_are_the_first_of_the_subject(mmlu):
    (mmlu / "test" / "anatomy_test.csv").write_text("How many?,one,two,three,four,C\n")
    task = MMLU(str(mmlu / "test" / "anatomy_test.csv"), shots=2, shots_path=str(mmlu / "dev"))
    [example] = task.examples
    assert example.text == "How many?\nA. one\nB. two\nC. three\nD. four\nAnswer:"
    dev = MMLU(str(mmlu / "dev" / "anatomy_dev.csv")).examples
    expected = tuple(f"{shot.text} {'ABCD'[shot.answer]}\n\n" for shot in dev[:2])
    assert task.prompt(0, example).shots == expected


def test_mmlu_limit_counts_each_subject_and_rows_are_read(mmlu, tmp_path):
    limited = MMLU(str(mmlu / "test"), limit=3)
    assert [e.subject for e in limited.examples] == ["anatomy"] * 2 + ["us_history"] * 3
    row = {"question": "q", "choices": ["a", "b", "c", "d"], "answer": 3, "subject": "law"}
    [example] = MMLU(write(tmp_path / "a.jsonl", [row])).examples
    assert (example.answer, example.subject) == (3, "law")


def test_mmlu_needs_shots_of_each_subject(mmlu):
    (mmlu / "dev" / "anatomy_dev.csv").unlink()
    with pytest.raises(ConfigError, match=r"MMLU.shots: is 1, but .*dev has only 0 examples of anatomy"):
        MMLU(str(mmlu / "test"), shots=1, shots_path=str(mmlu / "dev")).load()


def test_the_task_of_ones_own_in_the_documentation(tmp_path):
    text = (Path(__file__).parents[3] / "docs" / "tasks.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(code, names)
    rows = [
        {"country": name, "cities": ["Rome", "Oslo"], "right": n}
        for n, name in enumerate(["Italy", "Norway"])
    ]
    task = names["Capitals"](write(tmp_path / "a.jsonl", rows), shots=1)
    assert (
        task.prompt(0, task.examples[0]).text() == "The capital of Norway is Oslo\n\nThe capital of Italy is"
    )
    assert check_against_brute_force(task, evaluator(), shots=1).name == "capitals"


HELLASWAG = {"activity_label": "a", "ctx": "b", "endings": ["c", "d"], "label": 0}
ARC_ROW = {"question": {"stem": "s", "choices": [{"text": "x", "label": "A"}, {"text": "y", "label": "B"}]}}


@pytest.mark.parametrize(
    ("cls", "row", "message"),
    [
        (HellaSwag, HELLASWAG | {"label": 2}, "field 'label' is 2; expected a number from 0 to 1"),
        (HellaSwag, HELLASWAG | {"label": ""}, "field 'label' is ''; expected a number from 0 to 1"),
        (HellaSwag, HELLASWAG | {"endings": ["c"]}, "field 'endings' has 1 entries; expected at least 2"),
        (HellaSwag, {"activity_label": "a", "endings": ["c", "d"]}, "has no field 'ctx'"),
        (PIQA, {"goal": "g", "sol1": "a", "label": 1}, "has no field 'sol2'"),
        (ARC, ARC_ROW | {"answerKey": "C"}, "field 'answerKey' is 'C'; expected one of A, B"),
        (ARC, ARC_ROW, "has no field 'answerKey'"),
        (ARC, {"question": "s", "choices": ["x"], "answerKey": "A"}, r"choices\[0\] is a JSON string"),
        (ARC, {"question": "s", "choices": "x", "answerKey": "A"}, "field 'choices' is a string"),
        (OpenBookQA, {"question": "s", "choices": {"text": ["x", "y"], "label": ["A"]}, "answerKey": "A"},
         "has 2 choices and 1 labels"),
        (MMLU, {"question": "q", "choices": ["a"] * 5, "answer": 1, "subject": "s"},
         "has 5 choices; expected 4"),
    ],
)  # fmt: skip
def test_malformed_rows(tmp_path, cls, row, message):
    with pytest.raises(DataError, match=f"a.jsonl:1: {message}"):
        cls(write(tmp_path / "a.jsonl", [row])).load()


def test_malformed_tables(tmp_path):
    with pytest.raises(DataError, match=r"is a folder without a file named \*.csv"):
        MMLU(str(tmp_path)).load()
    (tmp_path / "law_test.csv").write_text("q,a,b,c,d,E\n")
    with pytest.raises(DataError, match=r"law_test.csv:1: field 'answer' is 'E'; expected one of A, B, C, D"):
        MMLU(str(tmp_path)).load()
    (tmp_path / "law_test.csv").write_text("q,a,b,c,A\n")
    with pytest.raises(
        DataError, match=r"law_test.csv:1: has 5 columns; expected 6: question, A, B, C, D, answer"
    ):
        MMLU(str(tmp_path)).load()
