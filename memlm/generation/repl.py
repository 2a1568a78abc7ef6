"""A prompt line: each line typed is a prompt, and its continuation appears as it comes."""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from memlm.errors import UserError
from memlm.generation.sampling_options import OPTIONS

_PROMPT = "> "
_SHORT = {"max": "max_new_tokens"}

HELP = """\
A line is the beginning of a document, which the model continues; nothing of earlier lines is remembered.
Ctrl-C stops an answer, Ctrl-D or :quit ends. A line that begins with : is a command:

  :max_new_tokens N  (or :max) most tokens of an answer
  :temperature T     0 takes the likeliest token; 1 draws from the model's distribution
  :top_k K  :top_p P  :min_p P   draw among likely tokens only
  :seed N            the same seed gives the same answer again
  :OPTION none       back to the default
  :stop TEXT         end answers at this text, too (\\n: a line end); :stop alone forgets all of them
  :settings          what is set
  :help              this text
  ::TEXT             a prompt that begins with :"""


class Repl:
    """Reads lines, answers them and obeys commands, until it is told to quit.

    Args:
        answer: Answers a prompt, with the settings (by the names of `OPTIONS`, and ``stop``, a list); prints
            the answer as it comes.
        settings: What is set at first.
        read: Gives the next line, for the prompt that it shows; raises EOFError at the end.
        write: Prints a line.
    """

    def __init__(
        self,
        answer: Callable[[str, Mapping[str, Any]], object],
        settings: Mapping[str, Any],
        read: Callable[[str], str],
        write: Callable[[str], object],
    ) -> None:
        self.settings = {**settings, "stop": list(settings["stop"])}
        self._answer, self._read, self._write = answer, read, write

    def run(self) -> None:
        """Goes on until ``:quit`` or the end of the input; Ctrl-C ends an answer or a line alone."""
        while True:
            try:
                line = self._read(_PROMPT)
            except EOFError:
                self._write("")
                return
            except KeyboardInterrupt:
                self._write("")
                continue
            if line.startswith(":") and not line.startswith("::"):
                word, _, rest = line[1:].partition(" ")
                if word in ("quit", "q", "exit"):
                    return
                self._obey(word, rest)
            elif line.strip():
                self._respond(line[1:] if line.startswith("::") else line)

    def _respond(self, text: str) -> None:
        try:
            self._answer(text, self.settings)
        except KeyboardInterrupt:
            self._write("\n(stopped)")
        except UserError as error:
            self._write(f"error: {error}")

    def _obey(self, word: str, value: str) -> None:
        options = {option.name: option for option in OPTIONS}
        name = _SHORT.get(word, word)
        if word == "help":
            self._write(HELP)
        elif word == "settings":
            self._write("  ".join(f"{name} {_shown(value)}" for name, value in self.settings.items()))
        elif word == "stop":
            self.settings["stop"] = [*self.settings["stop"], _unescaped(value)] if value else []
            self._write(f"stop {_shown(self.settings['stop'])}")
        elif name in options:
            self._set(name, value.strip())
        else:
            known = ", ".join(f":{name}" for name in [*options, "stop", "settings", "help", "quit"])
            self._write(f"error: no command :{word}; there are {known} (a prompt may begin with ::)")

    def _set(self, name: str, value: str) -> None:
        option = next(option for option in OPTIONS if option.name == name)
        try:
            if value:
                self.settings[name] = option.default if value == "none" else option.parse(value)
        except argparse.ArgumentTypeError as error:
            self._write(f"error: :{name} {error}")
            return
        self._write(f"{name} {_shown(self.settings[name])}")


def _unescaped(text: str) -> str:
    """``\\n`` as a line end and ``\\t`` as a tab, which no line can hold."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(repr, value)) or "none"
    return "none" if value is None else str(value)
