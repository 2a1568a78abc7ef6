import json
import math

import pytest
from byte_model import evaluator, log_likelihood

from memlm.errors import ConfigError, DataError
from memlm.evaluation import text_likelihood
from memlm.evaluation.text_likelihood import TextPerplexity

TEXTS = ["One text,\nof two lines.\n", "Über allen Gipfeln ist Ruh", "x"]


def write(tmp_path, texts=TEXTS, key="text"):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return str(path)


def test_figures_against_brute_force(tmp_path, monkeypatch):
    monkeypatch.setattr(text_likelihood, "CHARACTERS_AT_ONCE", 30)  # more than one portion
    ask = evaluator()
    result = TextPerplexity(write(tmp_path)).run(ask, records=True)
    nats = [-log_likelihood(ask.model, "", text) for text in TEXTS]
    size = sum(len(text.encode()) for text in TEXTS)
    assert [record["nats"] for record in result.records] == pytest.approx(nats, abs=1e-4)
    loss = sum(nats) / size  # bytes are the tokens
    words = sum(len(text.split()) for text in TEXTS)
    expected = {
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss / math.log(2),
        "word_perplexity": math.exp(sum(nats) / words),
    }
    got = {name: estimate.value for name, estimate in result.metrics.items()}
    assert got == pytest.approx(expected, rel=1e-5)
    assert result.metrics["loss"].low < loss < result.metrics["loss"].high


def test_a_text_file_is_one_document_or_several(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("first\n\nsecond one\n\n\n\nthird")
    assert TextPerplexity(str(path)).examples == ["first\n\nsecond one\n\n\n\nthird"]
    parts = TextPerplexity(str(path), separator="\n\n", limit=2)
    assert parts.examples == ["first", "second one"]
    one = TextPerplexity(str(path), name="book").run(evaluator(16))
    assert (one.name, one.examples, one.metrics["loss"].low) == ("book", 1, None)
    assert one.metrics["loss"].value > 0


def test_another_key(tmp_path):
    assert TextPerplexity(write(tmp_path, key="body"), text_key="body").examples == TEXTS
    with pytest.raises(DataError, match=r"a.jsonl:1: has no field 'text'; expected a string. It has 'body'"):
        TextPerplexity(write(tmp_path, key="body")).load()


def test_no_text(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"empty.txt: holds no text"):
        TextPerplexity(str(tmp_path / "empty.txt")).load()
    with pytest.raises(DataError, match=r"a.jsonl:2: field 'text' is empty"):
        TextPerplexity(write(tmp_path, ["a", ""])).load()
    with pytest.raises(ConfigError, match=r"TextPerplexity.separator: is empty"):
        TextPerplexity("a.txt", separator="")
