"""``memlm export`` as it is used."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

from memlm.errors import CheckpointError
from memlm.export_verb import main
from memlm.trained import build, load_trained
from memlm.usage_errors import UsageError

DATA = {
    "class_path": "SyntheticFacts",
    "init_args": {"people": 40, "name_vocabulary": 20, "batch_size": 8, "sequence_length": 20},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory as training leaves it, of a model with random parameters."""
    import data_modules
    from data_modules.base import LanguageDataModule
    from memlm.discovery import import_all
    from memlm.meta_model import instantiate

    import_all(data_modules)
    tokenizer = instantiate(LanguageDataModule, DATA).tokenizer
    architecture = {
        "class_path": "memlm.MemoryLM",
        "vocab_size": tokenizer.vocab_size,
        "transformer": {"dim": 32, "layers": 2, "heads": 2, "feed_forward_dim": 32},
        "memory": {"half_keys": 8, "heads": 2, "reads": 4, "layers": [0, 1]},
    }
    model = build(architecture)
    torch.manual_seed(0)
    state = {}
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape) / 5
        state[f"transformer.{name}"] = 1 + noise if "norm" in name else noise
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": DATA}))
    torch.save(
        {"state_dict": state, "global_step": 3, "tokens_seen": 480, "architecture": architecture},
        folder / "checkpoints" / "last.ckpt",
    )
    return folder


def test_a_run_becomes_a_folder_of_the_same_model(run, tmp_path, capsys):
    assert main([str(run), str(tmp_path / "out"), "--shard_size", "20KB"]) == 0
    assert re.search(r"Written to .*out: \d\.\d MB", capsys.readouterr().out)
    first, again = load_trained(run), load_trained(tmp_path / "out")
    assert (again.step, again.tokens, again.context) == (3, 480, 20)
    state = again.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in first.model.state_dict().items())
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert again.tokenizer.hash == first.tokenizer.hash


def test_measured_losses_are_printed_and_in_the_model_card(run, tmp_path, capsys):
    from memlm.export_verb import _validation_data

    out = tmp_path / "out"
    assert main([str(run), str(out), "--values", "int8", "--measure", "3"]) == 0
    printed = capsys.readouterr().out
    table = dict(re.findall(r"\| (\w+) \| (\d+\.\d+) \|", printed))
    assert table.keys() == {"float32", "int8"}
    assert printed.split("\nWritten")[0] in (out / "README.md").read_text()
    for source, name in ((run, "float32"), (out, "int8")):
        trained = load_trained(source)
        total, number = 0.0, 0
        for batch, _ in zip(
            (b for part in _validation_data(load_trained(run)) for b in part), range(3), strict=False
        ):
            with torch.no_grad():
                logits = trained.model(batch["tokens"]).double().flatten(0, 1)
            total += float(F.cross_entropy(logits, batch["targets"].flatten(), reduction="sum"))
            number += int((batch["targets"] != -100).sum())
        assert float(table[name]) == pytest.approx(total / number, abs=2e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dtype", "float8"], r"argument --dtype: invalid choice: 'float8'"),
        (["--values", "int4"], r"argument --values: invalid choice: 'int4'"),
        (["--shard_size", "much"], r"argument --shard_size: is much, must be a size such as 500MB or 5GB"),
        (["--shard_size", "0GB"], r"argument --shard_size: is 0GB"),
        (["--measure", "0"], r"argument --measure: is 0, must be an integer of at least 1"),
        (["--measure", "2"], r"--measure: the values are exported as they are, which costs nothing"),
        (["--measure", "2", "--values", "float32"], r"--measure: the values are exported as they are"),
        (["--wrong"], r"--wrong: is not an option of memlm export"),
    ],
)
def test_options_that_cannot_be_are_named(run, tmp_path, words, message):
    with pytest.raises(UsageError, match=message):
        main([str(run), str(tmp_path / "out"), *words])
    assert not list(tmp_path.iterdir())


def test_models_and_folders_that_cannot_be_are_named(run, tmp_path):
    out = str(tmp_path / "out")
    with pytest.raises(CheckpointError, match="nowhere: does not exist"):
        main([str(tmp_path / "nowhere"), out])
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    with pytest.raises(CheckpointError, match=r"text\.ckpt: is truncated, or is not a checkpoint"):
        main([str(tmp_path / "text.ckpt"), out])
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "x").write_text("x")
    with pytest.raises(
        CheckpointError, match="held: already holds x; expected a folder that is new or empty"
    ):
        main([str(run), str(tmp_path / "held")])
    assert main([str(run), str(tmp_path / "small"), "--values", "int8"]) == 0
    with pytest.raises(UsageError, match=r"--measure: .*small holds int8 values; measure the run"):
        main([str(tmp_path / "small"), out, "--values", "fp8", "--measure", "1"])
    assert main([str(run), str(tmp_path / "full"), "--values", "float32"]) == 0
    with pytest.raises(UsageError, match=r"--measure: .*full belongs to no run"):
        main([str(tmp_path / "full"), out, "--values", "int8", "--measure", "1"])
    assert not (tmp_path / "out").exists()


def test_sizes():
    from memlm.export_verb import _bytes

    sizes = {
        "5GB": 5 * 10**9,
        "500MB": 5 * 10**8,
        "1.5kb": 1500,
        "7": 7,
        "2 TB": 2 * 10**12,
        "3g": 3 * 10**9,
        "9B": 9,
    }
    assert {text: _bytes(text) for text in sizes} == sizes


def test_the_config_says_what_the_values_are(run, tmp_path):
    assert main([str(run), str(tmp_path / "out"), "--values", "fp8", "--dtype", "bfloat16"]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["values_format"], config["torch_dtype"], config["memlm_step"]) == ("fp8", "bfloat16", 3)
    assert config["max_position_embeddings"] == 20 and config["memlm_tokenizer"] == "tokenizer.json"


def test_the_page_s_commands_have_only_options_that_exist():
    from memlm.export_verb import _parser

    page = (Path(__file__).parents[2] / "docs/export.md").read_text()
    commands = re.findall(r"^memlm export (.*)$", page, re.MULTILINE)
    assert len(commands) == 3
    parsed = [_parser().parse_args(shlex.split(command)) for command in commands]
    assert [options.shard_size for options in parsed] == [5 * 10**9, 5 * 10**9, 5 * 10**8]


def test_the_page_s_python_runs(run, tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    assert main([str(run), str(tmp_path / "exported")]) == 0
    page = (Path(__file__).parents[2] / "docs/export.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(code.replace('"exported"', '"./exported"'), {})
    assert capsys.readouterr().out.strip()
