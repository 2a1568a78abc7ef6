"""Files of tiktoken ranks; the oracle is the package itself."""

import base64
import pickle
import sys
from collections import Counter
from itertools import pairwise
from pydoc_data.topics import topics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memlm.errors import DataError
from memlm.tokenizers import TiktokenTokenizer, Tokenizer, load_tokenizer, tiktoken_ranks
from memlm.tokenizers.tiktoken_ranks import FAMILIES

tiktoken = pytest.importorskip("tiktoken")
openai_public = pytest.importorskip("tiktoken_ext.openai_public")

TEXTS = [topics[name] for name in sorted(topics)[:8]]
UNUSUAL = st.text(st.sampled_from("aBsTll79 \n\n\r\t'/._-é\u0301ß中🙂<|endoftext|>"), max_size=60)
OPENAI = {50256: "r50k_base", 50280: "p50k_base", 100256: "cl100k_base", 199998: "o200k_base"}


def trained_ranks(count):
    """Ranks of the 256 bytes and of the pairs most often merged in real text."""
    tokens = [bytes([byte]) for byte in TEXTS[0].encode()]
    ranks = {bytes([byte]): byte for byte in range(256)}
    while len(ranks) < count:
        pair, _ = Counter(pairwise(tokens)).most_common(1)[0]
        ranks[b"".join(pair)] = len(ranks)
        merged: list[bytes] = []
        for token in tokens:
            if merged and (merged[-1], token) == pair:
                merged[-1] += token
            else:
                merged.append(token)
        tokens = merged
    return ranks


RANKS = trained_ranks(300)


def file_content(ranks):
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())


@pytest.fixture(params=sorted(FAMILIES))
def family(request, monkeypatch):
    """One of the families, for a file with as few ranks as those above."""
    family = FAMILIES[request.param]
    monkeypatch.setattr(tiktoken_ranks, "FAMILIES", {len(RANKS): family})
    return request.param, family


@pytest.fixture
def tokenizer(monkeypatch):
    monkeypatch.setattr(tiktoken_ranks, "FAMILIES", {len(RANKS): FAMILIES[128000]})
    return TiktokenTokenizer(file_content(RANKS), "tokenizer.model")


def openai_encoding(count, monkeypatch):
    """What the package says of a tokenizer of its own, but for the ranks, which it would have to download."""
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *args, **kwargs: RANKS)
    said = getattr(openai_public, OPENAI[count])()
    return {key: said[key] for key in ("pat_str", "special_tokens")}


@pytest.mark.parametrize("count", sorted(OPENAI))
def test_special_tokens_and_sizes_are_those_of_the_package(count, monkeypatch):
    family = FAMILIES[count]
    assert family.special == openai_encoding(count, monkeypatch)["special_tokens"]
    assert family.special[family.eos] in (count, count + 1, 50256)


@pytest.mark.parametrize("count", sorted(OPENAI))
@given(text=UNUSUAL)
@settings(max_examples=200, deadline=None)
def test_patterns_are_those_of_the_package(count, text):
    with pytest.MonkeyPatch.context() as patch:
        oracle = tiktoken.Encoding("oracle", mergeable_ranks=RANKS, **openai_encoding(count, patch))
        patch.setattr(tiktoken_ranks, "FAMILIES", {len(RANKS): FAMILIES[count]})
        assert TiktokenTokenizer(file_content(RANKS), "x").encode(text) == oracle.encode_ordinary(text)


def test_digits_of_llama_3_and_qwen():
    ranks = RANKS | {b"1" * n: len(RANKS) + n for n in (2, 3, 4)}
    for count, expected in ((128000, ["111", "1"]), (151643, ["1"] * 4), (50256, ["1111"])):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiktoken_ranks, "FAMILIES", {len(ranks): FAMILIES[count]})
            tokenizer = TiktokenTokenizer(file_content(ranks), "x")
        assert [tokenizer.decode([i]) for i in tokenizer.encode("1111")] == expected


def test_a_family_by_its_number_of_ranks(family):
    count, expected = family
    tokenizer = TiktokenTokenizer(file_content(RANKS), "ranks")
    texts = [*TEXTS, "", "a <|endoftext|> <|end_of_text|> b", "naïve 中🙂 e\u0301"]
    batch = tokenizer.encode_batch(texts)
    for text, ids in zip(texts, batch, strict=True):
        assert ids.dtype == np.int32
        assert ids.tolist() == tokenizer.encode(text) == tokenizer.encoding.encode_ordinary(text)
        assert tokenizer.decode(ids.tolist()) == text
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert len(batch[0]) < 0.8 * len(TEXTS[0])
    sizes = {50256: 50257, 50280: 50257, 100256: 100277, 128000: 128256, 151643: 151646, 199998: 200019}
    assert tokenizer.vocab_size == sizes[count] == len(tokenizer.token_bytes)
    assert tokenizer.eos_id == expected.special[expected.eos]
    assert tokenizer.token_bytes[list(expected.special.values())].sum() == 0
    assert tokenizer.decode([tokenizer.eos_id, 97, 10**7, 290_000, 0xC3]) == "a�"


@given(text=st.text())
@settings(deadline=None)
def test_any_text_comes_back(text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiktoken_ranks, "FAMILIES", {len(RANKS): FAMILIES[199998]})
        tokenizer = TiktokenTokenizer(file_content(RANKS), "x")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())


def test_a_llama_3_file_is_recognized_saved_and_pickled(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(file_content(RANKS).replace(b"\n", b"\r\n"))
    assert load_tokenizer(str(path)).encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    assert tokenizer.save(tmp_path) == tokenizer.save(tmp_path) == "tokenizer.tiktoken"
    assert (tmp_path / "tokenizer.tiktoken").read_bytes() == file_content(RANKS)
    again = load_tokenizer(str(tmp_path / "tokenizer.tiktoken"))
    assert isinstance(again, TiktokenTokenizer)
    for other in (again, pickle.loads(pickle.dumps(tokenizer))):
        assert other.hash == tokenizer.hash
        assert other.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def test_the_hash_follows_ranks_and_family(tokenizer, monkeypatch):
    hashes = {tokenizer.hash}
    for family in FAMILIES.values():
        monkeypatch.setattr(tiktoken_ranks, "FAMILIES", {len(RANKS): family})
        hashes.add(TiktokenTokenizer(file_content(RANKS), "x").hash)
    assert len(hashes) == len(FAMILIES) - 1, "GPT-2 and p50k differ by their ranks alone"
    swapped = RANKS | {b"a": RANKS[b"b"], b"b": RANKS[b"a"]}
    assert TiktokenTokenizer(file_content(swapped), "x").hash not in hashes


def test_long_texts_in_pieces_have_the_ids_of_the_whole(tokenizer, monkeypatch):
    whole = [tokenizer.encode(text) for text in TEXTS]
    monkeypatch.setattr(Tokenizer, "piece_length", 50)
    assert len(list(tokenizer._pieces(TEXTS[0]))) > len(TEXTS[0]) / 150
    assert [tokenizer.encode(text) for text in TEXTS] == whole
    assert [ids.tolist() for ids in tokenizer.encode_batch(TEXTS)] == whole


def test_a_million_spaces(tokenizer):
    text = " " * 1_100_000 + "x"
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.decode(ids.tolist()) == text


def test_an_unknown_number_of_ranks_says_what_to_do():
    message = r"odd.model: holds 300 tiktoken ranks, .*; expected 50,256 \(GPT-2 \(r50k\)\), .*tokenizer.json"
    with pytest.raises(DataError, match=message):
        TiktokenTokenizer(file_content(RANKS), "odd.model")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"YQ== 97\nYg\n", r"x:2: holds b'Yg'; expected a token in base64 and its rank"),
        (b"YQ== 97\nYg=x 98\n", r"x:2: holds b'Yg=x 98'; expected a token in base64"),
        (b"YQ== 97\nYgg 98\n", r"x:2: holds b'Ygg 98'; expected a token in base64"),
        (b"YQ== 97\n\nYQ== 98\n", r"x:3: repeats the token b'a' or its rank 98"),
        (b"YQ== 97\nYg== 97\n", r"x:2: repeats the token b'b' or its rank 97"),
        (b"AA== 0\n", r"x: has no rank for the byte 1; expected one for each of 256 bytes"),
    ],
)
def test_malformed_files_are_named(content, message):
    with pytest.raises(DataError, match=message):
        TiktokenTokenizer(content, "x")


def test_a_rank_that_is_a_special_token_is_refused(monkeypatch):
    monkeypatch.setattr(tiktoken_ranks, "FAMILIES", {301: FAMILIES[50256]})
    with pytest.raises(DataError, match=r"x: gives rank 50256 to a token, which is a special token of GPT-2"):
        TiktokenTokenizer(file_content(RANKS | {b"zzzz": 50256}), "x")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(DataError, match=r"x: .* package tiktoken: pip install 'memlm\[tokenizers\]'"):
        TiktokenTokenizer(file_content(RANKS), "x")
