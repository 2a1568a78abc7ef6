"""The Python of docs/inspect.md runs as it stands there, and its commands have only options that exist."""

import json
import re
import shlex
from pathlib import Path

import pytest
from inspected_models import make, random_tokens

from memlm.inspection.verb import _check, _parser

PAGE = (Path(__file__).parents[3] / "docs" / "inspect.md").read_text(encoding="utf-8")
CORPUS, CODE = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^    memlm inspect (.*?)(?: +#.*)?$", PAGE, re.MULTILINE)


def test_the_page_has_commands():
    assert len(COMMANDS) == 6


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command):
    numbered = re.sub(r"--slot N", "--slot 1", command)
    _check(_parser().parse_args(shlex.split(numbered)))


def test_python(monkeypatch):
    class Tokenizer:
        eos_id = 0

        def encode(self, text):
            return random_tokens(len(text.split()))

    class Trained:
        model, tokenizer, context = make("memory"), Tokenizer(), 40

    monkeypatch.setattr("memlm.trained.load_trained", lambda path: Trained())
    names: dict = {}
    exec(CODE.replace("[13966, 2617]", "[3, 26]"), names)
    assert len(names["layers"]) == 2


def test_corpus(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    exec(CORPUS, {})
    texts = [json.loads(line)["text"] for line in (tmp_path / "corpus.jsonl").read_text().splitlines()]
    assert len(texts) == 2016
    shown = re.search(r"1885  (.*?)…", PAGE)[1]  # of the page's output: a document's beginning
    assert texts[1885].startswith(shown.replace("[", "").replace("]", "").strip())
