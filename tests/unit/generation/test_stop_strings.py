"""Stop strings and the text of tokens as they come; the oracles see all of the text at once."""

import io
import random
from pydoc_data.topics import topics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memlm.generation.stop_strings import StopStrings
from memlm.generation.streamed_text import IncrementalDecoder, StreamedText
from memlm.tokenizers import (
    ByteTokenizer,
    FileTokenizer,
    JsonTokenizer,
    SentencePieceTokenizer,
    TiktokenTokenizer,
    train_bpe,
    word_tokenizer,
)

TEXTS = [topics[name] for name in sorted(topics)[:8]]
FEW = st.text(st.sampled_from("abc"), max_size=12)
UNUSUAL = st.text(st.sampled_from("ab \n\t.é\u0301中🙂▁\ufffd"), max_size=30).filter(
    lambda text: "\ufffd" * 3 not in text  # what some tokenizers cannot tell from half a character in time
)


def ending(text, stops):
    """The text before the stop that is whole first, and that stop, by trying every end."""
    for end in range(1, len(text) + 1):
        whole = [stop for stop in stops if text[:end].endswith(stop)]
        if whole:
            longest = max(whole, key=len)
            return text[: end - len(longest)], longest
    return text, None


def cut(text, random_):
    places = sorted(random_.randrange(len(text) + 1) for _ in range(random_.randrange(6)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@given(FEW, st.lists(FEW.filter(bool), max_size=3), st.randoms(use_true_random=False))
def test_the_first_stop_that_is_whole_ends_the_text_however_it_is_cut(text, stops, random_):
    found = StopStrings(stops)
    expected, stop = ending(text, stops)
    given_ = ""
    for piece in cut(text, random_):
        given_ += found.push(piece)
        assert expected.startswith(given_)
    given_ += found.finish()
    assert (given_, found.found) == (expected, stop)


def test_only_what_may_begin_a_stop_is_held_back():
    stops = StopStrings(["\n\n", "END"])
    assert [stops.push(piece) for piece in ("a\n", "b", "EN", "TER", "\nE", "ND x", "y")] == [
        "a",
        "\nb",
        "",
        "ENTER",
        "\n",
        "",
        "",
    ]
    assert stops.found == "END"
    assert stops.finish() == ""


def test_an_empty_stop_is_refused():
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["a", ""])


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train_bpe(TEXTS, 600, path)
    return FileTokenizer(path)


def sentencepiece_tokenizer(**options):
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    written = io.BytesIO()
    lines = iter([line for text in TEXTS for line in text.splitlines()])
    trainer.train(
        sentence_iterator=lines,
        model_writer=written,
        minloglevel=2,
        num_threads=1,
        vocab_size=500,
        **options,
    )
    return SentencePieceTokenizer(written.getvalue(), "a.model")


def metaspace_tokenizer():
    """Like Llama 2's ``tokenizer.json``: words begin with a mark for a space; other characters are bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abc", "ab", "▁a", "▁ab"]
    backend = Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            [("a", "b"), ("▁", "a"), ("▁a", "b")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    return JsonTokenizer(backend.to_str(), "llama")


def tiktoken_tokenizer():
    pytest.importorskip("tiktoken")
    import base64

    ranks = [bytes([byte]) for byte in range(256)]
    # As many as GPT-2's, by which the pattern is known.
    ranks += [number.to_bytes(3, "big") for number in range(1 << 16, (1 << 16) + 50256 - 256)]
    content = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks))
    return TiktokenTokenizer(content, "ranks")


@pytest.fixture(scope="module", params=["bytes", "bpe", "llama2", "default", "metaspace", "tiktoken"])
def tokenizer(request, bpe):
    if request.param == "bytes":
        return ByteTokenizer()
    if request.param == "bpe":
        return bpe
    if request.param == "metaspace":
        return metaspace_tokenizer()
    if request.param == "tiktoken":
        return tiktoken_tokenizer()
    if request.param == "default":
        return sentencepiece_tokenizer(model_type="unigram")
    return sentencepiece_tokenizer(
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )


def streamed(tokenizer, ids, context=()):
    decoder = IncrementalDecoder(tokenizer, context)
    pieces = [decoder.push(token) for token in ids]
    return pieces, decoder.finish()


@given(text=UNUSUAL | st.text(max_size=20), head=UNUSUAL)
@settings(max_examples=150)
def test_pieces_add_up_to_the_text_of_all_tokens(tokenizer, text, head):
    eos = tokenizer.eos_id
    ids = [*tokenizer.encode(text), eos]
    pieces, rest = streamed(tokenizer, ids)
    assert "".join(pieces) + rest == tokenizer.decode(ids)
    # After a prompt, to the whole text without the prompt's.
    context = [eos, *tokenizer.encode(head)]
    whole, before = tokenizer.decode([*context, *ids]), tokenizer.decode(context)
    pieces, rest = streamed(tokenizer, ids, context)
    assert before + "".join(pieces) + rest == whole


@given(st.lists(st.integers(0, 256), max_size=40))
@settings(max_examples=300)
def test_any_bytes_give_what_they_give_at_once(ids):
    tokenizer = ByteTokenizer()
    pieces, rest = streamed(tokenizer, ids)
    assert "".join(pieces) + rest == tokenizer.decode(ids)


def test_any_tokens_of_a_byte_level_vocabulary_give_what_they_give_at_once(bpe):
    draws = random.Random(0)
    for _ in range(200):
        ids = [draws.randrange(bpe.vocab_size) for _ in range(draws.randrange(30))]
        pieces, rest = streamed(bpe, ids)
        assert "".join(pieces) + rest == bpe.decode(ids)


def test_any_tokens_of_any_vocabulary_give_what_they_give_at_once(tokenizer):
    draws = random.Random(1)
    # Some tokenizers replace a whole run of bytes if any is invalid, after its first ones were given.
    bytes_of_one = tokenizer.encode("中")[-3:]
    replaces_runs = tokenizer.decode([*bytes_of_one, bytes_of_one[0]]) == "\ufffd" * 4
    known = range(257 if replaces_runs else 0, tokenizer.vocab_size)
    for _ in range(100):
        ids = [draws.choice(known) for _ in range(30)]
        pieces, rest = streamed(tokenizer, ids)
        assert "".join(pieces) + rest == tokenizer.decode(ids)


def test_characters_appear_once_they_are_whole():
    ids = list("a中🙂b".encode())
    pieces, rest = streamed(ByteTokenizer(), ids)
    assert pieces == ["a", "", "", "中", "", "", "", "🙂", "b"]
    assert rest == ""
    pieces, rest = streamed(ByteTokenizer(), ids[:-2])
    assert rest == "\ufffd"


def test_words_keep_the_space_between_prompt_and_continuation():
    words = word_tokenizer(["the", "cat", "sat"], "words")
    assert streamed(words, [1, 2, words.eos_id], [words.eos_id, 0]) == ([" cat", " sat", ""], "")
    assert streamed(words, [1, 2], [words.eos_id]) == (["cat", " sat"], "")


@given(text=UNUSUAL, head=UNUSUAL, stops=st.lists(UNUSUAL.filter(bool), min_size=1, max_size=3))
@settings(max_examples=150)
def test_stops_are_found_across_tokens(tokenizer, text, head, stops):
    context = [tokenizer.eos_id, *tokenizer.encode(head)]
    ids = tokenizer.encode(text)
    stream = StreamedText(tokenizer, stops, context)
    pieces = []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    new = tokenizer.decode([*context, *ids])[len(tokenizer.decode(context)) :]
    expected, stop = ending(new, stops)
    assert stream.text == "".join(pieces) == expected
    assert stream.stopped == (stop is not None)


def test_a_stop_ends_the_text_with_the_token_that_completes_it():
    stream = StreamedText(ByteTokenizer(), ["\n\n"])
    assert [stream.push(token) for token in b"ab\n\nc"] == ["a", "b", "", "", ""]
    assert stream.stopped
    assert stream.finish() == ""
    assert stream.text == "ab"
    stream = StreamedText(ByteTokenizer(), ["\n\n"])
    assert [stream.push(token) for token in b"ab\n"] == ["a", "b", ""]
    assert stream.finish() == "\n"
    assert not stream.stopped


def test_a_long_text_is_decoded_in_time_linear_in_its_tokens():
    decoded = 0

    class Counting(ByteTokenizer):
        def decode(self, ids):
            nonlocal decoded
            decoded += len(ids)
            return super().decode(ids)

    text = "The quick brown fox. " * 500
    pieces, _ = streamed(Counting(), list(text.encode()), list(text.encode()))
    assert "".join(pieces) == text
    assert decoded < 10 * len(text)
