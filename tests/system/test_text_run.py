"""Real text through the real command line: it is learnt, resumed to the bit, and its faults are named."""

import gzip
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import yaml
import zstandard

from memlm.run_metrics import read_metrics

ROOT = Path(__file__).parents[2]
TEXTS = [topics[name] for name in sorted(topics)]

CONFIG = {
    "run": {"name": "text"},
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 60,
        "val_check_interval": 6,
        "limit_val_batches": 2,
        "log_every_n_steps": 1,
        "gradient_clip_val": 1.0,
        "enable_progress_bar": False,
        "logger": None,
    },
    "model": {
        "class_path": "memlm.MemoryLM",
        "init_args": {
            "transformer": {"dim": 32, "layers": 2, "heads": 2, "feed_forward_dim": 64},
            "memory": {"half_keys": 16, "heads": 2, "reads": 4, "layers": [1], "query_norm": "qk"},
            "optimizer": {"learning_rate": 0.01, "schedule": {"warmup_steps": 5}},
        },
    },
    "data": {
        "class_path": "TextStream",
        "init_args": {
            "paths": ["text.*"],
            "sequence_length": 128,
            "batch_size": 8,
            "validation_fraction": 0.1,
        },
    },
}


def json_lines(texts: list[str], key: str = "text") -> bytes:
    return "".join(json.dumps({key: text}) + "\n" for text in texts).encode()


def write(name: str) -> None:
    """The whole text in the kind of file that the name says; a text file is one document."""
    if name.endswith(".txt"):
        for number, text in enumerate(TEXTS):
            Path(f"text.{number:03}.txt").write_text(text)
        return
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)
    Path(name).write_bytes(compress(json_lines(TEXTS)))


@pytest.fixture
def run(memlm, folder):
    """Runs a verb on fit.yaml in an empty folder, with more words."""
    (folder / "fit.yaml").write_text(yaml.safe_dump(CONFIG))
    return lambda verb, *words: memlm(verb, "--config", "fit.yaml", *words)


@pytest.fixture
def error(run, capsys):
    """Runs a fit that must fail; returns its one line."""

    def failing(*words: str) -> str:
        capsys.readouterr()
        assert run("fit", *words) == 2
        lines = capsys.readouterr().err.splitlines()
        [line] = [line for line in lines if line.startswith("memlm: error: ")]
        assert "Traceback" not in "\n".join(lines)
        return line.removeprefix("memlm: error: ")

    return failing


def rows(name: str) -> list[dict[str, float]]:
    return read_metrics(Path("runs", name, "metrics.csv"))


def bits_per_byte(name: str) -> list[float]:
    return [row["val/bits_per_byte"] for row in rows(name) if "val/bits_per_byte" in row]


# The other kinds of files: see the next test.
@pytest.mark.parametrize("file", ["text.jsonl.zst", "text.txt"])
def test_text_is_learnt(run, file):
    write(file)
    assert run("fit") == 0
    measured = bits_per_byte("text")
    assert len(measured) == 10
    # Uniform bytes are 8 bits; these texts' letter frequencies alone give about 4.8.
    assert measured[0] < 8
    assert measured[-1] < 0.8 * measured[0]
    assert measured[-1] < 4.5
    assert run("test", "--ckpt_path", "last", "--trainer.limit_test_batches", "2") == 0
    tested = json.loads(Path("runs/text/test.json").read_text())
    assert tested["test/bits_per_byte"] == pytest.approx(measured[-1])


def test_all_kinds_of_files_are_the_same_text(run):
    """Compression changes nothing; nor does another key for the text."""
    write("text.jsonl")
    write("text.jsonl.zst")
    Path("other.ndjson.gz").write_bytes(gzip.compress(json_lines(TEXTS, "body")))
    short = ("--trainer.max_steps", "12")
    assert run("fit", *short, "--run.name", "plain", '--data.paths=["text.jsonl"]') == 0
    assert run("fit", *short, "--run.name", "zst", '--data.paths=["text.jsonl.zst"]') == 0
    other = ('--data.paths=["other.ndjson.gz"]', "--data.text_key", "body")
    assert run("fit", *short, "--run.name", "gz", *other) == 0
    assert len(rows("plain")) == 14
    assert rows("plain") == rows("zst") == rows("gz")


def test_resuming_changes_nothing(run):
    """Stopped by a crash between two validations, inside a document of a compressed file."""
    write("text.jsonl.zst")
    short = ("--trainer.max_steps", "30")
    assert run("fit", *short, "--run.name", "whole") == 0
    crash = ("--trainer.callbacks+=toy_callbacks.Crash", "--trainer.callbacks.step", "17")
    with pytest.raises(RuntimeError, match="crash"):
        run("fit", *short, *crash, "--run.name", "cut")
    assert run("fit", *short, "--run.name", "cut", "--ckpt_path", "last") == 0
    assert len(rows("whole")) == 35
    assert rows("cut") == rows("whole")


def test_a_broken_line_in_a_real_process(folder):
    """One line on standard error, which names the file and the line; exit code 2."""
    (folder / "fit.yaml").write_text(yaml.safe_dump(CONFIG))
    good = json_lines(TEXTS[:40]).splitlines(keepends=True)
    Path("text.jsonl").write_bytes(b"".join([*good[:6], b'{"text": "cut o\n', *good[6:]]))
    done = subprocess.run(
        [sys.executable, "-m", "memlm", "fit", "--config", "fit.yaml"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("memlm: error: text.jsonl:7: is not valid JSON")
    assert "data.skip_malformed: true" in line


def test_a_broken_line_is_skipped_only_if_asked_for_and_counted(run, error, caplog):
    short = [text for text in TEXTS if len(text) < 1500][:20]
    Path("text.jsonl").write_bytes(json_lines(short[:10]) + b"[1, 2]\n" + json_lines(short[10:]))
    message = error("--run.name", "strict")
    assert message.startswith("text.jsonl:11: holds a JSON list; expected an object with key 'text'")
    # The share held out of so few texts may be none at all.
    skip = ("--data.skip_malformed", "true", "--data.validation_fraction", "0")
    told = caplog.at_level(logging.INFO, logger="lightning.pytorch")
    with told, pytest.warns(UserWarning, match="skipped a malformed record.*text.jsonl:11"):
        assert run("fit", *skip, "--run.name", "skipping") == 0
    assert "1 epochs read; 1 malformed records skipped" in caplog.text


def test_truncated_files(error):
    """What is missing is unknown, so that no option skips it."""
    whole = json_lines(TEXTS[:8])
    for name, compress in (("text.jsonl.zst", zstandard.compress), ("text.jsonl.gz", gzip.compress)):
        cut = compress(whole)[:-9]
        Path(name).write_bytes(cut)
        words = ("--data.paths", f'["{name}"]', "--data.skip_malformed", "true", "--run.name", name)
        message = error(*words, "--data.validation_fraction", "0")
        assert message.startswith(f"{name}:") and "truncated" in message


@pytest.mark.parametrize(
    ("content", "words", "parts"),
    [
        (b"", (), ["text.jsonl", "no document"]),
        (b"\n\n", (), ["text.jsonl", "no document"]),
        (json_lines(["x", "  "]), (), ["text.jsonl:2", "an empty document", "data.skip_empty: true"]),
        (json_lines(["", "  "]), ("--data.skip_empty", "true"), ["text.jsonl", "no document"]),
        (
            json_lines(["A short text."]),
            ("--data.validation_fraction", "0"),
            ["text.jsonl", "14 tokens in all", "data.sequence_length", "129"],
        ),
        (json_lines(["A short text."], "body"), (), ["text.jsonl:1", "no key 'text'", "'body'"]),
    ],
    ids=["empty", "blank lines", "an empty text", "empty texts", "shorter than a row", "other key"],
)
def test_too_little_text(error, content, words, parts):
    Path("text.jsonl").write_bytes(content)
    message = error("--data.paths", '["text.jsonl"]', *words)
    for part in parts:
        assert part in message


def test_a_trained_tokenizer(run, memlm, error):
    """Trained by its verb, used by a run, and missed by a checkpoint if another one takes its place."""
    write("text.jsonl")
    for name, paths in (("one", "text.jsonl"), ("two", "half.jsonl")):
        Path("half.jsonl").write_bytes(json_lines(TEXTS[:20]))
        words = (f'--paths=["{paths}"]', "--vocab_size", "400", "--output", f"{name}.json")
        assert memlm("tokenizer", "train", *words) == 0
    assert run("fit", "--data.tokenizer", "one.json") == 0
    model = json.loads(Path("runs/text/model.json").read_text())
    assert model["architecture"]["vocab_size"] == 400
    measured = bits_per_byte("text")
    assert measured[-1] < 0.8 * 8
    assert measured[-1] < measured[0]

    more = ("--ckpt_path", "last", "--trainer.max_steps", "61")
    message = error(*more)
    assert "tokenizer" in message and "257" in message and "400" in message
    message = error(*more, "--data.tokenizer", "two.json")
    hashes = [json.loads(Path(f"{name}.json").read_text()) for name in ("one", "two")]
    assert hashes[0] != hashes[1]
    assert message.startswith("runs/text/checkpoints/last.ckpt") and message.count("(hash ") == 2
    assert "data.tokenizer" in message
    assert run("fit", *more, "--data.tokenizer", "one.json") == 0
