"""Every YAML that is shipped builds, trains and prints itself."""

import json
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import yaml

from memlm.__main__ import main
from memlm.run_metrics import read_metrics

CONFIGS = Path(__file__).parents[2] / "configs"
# The ladder of the paper and the retrofit have tests of their own: other sizes, and a model to begin with.
FILES = sorted(
    file for file in CONFIGS.rglob("*.yaml") if file.parent.name != "paper" and file.stem != "retrofit"
)
BASE = CONFIGS / "quickstart.yaml"


def content(file: Path) -> dict:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def name(file: Path) -> str:
    return str(file.relative_to(CONFIGS))


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """What makes a command of a file: the file, a base where it is an overlay, and data where it has none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEMLM_TRACEBACK", raising=False)

    def words(file: Path) -> list[str]:
        files = [file] if "model" in content(file) else [BASE, file]
        command = [word for path in files for word in ("--config", str(path))]
        data = content(files[0])["data"]["class_path"]
        if data in ("TextStream", "PackedTokens"):
            lines = [json.dumps({"text": text}) for text in topics.values()]
            (tmp_path / "topics.jsonl").write_text("\n".join(lines))
        if data == "TextStream":
            command.append('--data.paths=["topics.jsonl"]')
        elif data == "PackedTokens":
            prepare = ["prepare", '--paths=["topics.jsonl"]', "--tokenizer", "bytes", "--output", "topics"]
            assert main([*prepare, "--validation_fraction", "0.1"]) == 0
            command.append("--data.folders=topics")
        elif data == "FactQuestions" and find_spec("airportsdata") is None:
            facts = [{"question": f"Q{i}", "answer": f"A{i * 7 % 50}"} for i in range(50)]
            (tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, facts)))
            command.append("--data.facts=facts.jsonl")
        return command

    return words


def fit(command: list[str], *more: str) -> int:
    two_steps = (
        *("--trainer.max_steps", "2", "--trainer.val_check_interval", "2"),
        *("--trainer.limit_val_batches", "1", "--trainer.log_every_n_steps", "1"),
        *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
    )
    return main(["fit", *command, "--run.name", "two", *two_steps, *more])


@pytest.mark.parametrize("file", FILES, ids=name)
def test_two_steps_and_a_validation(arguments, file):
    assert fit(arguments(file)) == 0
    rows = read_metrics(Path("runs/two/metrics.csv"))
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2]
    assert any(row["step"] == 2 and row["val/loss"] > 0 for row in rows if "val/loss" in row)


@pytest.mark.parametrize("file", FILES, ids=name)
def test_print_config_prints_a_config(arguments, file, capsys):
    def printed(*command: str) -> str:
        with pytest.raises(SystemExit) as done:
            main(["fit", *command, "--print_config"])
        assert done.value.code == 0
        return capsys.readouterr().out

    command = arguments(file)
    capsys.readouterr()  # of preparing its data
    first = printed(*command)
    Path("printed.yaml").write_text(first)
    assert yaml.safe_load(printed("--config", "printed.yaml")) == yaml.safe_load(first)


def test_the_dense_twin_differs_in_nothing_but_the_model(arguments):
    """Same data, tokens and validations, and forward FLOPs a token that are equal within 1 %."""
    memory, dense = (content(CONFIGS / f"quickstart{suffix}.yaml") for suffix in ("", "_dense"))
    assert memory["data"] == dense["data"]
    for key in ("max_steps", "val_check_interval"):
        assert memory["trainer"][key] == dense["trainer"][key]
    flops = {}
    for suffix in ("", "_dense"):
        assert fit(arguments(CONFIGS / f"quickstart{suffix}.yaml"), "--run.root", f"runs{suffix}") == 0
        flops[suffix] = json.loads(Path(f"runs{suffix}/two/model.json").read_text())["flops_per_token"]
    assert flops["_dense"] == pytest.approx(flops[""], rel=0.01)


def test_the_pretraining_config_asks_for_a_folder(arguments, capsys):
    assert fit(["--config", str(CONFIGS / "pretrain.yaml")]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "data/prepared: no such folder; expected one made by memlm prepare" in line
    assert not Path("runs").exists()


def test_the_text_config_asks_for_paths(arguments, capsys):
    """Its paths are a placeholder: without the user's own, one line names the key, and nothing is left."""
    assert fit(["--config", str(CONFIGS / "text.yaml")]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "data.paths: matches no file" in line
    assert not Path("runs").exists()
