import json
import subprocess
import sys

import pytest

from data_modules.prepared.manifest import Manifest
from memlm import __main__ as entry


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a.jsonl"
    texts = [f"document number {i}" for i in range(60)] + ["", "document number 3"]
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts) + "{\n")
    return path


def test_the_command_by_options_and_by_file(tmp_path, path, capsys, contents):
    output = tmp_path / "o"
    options = {
        "paths": [str(path)],
        "tokenizer": "bytes",
        "text_key": "body",
        "validation_fraction": 0.2,
        "deduplicate": True,
        "workers": 2,
        "skip_malformed": True,
        "skip_empty": True,
    }
    words = [
        f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in options.items()
    ]
    assert entry.main(["prepare", *words, f"--output={output}"]) == 0
    first, *table = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{output} in ") and "tokens/s" in first
    manifest = Manifest.load(output)
    held_out = sum(shard.documents for shard in manifest.shards("validation"))
    rows = dict(line.rsplit("  ", 1) for line in table)
    assert {key.strip(): value for key, value in rows.items()} == {
        "documents": "60",
        "tokens": f"{sum(len(f'document number {i}') + 1 for i in range(60)):,}",
        "bytes of text": f"{sum(len(f'document number {i}') for i in range(60)):,}",
        "bytes per token": f"{manifest.counts.text_bytes / manifest.counts.tokens:.3f}",
        "held out documents": str(held_out),
        "held out tokens": str(sum(shard.tokens for shard in manifest.shards("validation"))),
        "shards": "2",
        "skipped as malformed": "1",
        "skipped as empty": "1",
        "dropped as duplicates": "1",
        "files not read to their end": "0",
    }
    assert 0 < held_out < 30
    config = tmp_path / "prepare.yaml"
    config.write_text(json.dumps(options | {"output": str(tmp_path / "p")}))
    assert entry.main(["prepare", "--config", str(config)]) == 0
    assert contents(tmp_path / "p") == contents(output)
    capsys.readouterr()
    assert entry.main(["prepare", "--config", str(config)]) == 0
    assert (
        capsys.readouterr().out
        == f"{tmp_path / 'p'} is complete: {manifest.counts.tokens:,} tokens; nothing to do\n"
    )
    assert entry.main(["prepare", "--config", str(config), "--seed", "4"]) == 2
    assert "seed: is 4; it was 0; give what" in capsys.readouterr().err
    assert entry.main(["verify", str(output)]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"workers": "0"}, "memlm: error: workers: is 0; expected at least 1\n"),
        ({"tokenizer": "gone.json"}, "gone.json: no such file"),
        ({"paths": '["gone/*"]'}, "gone/*: paths: matches no file\n"),
        ({}, "a.jsonl:61: is an empty document; --skip_empty true skips"),
        ({"skip_empty": "true"}, "a.jsonl:63: is not valid JSON"),
    ],
)
def test_faults_are_one_line(tmp_path, path, capsys, change, message):
    options = {
        "paths": f'["{path}"]',
        "tokenizer": "bytes",
        "output": str(tmp_path / "o"),
        "text_key": "body",
    }
    words = [f"--{key}={value}" for key, value in (options | change).items()]
    assert entry.main(["prepare", *words]) == 2
    error = capsys.readouterr().err.splitlines()[-1] + "\n"
    assert error.startswith("memlm: error: ") and message in error


def test_a_split_without_documents_is_said(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("the only document")
    words = [f'--paths=["{tmp_path}/a.txt"]', "--tokenizer=bytes", f"--output={tmp_path / 'o'}"]
    assert entry.main(["prepare", *words]) == 0
    assert "No document is held out: there is no validation split" in capsys.readouterr().out
    assert entry.main(["verify", str(tmp_path)]) == 2
    assert "holds no manifest.json" in capsys.readouterr().err


def test_preparing_does_not_wait_for_torch():
    """Importing torch and lightning takes four seconds, and 450 MB in every worker that is not forked."""
    code = "import sys, data_modules.prepared.verb; print({'torch', 'lightning', 'numba'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(("inputs", "output"), [("in", "in/out"), ("in", "in"), ("in/sub", "in")])
def test_what_is_written_must_not_be_among_the_inputs(tmp_path, monkeypatch, capsys, inputs, output):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "sub" / "a.jsonl").write_text('{"text": "one"}\n')
    words = [f'--paths=["{inputs}"]', "--tokenizer", "bytes", "--output", output]
    assert entry.main(["prepare", *words]) == 2
    assert f"output: is {tmp_path / output}" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.jsonl", "in", "sub"]
