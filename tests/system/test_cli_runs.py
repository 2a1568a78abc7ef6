"""What the verbs of the Trainer leave behind, and which checkpoint they use."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from memlm.run_metrics import read_metrics

FIT = ("fit", "--config", "tiny.yaml")


def load(path: str) -> dict:
    return torch.load(path, weights_only=True)


def held(folder: Path) -> set[str]:
    names = {path.name for path in folder.iterdir()}
    return {"events" if name.startswith("events.out.tfevents") else name for name in names}


@pytest.fixture
def fitted(memlm):
    """runs/tiny, ten steps."""
    assert memlm(*FIT) == 0
    return Path("runs/tiny")


def test_fit_fills_one_directory(memlm, folder, capsys):
    assert memlm(*FIT) == 0
    run = folder / "runs" / "tiny"
    assert held(folder) == {"tiny.yaml", "runs"}
    assert held(run) == {
        "config.yaml",
        "environment.json",
        "model.json",
        "checkpoints.csv",
        "metrics.csv",
        "checkpoints",
        "events",
    }
    assert held(run / "checkpoints") == {"last.ckpt", "best.ckpt"}
    printed = capsys.readouterr().out
    assert "MemoryLM: " in printed
    assert "memlm test --config runs/tiny/config.yaml --ckpt_path last" in printed

    rows = read_metrics(run / "metrics.csv")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 10]
    assert all("train/tokens" in row for row in rows)
    model = json.loads((run / "model.json").read_text())
    assert model["architecture"]["memory"]["half_keys"] == 8
    assert model["memory"] == 8 * 8 * 16
    assert model["total"] > model["active"] > 0
    environment = json.loads((run / "environment.json").read_text())
    assert environment["command"] == "memlm fit --config tiny.yaml"
    assert environment["outcome"] == "finished"
    assert environment["steps"] == 10
    assert environment["tokens"] == rows[-1]["train/tokens"]
    assert environment["train_seconds"] > 0
    assert environment["validation_seconds"] > 0
    assert environment["torch"] == torch.__version__


def test_saved_config_reproduces_the_run(memlm, fitted):
    assert memlm("fit", "--config", "runs/tiny/config.yaml", "--run.name", "again") == 0
    assert read_metrics(Path("runs/again/metrics.csv")) == read_metrics(fitted / "metrics.csv")
    first, again = (
        yaml.safe_load(Path("runs", name, "config.yaml").read_text()) for name in ("tiny", "again")
    )
    assert first.pop("run") == {"name": "tiny", "root": "runs"}
    assert again.pop("run")["name"] == "again"
    assert first == again


def test_overlays_and_flags_win_in_order(memlm, folder):
    (folder / "short.yaml").write_text(
        "trainer: {max_steps: 3}\nmodel: {init_args: {transformer: {dim: 32}}}\n"
    )
    assert memlm(*FIT, "--config", "short.yaml", "--trainer.max_steps", "2", "--run.root", "elsewhere") == 0
    config = yaml.safe_load(Path("elsewhere/tiny/config.yaml").read_text())
    assert config["trainer"]["max_steps"] == 2
    assert config["model"]["init_args"]["transformer"]["dim"] == 32
    assert config["model"]["init_args"]["memory"]["half_keys"] == 8


def test_last_is_written_without_any_validation(memlm, capfd):
    assert memlm(*FIT, "--trainer.max_steps", "3") == 0
    assert held(Path("runs/tiny/checkpoints")) == {"last.ckpt"}
    assert load("runs/tiny/checkpoints/last.ckpt")["global_step"] == 3


def test_best_is_the_lowest_validation_loss(memlm):
    # A rate that rises until training diverges: the first validation stays the best.
    diverging = ("--model.optimizer.learning_rate", "3", "--model.optimizer.schedule.warmup_steps", "40")
    assert memlm(*FIT, *diverging) == 0
    losses = [row["val/loss"] for row in read_metrics(Path("runs/tiny/metrics.csv")) if "val/loss" in row]
    assert losses[0] < losses[1]
    assert load("runs/tiny/checkpoints/best.ckpt")["global_step"] == 4
    assert load("runs/tiny/checkpoints/last.ckpt")["global_step"] == 10


def test_fresh_fit_refuses_a_used_directory(memlm, fitted, capsys):
    before = {path: path.read_bytes() for path in fitted.rglob("*") if path.is_file()}
    assert memlm(*FIT) == 2
    message = capsys.readouterr().err
    assert "run.name: runs/tiny already holds checkpoints, checkpoints.csv, config.yaml" in message
    assert "--run.name" in message and "--ckpt_path last" in message
    assert {path: path.read_bytes() for path in fitted.rglob("*") if path.is_file()} == before


def test_checkpoint_from_elsewhere_starts_a_new_run(memlm, fitted, capsys):
    checkpoint = "runs/tiny/checkpoints/best.ckpt"
    shutil.copytree(fitted, "runs/other")
    assert memlm(*FIT, "--run.name", "other", "--ckpt_path", checkpoint, "--trainer.max_steps", "12") == 2
    assert "already holds" in capsys.readouterr().err
    assert memlm(*FIT, "--run.name", "new", "--ckpt_path", checkpoint, "--trainer.max_steps", "12") == 0
    assert read_metrics(Path("runs/new/metrics.csv"))[0]["step"] == 9
    assert json.loads(Path("runs/new/environment.json").read_text())["resumed_from"]["step"] == 8


def test_test_writes_the_result_beside_the_checkpoint(memlm, fitted, capsys):
    assert memlm("test", "--config", "tiny.yaml", "--ckpt_path", "last") == 0
    assert "test/recall" in capsys.readouterr().out
    result = json.loads((fitted / "test.json").read_text())
    assert result["checkpoint"] == "runs/tiny/checkpoints/last.ckpt"
    assert (result["step"], result["tokens"]) == (10, load(result["checkpoint"])["tokens_seen"])
    assert {"test/loss", "test/bits_per_byte", "test/recall", "test/recall_control"} <= result.keys()
    # Under another name, and with nothing but the class in the config: still this run's checkpoint.
    (fitted / "test.json").unlink()
    Path("bare.yaml").write_text(
        yaml.safe_dump(
            yaml.safe_load(Path("tiny.yaml").read_text()) | {"model": {"class_path": "memlm.MemoryLM"}}
        )
    )
    assert memlm("test", "--config", "bare.yaml", "--ckpt_path", "runs/tiny/checkpoints/last.ckpt") == 0
    assert json.loads((fitted / "test.json").read_text()) == result
    assert not Path("runs/bare").exists()


def test_validate_leaves_the_run_untouched(memlm, fitted, capsys):
    before = held(fitted), (fitted / "metrics.csv").read_bytes()
    assert memlm("validate", "--config", "tiny.yaml", "--ckpt_path", "best") == 0
    assert "val/loss" in capsys.readouterr().out
    assert (held(fitted), (fitted / "metrics.csv").read_bytes()) == before


def test_predict_writes_one_line_for_each_question(memlm, fitted):
    assert memlm("test", "--config", "tiny.yaml", "--ckpt_path", "last") == 0
    assert memlm("predict", "--config", "tiny.yaml", "--ckpt_path", "last") == 0
    lines = [json.loads(line) for line in (fitted / "predictions.jsonl").read_text().splitlines()]
    control = [line["recalled"] for line in lines if line["group"] == "recall_control"]
    assert len(control) == 10
    recall = json.loads((fitted / "test.json").read_text())["test/recall_control"]
    assert sum(control) / len(control) == pytest.approx(recall)


def test_architecture_comes_from_the_checkpoint_and_rates_from_the_command_line(memlm, fitted):
    Path("tiny.yaml").write_text(
        yaml.safe_dump(
            yaml.safe_load(Path("tiny.yaml").read_text()) | {"model": {"class_path": "memlm.MemoryLM"}}
        )
    )
    rate = ("--model.optimizer.learning_rate", "0.5", "--model.optimizer.schedule.shape", "constant")
    assert memlm(*FIT, "--ckpt_path", "last", "--trainer.max_steps", "11", *rate) == 0
    checkpoint = load("runs/tiny/checkpoints/last.ckpt")
    assert checkpoint["architecture"]["transformer"]["dim"] == 16
    groups = checkpoint["optimizer_states"][0]["param_groups"]
    assert {group["lr"] for group in groups if group["kind"] == "dense"} == {0.5}


def test_last_is_the_newest_checkpoint_of_the_run(memlm, fitted):
    # An extra checkpoint of the user's own, newer than last.ckpt.
    assert memlm(*FIT, "--run.name", "longer", "--trainer.max_steps", "12") == 0
    shutil.copy("runs/longer/checkpoints/last.ckpt", "runs/tiny/checkpoints/extra.ckpt")
    assert memlm("test", "--config", "tiny.yaml", "--ckpt_path", "last") == 0
    assert json.loads((fitted / "test.json").read_text())["step"] == 12


def test_resuming_keeps_the_history_of_sessions(memlm, fitted):
    seconds = json.loads((fitted / "environment.json").read_text())["train_seconds"]
    assert (
        memlm("fit", "--config", "runs/tiny/config.yaml", "--ckpt_path", "last", "--trainer.max_steps", "12")
        == 0
    )
    environment = json.loads((fitted / "environment.json").read_text())
    assert [session["steps"] for session in environment["earlier"]] == [10]
    assert environment["steps"] == 12
    assert environment["train_seconds"] > seconds * 0.9  # goes on from the checkpoint's clock


def test_fast_dev_run_writes_nothing(memlm, folder):
    assert memlm(*FIT, "--trainer.fast_dev_run", "2") == 0
    assert held(folder) == {"tiny.yaml"}


def test_no_logger_and_no_checkpoints(memlm):
    assert memlm(*FIT, "--trainer.logger", "false", "--trainer.enable_checkpointing", "false") == 0
    assert held(Path("runs/tiny")) == {"config.yaml", "environment.json", "model.json", "checkpoints"}
    assert held(Path("runs/tiny/checkpoints")) == set()


def test_another_logger_stands_beside_metrics_csv(memlm, folder):
    (folder / "logger.yaml").write_text(
        "trainer: {logger: {class_path: CSVLogger, init_args: {save_dir: csv, name: x, version: y}}}"
    )
    assert memlm(*FIT, "--config", "logger.yaml") == 0
    assert held(Path("runs/tiny")) == {
        "config.yaml",
        "environment.json",
        "model.json",
        "checkpoints.csv",
        "metrics.csv",
        "checkpoints",
    }
    assert Path("csv/x/y/metrics.csv").exists()


def test_callbacks_are_named_by_class_alone_and_appended(memlm, folder):
    (folder / "lr.yaml").write_text("trainer:\n  callbacks+:\n    - class_path: LearningRateMonitor\n")
    assert memlm(*FIT, "--config", "lr.yaml", "--trainer.callbacks+=toy_callbacks.Noise") == 0
    rows = read_metrics(Path("runs/tiny/metrics.csv"))
    assert any("train/noise" in row for row in rows)
    assert any(key.startswith("lr-MemoryAdamW") for row in rows for key in row)


def test_print_config_and_help(memlm, capsys):
    with pytest.raises(SystemExit) as done:
        memlm(*FIT, "--print_config")
    assert done.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["data"]["class_path"] == "data_modules.SyntheticFacts"
    assert config["seed_everything"] == 0
    helps = {
        ("--help",): ("--run.name", "Name of the run", "--trainer.max_steps", "--ckpt_path"),
        ("--model.help", "memlm.MemoryLM"): ("half_keys", "Base learning rate", "Whether to run"),
        ("--data.help", "SyntheticFacts"): ("People whose facts are trained", "--data.people PEOPLE"),
    }
    for arguments, shown in helps.items():
        with pytest.raises(SystemExit) as done:
            memlm("fit", *arguments)
        assert done.value.code == 0
        printed = " ".join(capsys.readouterr().out.split())
        for text in shown:
            assert text in printed
    assert not Path("runs").exists()


@pytest.mark.parametrize("name", ["MoELM", "MemoryLM", "PEERLM", "EngramLM"])
def test_sections_that_a_config_leaves_out_have_their_defaults(memlm, folder, capsys, name):
    model = {"class_path": f"memlm.{name}", "init_args": {"transformer": {"dim": 32, "layers": 12}}}
    content = {"model": model, "data": {"class_path": "SyntheticFacts"}}
    (folder / "bare.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(SystemExit):
        memlm("fit", "--config", "bare.yaml", "--print_config")
    printed = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    sections = ["moe"] if name == "MoELM" else ["memory", "values_optimizer"]
    assert all(printed[section] for section in sections)
    assert memlm("params", "--config", "bare.yaml") == 0
    assert ("values: " in capsys.readouterr().out) == (name != "MoELM")
