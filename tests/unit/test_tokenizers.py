import errno
import hashlib
import json
import multiprocessing
import os
import pickle
from pydoc_data.topics import topics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlm.errors import ConfigError, DataError
from memlm.tokenizers import (
    ByteTokenizer,
    FileTokenizer,
    JsonTokenizer,
    load_tokenizer,
    train_bpe,
    word_tokenizer,
)

TEXTS = [topics[name] for name in sorted(topics)[:8]]


@pytest.fixture(scope="module")
def bpe_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train_bpe(TEXTS, 600, path)
    return path


@given(st.text())
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())


def test_invalid_bytes_decode_to_the_replacement_character():
    assert ByteTokenizer().decode([104, 0xFF, 256]) == "h�"


@given(st.text())
def test_bpe_tokens_count_every_byte_of_any_text(bpe_path, text):
    tokenizer = FileTokenizer(bpe_path)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())


def test_bpe_compresses_real_text_and_knows_its_size(bpe_path):
    tokenizer = load_tokenizer(str(bpe_path))
    assert tokenizer.vocab_size == 600 == len(tokenizer.token_bytes)
    batch = tokenizer.encode_batch(TEXTS)
    assert all(ids.dtype == np.int32 for ids in batch)
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in TEXTS]
    for text, ids in zip(TEXTS, batch, strict=True):
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())
        assert len(ids) < 0.6 * len(text.encode())


@pytest.mark.parametrize("name", ["<|eos|>", "a <|eos|> b"])
def test_a_document_that_spells_eos_does_not_end(bpe_path, name):
    tokenizer = FileTokenizer(bpe_path)
    ids = tokenizer.encode(name)
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == name
    assert tokenizer.token_bytes[ids].sum() == len(name)
    assert tokenizer.token_bytes[tokenizer.eos_id] == 0


def test_hash_follows_content_not_layout(bpe_path, tmp_path):
    content = json.loads(bpe_path.read_text())
    compact = tmp_path / "compact.json"
    compact.write_text(json.dumps(content))
    changed = tmp_path / "changed.json"
    content["model"]["merges"] = content["model"]["merges"][:-1]
    changed.write_text(json.dumps(content))
    assert FileTokenizer(compact).hash == FileTokenizer(bpe_path).hash != FileTokenizer(changed).hash
    assert len({FileTokenizer(bpe_path).hash, ByteTokenizer().hash}) == 2


def test_hashes_stay_what_they_were(bpe_path):
    """They are in checkpoints."""
    assert ByteTokenizer().hash == "ccc4ae74839b222ecf1411286f7b13ef8c88d4c5368b7c96f9a4cffc13e29e3c"
    canonical = json.dumps(json.loads(bpe_path.read_text()), sort_keys=True)
    assert FileTokenizer(bpe_path).hash == hashlib.sha256(canonical.encode()).hexdigest()


@given(st.lists(st.text(), max_size=4))
def test_a_batch_of_bytes(texts):
    batch = ByteTokenizer().encode_batch(texts)
    assert [ids.tolist() for ids in batch] == [list(text.encode()) for text in texts]
    assert all(ids.dtype == np.int32 for ids in batch)


def test_saved_and_loaded_again(bpe_path, tmp_path):
    tokenizer = load_tokenizer(str(bpe_path))
    assert tokenizer.save(tmp_path) == tokenizer.save(tmp_path) == "tokenizer.json"
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]
    assert (tmp_path / "tokenizer.json").read_bytes() == bpe_path.read_bytes()
    assert load_tokenizer(str(tmp_path / "tokenizer.json")).hash == tokenizer.hash
    words = word_tokenizer(["a"], "test words")
    with pytest.raises(DataError, match=r"tokenizer.json: exists already and holds another tokenizer"):
        words.save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == bpe_path.read_bytes()
    folder = tmp_path / "words"
    with pytest.raises(DataError, match=r"tokenizer.json: cannot be written \(No such file"):
        words.save(folder)
    folder.mkdir()
    assert load_tokenizer(str(folder / words.save(folder))).hash == words.hash
    assert load_tokenizer(ByteTokenizer().save(folder)).hash == ByteTokenizer.hash
    assert [file.name for file in folder.iterdir()] == ["tokenizer.json"]


def test_a_pickled_tokenizer_needs_no_file_and_still_reads_eos_as_text(bpe_path, tmp_path):
    path = tmp_path / "t.json"
    path.write_bytes(bpe_path.read_bytes())
    tokenizer = FileTokenizer(path)
    pickled = pickle.dumps([tokenizer, ByteTokenizer()])
    path.unlink()
    again, of_bytes = pickle.loads(pickled)
    text = "a <|eos|> b"
    assert again.encode(text) == tokenizer.encode(text)
    assert [ids.tolist() for ids in again.encode_batch([text])] == [tokenizer.encode(text)]
    assert (again.hash, of_bytes.hash) == (tokenizer.hash, ByteTokenizer.hash)


def test_a_forked_process_encodes_after_its_parent_did(bpe_path):
    tokenizer = FileTokenizer(bpe_path)
    expected = [ids.tolist() for ids in tokenizer.encode_batch(TEXTS)]
    with multiprocessing.get_context("fork").Pool(1) as pool:
        result = pool.apply_async(tokenizer.encode_batch, (TEXTS,)).get(timeout=60)
    assert [ids.tolist() for ids in result] == expected


def test_saved_truncation_is_ignored(bpe_path, tmp_path):
    content = json.loads(bpe_path.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    path = tmp_path / "t.json"
    path.write_text(json.dumps(content))
    assert len(FileTokenizer(path).encode(TEXTS[0])) > 100


def test_words():
    tokenizer = word_tokenizer(["was", "born", "Zürich", "."], "test words")
    assert tokenizer.encode("born Zürich .") == [1, 2, 3]
    assert tokenizer.decode([1, 2, 3, 4]) == "born Zürich ."
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (4, 5)
    assert tokenizer.token_bytes.tolist() == [4, 5, 8, 2, 0]
    with pytest.raises(DataError, match="test words: cannot encode 'born Paris'"):
        tokenizer.encode("born Paris")


def test_sentencepiece_style_vocabulary_counts_spaces_and_fallback_bytes(tmp_path):
    vocabulary = {"</s>": 0, "<0xC3>": 1, "<0xBC>": 2, "▁": 3, "a": 4, "▁a": 5}
    content = {
        "added_tokens": [
            {"id": 0, "content": "</s>", "special": True}
            | dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": None,
        "decoder": {"type": "ByteFallback"},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [["▁", "a"]], "byte_fallback": True},
    }
    path = tmp_path / "sp.json"
    path.write_text(json.dumps(content))
    tokenizer = FileTokenizer(path)
    ids = tokenizer.encode("a aü ")
    assert ids == [4, 5, 1, 2, 3]
    assert tokenizer.token_bytes[ids].sum() == len("a aü ".encode())


def test_a_unigram_vocabulary_cannot_be_made_to_end_a_document():
    """Its trie holds the end-of-document token, too."""
    pieces = [["<unk>", 0.0], ["</s>", 0.0], *([piece, -3.0] for piece in "▁</s>ab")]
    content = {
        "added_tokens": [
            {"id": 1, "content": "</s>", "special": True}
            | dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
        ],
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True},
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True},
        "model": {"type": "Unigram", "unk_id": 0, "vocab": pieces, "byte_fallback": False},
    }
    tokenizer = JsonTokenizer(json.dumps(content), "u.json")
    texts = ["</s>", "a</s>b </s></s>", "b a"]
    ids = [tokenizer.encode(text) for text in texts]
    assert not any(tokenizer.eos_id in i for i in ids)
    letters = [[pieces[i][0].replace("▁", "") for i in i_] for i_ in ids]
    assert ["".join(letter) for letter in letters] == [text.replace(" ", "") for text in texts]
    assert [i.tolist() for i in tokenizer.encode_batch(texts)] == ids
    assert ids[2] == [pieces.index([piece, -3.0]) for piece in "▁b▁a"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"bad.json: is not a Hugging Face tokenizer.json"),
        ("[]", r"bad.json: is not a Hugging Face tokenizer.json"),
        (
            '{"added_tokens": [], "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, '
            '"trim_offsets": true}, "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}',
            r"bad.json: has no end-of-document token; expected one of <\|eos\|>, <\|endoftext\|>",
        ),
        (
            '{"added_tokens": [], "model": {"type": "WordPiece", "vocab": {"</s>": 0, "[UNK]": 1}, '
            '"unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 9}}',
            r"bad.json: is a WordPiece tokenizer that does not say which bytes",
        ),
    ],
)
def test_unusable_files_are_named(tmp_path, content, message):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        load_tokenizer(str(path))


@pytest.mark.parametrize("content", [b"", b"hello\n", b"\x80\x04", "é 97\n".encode()])
def test_other_files_are_no_tokenizers(tmp_path, content):
    path = tmp_path / "t.model"
    path.write_bytes(content)
    with pytest.raises(
        DataError, match=r"t.model: is no tokenizer \((begins with|is empty).*; expected a token"
    ):
        load_tokenizer(str(path))


def test_missing_file_directory_and_binary(tmp_path):
    with pytest.raises(DataError, match=r"nowhere.json: no such file; a tokenizer is 'bytes' or"):
        load_tokenizer(str(tmp_path / "nowhere.json"))
    with pytest.raises(DataError, match=r"is a directory; give the path of its tokenizer.json"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "b.json").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"b.json: cannot be read"):
        load_tokenizer(str(tmp_path / "b.json"))


def test_training_refuses_bad_targets(bpe_path, tmp_path):
    before = bpe_path.read_bytes()
    with pytest.raises(DataError, match="exists already"):
        train_bpe(TEXTS, 300, bpe_path)
    assert bpe_path.read_bytes() == before
    with pytest.raises(DataError, match="is not a directory"):
        train_bpe(TEXTS, 300, tmp_path / "no" / "t.json")
    with pytest.raises(ConfigError, match=r"vocab_size: is 256; 256 bytes and <\|eos\|> need at least 257"):
        train_bpe(TEXTS, 256, tmp_path / "t.json")
    assert list(tmp_path.iterdir()) == []


def interrupted():
    yield TEXTS[0]
    raise KeyboardInterrupt


def failing():
    yield TEXTS[0]
    raise DataError("a.jsonl", "is truncated", 7)


@pytest.mark.parametrize(("texts", "error"), [(interrupted, KeyboardInterrupt), (failing, DataError)])
def test_training_that_is_cut_off_leaves_no_file(tmp_path, texts, error):
    with pytest.raises(error):
        train_bpe(texts(), 300, tmp_path / "t.json")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"t.json: cannot be written \(No space left on device\)"):
        train_bpe(TEXTS, 300, tmp_path / "t.json")
    assert list(tmp_path.iterdir()) == []


def test_training_counts_long_texts_whole(bpe_path, tmp_path, monkeypatch):
    monkeypatch.setattr("memlm.tokenizers.base.Tokenizer.piece_length", 30)
    train_bpe(TEXTS, 600, tmp_path / "t.json")
    assert (tmp_path / "t.json").read_bytes() == bpe_path.read_bytes()
