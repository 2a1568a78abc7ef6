import json
import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import TQDMProgressBar

from callbacks.run_directory import RunDirectory
from callbacks.slot_usage import SlotUsage
from callbacks.tasks import Tasks
from callbacks.throughput import Throughput
from data_modules import TextStream
from memlm.errors import ConfigError, DataError
from memlm.evaluation.evaluator import Evaluator
from memlm.evaluation.multiple_choice import PIQA
from memlm.evaluation.question_answering import NQOpen
from memlm.evaluation.text_likelihood import TextPerplexity
from memlm.language_models import MemoryLM
from memlm.loggers import MetricsLogger, TensorBoard
from memlm.memory import MemoryConfig
from memlm.run_directory import RunFiles
from memlm.run_metrics import read_metrics
from memlm.transformer import TransformerConfig


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    draw = random.Random(0)
    words = ["one", "river", "runs", "over", "stones", "and", "never", "ends"]
    lines = [json.dumps({"text": " ".join(draw.choices(words, k=30))}) for _ in range(40)]
    path.write_text("\n".join(lines) + "\n")
    return TextStream([str(path)], sequence_length=48, batch_size=4, validation_fraction=0.2)


@pytest.fixture
def model(texts):
    pl.seed_everything(1, verbose=False)
    memory = MemoryConfig(half_keys=8, heads=2, reads=3, key_dim=8, layers=[1])
    return MemoryLM(texts.vocab_size, TransformerConfig(16, 2, 2, feed_forward_dim=16), memory)


@pytest.fixture
def tasks(tmp_path):
    piqa, nq, text = tmp_path / "valid.jsonl", tmp_path / "nq.jsonl", tmp_path / "book.txt"
    rows = [{"goal": f"go {n}", "sol1": "left", "sol2": "far right", "label": n % 2} for n in range(5)]
    piqa.write_text("".join(json.dumps(row) + "\n" for row in rows))
    nq.write_text("".join(json.dumps({"question": f"who {n}", "answer": ["me"]}) + "\n" for n in range(3)))
    text.write_text("A river runs.")
    return [
        PIQA(str(piqa)),
        NQOpen(str(nq), shots=1, max_new_tokens=4),
        TextPerplexity(str(text), name="book"),
    ]


METRICS = {
    "piqa": ["acc", "acc_norm"],
    "nqopen": ["exact_match", "f1", "answer_nll"],
    "book": ["loss", "perplexity", "bits_per_byte", "word_perplexity"],
}


def test_a_test_run_writes_what_the_tasks_give(texts, model, trainer, tasks, tmp_path, capsys):
    files = RunFiles(tmp_path / "run")
    files.directory.mkdir()
    source = {"checkpoint": "last.ckpt", "step": 7, "tokens": 100}
    callbacks = [RunDirectory(files, source=source), Tasks(tasks, records=True)]
    trainer(*callbacks, logger=False).test(model, datamodule=texts, verbose=False)
    held = json.loads((files.directory / "tasks.json").read_text())["tasks"]
    assert {name: list(task["metrics"]) for name, task in held.items()} == METRICS
    ask = Evaluator(model.transformer, texts.tokenizer, 48)
    for task in tasks:
        expected = task.run(ask, records=True)
        assert held[task.name]["examples"] == expected.examples
        assert held[task.name]["checkpoint"] == "last.ckpt" and held[task.name]["step"] == 7
        for name, estimate in expected.metrics.items():
            assert held[task.name]["metrics"][name]["value"] == pytest.approx(estimate.value, abs=1e-4)
        lines = (files.directory / "tasks" / f"{task.name}.jsonl").read_text().splitlines()
        assert [json.loads(line)["index"] for line in lines] == list(range(expected.examples))
    assert "test/loss" in json.loads(files.test.read_text())
    shown = capsys.readouterr().out
    assert "95 % interval" in shown and "bits_per_byte" in shown
    assert f"Written to {files.directory / 'tasks.json'}" in shown


def test_the_table_is_shown_after_the_progress_bar_is_closed(texts, model, trainer, tasks, capsys):
    # As in memlm test, whose progress bar is closed before the tasks are evaluated.
    run = trainer(TQDMProgressBar(), Tasks(tasks[:1]), enable_progress_bar=True, logger=False)
    run.callbacks.sort(key=lambda callback: isinstance(callback, Tasks))
    run.test(model, datamodule=texts, verbose=False)
    assert "95 % interval" in capsys.readouterr().out


def test_a_fit_logs_every_so_many_steps(texts, model, trainer, tasks, tmp_path, capsys):
    callback = Tasks(tasks, every_n_steps=2, records=True)
    trainer(callback, max_steps=5, num_sanity_val_steps=1).fit(model, datamodule=texts)
    names = [f"tasks/{task}/{metric}" for task, metrics in METRICS.items() for metric in metrics]
    rows = [row for row in read_metrics(tmp_path / "metrics.csv") if any(name in row for name in names)]
    assert [row["step"] for row in rows] == [2, 4]
    assert all(name in row for row in rows for name in names)
    assert rows[0]["tasks/book/loss"] > rows[1]["tasks/book/loss"]
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if line.startswith("step")] == ["step 2", "step 4"]
    assert sorted(path.name for path in (tmp_path / "tasks").iterdir())[:2] == [
        "book-2.jsonl",
        "book-4.jsonl",
    ]
    assert not (tmp_path / "tasks.json").exists()


def test_a_step_of_several_batches_is_evaluated_once(texts, model, trainer, tasks, tmp_path):
    trainer(Tasks(tasks[:1], every_n_steps=2), max_steps=4, accumulate_grad_batches=3).fit(
        model, datamodule=texts
    )
    rows = [row for row in read_metrics(tmp_path / "metrics.csv") if "tasks/piqa/acc" in row]
    assert [row["step"] for row in rows] == [2, 4]


def test_without_every_n_steps_a_fit_does_not_even_read_the_files(texts, model, trainer, tmp_path):
    trainer(Tasks([PIQA("nowhere.jsonl")])).fit(model, datamodule=texts)
    assert not any("tasks/piqa/acc" in row for row in read_metrics(tmp_path / "metrics.csv"))


def test_training_is_not_disturbed(texts, model, trainer, tasks):
    def fit(module, *callbacks):
        texts.advance(texts.start())
        torch.manual_seed(3)
        np.random.seed(3)
        random.seed(3)
        trainer(*callbacks).fit(module, datamodule=texts)
        assert all(part.training for part in module.modules() if part is not module.losses)
        return (
            module.state_dict(),
            torch.get_rng_state(),
            np.random.get_state()[1].tolist(),
            random.getstate(),
        )

    twin = type(model)(texts.vocab_size, *model.sections.values())
    twin.load_state_dict(model.state_dict())
    watched, plain = fit(model, Tasks(tasks, every_n_steps=1)), fit(twin)
    assert all(torch.equal(watched[0][key], plain[0][key]) for key in watched[0])
    assert torch.equal(watched[1], plain[1]) and watched[2:] == plain[2:]


def test_other_callbacks_count_nothing_of_it(texts, model, trainer, tasks, tmp_path, monkeypatch):
    """The clocks stand still, and reads of slots are not counted, whichever callback comes first."""
    usage = {}
    for name, order in {"with": 1, "without": 0, "before": -1}.items():
        folder = tmp_path / name
        files = RunFiles(folder)
        callbacks = [RunDirectory(files), Throughput(every_n_steps=1), SlotUsage(every_n_steps=1)]
        if order:
            callbacks.insert(3 if order > 0 else 1, Tasks(tasks, every_n_steps=2))
        texts.advance(texts.start())
        twin = type(model)(texts.vocab_size, *model.sections.values())
        twin.load_state_dict(model.state_dict())
        trainer(*callbacks, logger=MetricsLogger(files.metrics)).fit(twin, datamodule=texts)
        rows = read_metrics(files.metrics)
        usage[name] = [{k: v for k, v in row.items() if "slots" in k or "memory/" in k} for row in rows]
        usage[name] = [row for row in usage[name] if row]
    assert usage["without"] and usage["with"] == usage["without"] == usage["before"]


def test_the_time_of_tasks_is_no_training_time(texts, model, trainer, tasks, tmp_path, monkeypatch):
    from time import sleep

    run = PIQA.run
    monkeypatch.setattr(PIQA, "run", lambda *args: (sleep(0.4), run(*args))[1])
    files = RunFiles(tmp_path / "run")
    directory, throughput = RunDirectory(files), Throughput()
    callbacks = [directory, throughput, Tasks(tasks[:1], every_n_steps=1)]
    trainer(*callbacks, max_steps=4, logger=False).fit(model, datamodule=texts)
    # The tasks alone take 1.6 seconds.
    assert 0 < directory.train_seconds < 1.5 and 0 < throughput.seconds < 1.5


def test_all_loggers_get_the_figures(texts, model, trainer, tasks, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = [MetricsLogger(tmp_path / "metrics.csv"), TensorBoard(tmp_path)]
    trainer(Tasks(tasks[:1], every_n_steps=3), logger=loggers).fit(model, datamodule=texts)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("tasks/piqa/acc")] == [3, 6]


def test_files_are_read_before_anything_else(texts, model, trainer, tmp_path):
    missing = Tasks([PIQA(str(tmp_path / "nowhere.jsonl"))], every_n_steps=1000)
    with pytest.raises(DataError, match=r"nowhere.jsonl: no such file"):
        trainer(missing).fit(model, datamodule=texts)
    with pytest.raises(DataError, match=r"nowhere.jsonl: no such file"):
        trainer(missing, logger=False).test(model, datamodule=texts)
    assert not (tmp_path / "metrics.csv").exists()


def test_an_answer_too_long_is_found_before_the_first_step(texts, model, trainer, tmp_path):
    path = tmp_path / "long.jsonl"
    rows = [{"goal": "go", "sol1": "left", "sol2": "far " * end, "label": 0} for end in (1, 13)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    watched = Tasks([PIQA(str(path))], every_n_steps=1000)
    with pytest.raises(
        DataError, match=r"long.jsonl: the answer 'far far.*' has 53 tokens; expected at most 48"
    ):
        trainer(watched).fit(model, datamodule=texts)
    assert not (tmp_path / "metrics.csv").exists()


def test_options_are_checked_against_the_context_before_anything_else(texts, model, trainer, tasks):
    tasks[1].max_new_tokens = 48
    with pytest.raises(ConfigError, match=r"NQOpen.max_new_tokens: is 48; expected less than 48 tokens"):
        trainer(Tasks(tasks, every_n_steps=1000)).fit(model, datamodule=texts)


def test_a_file_that_is_no_result_is_not_overwritten(texts, model, trainer, tasks, tmp_path):
    (tmp_path / "tasks.json").write_text("my notes")
    with pytest.raises(DataError, match=r"tasks.json: is not a file of task results"):
        trainer(Tasks(tasks), logger=False).test(model, datamodule=texts)
    assert (tmp_path / "tasks.json").read_text() == "my notes"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": []}, "Tasks.tasks: is empty"),
        ({"tasks": [PIQA("a"), PIQA("b")]}, "Tasks.tasks: has several tasks called 'piqa'"),
        ({"every_n_steps": 0}, "Tasks.every_n_steps: is 0, must be at least 1"),
        ({"batch_tokens": 0}, "Tasks.batch_tokens: is 0"),
        ({"batch_size": 0}, "Tasks.batch_size: is 0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ConfigError, match=message):
        Tasks(**({"tasks": [PIQA("a")]} | options))
