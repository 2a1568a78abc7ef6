import gzip
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_modules import file_bytes
from data_modules.readers import (
    Piece,
    piece_bytes,
    placed,
    read_piece,
    read_records,
    record_error,
    split_file,
)
from memlm.errors import DataError

LINES = st.one_of(
    st.just(b""),
    st.just(b" \r"),
    st.integers(0, 40).map(lambda n: json.dumps({"text": "é" * n}, ensure_ascii=False).encode()),
    st.binary(max_size=12).map(lambda content: content.replace(b"\n", b"")),
)
CONTENTS = st.builds(
    lambda mark, lines, end: mark + b"\n".join(lines) + end,
    st.sampled_from([b"", b"\xef\xbb\xbf"]),
    st.lists(LINES, max_size=30),
    st.sampled_from([b"", b"\n"]),
)


def plain(records):
    """Records without their numbers; errors, which are equal to nothing, as their messages."""
    return [str(text) if isinstance(text, DataError) else text for _, text in records]


@settings(max_examples=400, deadline=None)
@given(content=CONTENTS, size=st.integers(1, 200), chunk=st.integers(1, 100))
@example(content=b"", size=1, chunk=1)
@example(content=b"\n\n", size=1, chunk=1)
@example(content=b"\xef\xbb\xbf{}", size=1, chunk=1)
@example(content=b"{}\n\xef\xbb\xbf{}", size=2, chunk=9)
def test_pieces_hold_every_record_of_a_file_once(tmp_path_factory, content, size, chunk):
    path = tmp_path_factory.getbasetemp() / "pieces.jsonl"
    path.write_bytes(content)
    whole = plain(read_records(path, "text"))
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    assert len(whole) == len(lines) - (not lines[-1])
    pieces = split_file(path, size)
    assert all(piece.stop - piece.start <= size for piece in pieces)
    assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces[:-1])]
    parts, told = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_bytes, "CHUNK", chunk)
        for piece in pieces:
            steps = []
            records = list(read_piece(piece, "text", None, steps.append))
            assert [number for number, _ in records] == list(range(len(records)))
            parts += plain((n, placed(piece, n, r) if isinstance(r, DataError) else r) for n, r in records)
            told.append(sum(steps))
            assert min(steps, default=0) >= 0
    assert parts == whole  # the messages too, which name the line of the file
    assert told == [piece_bytes(piece) for piece in pieces]
    assert sum(told) == len(content)


def test_a_line_belongs_to_the_piece_in_which_it_starts(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' + '{"text": "%s"}\n' % ("b" * 1000) + '{"text": "c"}\n')
    parts = [plain(read_piece(piece, "text")) for piece in split_file(path, 100)]
    assert parts == [["a", "b" * 1000], *[[]] * 9, ["c"]]
    assert plain(read_piece(Piece(path, 14), "text")) == ["b" * 1000, "c"]
    assert plain(read_piece(Piece(path, 14, 15), "text")) == ["b" * 1000]
    assert plain(read_piece(Piece(path, 15, 900), "text")) == []


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt", "a.txt.gz", "no_suffix"])
def test_what_cannot_be_split_is_one_piece(tmp_path, name):
    content = b'{"text": "a"}\n\n{"text": "b"}' * 1000
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert split_file(path, 10) == [Piece(path, 0, None)]
    for separator in [None, "\n\n"]:
        told = []
        records = list(read_piece(Piece(path), "text", separator, told.append))
        assert [number for number, _ in records] == list(range(len(records)))
        found = ((n, placed(Piece(path), n, r) if isinstance(r, DataError) else r) for n, r in records)
        assert plain(found) == plain(read_records(path, "text", separator=separator))
        assert sum(told) == path.stat().st_size == piece_bytes(Piece(path))


def test_a_file_that_shrank_since_it_was_split(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n' * 100)
    first, second = split_file(path, 700)
    path.write_bytes(b'{"text": "a"}\n' * 60)
    assert plain(read_piece(first, "text")) == ["a"] * 50
    with pytest.raises(
        DataError, match=r"a.jsonl:61: ends at byte 840; expected 1400: it was changed while in use"
    ):
        list(read_piece(second, "text"))
    path.unlink()
    for use in [lambda: list(read_piece(first, "text")), lambda: split_file(path, 10)]:
        with pytest.raises(DataError, match=r"a.jsonl.*: no such file"):
            use()
    with pytest.raises(DataError, match=r"gone.txt: no such file"):
        piece_bytes(Piece(tmp_path / "gone.txt"))


def test_the_place_of_a_record(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "{line}"}}\n' for line in range(1, 301)))
    for piece in [Piece(path), *split_file(path, 500)]:
        for number, line in read_piece(piece, "text"):
            assert str(record_error(piece, number, "is odd")) == f"{path}:{line}: is odd"
            near = str(record_error(piece, number, "is odd", exact=False))
            if piece.start:  # without reading what is before the piece
                part = f"record {number} (from 0) of the part that begins at byte {piece.start:,}"
                assert near == f"{path}: {part} is odd"
            else:
                assert near == f"{path}:{line}: is odd"
    text = Piece(tmp_path / "a.txt.gz")
    assert str(record_error(text, 3, "is odd")) == f"{text.path}: document 3 (from 0) is odd"
