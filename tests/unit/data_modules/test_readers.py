import gzip
import json
from pathlib import Path

import pytest
import zstandard

from data_modules.readers import find_files, read_documents, read_records
from memlm.errors import DataError

LINES = ['{"text": "one"}', "", '{"id": 7, "text": "zwölf\\n\\ud83d\\ude00"}', "  ", '{"text": ""}']
TEXTS = [(0, "one"), (1, None), (2, "zwölf\n😀"), (3, None), (4, "")]


def zst(data, frames=1):
    size = -(-len(data) // frames)
    return b"".join(zstandard.compress(data[i * size : (i + 1) * size]) for i in range(frames))


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.ndjson", "A.JSON", "a.jsonl.gz", "a.json.zst", "a.ndjson.zstd"]
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("finished", [True, False])
def test_json_lines(tmp_path, name, end, finished):
    path = tmp_path / name
    data = (end.join(LINES) + (end if finished else "")).encode()
    if name.endswith("gz"):
        data = gzip.compress(data[:20]) + gzip.compress(data[20:])
    elif "zst" in name:
        data = zst(data, frames=3)
    path.write_bytes(data)
    assert list(read_records(path, "text")) == TEXTS
    for start in range(6):
        assert list(read_records(path, "text", start)) == TEXTS[start:]


@pytest.mark.parametrize("name", ["a.txt", "a.rst", "no_suffix", "b.md.gz", "c.txt.zst"])
def test_plain_text_is_one_document(tmp_path, name):
    path, text = tmp_path / name, "first\r\n{not json\n\nlast ü"
    data = text.encode()
    path.write_bytes(
        gzip.compress(data) if name.endswith("gz") else zst(data) if name.endswith("zst") else data
    )
    assert list(read_records(path, "text")) == [(0, text)]
    assert list(read_records(path, "text", start=1)) == []
    parts = [(0, "first\r\n{not json"), (1, "last ü")]
    assert list(read_records(path, "text", separator="\n\n")) == parts
    assert list(read_records(path, "text", start=1, separator="\n\n")) == parts[1:]


def test_lines_longer_than_what_is_read_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("data_modules.readers.CHUNK", 64)
    texts = ["x" * 1000, "y", "ü" * 333, "z" * 64]
    data = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts).encode()
    for name, content in {
        "a.jsonl": data,
        "a.jsonl.zst": zst(data, 2),
        "a.jsonl.gz": gzip.compress(data),
    }.items():
        (tmp_path / name).write_bytes(content)
        assert [text for _, text in read_records(tmp_path / name, "text")] == texts


def test_byte_order_mark_is_no_text(tmp_path):
    for name, content in {"a.txt": b"hello", "a.jsonl": b'{"text": "hello"}', "b.txt.zst": b"hello"}.items():
        data = b"\xef\xbb\xbf" + content
        (tmp_path / name).write_bytes(zst(data) if name.endswith("zst") else data)
        assert [text for _, text in read_records(tmp_path / name, "text")] == ["hello"]


def test_skippable_zstandard_frames_are_skipped(tmp_path):
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    path = tmp_path / "a.txt.zst"
    path.write_bytes(skippable + zst(b"one ") + skippable + zst(b"two") + skippable)
    assert list(read_documents([path], "text")) == ["one two"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', r"a.jsonl:2: is not valid JSON \(.*\); expected one JSON object on each line"),
        (b"[" * 100_000, "a.jsonl:2: is not valid JSON"),
        (b'{"text": "\xff"}', r"a.jsonl:2: is not valid UTF-8 \(invalid start byte at byte 10 of the line\)"),
        (b'["text"]', "a.jsonl:2: holds a JSON list; expected an object with key 'text'"),
        (b"null", "a.jsonl:2: holds a JSON null"),
        (b'{"body": "x"}', r"a.jsonl:2: has no key 'text' \(data.text_key\); it has 'body'"),
        (b"{}", r"a.jsonl:2: has no key 'text' \(data.text_key\); it has no keys"),
        (b'{"text": 3.5}', r"a.jsonl:2: 'text' is a number; expected a string"),
        (b'{"text": null}', r"a.jsonl:2: 'text' is a null; expected a string"),
        (b'{"text": "\\ud800"}', "a.jsonl:2: 'text' holds half a surrogate pair"),
    ],
)
def test_a_malformed_line_is_a_value_and_the_next_one_is_read(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "before"}\n' + line + b'\n{"text": "after"}\n')
    (_, before), (number, error), (_, after) = read_records(path, "text")
    assert (before, number, after) == ("before", 1, "after")
    assert isinstance(error, DataError) and error.line == 2
    with pytest.raises(DataError, match=message):
        raise error
    with pytest.raises(DataError, match=message):
        list(read_documents([path], "text"))


def test_a_text_file_in_another_encoding_is_named_with_its_line(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("eins\nzwei\nfünf".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin.txt:3: is not valid UTF-8 text \(.* at byte 11\)"):
        list(read_documents([path], "text"))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.9999])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_truncated_files_never_end_silently(tmp_path, suffix, kept, name):
    lines = b"".join(b'{"text": "%d"}\n' % (i * 7919 % 100_003) for i in range(20_000))
    whole = gzip.compress(lines) if suffix == ".gz" else zst(lines, frames=1)
    path = tmp_path / (name + suffix)
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(
        DataError, match=f"is truncated: the {suffix} stream ends before its end mark"
    ) as caught:
        list(read_documents([path], "text"))
    assert name != "a.jsonl" or caught.value.line is not None
    if kept == 0.5 and name == "a.jsonl":
        assert 5_000 < caught.value.line < 15_000


def test_truncation_between_zstandard_frames_of_a_line(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zst(b'{"text": "a"}\n') + zst(b'{"text": "b"}\n')[:-1])
    with pytest.raises(DataError, match=r"a.jsonl.zst:[23]: is truncated"):
        list(read_documents([path], "text"))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_what_is_not_compressed_as_its_name_says(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(b'{"text": "plain"}\n')
    with pytest.raises(DataError, match=f"a.jsonl{suffix}:1: cannot be decompressed as {suffix}"):
        list(read_documents([path], "text"))
    whole = bytearray((gzip.compress if suffix == ".gz" else zst)(bytes(range(256)) * 50))
    whole[len(whole) // 2] ^= 0xFF
    path = tmp_path / f"b.txt{suffix}"
    path.write_bytes(bytes(whole))
    with pytest.raises(DataError, match=r"b.txt.*: (cannot be decompressed|is truncated|is not valid UTF-8)"):
        list(read_documents([path], "text"))


def test_missing_file():
    with pytest.raises(DataError, match=r"gone.jsonl:1: no such file"):
        list(read_documents([Path("gone.jsonl")], "text"))


def test_find_files(tmp_path, monkeypatch):
    for name in ["b.txt", "a.txt", "sub/deep/c.txt", "sub/d.jsonl", "odd[1].txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    monkeypatch.chdir(tmp_path)

    def found(*patterns):
        return [str(file) for file in find_files(list(patterns), "data.paths")]

    assert found("*.txt") == ["a.txt", "b.txt", "odd[1].txt"]
    assert found("b.txt", "a.txt", "[ab].txt") == ["a.txt", "b.txt"]
    assert found("odd[1].txt") == ["odd[1].txt"]
    assert found("**/*.txt") == ["a.txt", "b.txt", "odd[1].txt", "sub/deep/c.txt"]
    assert found("sub/**") == ["sub/d.jsonl", "sub/deep/c.txt"]
    for pattern in ["*.zst", "nowhere/a.txt", "s*"]:
        with pytest.raises(DataError) as caught:
            found("a.txt", pattern)
        assert str(caught.value) == f"{pattern}: data.paths: matches no file"
    with pytest.raises(
        DataError, match=r"^sub: data.paths: is a directory; name its files, e.g. 'sub/\*\*/\*.jsonl'"
    ):
        found("sub")
    with pytest.raises(DataError, match=r"data.paths: names no file"):
        found()
