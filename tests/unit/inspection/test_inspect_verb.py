"""``memlm inspect`` on run directories, as a user calls it."""

import hashlib
import json
import re
import subprocess
import sys
from functools import cache

import pytest
import torch
import yaml

from data_modules.synthetic_facts import SyntheticFacts
from memlm import PEERLM, DenseLM, EngramLM, MemoryLM
from memlm.errors import CheckpointError, DataError
from memlm.inspection import session
from memlm.inspection.reads import reads_of
from memlm.inspection.verb import main
from memlm.memory import EngramConfig, MemoryConfig, PEERConfig
from memlm.trained import load_trained
from memlm.transformer import TransformerConfig
from memlm.usage_errors import UsageError

SMALL = {"half_keys": 8, "heads": 2, "reads": 4, "key_dim": 8, "layers": [0, 1]}
MODELS = {
    "dense": (DenseLM, {}),
    "memory": (MemoryLM, {"memory": MemoryConfig(**SMALL)}),
    "pools": (MemoryLM, {"memory": MemoryConfig(**SMALL, layer_pools=["a", "b"])}),
    "expanded": (MemoryLM, {"memory": MemoryConfig(**SMALL, value_expansion=4, values_dtype="bfloat16")}),
    "peer": (PEERLM, {"memory": PEERConfig(**SMALL)}),
    "engram": (EngramLM, {"memory": EngramConfig(slots=200, heads=2, layers=[1])}),
}
FACTS = {"people": 20, "control": 4, "values": 10, "name_vocabulary": 20, "batch_size": 4}


@pytest.fixture(scope="module")
def facts():
    return SyntheticFacts(**FACTS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, facts):
    """A run directory of each kind, as training leaves it."""
    root = tmp_path_factory.mktemp("runs")
    for name, (cls, options) in MODELS.items():
        torch.manual_seed(0)
        transformer = TransformerConfig(16, 2, 2, feed_forward_dim=16)
        model = cls(facts.vocab_size, **{"transformer": transformer, **options}).eval()
        (root / name / "checkpoints").mkdir(parents=True)
        data = {"class_path": "data_modules.SyntheticFacts", "init_args": FACTS}
        (root / name / "config.yaml").write_text(yaml.safe_dump({"data": data}))
        content = {
            "state_dict": model.state_dict(), "architecture": model.architecture(),
            "global_step": 7, "tokens_seen": 70, "SyntheticFacts": facts.state_dict(),
        }  # fmt: skip
        torch.save(content, root / name / "checkpoints" / "last.ckpt")
    return root


@pytest.fixture(scope="module", autouse=True)
def read_once():
    """Checkpoints are read once for all tests, which leave the models as they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "load_trained", cache(load_trained))
        yield


@pytest.fixture(scope="module")
def prompt(facts):
    """Six words that the tokenizer knows."""
    return facts.tokenizer.decode(list(range(facts.tokenizer.vocab_size - 8, facts.tokenizer.vocab_size - 2)))


@pytest.fixture
def corpus(tmp_path, facts, prompt):
    words = prompt.split()
    path = tmp_path / "corpus.jsonl"
    texts = [" ".join(words[i:] + words[:i]) for i in range(6)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.mark.parametrize("kind", ["memory", "pools", "expanded", "peer", "engram"])
def test_reads_of_a_prompt(runs, prompt, kind, tmp_path, capsys):
    png, values = tmp_path / "new" / "a.png", tmp_path / "new" / "a.json"
    assert main([str(runs / kind), "--prompt", prompt, "--png", str(png), "--json", str(values)]) == 0
    text = capsys.readouterr().out
    assert png.read_bytes().startswith(b"\x89PNG")
    assert str(png) in text
    assert str(values) in text
    assert max(map(len, text.splitlines()[:-4])) <= 120
    content = json.loads(values.read_text())
    trained = session.load_trained(str(runs / kind), tokenizer=None, device="cpu")
    ids = [trained.tokenizer.eos_id, *trained.tokenizer.encode(prompt)]
    assert [token["id"] for token in content["tokens"]] == ids
    assert [token["text"] for token in content["tokens"]] == ["<eos>", *prompt.split()]
    for found, expected in zip(content["layers"], reads_of(trained.model, ids), strict=True):
        assert found["block"] == expected.place.block
        assert torch.equal(torch.tensor(found["slots"]), expected.rows)
        torch.testing.assert_close(torch.tensor(found["weights"]), expected.weights.float())
        assert ("activations" in found) == (kind == "peer")
        assert ("virtual_tables" in found) == (kind == "expanded")
        assert f"Block {expected.place.block}, pool {expected.place.pool}" in text


@pytest.mark.parametrize("kind", ["memory", "expanded", "peer"])
def test_slots_by_number(runs, kind, corpus, tmp_path, capsys):
    values = tmp_path / "a.json"
    command = [str(runs / kind), "--slot", "3", "--slot", "5", "--corpus", str(corpus), "--json", str(values)]
    assert main(command) == 0
    text, content = capsys.readouterr().out, json.loads(values.read_text())
    assert [slot["slot"] for slot in content["slots"]] == [3, 5]
    for slot in content["slots"]:
        assert slot["tokens"] == 6 * 7
        assert sum(each["count"] for each in slot["reads"]) >= slot["readers"]
        assert f"Slot {slot['slot']} of pool main: read by {slot['readers']} of 42 tokens" in text


@pytest.mark.parametrize("kind", ["memory", "pools", "engram"])
def test_slots_of_a_prompt_are_found_in_a_corpus_that_has_it(runs, kind, prompt, corpus, tmp_path, capsys):
    values = tmp_path / "a.json"
    command = [
        str(runs / kind),
        "--slots_of",
        prompt,
        "--top",
        "3",
        "--corpus",
        str(corpus),
        "--json",
        str(values),
    ]
    assert main(command) == 0
    content = json.loads(values.read_text())
    assert len(content["slots"]) == 3
    for slot in content["slots"]:
        assert slot["readers"] >= 1
        assert len(slot["contexts"]) <= 3
        for context in slot["contexts"]:
            words = (
                " ".join([context["before"], context["token"], context["after"]]).replace("<eos>", "").split()
            )
            assert sorted(words) == sorted(prompt.split())
            assert context["weight"] <= 1
    # A tenth of the corpus is a tenth of the tokens.
    assert main([*command, "--limit", "1"]) == 0
    assert json.loads(values.read_text())["slots"][0]["tokens"] == 7
    capsys.readouterr()


@pytest.mark.parametrize("kind", ["memory", "pools", "peer", "engram"])
def test_ablation(runs, kind, prompt, tmp_path, capsys):
    checkpoint = runs / kind / "checkpoints" / "last.ckpt"
    before = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    words, values = prompt.rsplit(" ", 1), tmp_path / "a.json"
    command = [str(checkpoint), "--prompt", words[0], "--answer", words[1], "--ablate", "--remove", "3"]
    assert main([*command, "--json", str(values), "--png", str(tmp_path / "a.png")]) == 0
    text, content = capsys.readouterr().out, json.loads(values.read_text())
    assert hashlib.sha256(checkpoint.read_bytes()).hexdigest() == before
    assert f"Answer [{words[1]}], 1 token: " in text
    trained = session.load_trained(str(checkpoint), tokenizer=None, device="cpu")
    ids = [trained.tokenizer.eos_id, *trained.tokenizer.encode(prompt)]
    logits = trained.model(torch.tensor([ids[:-1]]))[0, -1].log_softmax(-1)
    assert content["log_likelihood"] == pytest.approx(logits[ids[-1]].item(), abs=1e-4)
    assert [each["removed"] for each in content["ablations"]].count("slot") == 3
    for each in content["ablations"]:
        assert each["change"] == pytest.approx(each["log_likelihood"] - content["log_likelihood"])
    assert (tmp_path / "a.png").exists()


def test_where_answer_and_prompt_meet(runs, prompt, capsys):
    """One space is between them, however the two are written."""
    words = prompt.rsplit(" ", 1)
    outputs = set()
    for before, after in [(words[0], words[1]), (words[0] + " ", words[1]), (words[0], " " + words[1])]:
        assert main([str(runs / "memory"), "--prompt", before, "--answer", after, "--ablate"]) == 0
        outputs.add(capsys.readouterr().out)
    assert len(outputs) == 1


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        ("memory", [], "expected one of --prompt, --slot and --slots_of, found none of them"),
        ("memory", ["--prompt", "P", "--slot", "1"], "found --prompt and --slot"),
        ("memory", ["--prompt", ""], "--prompt: is empty; expected some text"),
        ("memory", ["--prompt", "  "], "--prompt: is empty; expected some text"),
        (
            "memory",
            ["--prompt", "P P P P P"],
            r"--prompt: has 31 tokens .* more than the 20 of the model's context",
        ),
        ("memory", ["--prompt", "nobodysword"], "--prompt: the tokenizer .*nobodysword"),
        (
            "memory",
            ["--slot", "64", "--corpus", "C"],
            "--slot: 64 is no slot of the pool 'main', whose are 0 to 63",
        ),
        ("memory", ["--slot", "-1", "--corpus", "C"], "--slot"),
        ("memory", ["--slot", "x", "--corpus", "C"], "--slot: is x, must be the number of a row, from 0"),
        ("memory", ["--slot", "1"], "--corpus: is needed with --slot: the text files"),
        ("memory", ["--slots_of", "P"], "--corpus: is needed with --slots_of"),
        (
            "memory",
            ["--slot", "1", "--corpus", "C", "--pool", "b"],
            "--pool: 'b' is no pool of values; the model has main",
        ),
        ("peer", ["--slot", "1", "--corpus", "C", "--pool", "main_down"], "--pool: 'main_down' is no pool"),
        (
            "pools",
            ["--slot", "1", "--corpus", "C"],
            "--pool: is needed with --slot: the model has the pools a, b",
        ),
        ("memory", ["--prompt", "P", "--ablate"], "--answer: is needed with --ablate"),
        ("memory", ["--prompt", "P", "--ablate", "--answer", " "], "--answer: is empty"),
        (
            "memory",
            ["--prompt", "P", "--ablate", "--answer", "P P P"],
            "--answer: has 18 tokens after the 7 of the prompt",
        ),
        ("memory", ["--prompt", "P", "--ablate", "--answer", "unheard"], "--answer: the tokenizer .*unheard"),
        (
            "memory",
            ["--prompt", "P", "--answer", "P"],
            "--answer: would have no effect; it goes with --ablate",
        ),
        (
            "memory",
            ["--prompt", "P", "--limit", "3"],
            "--limit: would have no effect; it goes with --slot or --slots_of",
        ),
        (
            "memory",
            ["--slot", "1", "--corpus", "C", "--png", "x"],
            "--png: would have no effect; it goes with --prompt or --ablate",
        ),
        ("memory", ["--slot", "1", "--corpus", "C", "--last", "1"], "--last: would have no effect"),
        (
            "memory",
            ["--slot", "1", "--ablate", "--answer", "P"],
            "--ablate: goes with --prompt and --answer, not with --slot",
        ),
        ("memory", ["--prompt", "P", "--top", "0"], "--top: is 0, must be an integer of at least 1"),
        ("memory", ["--prompt", "P", "--json", "/"], "--json: / is a folder; expected the name of a file"),
        ("memory", ["--prompt", "\udcff"], "--prompt: is not valid UTF-8 text"),
        ("memory", ["--prompt", "P", "--device", "abacus"], "--device: abacus cannot be used"),
        (
            "engram",
            ["--prompt", "P", "--ablate", "--answer", "P", "--renormalise"],
            "--renormalise: .*no weights",
        ),
        (
            "dense",
            ["--prompt", "P"],
            "dense: is DenseLM: the model has no memory layers, .*expected a model with memory",
        ),
    ],
)
def test_what_a_user_can_do_wrong(runs, prompt, corpus, kind, words, message):
    fill = {"C": str(corpus)}
    words = [fill.get(word, re.sub(r"\bP\b", prompt, word)) for word in words]
    with pytest.raises(UsageError, match=message) as caught:
        main([str(runs / kind), *words])
    assert "\n" not in str(caught.value)


def test_files_that_are_not_there(runs, tmp_path, prompt):
    run = str(runs / "memory")
    with pytest.raises(DataError, match=r"nowhere.jsonl: --corpus: matches no file"):
        main([run, "--slot", "1", "--corpus", str(tmp_path / "nowhere.jsonl")])
    with pytest.raises(CheckpointError, match="does not exist; expected a run directory"):
        main([str(tmp_path / "none.ckpt"), "--prompt", prompt])
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "' + prompt + '"}\n{"txt": 3}\n')
    with pytest.raises(DataError, match=r"bad.jsonl:2: "):
        main([run, "--slot", "1", "--corpus", str(bad)])
    bad.write_text('{"text": "unheard"}\n')
    with pytest.raises(UsageError, match=r"--corpus: document 0 .*unheard"):
        main([run, "--slot", "1", "--corpus", str(bad)])


def test_help_needs_no_torch():
    code = (
        "import sys; from memlm.inspection.verb import _parser; print(_parser().format_help()); "
        "assert not {'torch', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--slots_of" in done.stdout
