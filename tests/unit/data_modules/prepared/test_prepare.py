import hashlib
import json
import os
import re

import numpy as np
import pytest
import zstandard

from data_modules.prepared.manifest import SPLITS, Manifest, expand
from data_modules.prepared.shard import open_shard
from data_modules.readers import read_piece
from data_modules.text_stream import TextStream
from memlm.errors import ConfigError, DataError, UserError
from memlm.metrics import IGNORED
from memlm.tokenizers import load_tokenizer


def texts_of(folder):
    """The documents of each split, in order, decoded from the shards."""
    expand(folder)
    manifest = Manifest.load(folder)
    tokenizer = manifest.load_tokenizer()
    found = {}
    for split in SPLITS:
        found[split] = []
        for info in manifest.shards(split):
            shard = open_shard(manifest.path(info), tokenizer.hash)
            for start, stop in zip(shard.starts[:-1], shard.starts[1:], strict=True):
                eos, *tokens = shard.tokens[int(start) : int(stop)].tolist()
                assert eos == manifest.eos_id
                found[split].append(tokenizer.decode(tokens))
    return found


def is_held_out(text, fraction, seed):
    digest = hashlib.blake2b(f"{seed}:{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < fraction


def lines(path, *texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_every_document_comes_once_in_order_on_its_side(
    tmp_path, prepare, inputs, documents, bpe, name, compress
):
    tokenizer = bpe if name == "bpe" else "bytes"
    result = prepare(tmp_path / "o", inputs, tokenizer=tokenizer, compress=compress, seed=5)
    expected = {
        "train": [text for text in documents if not is_held_out(text, 0.1, 5)],
        "validation": [text for text in documents if is_held_out(text, 0.1, 5)],
    }
    manifest = Manifest.load(tmp_path / "o")
    assert result.manifest == manifest
    names = {path.name.split(".", 1)[1] for path in (tmp_path / "o").glob("train-*")}
    assert names == ({"tokens.zst"} if compress else {"tokens"})
    manifest.check()
    manifest.verify()
    assert texts_of(tmp_path / "o") == expected
    manifest.check()
    manifest.verify()
    used = load_tokenizer(str(tokenizer))
    assert manifest.counts.documents == len(documents)
    assert manifest.counts.text_bytes == sum(len(text.encode()) for text in documents)
    assert manifest.counts.tokens == sum(1 + len(used.encode(text)) for text in documents)
    for split in SPLITS:
        shards = manifest.shards(split)
        assert sum(shard.documents for shard in shards) == len(expected[split])
        assert sum(shard.text_bytes for shard in shards) == sum(len(t.encode()) for t in expected[split])
    assert len(manifest.shards("train")) > 4
    assert manifest.tokenizer_hash == used.hash
    assert {source["file"]: source["bytes"] for source in manifest.sources} == {
        str(path): path.stat().st_size for path in inputs.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("options", [{}, {"deduplicate": True, "compress": True}])
def test_files_are_the_same_for_any_number_of_workers(tmp_path, prepare, inputs, bpe, contents, options):
    made = []
    for workers in (1, 2, 3, 40):  # more than units: several threads tokenize in each process
        prepare(tmp_path / f"{workers}", inputs, tokenizer=bpe, workers=workers, **options)
        made.append(contents(tmp_path / f"{workers}"))
    assert len(made[0]) > 8
    assert all(other == made[0] for other in made[1:])


def test_shards_are_about_as_large_as_asked(tmp_path, prepare):
    lines(tmp_path / "a.jsonl", *(f"document {i:06}" for i in range(20_000)))
    for i in range(100):
        lines(tmp_path / f"b{i:03}.jsonl", *["x" * 30] * 40)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    prepare(tmp_path / "o", tmp_path, shard_megabytes=0.1, validation_fraction=0.0)
    manifest = Manifest.load(tmp_path / "o")
    assert manifest.shards("validation") == []
    sizes = [shard.documents for shard in manifest.shards("train")]
    assert len(sizes) == -(-size // 100_000)
    texts = [shard.text_bytes for shard in manifest.shards("train")]
    assert max(texts) < 1.6 * np.mean(texts)


@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_duplicates_are_dropped_wherever_they_lie(tmp_path, prepare, inputs, documents, fraction):
    prepare(tmp_path / "o", inputs, deduplicate=True, validation_fraction=fraction)
    first = list(dict.fromkeys(documents))
    assert len(first) < len(documents)
    held_out = [is_held_out(text, fraction, 0) for text in first]
    assert texts_of(tmp_path / "o") == {
        "train": [text for text, held in zip(first, held_out, strict=True) if not held],
        "validation": [text for text, held in zip(first, held_out, strict=True) if held],
    }
    counts = Manifest.load(tmp_path / "o").counts
    assert (counts.documents, counts.duplicates) == (len(first), len(documents) - len(first))


@pytest.mark.parametrize("seed", [0, 5])
def test_the_stream_of_the_same_text_holds_out_the_same_documents(tmp_path, prepare, inputs, bpe, seed):
    prepare(tmp_path / "o", inputs, tokenizer=bpe, validation_fraction=0.1, seed=seed)
    stream = TextStream(
        [str(inputs)],
        str(bpe),
        sequence_length=50,
        batch_size=4,
        validation_fraction=0.1,
        seed=seed,
        packing="documents",
    )
    (source,) = stream.evaluation_sources(test=False).values()
    found = []
    for batch in source.batches(stream.start(), world=1, rank=0):
        found += batch["tokens"][batch["targets"] != IGNORED].tolist()
    manifest = Manifest.load(tmp_path / "o")
    shards = [open_shard(manifest.path(info)) for info in manifest.shards("validation")]
    assert found == np.concatenate([shard.tokens for shard in shards]).tolist()


def test_a_separator_parts_the_documents_of_text_files(tmp_path, prepare):
    (tmp_path / "a.txt").write_text("one<|endoftext|>two\n<|endoftext|>three")
    prepare(tmp_path / "o", tmp_path / "a.txt", document_separator="<|endoftext|>", validation_fraction=0)
    assert texts_of(tmp_path / "o")["train"] == ["one", "two\n", "three"]


def test_parquet_files_give_one_document_a_row(tmp_path, prepare):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    texts = [f"row {i}" for i in range(500)]
    pq.write_table(pa.table({"body": texts}), tmp_path / "a.parquet", row_group_size=50)
    prepare(
        tmp_path / "o", tmp_path / "a.parquet", text_key="body", validation_fraction=0, shard_megabytes=0.002
    )
    assert texts_of(tmp_path / "o")["train"] == texts
    assert len(Manifest.load(tmp_path / "o").shards("train")) > 1
    pq.write_table(pa.table({"body": [*texts[:3], " ", *texts]}), tmp_path / "b.parquet", row_group_size=50)
    with pytest.raises(
        DataError, match=r"b.parquet: row 3 \(from 0\) is an empty document; --skip_empty true"
    ):
        prepare(tmp_path / "p", tmp_path / "b.parquet", text_key="body")


def test_going_over_a_complete_folder_changes_nothing(tmp_path, prepare, inputs, bpe):
    prepare(tmp_path / "o", inputs, tokenizer=bpe)
    before = {path: path.stat() for path in (tmp_path / "o").rglob("*")}
    assert prepare(tmp_path / "o", inputs, tokenizer=bpe, workers=3, skip_empty=True) is None
    assert {path: path.stat() for path in (tmp_path / "o").rglob("*")} == before
    (tmp_path / "o" / "train-00001.tokens").unlink()
    with pytest.raises(DataError, match=r"train-00001.tokens: no such file"):
        prepare(tmp_path / "o", inputs, tokenizer=bpe)


@pytest.mark.parametrize("complete", [True, False])
def test_another_command_for_a_folder_is_refused_by_name(
    tmp_path, prepare, inputs, bpe, contents, complete, monkeypatch
):
    path = lines(tmp_path / "a.jsonl", "one", "two", "three")
    more = lines(tmp_path / "b.jsonl", "four")
    output = tmp_path / "o"
    if complete:
        prepare(output, path)
    else:
        (tmp_path / "c.jsonl").write_text("broken")
        with monkeypatch.context() as patch:
            patch.setattr("data_modules.prepared.preparation.Manifest.save", lambda self: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                prepare(output, path)
    before = contents(output)
    end = f"; give what {output} was begun with, or remove that folder to start over"
    for options, error in [
        ({"seed": 1}, f"seed: is 1; it was 0{end}"),
        ({"text_key": "body"}, f"text_key: is 'body'; it was 'text'{end}"),
        ({"validation_fraction": 0.2}, f"validation_fraction: is 0.2; it was 0.1{end}"),
        ({"deduplicate": True}, f"deduplicate: is True; it was False{end}"),
        ({"compress": True}, f"compress: is True; it was False{end}"),
        ({"shard_megabytes": 1.0}, f"shard_megabytes: is 1.0; it was 0.02{end}"),
        ({"document_separator": "x"}, f"document_separator: is 'x'; it was None{end}"),
        (
            {"tokenizer": bpe},
            f"tokenizer: has the hash {load_tokenizer(str(bpe)).hash}; it was one with "
            f"{load_tokenizer('bytes').hash}{end}",
        ),
    ]:
        with pytest.raises(ConfigError) as caught:
            prepare(output, path, **options)
        assert str(caught.value) == error
    with pytest.raises(DataError, match=r"b.jsonl: is new among the inputs \(paths\)"):
        prepare(output, path, more)
    with pytest.raises(DataError, match=r"(b.jsonl: is new|a.jsonl: is no longer) among the inputs"):
        prepare(output, more)
    lines(path, "one", "two", "other")
    os.utime(path, ns=(1, 1))
    if complete:
        assert prepare(output, path) is None  # as large as before; the manifest knows no times
    else:
        with pytest.raises(DataError, match=r"a.jsonl: was changed since the preparation began"):
            prepare(output, path)
    lines(path, "one", "two")
    with pytest.raises(DataError, match=r"a.jsonl: has 32 bytes; it had 50; give what"):
        prepare(output, path)
    assert contents(output) == before


def test_an_output_folder_with_something_else_in_it_is_refused(tmp_path, prepare, contents):
    path = lines(tmp_path / "a.jsonl", "one")
    for name in "abcd":
        (tmp_path / "o" / name).mkdir(parents=True)
    with pytest.raises(DataError, match=r"o: holds other files \(a, b, c, \.\.\.\); expected an empty"):
        prepare(tmp_path / "o", path)
    assert contents(tmp_path / "o") == {}
    with pytest.raises(DataError, match=r"a.jsonl: is a file; expected a folder to make \(output\)"):
        prepare(path, path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_fraction": 1.0}, "validation_fraction: is 1.0; expected 0 <= validation_fraction < 1"),
        ({"shard_megabytes": 0}, "shard_megabytes: is 0; expected a positive number"),
        ({"document_separator": ""}, "document_separator: is empty"),
    ],
)
def test_options_out_of_range(tmp_path, prepare, options, message):
    with pytest.raises(ConfigError, match=message):
        prepare(tmp_path / "o", lines(tmp_path / "a.jsonl", "one"), **options)


BROKEN = {
    "json": (b'{"text": "two', "is not valid JSON"),
    "utf8": (b'{"text": "\xff"}', "is not valid UTF-8"),
    "key": (b'{"body": "two"}', "has no key 'text'"),
    "kind": (b'{"text": 2}', "'text' is a number"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_malformed_records_end_it_or_are_skipped_and_counted(tmp_path, prepare, capsys, fault):
    line, message = BROKEN[fault]
    path = tmp_path / "a.jsonl"
    texts = [f"document {i}" for i in range(4000)]
    whole = [json.dumps({"text": text}).encode() for text in texts]
    path.write_bytes(b"\n".join([*whole[:3000], line, *whole[3000:]]) + b"\n")
    with pytest.raises(DataError, match=rf"a.jsonl:3001: {message}.*; --skip_malformed true skips"):
        prepare(tmp_path / "o", path)
    prepare(tmp_path / "o", path, skip_malformed=True)  # goes on
    found = texts_of(tmp_path / "o")
    assert sorted(found["train"] + found["validation"]) == sorted(texts)
    assert Manifest.load(tmp_path / "o").counts.malformed == 1
    assert re.search(rf"skipped: {path}: record \d+ \(from 0\) .* {message}", capsys.readouterr().err)


def test_empty_documents_end_it_or_are_skipped_and_counted(tmp_path, prepare, capsys):
    lines(tmp_path / "a.jsonl", *[f"document {i}" for i in range(3000)], " \n", "end")
    (tmp_path / "b.txt").write_text("")
    with pytest.raises(DataError, match=r"a.jsonl:3001: is an empty document; --skip_empty true skips"):
        prepare(tmp_path / "o", tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"b.txt: document 0 \(from 0\) is an empty document; --skip_empty"):
        prepare(tmp_path / "p", tmp_path / "b.txt")
    capsys.readouterr()
    result = prepare(tmp_path / "q", tmp_path, skip_empty=True)
    assert (result.manifest.counts.empty, result.manifest.counts.documents) == (2, 3001)
    place = r"a.jsonl: record \d+ \(from 0\) of the part that begins at byte [\d,]+"
    assert re.search(f"skipped: .*{place} is an empty document", capsys.readouterr().err)


def test_only_some_of_many_skipped_records_are_named(tmp_path, prepare, capsys):
    lines(tmp_path / "a.jsonl", "one", *[""] * 20_000)
    result = prepare(tmp_path / "o", tmp_path, skip_empty=True)
    assert result.manifest.counts.empty == 20_000
    assert 3 <= capsys.readouterr().err.count("skipped:") <= 10


def test_nothing_but_empty_documents_is_an_error(tmp_path, prepare):
    lines(tmp_path / "a.jsonl", "", " ")
    (tmp_path / "b.jsonl").write_text("{")
    message = r"o: no document is left of the inputs \(paths\): 2 are empty, 1 malformed"
    with pytest.raises(DataError, match=message):
        prepare(
            tmp_path / "o", tmp_path / "a.jsonl", tmp_path / "b.jsonl", skip_empty=True, skip_malformed=True
        )
    assert not (tmp_path / "o" / "manifest.json").exists()


@pytest.mark.parametrize("suffix", ["zst", "gz"])
def test_a_truncated_file_ends_it_or_is_kept_up_to_the_fault(tmp_path, prepare, capsys, suffix):
    import gzip

    texts = [hashlib.sha256(bytes([i % 256, i // 256])).hexdigest() for i in range(20_000)]
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    packed = zstandard.compress(data) if suffix == "zst" else gzip.compress(data)
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(packed[: len(packed) // 2])
    lines(tmp_path / "b.jsonl", "after")
    with pytest.raises(DataError, match=rf"a.jsonl.{suffix}:\d+: is truncated.*; --skip_unreadable true"):
        prepare(tmp_path / "o", tmp_path, shard_megabytes=1)
    result = prepare(
        tmp_path / "o", tmp_path, shard_megabytes=1, skip_unreadable=True, validation_fraction=0.1
    )
    found = texts_of(tmp_path / "o")
    count = result.manifest.counts.documents - 1
    assert 5_000 < count < 15_000
    assert sorted(found["train"] + found["validation"]) == sorted([*texts[:count], "after"])
    (fault,) = result.manifest.unreadable
    assert fault["file"] == str(path) and fault["message"].startswith("is truncated")
    assert f"left out the rest of a file: {path}:" in capsys.readouterr().err


def test_unreadable_files_end_it_or_are_listed(tmp_path, prepare):
    lines(tmp_path / "b.jsonl", "after")
    (tmp_path / "a.jsonl.gz").write_bytes(b"no gzip at all")
    with pytest.raises(DataError, match=r"a.jsonl.gz:1: cannot be decompressed"):
        prepare(tmp_path / "o", tmp_path)
    result = prepare(tmp_path / "o", tmp_path, skip_unreadable=True)
    assert [fault["file"] for fault in result.manifest.unreadable] == [str(tmp_path / "a.jsonl.gz")]
    assert result.manifest.counts.documents == 1
    pytest.importorskip("pyarrow")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 is not all that makes a table PAR1")
    with pytest.raises(DataError, match=r"c.parquet: is damaged"):
        prepare(tmp_path / "p", tmp_path / "b.jsonl", tmp_path / "c.parquet")
    result = prepare(tmp_path / "p", tmp_path / "b.jsonl", tmp_path / "c.parquet", skip_unreadable=True)
    assert [fault["file"] for fault in result.manifest.unreadable] == [str(tmp_path / "c.parquet")]


@pytest.mark.parametrize("deduplicate", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "vanished while it was prepared; it had"),
        (lambda path: path.write_text("x"), "was changed while it was prepared: 1 bytes; it had"),
        (lambda path: os.utime(path, ns=(1, 1)), "was changed while it was prepared$"),
    ],
)
def test_files_that_vanish_or_change_are_named_whatever_is_skipped(
    tmp_path, prepare, monkeypatch, change, message, deduplicate
):
    path = lines(tmp_path / "a.jsonl", *map(str, range(100)))
    from data_modules.prepared import reading

    def read(piece, *arguments):
        yield 0, "one"
        change(path)

    monkeypatch.setattr(reading, "read_piece", read)
    with pytest.raises(DataError, match=f"a.jsonl: {message}"):
        prepare(
            tmp_path / "o",
            path,
            skip_unreadable=True,
            skip_malformed=True,
            deduplicate=deduplicate,
            workers=1,
        )
    assert not list((tmp_path / "o").glob("*.tokens"))


def test_a_text_that_cannot_be_encoded_is_an_error(tmp_path, prepare):
    from memlm.tokenizers import word_tokenizer

    word_tokenizer(["one", "two"], "words").save(tmp_path)
    path = lines(tmp_path / "a.jsonl", "one two", "three")
    with pytest.raises(DataError, match="cannot encode 'three'"):
        prepare(tmp_path / "o", path, tokenizer=tmp_path / "tokenizer.json")


def test_a_long_document(tmp_path, prepare, bpe):
    text = "one two three, four; " * 60_000
    path = lines(tmp_path / "a.jsonl", "before", text, "after")
    prepare(tmp_path / "o", path, tokenizer=bpe, validation_fraction=0)
    manifest = Manifest.load(tmp_path / "o")
    assert texts_of(tmp_path / "o")["train"] == ["before", text, "after"]
    assert manifest.counts.text_bytes == len(text) + 11


def test_a_first_mistake_does_not_bind_the_next_command(tmp_path, prepare):
    path = lines(tmp_path / "a.jsonl", "one", "two")
    with pytest.raises(DataError, match="has no key 'body'"):
        prepare(tmp_path / "o", path, text_key="body")
    prepare(tmp_path / "o", path)
    assert Manifest.load(tmp_path / "o").counts.documents == 2


@pytest.mark.parametrize("first", [True, False])
def test_both_passes_must_read_the_same_documents(tmp_path, prepare, monkeypatch, first):
    """A file that can be read only once of twice would shift the marks of duplicates."""
    for name, texts in {"a": ["x", "y", "z"], "b": ["x", "u", "w"]}.items():
        lines(tmp_path / f"{name}.jsonl", *texts)
    passes = []

    def flaky(piece, *args):
        if piece.path.name == "a.jsonl":
            passes.append(1)
            if (len(passes) == 1) == first:
                raise DataError(piece.path, "cannot be read (Input/output error)")
        yield from read_piece(piece, *args)

    monkeypatch.setattr("data_modules.prepared.reading.read_piece", flaky)
    monkeypatch.setattr("data_modules.prepared.preparation.run_units", in_this_process)
    with pytest.raises(DataError, match=r"gave other documents than when they were hashed.* start over"):
        prepare(tmp_path / "o", tmp_path, deduplicate=True, skip_unreadable=True, shard_megabytes=1.0)
    assert not (tmp_path / "o" / "manifest.json").exists()


def in_this_process(job, task, units, processes, show):
    for unit in units:
        task(job, unit, show)
        yield unit


def test_a_wrong_column_is_no_damage_to_skip(tmp_path, prepare):
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pytest.importorskip("pyarrow").table({"text": ["a", "b"]}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"t.parquet: has no column 'body'") as raised:
        prepare(tmp_path / "o", tmp_path / "t.parquet", text_key="body", skip_unreadable=True)
    assert "skip_unreadable" not in str(raised.value)


def test_file_names_need_not_be_utf_8(tmp_path, prepare):
    folder = os.fsencode(tmp_path) + b"/in"
    os.mkdir(folder)
    with open(folder + b"/\xff\xfename.jsonl", "wb") as file:
        file.write(b'{"text": "one"}\n')
    prepare(tmp_path / "o", tmp_path / "in")
    [source] = Manifest.load(tmp_path / "o").sources
    assert os.fsencode(source["file"]) == folder + b"/\xff\xfename.jsonl"


def test_a_manifest_with_another_type_of_tokens(tmp_path, prepare):
    prepare(tmp_path / "o", lines(tmp_path / "a.jsonl", "one"))
    path = tmp_path / "o" / "manifest.json"
    path.write_text(path.read_text().replace('"uint16"', '"int7"'))
    with pytest.raises(DataError, match=r"manifest.json: has tokens of 'int7'; expected uint16 or uint32"):
        Manifest.load(tmp_path / "o")
