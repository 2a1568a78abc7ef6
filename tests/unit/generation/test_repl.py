import pytest

from memlm.errors import ConfigError
from memlm.generation.repl import Repl

SETTINGS = {
    "max_new_tokens": 128,
    "temperature": 0.0,
    "top_k": None,
    "top_p": None,
    "min_p": None,
    "seed": None,
    "stop": [],
}


class Session:
    """Lines that somebody types, an exception where they press Ctrl-C or Ctrl-D, and what they see."""

    def __init__(self, *typed, answer=None):
        self.typed = list(typed)
        self.written = []
        self.asked = []
        self.repl = Repl(answer or self.answer, SETTINGS, self.read, self.written.append)
        self.repl.run()

    def read(self, shown):
        if not self.typed:
            raise EOFError
        line = self.typed.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line

    def answer(self, text, settings):
        self.asked.append((text, dict(settings)))


def test_a_line_is_a_prompt_as_it_stands():
    session = Session(" once upon ", "", "   ", "::colon", "a :b")
    assert [text for text, _ in session.asked] == [" once upon ", ":colon", "a :b"]
    assert session.asked[0][1] == SETTINGS


def test_commands_change_what_the_next_answer_gets():
    session = Session(
        ":seed 3",
        ":temperature 0.8",
        ":max 100",
        ":top_k 5",
        ":top_p 0.9",
        ":min_p 0.1",
        ":stop \\n\\n",
        ":stop END",
        "a",
        ":seed none",
        ":top_k none",
        ":stop",
        "b",
    )
    (_, first), (_, second) = session.asked
    assert first == {
        "max_new_tokens": 100,
        "temperature": 0.8,
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0.1,
        "seed": 3,
        "stop": ["\n\n", "END"],
    }
    assert second == first | {"seed": None, "top_k": None, "stop": []}
    assert session.written[:3] == ["seed 3", "temperature 0.8", "max_new_tokens 100"]
    assert SETTINGS["stop"] == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (":temperature hot", "error: :temperature is hot, must be a number of at least 0"),
        (":temperature -1", "error: :temperature is -1, must be a number of at least 0"),
        (":top_p 2", "error: :top_p is 2, must be above 0 and at most 1"),
        (":max 0", "error: :max_new_tokens is 0, must be an integer of at least 1"),
        (":nonsense 3", "error: no command :nonsense; there are :max_new_tokens, :temperature, :top_k, "),
    ],
)
def test_a_wrong_command_is_named_and_changes_nothing(line, message):
    session = Session(line, "a")
    assert session.written[0].startswith(message)
    assert session.asked == [("a", SETTINGS)]


def test_settings_and_help_are_shown():
    session = Session(":settings", ":seed", ":help")
    assert session.written[0] == (
        "max_new_tokens 128  temperature 0.0  top_k none  top_p none  min_p none  seed none  stop none"
    )
    assert session.written[1] == "seed none"
    assert all(f":{name}" in session.written[2] for name in SETTINGS)


def test_interrupts_stop_an_answer_or_a_line_and_the_end_of_input_all():
    asked = []

    def answer(text, settings):
        asked.append(text)
        if text == "long":
            raise KeyboardInterrupt

    session = Session("long", KeyboardInterrupt(), "short", answer=answer)
    assert asked == ["long", "short"]
    assert session.written == ["\n(stopped)", "", ""]


def test_quit_ends_before_the_next_line():
    assert Session(":quit", "a").asked == []


def test_an_error_of_one_prompt_is_shown_and_the_next_is_answered():
    asked = []

    def answer(text, settings):
        asked.append(text)
        if text == "long":
            raise ConfigError("prompt", "is too long")

    session = Session("long", "short", answer=answer)
    assert asked == ["long", "short"]
    assert session.written[0] == "error: prompt: is too long"
