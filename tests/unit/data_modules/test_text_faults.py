"""Every kind of bad input to TextStream: an error that names the place, or skipped and counted on demand."""

import gzip
import json
from itertools import islice

import pytest
import zstandard

from data_modules import TextStream
from data_modules.packing import concatenate
from data_modules.streaming.documents import COUNTED
from memlm.errors import ConfigError, DataError

GOOD = ["good " * 20, "fine " * 20]


def lines(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def stream(folder, **options):
    options = {"sequence_length": 50, "batch_size": 1, "validation_fraction": 0.0, "num_workers": 0} | options
    return TextStream([f"{folder}/*"], **options)


def read(module, lane=0):
    """The texts of an epoch of a lane, and what its positions count from one epoch to the next."""
    [documents] = module.training_source().streams
    texts, first = [], {}
    for position, tokens in documents.read(documents.start(), True, 1, lane, module.lanes):
        first.setdefault(position["epoch"], position)
        if position["epoch"] == 2:
            return texts, tuple(first[2][name] - first[1][name] for name in COUNTED)
        if position["epoch"] == 0:
            texts.append(bytes(tokens[1:].tolist()).decode())
    raise AssertionError


MALFORMED = {
    "broken JSON": (b'{"text": "cut o\n', "is not valid JSON"),
    "invalid UTF-8": (b'{"text": "\xff"}\n', "is not valid UTF-8"),
    "missing key": (b'{"body": "x"}\n', "has no key 'text'"),
    "no object": (b"[1, 2]\n", "holds a JSON list"),
}


@pytest.mark.parametrize(("line", "message"), MALFORMED.values(), ids=MALFORMED)
@pytest.mark.parametrize("lanes", [1, 2])
def test_malformed_records(tmp_path, line, message, lanes):
    (tmp_path / "a.jsonl").write_bytes(lines(*GOOD) + line + lines(*GOOD))
    with pytest.raises(
        DataError, match=rf"a\.jsonl:3: {message}.*; data\.skip_malformed: true skips"
    ) as caught:
        read(stream(tmp_path, lanes=lanes))
    assert caught.value.line == 3
    with pytest.warns(UserWarning, match=r"skipped a malformed record.*a\.jsonl:3"):
        found = [read(stream(tmp_path, lanes=lanes, skip_malformed=True), lane) for lane in range(lanes)]
    assert sorted(text for texts, _ in found for text in texts) == sorted(2 * GOOD)
    assert sum(skipped for _, (skipped, _, _) in found) == 1


def test_a_text_file_that_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo \xff")
    (tmp_path / "b.txt").write_text(GOOD[0])
    with pytest.raises(DataError, match=r"a\.txt:2: is not valid UTF-8 text"):
        read(stream(tmp_path))
    with pytest.warns(UserWarning, match="skipped a malformed record"):
        assert read(stream(tmp_path, skip_malformed=True)) == ([GOOD[0]], (1, 0, 0))


EMPTY = {
    "a.jsonl": (lines(GOOD[0], " \n\t", GOOD[1]), r"a\.jsonl:2: is an empty document"),
    "a.jsonl.gz": (gzip.compress(lines(GOOD[0], "", GOOD[1])), r"a\.jsonl\.gz:2: is an empty document"),
    "a.txt": (f"{GOOD[0]}--\n--{GOOD[1]}".encode(), r"a\.txt: document 1 \(from 0\) is an empty document"),
}


@pytest.mark.parametrize("name", EMPTY)
def test_empty_documents(tmp_path, name):
    content, message = EMPTY[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message + "; data.skip_empty: true drops and counts"):
        read(stream(tmp_path, document_separator="--"))
    assert read(stream(tmp_path, document_separator="--", skip_empty=True)) == (GOOD, (0, 1, 0))


def truncated(compress):
    return compress(lines(*GOOD))[:20]


def parquet_cut(path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": GOOD}), path)
    path.write_bytes(path.read_bytes()[:-9])


UNREADABLE = {
    "b.jsonl.gz": (lambda path: path.write_bytes(truncated(gzip.compress)), "is truncated"),
    "b.jsonl.zst": (lambda path: path.write_bytes(truncated(zstandard.compress)), "is truncated"),
    "b.txt.gz": (lambda path: path.write_bytes(b"no gzip"), "cannot be decompressed"),
    "b.jsonl": (lambda path: path.symlink_to("nowhere"), "no such file"),
    "b.parquet": (parquet_cut, "parquet"),
}


@pytest.mark.parametrize("name", UNREADABLE)
@pytest.mark.parametrize("lanes", [1, 3])
def test_unreadable_files(tmp_path, name, lanes):
    """Between two good ones. No option but its own skips what is missing."""
    make, message = UNREADABLE[name]
    make(tmp_path / name)
    (tmp_path / "a.jsonl").write_bytes(lines(*GOOD, *GOOD))
    (tmp_path / "c.jsonl").write_bytes(lines(*GOOD, *GOOD))
    with pytest.raises(
        DataError, match=rf"{name}.*: .*{message}.*; data\.skip_unreadable: true goes on with"
    ):
        for lane in range(lanes):
            read(stream(tmp_path, lanes=lanes, skip_malformed=True, skip_empty=True), lane)
    with pytest.warns(UserWarning, match=rf"left the rest of a file unread: .*{name}"):
        found = [read(stream(tmp_path, lanes=lanes, skip_unreadable=True), lane) for lane in range(lanes)]
    assert sorted(text for texts, _ in found for text in texts) == sorted(4 * GOOD)
    assert sum(unreadable for _, (_, _, unreadable) in found) == 1


def test_what_precedes_a_fault_is_kept(tmp_path):
    texts = [f"{i} " + "word " * 5000 for i in range(40)]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(*texts))[:-9])
    with pytest.warns(UserWarning, match="left the rest of a file unread"):
        kept, (_, _, unreadable) = read(stream(tmp_path, skip_unreadable=True))
    assert kept == texts[: len(kept)] and len(kept) >= 39 and unreadable == 1
    [documents] = stream(tmp_path).training_source().streams
    found = []
    with pytest.raises(DataError, match="is truncated"):
        for _, tokens in documents.read(documents.start(), True, 1):
            found.append(bytes(tokens[1:].tolist()).decode())
    assert found == kept


def test_a_file_that_vanishes_while_training(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_bytes(lines(*GOOD))
    strict, lenient = stream(tmp_path), stream(tmp_path, skip_unreadable=True)
    for module in (strict, lenient):
        module.setup("fit")
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(DataError, match=r"b\.jsonl.*: no such file; data\.skip_unreadable: true"):
        read(strict)
    with pytest.warns(UserWarning, match=r"b\.jsonl.*: no such file"):
        assert read(lenient) == (2 * GOOD, (0, 0, 1))
    assert strict.fingerprint()  # known since before


def test_nothing_but_unreadable_files(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"no gzip")
    with (
        pytest.warns(UserWarning, match="left the rest"),
        pytest.raises(DataError, match="no document to train on"),
    ):
        read(stream(tmp_path, skip_unreadable=True))


def test_validation_counts_too(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(GOOD[0], "", GOOD[1]))
    module = stream(tmp_path, validation_paths=[str(tmp_path)], skip_empty=True)
    [loader] = module.val_dataloader()
    with pytest.warns(
        UserWarning, match="0 malformed records skipped, 1 empty documents dropped, 0 files un"
    ):
        list(loader)


@pytest.mark.parametrize("size", [3_000_000, pytest.param(100_000_000, marks=pytest.mark.slow)])
def test_a_long_document(tmp_path, size):
    """Is cut into rows from wherever a run resumes, with the tokens of a whole."""
    text = ("0123456789abcde\n" * (size // 16))[:size]
    (tmp_path / "a.jsonl").write_bytes(lines(GOOD[0], text, GOOD[1]))
    module = stream(tmp_path, sequence_length=65536, batch_size=8)
    [documents] = module.training_source().streams
    positioned = list(islice(documents.read(documents.start(), True, 1), 3))
    assert [len(tokens) for _, tokens in positioned] == [101, size + 1, 101]
    row, after = next(islice(concatenate(iter(positioned), 65536), 40, None))
    batch = next(module.training_source().batches({"row": 41, "lanes": [[after]]}, 1, 0))
    assert (batch["tokens"][0, 0], batch["targets"][0, 0]) == (
        row[-1],
        text[41 * 65536 - 101 :][:1].encode()[0],
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"paths": {}}, r"data\.paths: names no source"),
        ({"weights": {"web": 1}}, r"data\.weights: needs named sources"),
        (
            {"weights": {"web": 1, "wiki": 1}},
            r"data\.weights\.wiki: is the weight of no source; data\.paths has web, books",
        ),
        ({"weights": {"web": 1}}, r"data\.weights: has none for 'books' of data\.paths"),
        ({"weights": {"web": 1, "books": 0}}, r"data\.weights\.books: is 0; expected a positive number"),
        (
            {"weights": {"web": 1, "books": 1e-6}},
            r"data\.weights\.books: is 1e-06 of all weights; expected at least",
        ),
        (
            {"text_key": {"web": "text"}},
            r"data\.text_key: has no key for 'books' of data\.paths; it has 'web'",
        ),
    ],
)
def test_names_that_do_not_match(tmp_path, options, message):
    (tmp_path / "a.jsonl").write_bytes(lines(*GOOD))
    paths = {"web": [str(tmp_path)], "books": [str(tmp_path)]}
    if "needs named" in message:
        paths = [str(tmp_path)]
    with pytest.raises(ConfigError, match=message):
        TextStream(**({"paths": paths} | options))


def test_keys_by_source_need_sources(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(*GOOD))
    named = {"web": [str(tmp_path)]}
    with pytest.raises(ConfigError, match=r"data\.text_key: gives keys by source, but data\.paths names no"):
        TextStream([str(tmp_path)], text_key={"web": "text"})
    with pytest.raises(ConfigError, match=r"but data\.validation_paths names no sources"):
        TextStream(named, text_key={"web": "text"}, validation_paths=[str(tmp_path)]).val_dataloader()


def test_a_broken_source_is_found_before_its_first_row(tmp_path):
    for name, content in {"web": lines(*GOOD, *GOOD), "books": lines(*GOOD) + b"{\n"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_bytes(content)
    paths = {name: [str(tmp_path / name)] for name in ("web", "books")}
    module = TextStream(paths, weights={"web": 1, "books": 0.01}, sequence_length=300, validation_fraction=0)
    with pytest.raises(DataError, match=r"books/a\.jsonl:3: is not valid JSON"):
        module.setup("fit")
