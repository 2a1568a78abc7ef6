"""Long texts in pieces, cut where tokenizers do not merge."""

import re
from collections.abc import Iterator
from typing import NamedTuple

# What follows must be a letter or digit: o200k's pattern, for one, joins a slash to the newline before it.
_NEWLINE = re.compile(r"(?<=\S)\n(?=[^\W_])")
_SPACE = re.compile(r"(?<=\S) (?=[^\W_])")


class CutRule(NamedTuple):
    """Where a tokenizer's texts can be cut without another result.

    Attributes:
        after_newline: Whether that is so after a newline between two characters that are not white space.
        at_space: Whether that is so at a space between two such characters.
        drop_space: Whether a cut at a space leaves it out, because the tokenizer begins each text with one;
            otherwise the space begins the next piece.
    """

    after_newline: bool
    at_space: bool
    drop_space: bool = False


def cut(text: str, length: int, most: int, rule: CutRule) -> Iterator[str]:
    """Pieces of a text, in order: each of the characters falls into one, but for spaces dropped by the rule.

    A piece ends at the first newline, or else the first space, from ``length`` to twice that; else wherever
    the rule allows below ``most``; else at ``most``.

    Args:
        text: Any text.
        length: Characters that a piece must have before it is ended; at least 1. The last may have fewer.
        most: Characters that no piece exceeds; at least ``length``.
        rule: What makes a good place.
    """
    start = 0
    while len(text) - start > length:
        near, far = start + min(2 * length, most), start + most
        place = _find(text, start + length, near, rule) or _find(text, near, far, rule)
        if place is None and len(text) - start <= most:
            break
        stop, following = place or (far, far)
        yield text[start:stop]
        start = following
    yield text[start:]


def _find(text: str, least: int, most: int, rule: CutRule) -> tuple[int, int] | None:
    """Where a piece can end and the next begin."""
    if rule.after_newline and (found := _NEWLINE.search(text, least, most)):
        return found.end(), found.end()
    if rule.at_space and (found := _SPACE.search(text, least, most)):
        return found.start(), found.end() if rule.drop_space else found.start()
    return None
