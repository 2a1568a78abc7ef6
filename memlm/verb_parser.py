"""What the parsers of all verbs share that are not the Trainer's; the standard library alone."""

import argparse
import difflib
from typing import Any

from memlm.usage_errors import UsageError


class VerbParser(argparse.ArgumentParser):
    """Raises an error of one line in place of a page of usage, and suggests what an unknown option means.

    Args:
        verb: The words of the command, such as ``memlm export``.
        description: Of ``--help``, printed as it stands.
    """

    def __init__(self, verb: str, description: str) -> None:
        super().__init__(
            verb,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def parse_args(self, *arguments: Any, **options: Any) -> Any:
        """See :meth:`argparse.ArgumentParser.parse_args`.

        Raises:
            UsageError: An option is unknown, lacks its value, or has a wrong one.
        """
        parsed, unknown = self.parse_known_args(*arguments, **options)
        if unknown:
            word = unknown[0].split("=")[0]
            known = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(word.replace("-", "_").replace("__", "--", 1), known, 1)
            hint = f"; did you mean {near[0]}?" if near and word.startswith("-") else ""
            raise UsageError(f"{' '.join(unknown)}: is not an option of {self.prog}{hint}")
        return parsed

    def error(self, message: str) -> Any:
        """Raises the one line."""
        raise UsageError(message)


def positive(text: str) -> int:
    """An option's value that is an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"is {text}, must be an integer of at least 1")
    return int(text)
