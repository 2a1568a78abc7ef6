"""The Python of docs/inspect.md runs as it stands there, and its commands have only options that exist."""

import re
import shlex
from pathlib import Path

import pytest
from inspected_models import make, random_tokens

from memlm.inspection.verb import _check, _parser

PAGE = (Path(__file__).parents[3] / "docs" / "inspect.md").read_text(encoding="utf-8")
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

    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    monkeypatch.setattr("memlm.trained.load_trained", lambda path: Trained())
    names: dict = {}
    exec(code.replace("[13966, 2617]", "[3, 26]"), names)
    assert len(names["layers"]) == 2
