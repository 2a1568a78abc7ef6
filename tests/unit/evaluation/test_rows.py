import gzip
import json

import pytest
import zstandard

from memlm.errors import DataError
from memlm.evaluation.rows import read_rows, read_table, read_text

ROWS = [{"question": "who?", "n": 1}, {"question": "Ünïcode\u2028here", "n": 2}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in ROWS)


def fields(path, **options):
    return [row.fields for row in read_rows(path, **options)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson", "a.jsonl.gz", "a.json.zst"])
def test_json_lines(tmp_path, name):
    path, data = tmp_path / name, b"\xef\xbb\xbf" + LINES.encode()
    if name.endswith(".gz"):
        data = gzip.compress(data)
    if name.endswith(".zst"):
        # Two frames, without their size, as a streaming compressor writes them.
        parts = [data[:20], data[20:]]
        data = b"".join(zstandard.ZstdCompressor(write_content_size=False).compress(part) for part in parts)
    path.write_bytes(data)
    assert fields(path) == ROWS
    assert [row.line for row in read_rows(path)] == [1, 3]


def test_a_json_document(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ROWS, indent=1))
    assert fields(path) == ROWS
    path.write_text(json.dumps({"Data": ROWS, "Version": 1}))
    assert fields(path, within="Data") == ROWS
    path.write_text(json.dumps(ROWS[0], indent=1))
    assert fields(path) == ROWS[:1]


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    nested = [row | {"answer": {"aliases": ["x", "y"]}} for row in ROWS]
    pq.write_table(pa.Table.from_pylist(nested), path)
    assert fields(path) == nested
    assert read_rows(path)[1].texts("answer.aliases") == ["x", "y"]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"a.parquet: is damaged, cut off or no parquet file"):
        read_rows(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "none.jsonl: no such file"),
        ("none.parquet", None, "none.parquet: no such file"),
        ("a.jsonl", "", "a.jsonl: has no examples"),
        ("a.json", "[]", "a.json: has no examples"),
        ("a.jsonl", '{"a": 1}\n{"a": ', r"a.jsonl:2: is not valid JSON \(Expecting value at column 7\)"),
        ("a.jsonl", "[1]\n", "a.jsonl:1: is a JSON list; expected an object"),
        ("a.json", '[{"a": 1}, 3]', r"a.json: item 1 \(from 0\) is a JSON number; expected an object"),
        ("a.json", '[\n{"a" 1}]', "a.json:2: is not valid JSON .*column 6"),
        ("a.json", '"text"', "a.json: is a JSON string; expected a list of examples"),
        ("a.txt", "x", r"a.txt: has suffix '.txt'; expected .jsonl, .ndjson, .json or .parquet"),
        ("a.jsonl", b'{"a": 1}\n\xff\n', "a.jsonl:2: is not valid UTF-8"),
        ("a.jsonl.gz", b"no", "a.jsonl.gz: cannot be decompressed as .gz"),
        ("a.jsonl.zst", b"no", "a.jsonl.zst: cannot be decompressed as .zst"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / name)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_file_cut_off_is_no_shorter_file(tmp_path, suffix):
    data = LINES.encode() * 2000
    whole = gzip.compress(data) if suffix == ".gz" else zstandard.compress(data)
    (tmp_path / f"a.jsonl{suffix}").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=f"cannot be decompressed as {suffix}"):
        read_rows(tmp_path / f"a.jsonl{suffix}")


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda row: row.text("b"), "has no field 'b'; expected a string. It has 'a', 'l', 'e', 'n', 's'"),
        (lambda row: row.text("a.x"), "has no field 'a.x'"),
        (lambda row: row.text("n"), "has no field 'n'"),
        (lambda row: row.text("l"), "field 'l' is a list; expected a string"),
        (lambda row: row.text("e"), "field 'e' is empty; expected some text"),
        (lambda row: row.texts("a"), "field 'a' is a number; expected a list of strings"),
        (lambda row: row.texts("l"), r"field 'l\[1\]' is a number; expected a string"),
        (lambda row: row.texts("s", least=2), "field 's' has 1 entries; expected at least 2"),
        (lambda row: row.index("a", 3), "field 'a' is 3; expected a number from 0 to 2"),
        (lambda row: row.index("s", 3), r"field 's' is \['x'\]; expected a number from 0 to 2"),
        (lambda row: row.index("e", 3), "field 'e' is ' '; expected a number from 0 to 2"),
    ],
)
def test_what_is_wrong_with_a_field(tmp_path, ask, message):
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"a": 3, "l": ["x", 1], "e": " ", "n": null, "s": ["x"]}\n')
    [row] = read_rows(path)
    with pytest.raises(DataError, match=f"a.jsonl:2: {message}"):
        ask(row)


def test_a_table(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('"one, two",b\n"of\nlines ""quoted""",d\n')
    rows = read_table(path, ("x", "y"))
    assert [row.fields for row in rows] == [
        {"x": "one, two", "y": "b"},
        {"x": 'of\nlines "quoted"', "y": "d"},
    ]
    for content, message in [
        ("a,b\nc\n", "a.csv:2: has 1 columns; expected 2: x, y"),
        ('"of\nlines",b\nc,d,e\n', "a.csv:3: has 3 columns; expected 2: x, y"),
        ('a,b\n"never closed,\n', "a.csv:2: is not valid CSV"),
        ("\n", "a.csv: has no examples"),
    ]:
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            read_table(path, ("x", "y"))


def test_a_directory_is_no_file(tmp_path):
    with pytest.raises(DataError, match=r"cannot be read"):
        read_text(tmp_path)
