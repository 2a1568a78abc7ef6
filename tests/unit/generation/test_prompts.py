import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlm.errors import DataError
from memlm.generation.prompts import Prompt, command_line_prompts, parse_prompts, read_prompts
from memlm.tokenizers import ByteTokenizer, word_tokenizer
from memlm.usage_errors import UsageError

WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r"), min_size=1).filter(
    lambda text: text.strip()
)


@given(st.lists(WORDS, min_size=1))
def test_each_line_of_text_is_a_prompt(texts):
    for end in ("\n", "\r\n"):
        for tail in ("", end):
            prompts = parse_prompts((end.join(texts) + tail).encode(), "a.txt", as_json=False)
            assert [prompt.text for prompt in prompts] == texts
            assert [prompt.line for prompt in prompts] == list(range(1, len(texts) + 1))


@given(st.lists(st.tuples(st.text(st.characters(exclude_categories=["Cs"])), st.integers()), min_size=1))
def test_a_line_of_json_is_a_prompt_with_fields(records):
    records = [(text + "x", number) for text, number in records]
    lines = [json.dumps({"id": number, "prompt": text}) for text, number in records]
    prompts = parse_prompts("\n\n".join(lines).encode(), "a.jsonl", as_json=True)
    assert [(prompt.text, prompt.fields) for prompt in prompts] == [
        (text, {"id": number}) for text, number in records
    ]
    assert [prompt.line for prompt in prompts] == list(range(1, 2 * len(records), 2))


def test_the_suffix_decides_what_a_line_is(tmp_path):
    line = '{"prompt": "a"}\n'
    for name, text in (("a.jsonl", "a"), ("a.ndjson", "a"), ("A.JSON", "a"), ("a.txt", line[:-1])):
        (tmp_path / name).write_text(line)
        assert [prompt.text for prompt in read_prompts(tmp_path / name)] == [text]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "a.jsonl:2: is not valid JSON (Expecting value at"),
        ("a.jsonl", b'{"prompt": "a"}\n\n[1]', "a.jsonl:3: expected an object with the string 'prompt'; "
            "this is no object"),
        ("a.jsonl", b'{"question": "a", "id": 1}', ":1: expected an object with the string 'prompt'; this "
            "has the fields 'question', 'id'"),
        ("a.jsonl", b'{"prompt": ["a"]}', 'this has ["a"] as its prompt'),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": ""}', "a.jsonl:2: is an empty prompt"),
        ("a.jsonl", b'{"prompt": "a", "text": "b"}', ":1: has the field 'text', which is the answer's"),
        ("a.jsonl", b'{"prompt": "\\ud800"}', ":1: 'prompt' holds half a surrogate pair"),
        ("a.jsonl", b"[" * 100_000, ":1: is not valid JSON"),
        ("a.jsonl", b"\n \n", "a.jsonl: holds no prompts"),
        ("a.txt", b"", "a.txt: holds no prompts"),
        ("a.txt", b"a\n\nb\n", "a.txt:2: is an empty prompt"),
        ("a.txt", b"a\n \t\n", "a.txt:2: is an empty prompt"),
        ("a.txt", b"a\nb\xff\n", "a.txt:2: is not valid UTF-8 (invalid start byte at byte 1 of the line)"),
    ],
)  # fmt: skip
def test_a_malformed_file_is_named_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_prompts(tmp_path / name)
    assert message in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no\.txt: cannot be read: No such file"):
        read_prompts(tmp_path / "no.txt")


def test_tokens_begin_with_the_end_of_the_document_before():
    tokenizer = ByteTokenizer()
    assert Prompt("ab").encode(tokenizer, 3) == [256, 97, 98]
    assert command_line_prompts([""])[0].encode(tokenizer, 1) == [256]


def test_too_long_a_prompt_is_named_with_both_lengths():
    with pytest.raises(DataError) as caught:
        Prompt("a" * 2000, {}, "p.txt", 7).encode(ByteTokenizer(), 1024)
    assert str(caught.value).startswith("p.txt:7: is 2,001 tokens long")
    assert "the 1,024 of the context" in str(caught.value)
    with pytest.raises(UsageError, match=r"prompt 'aaa': is 4 tokens long .* more than the 3 "):
        Prompt("aaa").encode(ByteTokenizer(), 3)
    assert len(Prompt("aaa").encode(ByteTokenizer(), None)) == 4


def test_a_word_that_the_tokenizer_does_not_know_is_named_with_its_prompt():
    with pytest.raises(DataError, match=r"p\.txt:3: the tokenizer words: cannot encode 'the dog'"):
        Prompt("the dog", {}, "p.txt", 3).encode(word_tokenizer(["the"], "words"), None)


def test_words_that_are_no_text_are_refused():
    with pytest.raises(UsageError, match="is not valid UTF-8"):
        command_line_prompts(["a\udcff"])
