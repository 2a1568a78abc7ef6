"""SentencePiece models; the oracle is the package itself."""

import hashlib
import io
import pickle
import re
import sys
from pydoc_data.topics import topics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlm.errors import DataError
from memlm.tokenizers import SentencePieceTokenizer, Tokenizer, load_tokenizer
from memlm.tokenizers.long_texts import CutRule

sentencepiece = pytest.importorskip("sentencepiece")

TEXTS = [topics[name] for name in sorted(topics)[:8]]
UNUSUAL = st.text(st.sampled_from("ab \n\t.é\u0301中🙂▁ﬁ</s>"), max_size=40)
LLAMA2 = {  # bytes for unknown characters; text is left as it is
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
}
DEFAULT = {"model_type": "unigram"}


def model(**options):
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in TEXTS for line in text.splitlines()]),
        model_writer=written,
        minloglevel=2,
        num_threads=1,
        **{"vocab_size": 500, **options},
    )
    return written.getvalue()


@pytest.fixture(scope="module")
def models():
    return {"llama2": model(**LLAMA2), "default": model(**DEFAULT)}


@pytest.fixture(params=["llama2", "default"])
def content(request, models):
    return models[request.param]


def test_ids_are_those_of_the_package(content):
    oracle = sentencepiece.SentencePieceProcessor(model_proto=content)
    tokenizer = SentencePieceTokenizer(content, "a.model")
    texts = [*TEXTS, "", " ", "a </s> b", "naïve 中🙂 e\u0301"]
    expected = [oracle.encode(text) for text in texts]
    assert [tokenizer.encode(text) for text in texts] == expected
    batch = tokenizer.encode_batch(texts)
    assert [ids.tolist() for ids in batch] == expected
    assert all(ids.dtype == np.int32 for ids in batch)
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (oracle.eos_id(), oracle.vocab_size())
    assert not any(tokenizer.eos_id in ids for ids in expected)
    decoded = tokenizer.decode([*expected[0], tokenizer.eos_id, 10**6])
    assert decoded == oracle.decode(expected[0]) != ""


@given(text=UNUSUAL)
def test_each_document_counts_its_bytes_and_one_space(models, text):
    tokenizer = SentencePieceTokenizer(models["llama2"], "a.model")
    ids = tokenizer.encode(text)
    as_read = text.replace("▁", " ")  # the model's own mark
    assert tokenizer.decode(ids) == as_read
    assert tokenizer.token_bytes[ids].sum() == len(as_read.encode()) + bool(text)


def test_bytes_of_special_and_unknown_pieces(models):
    tokenizer = SentencePieceTokenizer(models["default"], "a.model")
    assert tokenizer.token_bytes.shape == (500,)
    assert tokenizer.token_bytes[[0, 1, tokenizer.eos_id]].tolist() == [0, 0, 0], "<unk>, <s>, </s>"
    assert tokenizer.token_bytes[tokenizer.encode("a 中")].sum() == len(" a ")
    text = TEXTS[0].replace("\n", " ")
    changed = " ".join(text.split())  # what this model reads
    assert tokenizer.token_bytes[tokenizer.encode(text)].sum() == len(changed) + 1


def without_ties(text):
    """Without runs of one character, which Unigram can cut in several equally good ways."""
    return re.sub(r"([*=.-])\1+", r"\1", text)


@pytest.mark.parametrize("name", ["llama2", "default"])
@pytest.mark.parametrize("length", [1, 40])
def test_long_texts_in_pieces_have_the_ids_of_the_whole(models, monkeypatch, name, length):
    tokenizer = SentencePieceTokenizer(models[name], "a.model")
    texts = [*map(without_ties, TEXTS[:4]), "a  b \n c" * 20 + " d e f", "x" * 30]
    whole = [tokenizer.encode(text) for text in texts]
    monkeypatch.setattr(Tokenizer, "piece_length", length)
    monkeypatch.setattr(Tokenizer, "longest_piece", 400)
    monkeypatch.setattr("memlm.tokenizers.base.CHARACTERS_AT_ONCE", 1000)
    assert len(list(tokenizer._pieces(texts[0]))) > len(texts[0]) / (length + 200)
    assert [tokenizer.encode(text) for text in texts] == whole
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == whole
    drops = name == "llama2"  # the other model takes away a space at the beginning itself
    assert tokenizer._cut_rule == CutRule(not drops, at_space=True, drop_space=drops)


def test_a_file_is_recognized_saved_and_pickled(content, tmp_path):
    path = tmp_path / "any.name"
    path.write_bytes(content)
    tokenizer = load_tokenizer(str(path))
    assert isinstance(tokenizer, SentencePieceTokenizer)
    folder = tmp_path / "saved"
    folder.mkdir()
    assert tokenizer.save(folder) == tokenizer.save(folder) == "tokenizer.model"
    assert [file.name for file in folder.iterdir()] == ["tokenizer.model"]
    assert (folder / "tokenizer.model").read_bytes() == content
    for again in (load_tokenizer(str(folder / "tokenizer.model")), pickle.loads(pickle.dumps(tokenizer))):
        assert again.hash == tokenizer.hash
        assert again.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    assert tokenizer.hash == hashlib.sha256(b"memlm SentencePiece\0" + content).hexdigest()


def test_another_end_of_document_piece():
    named = model(**LLAMA2, eos_id=-1, control_symbols=["<pad>", "<|endoftext|>"])
    tokenizer = SentencePieceTokenizer(named, "named.model")
    assert tokenizer.processor.id_to_piece(tokenizer.eos_id) == "<|endoftext|>"
    assert tokenizer.eos_id not in tokenizer.encode("a <|endoftext|> b")


@pytest.mark.parametrize("options", [{}, {"user_defined_symbols": ["<|endoftext|>"]}])
def test_a_model_whose_documents_cannot_end_safely_is_refused(options):
    with pytest.raises(DataError, match=r"no.model: has no end-of-document piece; expected an eos_id or a"):
        SentencePieceTokenizer(model(**LLAMA2, eos_id=-1, **options), "no.model")


def test_broken_and_truncated_files_are_named(models, tmp_path):
    path = tmp_path / "broken.model"
    for content in (models["llama2"][:-100], b"\n" + b"x" * 300):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"broken.model: is not a SentencePiece model \("):
            load_tokenizer(str(path))


def test_a_missing_package_is_named(models, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(DataError, match=r"a.model: .* sentencepiece: pip install 'memlm\[tokenizers\]'"):
        SentencePieceTokenizer(models["llama2"], "a.model")
