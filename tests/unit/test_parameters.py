"""memlm params: its columns, its options, its table and its errors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from memlm import DenseLM, MemoryLM
from memlm.__main__ import main
from memlm.memory import MemoryConfig
from memlm.parameters import columns
from memlm.parameters_table import size
from memlm.transformer import TransformerConfig

TRANSFORMER = {"dim": 32, "layers": 3, "heads": 4, "feed_forward_dim": 64}
MEMORY = {"half_keys": 12, "heads": 3, "reads": 5, "key_dim": 8, "layers": [0, 2], "value_dim": 20}
FACTS = {"class_path": "SyntheticFacts", "init_args": {"people": 20, "batch_size": 4}}
TEXT = {
    "class_path": "TextStream",
    "init_args": {"paths": ["none.txt"], "tokenizer": "none.json", "sequence_length": 50, "batch_size": 3},
}


def config(name: str, data: dict | None, **sections: dict) -> dict:
    content = {"model": {"class_path": name, "init_args": {"transformer": TRANSFORMER, **sections}}}
    return content if data is None else content | {"data": data}


FILES = {
    "dense": config("memlm.DenseLM", FACTS),
    "memory": config("memlm.MemoryLM", FACTS, memory=MEMORY),
    "experts": config("memlm.MoELM", FACTS, moe={"experts": 4}),
    "text": config("memlm.MemoryLM", TEXT, memory=MEMORY),
    "bare": config("memlm.MemoryLM", None, memory=MEMORY),
    "wider": {"model": {"init_args": {"transformer": {"dim": 48}}}},
    "slower": {"trainer": {"accumulate_grad_batches": 5}},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEMLM_TRACEBACK", raising=False)
    for name, content in FILES.items():
        Path(f"{name}.yaml").write_text(yaml.safe_dump(content))
    return tmp_path


@pytest.fixture
def params(folder, capsys):
    """Runs memlm params on configs by name; returns the JSON."""

    def run(*words: str) -> dict:
        command = [
            part for word in words for part in (("--config", f"{word}.yaml") if word in FILES else (word,))
        ]
        assert main(["params", *command, "--json", "out/params.json"]) == 0
        return json.loads(Path("out/params.json").read_text())

    return run


@pytest.fixture
def error(folder, capsys):
    """Runs memlm params, which must fail; returns its one line."""

    def run(*words: str) -> str:
        assert main(["params", *words]) == 2
        [line] = capsys.readouterr().err.splitlines()
        return line.removeprefix("memlm: error: ")

    return run


TINY = ("--vocab_size", "37", "--sequence_length", "10")


def test_equals_the_counts_of_the_real_model(params):
    found = params("memory", *TINY)
    counts = MemoryLM(37, TransformerConfig(**TRANSFORMER), MemoryConfig(**MEMORY)).counts(10).as_dict()
    assert {name: found[name] for name in counts} == counts
    assert (found["vocab_size"], found["sequence_length"]) == (37, 10)
    assert sum(found["parts"].values()) == counts["total"]
    assert found["class_path"] == "memlm.MemoryLM"


def test_the_keys_of_the_json(params):
    found = params("memory", *TINY)
    for name in ("total", "active", "memory", "flops_per_token", "bytes_read_per_token"):
        assert isinstance(found[name], int)
    [only] = found.pop("models")
    assert only == found


def test_a_column_for_each_config(params, capsys):
    found = params("dense", "memory", "experts", *TINY)
    assert [model["name"] for model in found["models"]] == ["dense", "memory", "experts"]
    assert found["total"] == found["models"][0]["total"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["dense", "memory", "experts"]
    rows = {line[:31].strip(): line[31:].split() for line in lines}
    for row, key in (
        ("total", "total"),
        ("active per token", "active"),
        ("FLOPs backward", "backward_flops_per_token"),
    ):
        assert rows[row] == [f"{model[key]:,}" for model in found["models"]]
    assert rows["values: main"] == ["-", f"{144 * 20:,}", "-"]
    assert rows["experts"] == ["-", "-", f"{3 * (4 * 3 * 32 * 64 + 4 * 32):,}"]
    assert rows["values read, bytes"] == ["0", f"{2 * 15 * 20 * 4:,}", "0"]
    assert rows["values"] == ["0", "B", "11.52", "kB", "0", "B"]


def test_options_of_fit_hold_for_every_column(params):
    found = params("dense", "memory", *TINY, "--model.transformer.dim", "64", "--trainer.precision=bf16-true")
    dense = DenseLM(37, TransformerConfig(**TRANSFORMER | {"dim": 64}))
    assert found["models"][0]["total"] == dense.counts(10).total
    assert [model["rank"]["precision"] for model in found["models"]] == ["bf16-true"] * 2
    assert found["models"][1]["bytes_read_per_token"] == 2 * 15 * 20 * 2


def test_a_config_without_a_model_class_lies_over_the_one_before(params):
    found = params("dense", "memory", "wider", "slower", "experts", *TINY)
    assert [model["name"] for model in found["models"]] == ["dense", "memory+wider+slower", "experts"]
    wide = TransformerConfig(**TRANSFORMER | {"dim": 48})
    assert found["models"][1]["total"] == MemoryLM(37, wide, MemoryConfig(**MEMORY)).counts(10).total
    assert [model["rank"]["tokens"] for model in found["models"]] == [4 * 10, 5 * 4 * 10, 4 * 10]


def test_which_files_name_a_model(folder):
    Path("short.yaml").write_text("model: memlm.DenseLM\n")
    Path("list.yaml").write_text("- 1\n")
    Path("broken.yaml").write_text("a: [1\n")
    files = [
        "wider.yaml",
        "slower.yaml",
        "short.yaml",
        "list.yaml",
        "broken.yaml",
        "absent.yaml",
        "wider.yaml",
    ]
    grouped = [["wider.yaml", "slower.yaml"], ["short.yaml"], ["list.yaml"], ["broken.yaml"]]
    assert columns(files) == [*grouped, ["absent.yaml", "wider.yaml"]]
    assert columns([]) == [[]]


def test_without_a_config(params):
    found = params(
        "--model", "memlm.DenseLM", "--model.transformer.layers", "2", *TINY, "--tokens_per_rank", "7"
    )
    assert found["name"] == "DenseLM"
    assert found["total"] == DenseLM(37, TransformerConfig(layers=2)).counts(10).total


def test_the_data_tells_what_the_command_does_not(params):
    """SyntheticFacts: tokenizer and length come from the data it makes."""
    from data_modules import SyntheticFacts

    data = SyntheticFacts(**FACTS["init_args"])
    found = params("memory")
    assert (found["vocab_size"], found["sequence_length"]) == (data.vocab_size, data.sequence_length)
    assert found["rank"]["tokens"] == 4 * data.sequence_length


def test_the_config_s_own_vocabulary_and_length(params):
    """So that a config whose text and tokenizer are not there can be counted."""
    found = params("text", "--model.transformer.vocab_size", "99")
    assert (found["vocab_size"], found["sequence_length"], found["rank"]["tokens"]) == (99, 50, 150)
    assert params("text", "--model.transformer.vocab_size", "99", "--vocab_size", "40")["vocab_size"] == 40
    assert params("bare", *TINY, "--tokens_per_rank", "6")["rank"]["tokens"] == 6


def test_nothing_is_allocated(params, monkeypatch):
    """137 billion parameters, on the meta device; the seed of the process stays as it was."""
    state = torch.get_rng_state()
    found = params("memory", *TINY, "--model.memory.half_keys", "8192", "--model.memory.value_dim", "2048")
    assert found["memory"] == 2**26 * 2048
    assert torch.equal(torch.get_rng_state(), state)


def test_the_mesh(params):
    words = ("--ranks", "6", "--memory_group", "2", "--shard_dense", "true", "--precision", "bf16-true")
    found = params("memory", *TINY, *words, "--tokens_per_rank", "1")["rank"]
    assert [found[key] for key in ("ranks", "memory_group", "shard_dense")] == [6, 2, True]
    assert (found["precision"], found["tokens"]) == ("bf16-true", 1)
    assert found["bytes"]["values"] == 144 * 10 * 2
    # Two fp32 moments, a third of the rows each, and two scalars: fp32 steps and fp64 decay.
    assert found["bytes"]["values_state"] == 2 * 48 * 10 * 4 + 4 + 8
    # Read by the group, and a third of what all have read.
    assert found["bytes"]["row_gradients"] == (2 * 30 + 48) * 10 * 4
    assert found["bytes"]["total"] == sum(found["bytes"].values()) / 2


def test_the_mesh_in_one_word(params):
    words = ("--shard_dense", "true", "--tokens_per_rank", "1")
    apart = params("memory", *TINY, "--ranks", "6", "--memory_group", "2", *words)["rank"]
    found = params("memory", *TINY, "--mesh", "6x2", *words)["rank"]
    assert found == apart
    assert found["sent"]["total"] == sum(found["sent"].values()) / 2 > 0


def test_the_memory_group_is_all_ranks_by_default(params):
    found = params("memory", "dense", *TINY, "--ranks", "4")["models"]
    assert [model["rank"]["memory_group"] for model in found] == [4, 1]
    assert found[0]["rank"]["bytes"]["values"] == 144 * 5 * 4


def test_the_optimizer_of_the_values_is_the_config_s(params):
    options = ("--model.values_optimizer.method", "sgd", "--model.values_optimizer.rounding", "master")
    found = params("memory", *TINY, *options, "--model.memory.values_dtype", "bfloat16")["rank"]["bytes"]
    assert (found["values"], found["values_state"]) == (144 * 20 * 2, 144 * 20 * 4 + 12)


def test_match_prints_yaml_that_counts_the_same(params, folder, capsys):
    found = params("dense", "memory", *TINY, "--match")
    assert "baselines" not in found["models"][0]
    baselines = found["models"][1]["baselines"]
    assert [baseline["class_path"] for baseline in baselines] == [
        "memlm.DenseLM",
        "memlm.MoELM",
        "memlm.PEERLM",
    ]
    out = capsys.readouterr().out
    for baseline in baselines:
        assert baseline["yaml"] in out
        assert f"matched to memory: {baseline['total']:,} parameters, {baseline['active']:,} active" in out
        Path("matched.yaml").write_text(yaml.safe_dump(yaml.safe_load(baseline["yaml"]) | {"data": FACTS}))
        again = params("--config", "matched.yaml", *TINY)
        for key in ("total", "active", "flops_per_token", "backward_flops_per_token"):
            assert again[key] == baseline[key]


def test_match_says_what_has_no_match(params, capsys):
    params("memory", *TINY, "--match", "--model.transformer.feed_forward_dim", "60")
    assert "# no MoELM matches memory: model.moe.expert_dim: is 60" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("", ["model", "needed"]),
        ("--config absent.yaml", ["absent.yaml", "not exist"]),
        ("--config memory.yaml --model.memory.reads 13", ["model.memory.reads: is 13", "half_keys (12)"]),
        ("--config memory.yaml --model.transformer.dimm 3", ["model.transformer.dimm", "not an option"]),
        ("--config memory.yaml --nonsense 3", ["nonsense"]),
        ("--config memory.yaml --rank 3", ["rank"]),
        ("--config memory.yaml --ranks 0", ["--ranks", "is 0, must be an integer of at least 1"]),
        ("--config memory.yaml --ranks two", ["--ranks", "is two"]),
        ("--config memory.yaml --mesh 8", ["--mesh", "is 8", "such as 64x8"]),
        ("--config memory.yaml --mesh 8x4 --ranks 8", ["--mesh", "--ranks", "give either"]),
        ("--config memory.yaml --ranks 6 --memory_group 4", ["memory_group: is 4, must divide ranks (6)"]),
        ("--config memory.yaml --ranks 40", ["memory_group: is 40", "20 elements"]),
        ("--config memory.yaml --precision half", ["precision: is half", "bf16-true"]),
        ("--config memory.yaml --shard_dense maybe", ["--shard_dense", "'maybe'"]),
        ("--config memory.yaml --ckpt_path last", ["ckpt_path", "config.yaml"]),
        ("--config dense.yaml --match", ["--match: none of the models has a memory"]),
        ("--config text.yaml", ["model.transformer.vocab_size: is not set", "none.json", "--vocab_size"]),
        (
            "--config bare.yaml",
            ["model.transformer.vocab_size: is needed", "no data section", "--vocab_size"],
        ),
        ("--config bare.yaml --vocab_size 37", ["data.sequence_length: is needed", "--sequence_length"]),
        (f"--config bare.yaml {' '.join(TINY)}", ["tokens_per_rank: is needed", "batch_size"]),
    ],
)
def test_errors_are_one_line(error, words, parts):
    message = error(*words.split())
    for part in parts:
        assert part in message


def test_the_page_shows_what_is_printed(monkeypatch, capsys):
    """The second command of docs/counting.md, and the table under it."""
    root = Path(__file__).parents[2]
    page = (root / "docs" / "counting.md").read_text(encoding="utf-8")
    monkeypatch.chdir(root)
    command = page.split("    memlm params ")[2].split("\n\n")[0].replace("\\\n", " ")
    assert main(["params", *command.split()]) == 0
    assert capsys.readouterr().out == page.split("```\n")[1]


def test_help_needs_no_torch():
    program = (
        "import sys\n"
        "from memlm.__main__ import main\n"
        "try: main(['params', '--help'])\n"
        "except SystemExit as done: assert done.code == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--memory_group G" in done.stdout


@pytest.mark.parametrize(
    "number,text",
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (11_520, "11.52 kB"),
        (999_940, "999.9 kB"),
        (999_990, "1 MB"),
        (549_755_813_888, "549.8 GB"),
        (10**15 * 12_345, "1.234e+04 PB"),
    ],
)
def test_sizes(number, text):
    assert size(number) == text
