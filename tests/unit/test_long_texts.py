"""Long texts are encoded in pieces: the ids must be those of the whole text."""

from itertools import pairwise
from pydoc_data.topics import topics

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from memlm.tokenizers import ByteTokenizer, JsonTokenizer, Tokenizer, word_tokenizer
from memlm.tokenizers.long_texts import _NEWLINE, _SPACE, CutRule, cut

TEXTS = [topics[name] for name in sorted(topics)[:8]]
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ALPHABET = st.sampled_from(
    [*"aB7\n\n\n  \r\t'/.s_", "é", "\u0301", "ß", "中", "🙂", "\u00a0", "\x1c", "٣", "\0"]
)
UNUSUAL = st.text(ALPHABET, max_size=60)

NEWLINES, SPACES = CutRule(True, at_space=True), CutRule(False, at_space=True)
DROPPED = CutRule(False, at_space=True, drop_space=True)


def byte_level(pattern):
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return trained(backend, pre_tokenizers.ByteLevel.alphabet())


def spaces_marked():
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return trained(backend, {c for text in TEXTS for c in text} | {"▁"})


def trained(backend, alphabet):
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<unk>", "<|eos|>", *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    # Merges across everything that pre-tokenizers allow, such as ".\n/" in o200k's.
    more = [".\n/x\n.\n/\r\n\r\n\n\n  \n" * 999, "12 345\n67 'S's\n" * 999]
    backend.train_from_iterator([*TEXTS, *more], trainer)
    return JsonTokenizer(backend.to_str(), "trained for a test")


def prepending(tokenizer):
    """The same vocabulary, but spaces are marked by the normalizer, as in Llama 2's tokenizer.json."""
    tokenizer.backend.pre_tokenizer = None
    tokenizer.backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return JsonTokenizer(tokenizer.backend.to_str(), "trained for a test")


@pytest.fixture(scope="module")
def tokenizers():
    patterns = {"gpt2": GPT2, "llama3": LLAMA3, "o200k": O200K}
    return {name: byte_level(pattern) for name, pattern in patterns.items()} | {
        "metaspace": spaces_marked(),
        "prepend": prepending(spaces_marked()),
    }


@pytest.fixture
def lengths(monkeypatch):
    def patch(length, most, at_once=50):
        monkeypatch.setattr(Tokenizer, "piece_length", length)
        monkeypatch.setattr(Tokenizer, "longest_piece", most)
        monkeypatch.setattr("memlm.tokenizers.base.CHARACTERS_AT_ONCE", at_once)

    return patch


def test_rules_are_found_by_trying(tokenizers):
    rules = {name: tokenizer._cut_rule for name, tokenizer in tokenizers.items()}
    assert rules == {"gpt2": NEWLINES, "llama3": NEWLINES, "o200k": NEWLINES, "metaspace": SPACES} | {
        "prepend": DROPPED
    }
    assert ByteTokenizer()._cut_rule == NEWLINES
    assert word_tokenizer(["word"], "test words")._cut_rule == SPACES


@pytest.mark.parametrize("name", ["gpt2", "llama3", "o200k"])
@given(text=UNUSUAL)
@example(text="a.\n/b")
@settings(max_examples=300, deadline=None)
def test_every_good_place_leaves_the_ids_of_byte_level_bpe(tokenizers, name, text):
    encode = tokenizers[name].encode
    whole = encode(text)
    places = [found.end() for found in _NEWLINE.finditer(text)] + [f.start() for f in _SPACE.finditer(text)]
    for place in places:
        assert encode(text[:place]) + encode(text[place:]) == whole, (text[:place], text[place:])


@pytest.mark.parametrize("name", ["gpt2", "llama3", "o200k", "metaspace", "prepend"])
@pytest.mark.parametrize("length", [1, 7, 300])
def test_pieces_of_real_text_give_the_ids_of_the_whole(tokenizers, lengths, name, length):
    tokenizer = tokenizers[name]
    texts = [*TEXTS[:5], "", "short", "a\n\n\n b" * 50, "a b\nc " * 50]
    whole = [tokenizer.encode(text) for text in texts]
    lengths(length, 1000)
    assert len(list(tokenizer._pieces(texts[0]))) > len(texts[0]) / (length + 300)
    assert [tokenizer.encode(text) for text in texts] == whole
    batch = tokenizer.encode_batch(texts)
    assert [ids.tolist() for ids in batch] == whole
    assert all(ids.dtype == np.int32 for ids in batch)


@given(texts=st.lists(UNUSUAL, max_size=5), length=st.integers(1, 9), more=st.integers(0, 9))
@settings(max_examples=200, deadline=None)
def test_cut_anywhere_a_batch_is_the_same_as_one_by_one_and_loses_nothing(tokenizers, texts, length, more):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tokenizer, "piece_length", length)
        patch.setattr(Tokenizer, "longest_piece", length + more)
        patch.setattr("memlm.tokenizers.base.CHARACTERS_AT_ONCE", 10)
        for tokenizer in (tokenizers["gpt2"], ByteTokenizer()):
            one_by_one = [tokenizer.encode(text) for text in texts]
            assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == one_by_one
            assert [tokenizer.decode(ids) for ids in one_by_one] == texts


@given(
    text=UNUSUAL,
    length=st.integers(1, 20),
    more=st.integers(0, 20),
    rule=st.builds(CutRule, st.booleans(), st.booleans(), st.booleans()),
)
@settings(max_examples=500)
def test_pieces_join_to_the_text_are_bounded_and_end_at_good_places(text, length, more, rule):
    pieces = list(cut(text, length, length + more, rule))
    assert all(length <= len(piece) <= length + more for piece in pieces[:-1])
    assert len(pieces[-1]) <= length + more
    start = 0
    for piece, following in pairwise(pieces):
        assert text.startswith(piece, start)
        stop = start + len(piece)
        newline = rule.after_newline and text[stop - 1] == "\n" and not text[stop - 2].isspace()
        space = rule.at_space and text[stop] == " " and not text[stop - 1].isspace()
        assert newline or space or len(piece) == length + more
        start = stop + (rule.drop_space and space and not newline and not text.startswith(following, stop))
    assert text[start:] == pieces[-1]


def test_groups_of_pieces_are_bounded(lengths, monkeypatch):
    lengths(10, 10, at_once=35)
    groups, encode_many = [], ByteTokenizer._encode_many
    monkeypatch.setattr(
        ByteTokenizer, "_encode_many", lambda self, texts: groups.append(texts) or encode_many(self, texts)
    )
    texts = ["x" * 25, "", "y" * 10, "z" * 101]
    assert [bytes(ids.tolist()).decode() for ids in ByteTokenizer().encode_batch(texts)] == texts
    assert groups[0] == ["x" * 10, "x" * 10, "x" * 5, "", "y" * 10], "pieces and texts go together"
    assert max(sum(map(len, group)) for group in groups) <= 35
    assert len(groups) == 5
