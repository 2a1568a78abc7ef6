import hashlib
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_modules.prepared.shard import Header, ShardWriter, open_shard, read_header, smallest_dtype
from memlm.errors import DataError

HASH = hashlib.sha256(b"a tokenizer").hexdigest()
OTHER = hashlib.sha256(b"another").hexdigest()


def write(path, documents, dtype=np.uint16):
    writer = ShardWriter(path, dtype, HASH)
    for document in documents:
        writer.add(document)
    return writer.finish()


@given(
    st.lists(st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=9), max_size=12),
    st.sampled_from([np.uint16, np.uint32]),
    st.integers(0, 12),
)
def test_round_trip(documents, dtype, together):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train-00000.tokens"
        writer = ShardWriter(path, dtype, HASH)
        writer.add_all([np.array(document) for document in documents[:together]])
        for document in documents[together:]:
            writer.add(document)
        flat = [token for document in documents for token in document]
        assert writer.finish() == (len(documents), len(flat))
        shard = open_shard(path, HASH)
        assert shard.tokens.tolist() == flat
        assert shard.tokens.dtype == dtype
        assert shard.starts.tolist() == [0, *np.cumsum([len(document) for document in documents])]
        assert not shard.tokens.flags.writeable and not shard.starts.flags.writeable
        assert [entry.name for entry in Path(folder).iterdir()] == [path.name]


def test_the_layout_is_the_documented_one(tmp_path):
    path = tmp_path / "s.tokens"
    write(path, [[1, 2], [3]])
    content = path.read_bytes()
    assert content[:8] == b"memlmtok"
    assert struct.unpack_from("<IIQQ", content, 8) == (1, 2, 2, 3)
    assert content[32:64].hex() == HASH
    assert struct.unpack_from("<HHH", content, 128) == (1, 2, 3)
    assert struct.unpack_from("<QQQ", content, 136) == (0, 2, 3)
    assert len(content) == 160


def test_every_truncation_and_every_change_of_the_header_is_found(tmp_path):
    path = tmp_path / "s.tokens"
    write(path, [[1, 2], [3]])
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"s\.tokens: is truncated"):
            open_shard(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(DataError, match=r"s\.tokens: is altered: 161 bytes; its header says 160"):
        open_shard(path)
    for at in range(128):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(DataError, match=r"s\.tokens: is (altered|not a shard)"):
            open_shard(path)


def test_foreign_missing_and_unreadable_files(tmp_path):
    (tmp_path / "text").write_text("memlm")
    with pytest.raises(DataError, match="text: is truncated: 5 bytes"):
        read_header(tmp_path / "text")
    (tmp_path / "text").write_text("something else" * 20)
    with pytest.raises(DataError, match="text: is not a shard of tokens"):
        read_header(tmp_path / "text")
    with pytest.raises(DataError, match="gone: no such file"):
        read_header(tmp_path / "gone")
    with pytest.raises(DataError, match=r"cannot be read \(Is a directory\)"):
        read_header(tmp_path)


def test_another_tokenizer(tmp_path):
    write(tmp_path / "s", [[1]])
    with pytest.raises(DataError, match=f"s: holds tokens of the tokenizer {HASH}; expected .* {OTHER}"):
        open_shard(tmp_path / "s", OTHER)


def test_a_shard_of_another_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("data_modules.prepared.shard.VERSION", 9)
    write(tmp_path / "s", [[1]])
    monkeypatch.undo()
    with pytest.raises(DataError, match="s: has version 9 with tokens of 2 bytes; expected version 1"):
        open_shard(tmp_path / "s")


def test_nothing_remains_of_what_is_given_up(tmp_path):
    writer = ShardWriter(tmp_path / "s", np.uint32, HASH)
    writer.add([1, 2, 3])
    assert not (tmp_path / "s").exists()
    writer.abort()
    writer.abort()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match=r"no/s: cannot be written \(No such file or directory\)"):
        ShardWriter(tmp_path / "no" / "s", np.uint32, HASH)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("tokens", [1, 2_000_000])
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, tokens):
    """The partial file is a link to a device that is always full."""
    (tmp_path / ".s.partial").symlink_to("/dev/full")
    writer = ShardWriter(tmp_path / "s", np.uint16, HASH)
    with pytest.raises(DataError, match=r"s: cannot be written \(No space left on device\); finished shards"):
        writer.add(np.zeros(tokens))
        writer.finish()
    writer.abort()
    assert list(tmp_path.iterdir()) == []


def test_tokens_are_as_narrow_as_the_vocabulary_allows():
    assert smallest_dtype(65536) == np.uint16
    assert smallest_dtype(65537) == np.uint32
    assert Header(smallest_dtype(7), 1, 5, HASH).file_bytes == 128 + 16 + 16
