"""The benchmark of the data path at tiny sizes: it measures every bar, and its instruments work."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks import data
from benchmarks.commands import digests, documents, killed, memory_of, write_json_lines
from benchmarks.measure import Report, Setting


@pytest.fixture
def report():
    return Report(Setting(torch.device("cpu"), quick=True), data.BARS)


@pytest.mark.slow  # looks through all files of the environment
def test_documents_are_as_many_as_wanted_and_always_the_same(tmp_path):
    some = list(documents(0.2))
    assert 200_000 <= sum(len(text.encode()) for text in some) < 220_000
    assert some == list(documents(0.2)) and all(text.strip() for text in some)
    write_json_lines(tmp_path / "a.jsonl", 0.2)
    lines = (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["text"] for line in lines] == some


def test_a_changed_file_changes_the_digests(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a").write_text("one")
    before = digests(tmp_path)
    assert list(before) == ["sub/a"] and before == digests(tmp_path)
    (tmp_path / "sub" / "a").write_text("two")
    assert before != digests(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked for in /proc")
def test_memory_counts_descendants():
    grow = "a = bytearray(b'x' * 50_000_000); print(flush=True); input()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grow!r}])"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe) as process:
        process.stdout.readline()
        held = memory_of(process.pid)
        process.stdin.write(b"\n")  # lets both end
    assert 50_000_000 < held < 200_000_000


def test_killed_tells_whether_it_came_in_time(tmp_path):
    assert killed(["--help"], tmp_path, after=60) is False
    assert killed(["fit", "--help"], tmp_path, after=0.01) is True


@pytest.mark.slow
def test_the_parts_at_tiny_sizes(tmp_path, report):
    write_json_lines(tmp_path / "text.jsonl", 0.5)
    data.run(
        *("tokenizer", "train", f'--paths=["{tmp_path}/text.jsonl"]', "--vocab_size", "500"),
        *("--output", str(tmp_path / "tokenizer.json")),
    )
    data.run(*data.prepare_words(tmp_path / "text.jsonl", tmp_path / "tokenizer.json", tmp_path / "text"))
    data.prepare_speed(report, tmp_path, 0.5, 1)
    data.reading(report, tmp_path / "text", 0.2)
    data.start_up(report, tmp_path, tmp_path / "text", 0.2)
    data.streaming(report, tmp_path, 0.5, 0.5)
    data.prepare_kills(report, tmp_path, 0.5, 1)
    data.training_kills(report, tmp_path, tmp_path / "text", 12, 1)
    data.prepare_memory(report, tmp_path, 0.5)
    left_out = {"quickstart_data_wait_share", "packed_data_wait_share"}  # of whole runs
    assert report.values.keys() == data.BARS.keys() - left_out
    assert report.values["prepare_kills_differing"] == report.values["training_kills_differing"] == 0
