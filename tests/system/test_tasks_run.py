"""Tasks as a user runs them: the shipped overlay on a run, in training, and what is wrong with files."""

import json
import random
from pathlib import Path

import pytest
import yaml

from memlm.run_metrics import read_metrics

OVERLAY = Path(__file__).parents[2] / "configs" / "tasks.yaml"
DATA = {
    "class_path": "TextStream",
    "init_args": {"paths": ["t.jsonl"], "sequence_length": 64, "batch_size": 4},
}


def lines(path: Path, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run(folder, memlm):
    """A trained run, and a file in the public format for each task of the overlay."""
    draw = random.Random(0)

    def say():
        return " ".join(draw.choices(["over", "the river", "never", "runs", "Stone"], k=draw.randint(1, 4)))

    lines(folder / "t.jsonl", [{"text": " ".join(say() for _ in range(9))} for _ in range(200)])
    config = yaml.safe_load((folder / "tiny.yaml").read_text()) | {"data": DATA}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    tasks = folder / "tasks"
    endings = [
        {
            "activity_label": "Going",
            "ctx_a": say(),
            "ctx_b": say(),
            "endings": [say() for _ in range(4)],
            "label": n % 4,
        }
        for n in range(6)
    ]
    lines(tasks / "hellaswag_val.jsonl", endings)
    lines(tasks / "piqa/valid.jsonl", [{"goal": say(), "sol1": say(), "sol2": say()} for _ in range(4)])
    (tasks / "piqa/valid-labels.lst").write_text("0\n1\n1\n0\n")
    for name in ("openbookqa/test.jsonl", "ARC-Easy-Test.jsonl", "ARC-Challenge-Test.jsonl"):
        choices = [{"text": say(), "label": label} for label in "ABCD"]
        lines(tasks / name, [{"question": {"stem": say(), "choices": choices}, "answerKey": "C"}] * 3)
    for split in ("test", "dev"):
        (tasks / "mmlu" / split).mkdir(parents=True)
        rows = [f"{say()} {n},{say()},{say()},{say()},{say()},B\n" for n in range(5)]
        (tasks / "mmlu" / split / f"law_{split}.csv").write_text("".join(rows))
    for split in ("dev", "train"):
        questions = [{"question": f"{split} {say()} {n}", "answer": [say()]} for n in range(6)]
        lines(tasks / f"NQ-open.{split}.jsonl", questions)
        trivia = [
            {"Question": f"{split}{n}?", "Answer": {"Value": say(), "Aliases": ["x"]}} for n in range(6)
        ]
        (tasks / f"triviaqa-{split}.json").write_text(json.dumps({"Data": trivia}))
    (tasks / "hotpot_dev.json").write_text(
        json.dumps([{"question": f"{say()} {n}?", "answer": "yes"} for n in range(6)])
    )
    (tasks / "wikitext.txt").write_text("the river never runs over the Stone\n" * 9)
    assert memlm("fit", "--config", "tiny.yaml") == 0
    return folder / "runs" / "tiny"


COMMAND = ("test", "--config", "runs/tiny/config.yaml", "--ckpt_path", "last", "--config")


def test_the_shipped_overlay(run, memlm, capsys):
    assert memlm(*COMMAND, str(OVERLAY)) == 0
    held = json.loads((run / "tasks.json").read_text())["tasks"]
    expected = {
        "hellaswag": 6, "piqa": 4, "openbookqa": 3, "arc_easy": 3, "arc_challenge": 3, "mmlu": 5,
        "nqopen": 6, "triviaqa": 6, "hotpotqa": 6, "wikitext": 1,
    }  # fmt: skip
    assert {name: result["examples"] for name, result in held.items()} == expected
    assert all(result["step"] == 10 for result in held.values())
    for name, examples in expected.items():
        records = (run / "tasks" / f"{name}.jsonl").read_text().splitlines()
        assert len(records) == examples
    shown = capsys.readouterr().out
    assert "hotpotqa" in shown and "95 % interval" in shown and "the context was too short" in shown
    assert json.loads((run / "test.json").read_text())["test/loss"] > 0
    assert memlm("compare", "runs/tiny") == 0
    assert "tasks/wikitext/bits_per_byte" in capsys.readouterr().out


def overlay(folder: Path, task: str, **options) -> str:
    callback = {"class_path": "Tasks", "init_args": {"tasks": [{"class_path": task, "init_args": options}]}}
    (folder / "own.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": [callback]}}))
    return "own.yaml"


def test_in_training(run, folder, memlm):
    own = overlay(folder, "TextPerplexity", path="tasks/wikitext.txt")
    config = yaml.safe_load((folder / own).read_text())
    config["trainer"]["callbacks+"][0]["init_args"]["every_n_steps"] = 5
    (folder / own).write_text(yaml.safe_dump(config))
    assert memlm("fit", "--config", "tiny.yaml", "--config", own, "--run.name", "watched") == 0
    rows = read_metrics(folder / "runs" / "watched" / "metrics.csv")
    figures = {
        row["step"]: row["tasks/textperplexity/loss"] for row in rows if "tasks/textperplexity/loss" in row
    }
    assert list(figures) == [5, 10] and figures[5] > figures[10]


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        (
            "HelaSwag",
            {"path": "x"},
            "trainer.callbacks.tasks: no class 'HelaSwag' is known; did you mean HellaSwag?",
        ),
        ("HellaSwag", {}, "trainer.callbacks.tasks: HellaSwag: path: needed, but not set"),
        (
            "HellaSwag",
            {"path": "x", "shot": 1},
            "trainer.callbacks.tasks.shot: is not an option of HellaSwag",
        ),
        ("HellaSwag", {"path": "none.jsonl"}, "none.jsonl: no such file"),
        (
            "HellaSwag",
            {"path": "t.jsonl"},
            "t.jsonl:1: has no field 'ctx'; expected a string. It has 'text'",
        ),
        (
            "PIQA",
            {"path": "tasks/piqa/valid.jsonl", "shots": 9},
            "PIQA.shots: is 9, but tasks/piqa/valid.jsonl has",
        ),
        (
            "NQOpen",
            {"path": "tasks/NQ-open.dev.jsonl", "max_new_tokens": 64},
            "NQOpen.max_new_tokens: is 64; expected less than 64 tokens, the model's context",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(run, folder, memlm, capsys, task, options, message):
    assert memlm(*COMMAND, overlay(folder, task, **options)) == 2
    [said] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("memlm: error: ")]
    assert message in said
    assert not (run / "tasks.json").exists() and not (run / "test.json").exists()
