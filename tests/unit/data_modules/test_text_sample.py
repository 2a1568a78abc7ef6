import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_modules import text_sample
from data_modules.readers import read_documents
from data_modules.text_sample import sample_documents
from memlm.errors import DataError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def write(path, texts):
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    path.write_bytes(gzip.compress(lines.encode(), mtime=0) if path.suffix == ".gz" else lines.encode())
    return path


@pytest.fixture
def files(tmp_path, monkeypatch):
    """About 10, 50 and 100 KB of JSON lines, a compressed file and a table; each document names its place."""
    monkeypatch.setattr(text_sample, "SMALLEST_PLACE", 2000)
    found = []
    for name, count in (("a.jsonl", 100), ("b.jsonl", 500), ("c.jsonl", 1000), ("d.jsonl.gz", 300)):
        found.append(write(tmp_path / name, [f"{name[0]} {i:04} " + "wörd " * 15 for i in range(count)]))
    table = pa.table({"text": [f"p {i:04} " + "wort " * 15 for i in range(400)]})
    pq.write_table(table, tmp_path / "p.parquet", row_group_size=50)
    return [*found, tmp_path / "p.parquet"]


def size(texts):
    return sum(len(text.encode()) for text in texts)


def test_without_a_bound_every_document_is_taken_and_all_bytes_are_told(files):
    told = []
    assert list(sample_documents(files, "text", None, told.append)) == list(read_documents(files, "text"))
    assert sum(told) == sum(file.stat().st_size for file in files)


def test_a_sample_is_even_over_files_and_within_them(files):
    plain = files[:3]
    told = []
    sample = list(sample_documents(plain, "text", 20_000, told.append))
    assert sample == list(sample_documents(plain, "text", 20_000, lambda more: None))
    assert abs(size(sample) - 20_000) < 200
    assert sum(told) == sum(file.stat().st_size for file in plain)
    total = sum(file.stat().st_size for file in plain)
    for file in plain:
        own = [text for text in sample if text[0] == file.name[0]]
        assert abs(size(own) - 20_000 * file.stat().st_size / total) < 200
    numbers = [int(text[2:6]) for text in sample if text[0] == "c"]
    assert numbers == sorted(set(numbers))
    for tenth in range(10):
        assert len([i for i in numbers if i // 100 == tenth]) == pytest.approx(len(numbers) / 10, abs=4)


def test_all_kinds_of_files_are_in_a_sample(files):
    sample = list(sample_documents(files, "text", 30_000, lambda more: None))
    assert size(sample) <= 30_100
    assert {text[0] for text in sample} == set("abcdp")
    assert set(sample[:-1]) <= set(read_documents(files, "text")), "the last may be cut"


@given(
    counts=st.lists(st.integers(0, 12), min_size=1, max_size=6),
    most=st.integers(1, 3000),
    place=st.integers(20, 400),
)
@settings(max_examples=60, deadline=None)
def test_a_sample_is_at_most_one_document_too_large(tmp_path_factory, counts, most, place):
    folder = tmp_path_factory.mktemp("sample")
    files = [
        write(folder / f"{i}.jsonl", [f"{i} {n} " + "x" * 40 for n in range(count)])
        for i, count in enumerate(counts)
    ]
    everything = list(read_documents(files, "text"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_sample, "SMALLEST_PLACE", place)
        sample = list(sample_documents(files, "text", most, lambda more: None))
    assert size(sample) <= most + 50
    assert len(set(sample)) == len(sample)
    whole = [text for text in sample if text in everything]
    assert len(whole) >= len(sample) - 1, "only the last may be cut"
    if most >= sum(file.stat().st_size for file in files):
        assert sample == everything


def test_a_document_larger_than_the_sample_is_cut(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("x" * 10_000)
    assert list(sample_documents([path], "text", 100, lambda more: None)) == ["x" * 100]


def test_faults_are_named(files, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "x"}\n{"txt": "x"}\n')
    with pytest.raises(DataError, match=r"bad.jsonl:2: has no key 'text'"):
        list(sample_documents([bad], "text", None, lambda more: None))
    empty = tmp_path / "empty.jsonl.gz"
    empty.write_bytes(b"")
    for most in (None, 10):
        with pytest.raises(DataError, match=r"empty.jsonl.gz.* is truncated"):
            list(sample_documents([files[0], empty], "text", most, lambda more: None))
