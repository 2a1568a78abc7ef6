"""The paper's ladder: totals as printed, and every config really trains, at a size that a test can afford."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import yaml

from memlm.__main__ import main
from memlm.run_metrics import read_metrics

FOLDER = Path(__file__).parents[2] / "configs/paper"
FILES = sorted(FOLDER.glob("*.yaml"))
KINDS = ("dense", "moe", "peer", "memory", "memory_plus")

PRINTED = {
    "134m_memory_plus": "0.937B",
    "134m_memory": "0.937B",
    "134m_peer": "1.037B",
    "134m_moe": "0.984B",
    "1.3b_memory": "3.377B",
    "1.3b_peer": "3.646B",
    "1.3b_moe": "3.545B",
    "1.3b_memory_plus_4m": "9.823B",
    "1.3b_memory_plus_16m": "35.618B",
    "1.3b_memory_plus_64m": "138.748B",
    "134m_dense": "134M",
    "373m_dense": "373M",
    "1.3b_dense": "1.3B",
    "8b_dense": "8.03B",
}
"""Totals in the paper, the names of its bases among them."""


def agrees(total: int, printed: str) -> bool:
    """Whether a printed number is the total, its last digit rounded or cut."""
    number, unit = printed[:-1], {"M": 10**6, "B": 10**9}[printed[-1]]
    digit = unit / 10 ** len(number.partition(".")[2])
    return abs(total - float(number) * unit) < digit


@pytest.fixture(scope="module")
def counted(tmp_path_factory) -> dict[str, dict]:
    """What memlm params says of every config."""
    path = tmp_path_factory.mktemp("params") / "params.json"
    words = [word for file in FILES for word in ("--config", str(file))]
    assert main(["params", *words, "--json", str(path)]) == 0
    return {model["name"]: model for model in json.loads(path.read_text())["models"]}


def test_the_ladder_is_complete():
    ladder = {f"{base}_{kind}" for base in ("134m", "373m", "720m", "1.3b") for kind in KINDS}
    ladder |= {"8b_dense", "8b_memory_plus"} | {
        f"1.3b_memory_plus_{values}" for values in ("4m", "16m", "64m")
    }
    assert {file.stem for file in FILES} == ladder


@pytest.mark.parametrize("name", PRINTED)
def test_totals_are_those_printed_in_the_paper(counted, name):
    assert agrees(counted[name]["total"], PRINTED[name])


def test_agreement_is_to_the_last_digit():
    assert (
        agrees(937_062_144, "0.937B") and agrees(3_545_507_840, "3.545B") and agrees(3_545_507_840, "3.546B")
    )
    assert not agrees(938_100_000, "0.937B") and not agrees(3_545_507_840, "3.547B")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_config_says_its_name_and_total(counted, file):
    text = file.read_text()
    stated = re.match(r"# .*: ([\d.]+[MB]) parameters", text)
    assert stated and agrees(counted[file.stem]["total"], stated[1])
    assert yaml.safe_load(text)["run"]["name"] == file.stem


@pytest.mark.parametrize("base", ["134m", "373m", "720m", "1.3b"])
def test_models_of_one_base_differ_little_in_flops(counted, base):
    dense = counted[f"{base}_dense"]["flops_per_token"]
    for kind in KINDS[1:]:
        assert counted[f"{base}_{kind}"]["flops_per_token"] == pytest.approx(dense, rel=0.06)


@pytest.mark.parametrize("values,slots", [("4m", 2**22), ("16m", 2**24), ("64m", 2**26)])
def test_the_pool_grows_and_a_token_s_cost_hardly(counted, values, slots):
    small, large = counted["1.3b_memory_plus"], counted[f"1.3b_memory_plus_{values}"]
    assert large["memory"] == slots * 2048
    assert large["bytes_read_per_token"] == small["bytes_read_per_token"] == 3 * 128 * 2048 * 4
    assert small["flops_per_token"] < large["flops_per_token"] < 1.08 * small["flops_per_token"]


def run_alone(*arguments: str) -> tuple[int, str, int]:
    """A command in a process of its own: exit code, last line of its errors, peak of its memory in bytes."""
    process = subprocess.Popen(
        [sys.executable, "-m", "memlm", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    errors = process.stderr.read().splitlines()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, errors[-1] if errors else "", usage.ru_maxrss * 1024


@pytest.mark.slow
def test_138_billion_parameters_are_counted_in_2_gb():
    code, error, peak = run_alone("params", "--config", str(FOLDER / "1.3b_memory_plus_64m.yaml"), "--match")
    assert (code, error) == (0, "")
    assert peak < 2e9


@pytest.mark.slow
def test_a_fit_of_138_billion_parameters_without_text_fails_before_it_allocates(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, error, peak = run_alone("fit", "--config", str(FOLDER / "1.3b_memory_plus_64m.yaml"))
    assert code == 2
    assert "data.tokenizer" in error
    assert peak < 2e9


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEMLM_TRACEBACK", raising=False)
    return tmp_path


@pytest.mark.parametrize("name", ["134m_dense", "1.3b_moe", "1.3b_peer", "1.3b_memory_plus_64m"])
def test_the_placeholders_are_one_line_that_names_the_key(folder, name, monkeypatch, capsys):
    """And no model is built, since the data comes first."""
    monkeypatch.setattr("memlm.language_models.LanguageModel.__init__", None)
    assert main(["fit", "--config", str(FOLDER / f"{name}.yaml")]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "your_tokenizer.json" in line and "data.tokenizer" in line
    assert not Path("runs").exists()


def test_all_train_on_the_same_data_in_the_same_way():
    """What the test above found of some configs holds for all of them."""
    contents = [yaml.safe_load(file.read_text()) for file in FILES]
    first = contents[0]
    for content in contents:
        assert content["data"] == first["data"]
        assert content["model"]["init_args"]["optimizer"] == first["model"]["init_args"]["optimizer"]
        for section in (content["trainer"], first["trainer"]):
            section.pop("callbacks", None)
        assert content["trainer"] == first["trainer"]
    values = [content["model"]["init_args"].get("values_optimizer") for content in contents]
    options = [section for section in values if section is not None]
    assert len(options) == 16 and all(section == options[0] for section in options)


TINY = {
    "model.transformer": {"dim": 16, "layers": 3, "heads": 2, "feed_forward_dim": 16, "vocab_size": 300},
    "data": {"tokenizer": "bytes", "sequence_length": 16, "batch_size": 4, "paths": '["topics.jsonl"]'},
    "trainer": {
        "max_steps": 2,
        "val_check_interval": 2,
        "limit_val_batches": 1,
        "log_every_n_steps": 1,
        "precision": "32-true",
        "accelerator": "cpu",
        "enable_progress_bar": "false",
    },
}
TINY["data"]["validation_paths"] = '["topics.jsonl"]'
TINY_MEMORY = {"half_keys": 8, "reads": 4, "key_dim": 8, "stride": 1}


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_two_steps_at_tiny_size(folder, file):
    Path("topics.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in topics.values()))
    sections = dict(TINY)
    content = yaml.safe_load(file.read_text())["model"]["init_args"]
    if "memory" in content:
        sections["model.memory"] = TINY_MEMORY
    if "kv_heads" in content["transformer"]:
        sections["model.transformer"] = TINY["model.transformer"] | {"kv_heads": 1}
    words = [
        f"--{section}.{key}={value}" for section, keys in sections.items() for key, value in keys.items()
    ]
    assert main(["fit", "--config", str(file), *words]) == 0
    rows = read_metrics(Path("runs") / file.stem / "metrics.csv")
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2]
    assert [row["step"] for row in rows if "val/loss" in row] == [2]
    model = json.loads((Path("runs") / file.stem / "model.json").read_text())
    assert (model["memory"] > 0) == ("memory" in content)
