"""The benchmark of generation at tiny sizes."""

import json

import pytest
import torch

from benchmarks import generation
from benchmarks.measure import Report, Setting

SIZES = generation.Sizes(
    dim=16, layers=3, heads=2, vocab=64, half_keys=32, prompt=4, length=12, new=3, rows=4, scored_rows=3,
    scored_length=9,
)  # fmt: skip


def test_every_bar_is_measured(tmp_path, capsys):
    pytest.importorskip("transformers")
    setting = Setting(torch.device("cpu"), quick=True, repeats=1, flush_bytes=2**16, json=tmp_path / "x.json")
    report = Report(setting, generation.BARS)
    memory, dense = generation.models(SIZES, torch.device("cpu"))
    generation.decoding(report, memory, SIZES)
    generation.likelihood(report, memory, SIZES)
    bars = {name.replace("16 rows", "4 rows") for name in generation.BARS}
    generation.beside_transformers(report, dense, SIZES)
    assert {*report.values, *report.comparisons} == bars
    report.finish()
    assert "tokens:" not in capsys.readouterr().out  # the same ones, by whatever way
    assert set(json.loads(setting.json.read_text())["ratios"]) == set(generation.BARS)
