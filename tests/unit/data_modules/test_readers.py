import gzip
import hashlib
import json
import os
import random
import time
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from data_modules.file_bytes import contents
from data_modules.readers import find_files, is_held_out, read_documents, read_records
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
    monkeypatch.setattr("data_modules.file_bytes.CHUNK", 64)
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
        (b'{"body": "x"}', r"a.jsonl:2: has no key 'text' \(option text_key\); it has 'body'"),
        (b"{}", r"a.jsonl:2: has no key 'text' \(option text_key\); it has no keys"),
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
    with pytest.raises(DataError, match=r"gone.jsonl: no such file"):
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
    with pytest.raises(DataError, match=r"data.paths: names no file"):
        found()


def test_a_directory_stands_for_the_known_files_below_it(tmp_path, monkeypatch):
    known = ["a.jsonl", "b.ndjson.gz", "c.JSON.zst", "d.txt", "deep/er/e.txt.zstd", "deep/f.parquet"]
    others = [
        "readme.md",
        "_SUCCESS",
        "a.jsonl.sha256",
        ".hidden.jsonl",
        ".cache/g.jsonl",
        "f.parquet.gz.part",
    ]
    for name in known + others:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text("x")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "h.jsonl").write_text("x")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "deep" / "round").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "dangling.jsonl").symlink_to("nowhere")
    (tmp_path / "readmes").mkdir()
    (tmp_path / "readmes" / "readme.md").write_text("x")
    monkeypatch.chdir(tmp_path)
    found = [str(file) for file in find_files(["data", "data/d.txt"], "paths")]
    assert found == sorted(f"data/{name}" for name in [*known, "linked/h.jsonl", "dangling.jsonl"])
    with pytest.raises(DataError, match=r"^readmes: paths: is a directory without a file named \*.jsonl, "):
        find_files(["readmes"], "paths")
    with pytest.raises(DataError, match=r"dangling.jsonl.*: no such file"):
        list(read_documents([Path("data/dangling.jsonl")], "text"))


def test_a_directory_that_cannot_be_listed_is_not_passed_over(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    (tmp_path / "a.jsonl").write_text("x")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"locked: cannot be read \(Permission denied\)"):
        find_files([str(tmp_path)], "paths")


def test_a_share_of_the_records(tmp_path):
    rng = random.Random(0)
    texts = ["" if rng.random() < 0.1 else str(i) * rng.randrange(60) for i in range(500)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    (tmp_path / "a.txt").write_text("|".join(texts))
    for name in ["a.jsonl", "a.jsonl.gz", "a.txt"]:
        for _ in range(60):
            every, start = rng.randrange(1, 20), rng.randrange(520)
            offset = rng.randrange(every)
            found = list(read_records(tmp_path / name, "text", start, "|", every, offset))
            assert found == [(n, t) for n, t in enumerate(texts) if n >= start and n % every == offset]


def test_records_of_other_shares_are_not_parsed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n\xff broken\n' * 10)
    assert [text for _, text in read_records(path, "text", every=2, offset=0)] == ["good"] * 10
    assert all(isinstance(text, DataError) for _, text in read_records(path, "text", every=2, offset=1))


def test_a_text_file_without_a_wanted_record_is_not_opened(tmp_path):
    gone = tmp_path / "gone.txt"
    assert list(read_records(gone, "text", every=3, offset=2)) == []
    assert list(read_records(gone, "text", start=1)) == []
    with pytest.raises(DataError, match=r"gone.txt: no such file"):
        list(read_records(gone, "text", every=3, offset=0))


def test_what_comes_before_a_fault_of_the_file_is_given(tmp_path):
    lines = [b'{"text": "%d"}\n' % i for i in range(3000)]
    for suffix, press in {".gz": gzip.compress, ".zst": zst}.items():
        path = tmp_path / f"a.jsonl{suffix}"
        path.write_bytes(press(b"".join(lines[:2000])) + press(b"".join(lines[2000:]))[:-3])
        found = []
        with pytest.raises(DataError, match=f"is truncated: the {suffix} stream") as caught:
            for _, text in read_records(path, "text"):
                found.append(text)
        assert len(found) >= 2000 and found == [str(i) for i in range(len(found))]
        assert 2001 <= caught.value.line <= 3001


def test_gzip_members_with_padding_and_garbage(tmp_path):
    path = tmp_path / "a.txt.gz"
    members = gzip.compress(b"one ") + b"\0" * 100_000 + gzip.compress(b"two") + b"\0" * 512
    path.write_bytes(members)
    assert list(read_documents([path], "text")) == ["one two"]
    path.write_bytes(members + b"garbage")
    with pytest.raises(DataError, match=r"a.txt.gz: cannot be decompressed as .gz \(.*header"):
        list(read_documents([path], "text"))


def test_compressed_repetitions_do_not_fill_the_memory(tmp_path):
    whole = 300_000_000
    with (
        open(tmp_path / "a.txt.zst", "wb") as file,
        zstandard.ZstdCompressor(3).stream_writer(file) as writer,
    ):
        for _ in range(whole // 10**6):
            writer.write(bytes(10**6))
    sizes = [len(chunk) for chunk in contents(tmp_path / "a.txt.zst")]
    assert sum(sizes) == whole and max(sizes) <= 40_000_000


@pytest.mark.parametrize("megabytes", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_a_huge_document_takes_time_in_proportion_to_its_size(tmp_path, megabytes):
    text = 'A "quoted" line with ü and \n' * (megabytes * 1_000_000 // 30)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": text}) + '\n{"text": "small"}\n' + json.dumps({"text": text}))
    started = time.process_time()
    records = dict(read_records(path, "text"))
    took = time.process_time() - started
    assert records == {0: text, 1: "small", 2: text}
    # 0.03 s for 8 MB here. Were lines put together anew with every chunk, 100 MB would be copied 400 times.
    assert took < 0.1 * megabytes + 1


def test_a_file_that_vanishes_or_fails_while_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n' * 100)
    monkeypatch.setattr("data_modules.file_bytes.CHUNK", 64)
    records = read_records(path, "text")
    assert next(records) == (0, "a")
    path.unlink()
    assert len(list(records)) == 99  # an open file stays readable
    with pytest.raises(DataError, match=r"a.jsonl: no such file"):
        next(read_records(path, "text"))
    (tmp_path / "dir.jsonl").mkdir()
    with pytest.raises(DataError, match=r"dir.jsonl: cannot be read \(Is a directory\)"):
        next(read_records(tmp_path / "dir.jsonl", "text"))


def test_the_choice_of_documents_to_hold_out():
    texts = [f"document {i} ü" for i in range(4000)]
    for fraction in [0.0, 0.005, 0.3, 1.0]:
        chosen = [text for text in texts if is_held_out(text, fraction, seed=3)]
        expected = [
            text
            for text in texts
            if int(hashlib.blake2b(f"3:{text}".encode(), digest_size=8).hexdigest(), 16) / 2**64 < fraction
        ]
        assert chosen == expected
        assert abs(len(chosen) / len(texts) - fraction) < 0.03
    assert {is_held_out(text, 0.3, 3) == is_held_out(text, 0.3, 4) for text in texts} == {True, False}


def test_a_separator_may_end_the_last_document(tmp_path):
    path = tmp_path / "a.txt"
    for end in ("---\n", "---", "--- \n\n"):
        path.write_text(f"one\n---\n\n---\ntwo\n{end}")
        expected = [(0, "one\n"), (1, "\n\n"), (2, "\ntwo\n"), (3, None)]
        assert list(read_records(path, "text", separator="---")) == expected
        assert list(read_records(path, "text", separator="---", every=2, offset=1)) == expected[1::2]
    path.write_text("\n")  # one empty document, not the end of one
    assert list(read_records(path, "text", separator="---")) == [(0, "\n")]


def test_a_file_reached_by_several_names_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "b.jsonl").write_text('{"text": "b"}\n')
    (tmp_path / "in" / "a.jsonl").symlink_to("b.jsonl")
    names = ["in", "in/b.jsonl", str(tmp_path / "in" / "b.jsonl"), "in/../in/*.jsonl"]
    assert len(find_files(names, "paths")) == 1
    (tmp_path / "in" / "c.jsonl").write_text('{"text": "b"}\n')  # equal content is another file
    assert len(find_files(names, "paths")) == 2


@given(
    st.lists(st.sampled_from(["a", "é", "\n", "-", "--", "---", "b\n"]), max_size=40).map("".join),
    st.sampled_from(["-", "--", "---", "\n\n", "é-"]),
    st.integers(1, 9),
)
def test_documents_of_a_text_file_are_cut_like_strings(tmp_path_factory, text, separator, chunk):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(text.encode())
    expected: list[str | None] = [*text.split(separator)]
    if len(expected) > 1 and not expected[-1].strip():
        expected[-1] = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_modules.file_bytes.CHUNK", chunk)
        assert [record for _, record in read_records(path, "text", separator=separator)] == expected


def test_bad_utf_8_spoils_one_document_of_a_text_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n---two\n\xff---three")
    (_, one), (_, two), (_, three) = read_records(path, "text", separator="---")
    assert (one, three) == ("one\n", "three")
    assert str(two) == f"{path}:3: is not valid UTF-8 text (invalid start byte at byte 11)"
