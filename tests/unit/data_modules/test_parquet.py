import builtins
import random
import time

import pytest

from data_modules import parquet
from data_modules.readers import (
    Piece,
    piece_bytes,
    read_documents,
    read_piece,
    read_records,
    record_error,
    split_file,
)
from memlm.errors import DataError, UserError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

TEXTS = [("" if i % 13 == 0 else f"zwölf\n😀 {i} " * (i * 7919 % 40)) for i in range(1000)]


def write(path, texts=TEXTS, kind=None, group=90, **options):
    column = pa.array(texts, kind or pa.string())
    pq.write_table(
        pa.table({"id": list(range(len(texts))), "text": column}), path, row_group_size=group, **options
    )
    return path


@pytest.mark.parametrize("compression", ["zstd", "snappy", "gzip", "none"])
@pytest.mark.parametrize(
    "kind", ["string", "large_string", "string_view", "binary", "large_binary", "dictionary"]
)
def test_a_record_is_a_row(tmp_path, compression, kind):
    types = {"dictionary": pa.dictionary(pa.int32(), pa.string())}
    typed = types.get(kind) or getattr(pa, kind)()
    texts = [text.encode() for text in TEXTS] if "binary" in kind else TEXTS
    path = write(tmp_path / "a.parquet", texts, typed, compression=compression)
    assert list(read_records(path, "text")) == list(enumerate(TEXTS))
    assert list(read_documents([path], "text")) == TEXTS


def test_a_share_of_the_rows(tmp_path):
    path, rng = write(tmp_path / "a.parquet"), random.Random(0)
    for _ in range(40):
        every, start = rng.randrange(1, 300), rng.randrange(1020)
        offset = rng.randrange(every)
        found = list(read_records(path, "text", start, every=every, offset=offset))
        assert found == [(n, t) for n, t in enumerate(TEXTS) if n >= start and n % every == offset]


@pytest.mark.parametrize("size", [1, 3_000, 20_000, 10**9])
def test_pieces_are_row_groups(tmp_path, size):
    path = write(tmp_path / "a.parquet", group=37)
    pieces, texts, whole = split_file(path, size), [], 0
    for piece in pieces:
        told = []
        records = list(read_piece(piece, "text", None, told.append))
        assert [number for number, _ in records] == list(range(len(records)))
        texts += [text for _, text in records]
        assert sum(told) == piece_bytes(piece) and min(told) >= 0
        whole += sum(told)
    assert texts == TEXTS
    assert whole == path.stat().st_size == piece_bytes(Piece(path))
    assert len(pieces) == {1: 28, 10**9: 1}.get(size, len(pieces))
    if size == 20_000:
        assert 1 < len(pieces) < 10


def test_row_groups_before_the_start_are_not_decoded(tmp_path):
    path = write(tmp_path / "a.parquet", compression="none", use_dictionary=False, group=100)
    content = bytearray(path.read_bytes())
    first = pq.read_metadata(path).row_group(0).column(1)
    content[first.data_page_offset : first.data_page_offset + first.total_compressed_size] = (
        b"\xff" * first.total_compressed_size
    )
    path.write_bytes(content)
    assert list(read_records(path, "text", start=100)) == list(enumerate(TEXTS))[100:]
    with pytest.raises(DataError, match=r"a.parquet: is damaged, cut off or no parquet file \(.+\)$"):
        list(read_records(path, "text", start=99))


def test_a_malformed_row_is_a_value_and_the_next_one_is_read(tmp_path):
    texts = [b"a"] * 100 + [None] + [b"b"] * 50 + [b"ab\xff"] + [b"c"]
    path = write(tmp_path / "a.parquet", texts, pa.binary(), group=60)
    # A column that claims to be text, as other programs write it.
    table = pq.read_table(path)
    claimed = pa.Array.from_buffers(
        pa.string(), len(texts), pa.array(texts, pa.binary()).buffers(), null_count=1
    )
    pq.write_table(table.set_column(1, "text", claimed), tmp_path / "b.parquet", row_group_size=60)
    for name in ["a.parquet", "b.parquet"]:
        records = [text for _, text in read_records(tmp_path / name, "text")]
        faults = {n: str(text) for n, text in enumerate(records) if isinstance(text, DataError)}
        where = f"{tmp_path / name}: row %d (from 0) of column 'text' is "
        assert faults == {
            100: where % 100 + "null; expected a string",
            151: where % 151 + "not valid UTF-8 (invalid start byte at byte 2)",
        }
        assert records[152] == "c" and records[101] == "b"
        pieces = [text for piece in split_file(tmp_path / name, 1) for _, text in read_piece(piece, "text")]
        assert [str(text) for text in pieces] == [str(text) for text in records]
    with pytest.raises(DataError, match=r"row 100 \(from 0\) of column 'text' is null"):
        list(read_documents([path], "text"))


def test_a_column_that_is_missing_or_no_text(tmp_path):
    path = write(tmp_path / "a.parquet")
    message = r"a.parquet: has no column 'body' \(option text_key\); it has 'id', 'text'"
    with pytest.raises(UserError, match=message):
        next(read_records(path, "body"))
    message = r"a.parquet: column 'id' holds values of type int64; expected strings \(option text_key\)"
    with pytest.raises(UserError, match=message):
        next(read_piece(Piece(path), "id"))


def test_the_place_of_a_record(tmp_path):
    path = write(tmp_path / "a.parquet", [str(row) for row in range(100)], group=30)
    for piece in [Piece(path), *split_file(path, 1)]:
        for number, row in read_piece(piece, "text"):
            assert str(record_error(piece, number, "is odd")) == f"{path}: row {row} (from 0) is odd"


def test_no_rows(tmp_path):
    path = write(tmp_path / "a.parquet", [])
    assert list(read_records(path, "text")) == []
    assert [list(read_piece(piece, "text")) for piece in split_file(path, 10)] == [[]]


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_truncated(tmp_path, kept):
    path = write(tmp_path / "a.parquet")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    for use in [lambda: list(read_records(path, "text")), lambda: split_file(path, 100)]:
        with pytest.raises(DataError, match=r"a.parquet: is damaged, cut off or no parquet file \(.+\)$"):
            use()


def test_damage_within_is_found_by_checksum_after_what_comes_before_it(tmp_path):
    options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    path = write(tmp_path / "a.parquet", group=100, **options)
    content, column = bytearray(path.read_bytes()), pq.read_metadata(path).row_group(4).column(1)
    content[column.data_page_offset + column.total_compressed_size - 10] ^= 1
    path.write_bytes(content)
    records = read_records(path, "text")
    assert [next(records) for _ in range(400)] == list(enumerate(TEXTS))[:400]
    with pytest.raises(DataError, match=r"a.parquet: is damaged.*CRC"):
        next(records)


def test_files_that_are_gone_changed_or_no_parquet(tmp_path):
    path = write(tmp_path / "a.parquet")
    last = split_file(path, 1)[-1]
    write(path, TEXTS[:100])
    message = r"a.parquet: has 2 row groups; expected 12: it was changed while in use"
    with pytest.raises(DataError, match=message):
        list(read_piece(last, "text"))
    path.unlink()
    for use in [lambda: next(read_records(path, "text")), lambda: split_file(path, 1)]:
        with pytest.raises(DataError, match=r"a.parquet: no such file"):
            use()
    path.mkdir()
    with pytest.raises(DataError, match=r"a.parquet: cannot be read \(Is a directory\)"):
        next(read_records(path, "text"))
    (tmp_path / "b.parquet").write_text('{"text": "json"}\n')
    with pytest.raises(DataError, match=r"b.parquet: is damaged, cut off or no parquet file"):
        next(read_records(tmp_path / "b.parquet", "text"))


def test_without_the_package(tmp_path, monkeypatch):
    path, import_ = write(tmp_path / "a.parquet"), builtins.__import__

    def without(name, *args, **options):
        if name.startswith("pyarrow"):
            raise ModuleNotFoundError(name)
        return import_(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"a.parquet: .* pyarrow; run: pip install 'memlm\[parquet\]'"):
        next(read_records(path, "text"))


def test_a_batch_is_decoded_at_a_time(tmp_path, monkeypatch):
    write(tmp_path / "long.parquet", ["x" * 100_000 + str(i) for i in range(200)], group=200)
    write(tmp_path / "short.parquet", ["x"] * 5000, group=5000)
    rows = {}
    batches = parquet._batches
    for name in ["long.parquet", "short.parquet"]:

        def counted(*args, name=name):
            for batch in batches(*args):
                rows.setdefault(name, []).append(len(batch))
                yield batch

        monkeypatch.setattr(parquet, "_batches", counted)
        list(read_records(tmp_path / name, "text"))
    assert max(rows["long.parquet"]) * 100_000 <= parquet.BATCH_BYTES
    assert max(rows["short.parquet"]) <= parquet.BATCH_ROWS


def test_memory_does_not_grow_with_the_row_group(tmp_path):
    options = {"compression": "none", "use_dictionary": False}
    path = write(tmp_path / "a.parquet", [str(i) * 500 for i in range(20_000)], group=20_000, **options)
    before, most = pa.total_allocated_bytes(), 0
    for number, _ in read_records(path, "text"):
        if number % 100 == 0:
            most = max(most, pa.total_allocated_bytes() - before)
    assert path.stat().st_size > 40_000_000 and most < 20_000_000


def test_huge_documents(tmp_path):
    text = "A line with ü\n" * 600_000
    path = write(tmp_path / "a.parquet", ["first", text, "between", text, "last"], group=5)
    started = time.process_time()
    assert [text for _, text in read_records(path, "text")] == ["first", text, "between", text, "last"]
    assert time.process_time() - started < 2
