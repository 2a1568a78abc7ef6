"""The options of generation that the command line and its prompt line share, and their values."""

import argparse
import math
from collections.abc import Callable
from typing import Any, NamedTuple


class Option(NamedTuple):
    """One option.

    Attributes:
        name: After ``--`` on the command line, and after ``:`` on the prompt line.
        parse: Makes its value of a word; raises ArgumentTypeError.
        default: Its value where it is not given.
        metavar: What stands for its value in help.
        help: What it does.
    """

    name: str
    parse: Callable[[str], Any]
    default: Any
    metavar: str
    help: str


def integer(least: int) -> Callable[[str], int]:
    """A parser of integers of at least ``least``."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"is {text}, must be an integer of at least {least}")
        return int(text)

    return parse


def _number(allowed: Callable[[float], bool], expected: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not allowed(value):
            raise argparse.ArgumentTypeError(f"is {text}, must be {expected}")
        return value

    return parse


OPTIONS = (
    Option("max_new_tokens", integer(1), 128, "N", "most tokens of a continuation"),
    Option(
        "temperature",
        _number(lambda value: 0 <= value < math.inf, "a number of at least 0"),
        0.0,
        "T",
        "divides the logits: 1 draws from the model's distribution, less prefers likelier tokens, 0 always "
        "takes the likeliest",
    ),
    Option("top_k", integer(1), None, "K", "draw among the K likeliest tokens only"),
    Option(
        "top_p",
        _number(lambda value: 0 < value <= 1, "above 0 and at most 1"),
        None,
        "P",
        "draw among the fewest tokens whose probabilities sum to P at least",
    ),
    Option(
        "min_p",
        _number(lambda value: 0 <= value <= 1, "between 0 and 1"),
        None,
        "P",
        "draw among the tokens of at least P times the likeliest one's probability only",
    ),
    Option("seed", integer(0), None, "N", "of the sampling; the same gives the same again [drawn]"),
)

NEED_TEMPERATURE = ("top_k", "top_p", "min_p", "seed")
"""Options that would do nothing with temperature 0."""
