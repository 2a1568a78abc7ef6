"""The text of tokens as they come: no half characters, nothing after a stop string."""

from collections.abc import Sequence

from memlm.generation.stop_strings import StopStrings
from memlm.tokenizers import Tokenizer

_REPLACEMENT = "\ufffd"
_HELD_BACK = 12
"""Characters U+FFFD at the end of a text that may change. A character of UTF-8 that is not whole yet is at
most 3 bytes, each of which may decode to one; some tokenizers replace valid bytes before it, too."""


class IncrementalDecoder:
    """Decodes tokens one by one, each together with a few before it, in the same time however many came.

    The pieces of text add up to what the tokenizer makes of all tokens at once, less what it makes of the
    context. Around bytes that are not valid UTF-8 it may differ: some tokenizers replace a whole run of bytes
    if any of them is invalid, and what was given cannot be taken back.

    Args:
        tokenizer: Of the tokens.
        context: Tokens before the first one, such as a prompt's: many tokenizers drop the space that a word
            begins with at the beginning of a text only.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        """Tokens that are decoded together: those of whole characters, then the others."""
        self._known = 0
        """How many tokens of the window stand for the text ``_text``."""
        self._text = ""
        """What the first ``_known`` tokens of the window say."""
        self._given = 0
        """Characters of the window's text that were given."""
        for start in range(len(context) - 1, -1, -1):
            # As few tokens as say anything but spaces, from the end.
            self._window = list(context[start:])
            self._text = tokenizer.decode(self._window)
            if self._text.strip(" " + _REPLACEMENT):
                break
        self._known, self._given = len(self._window), len(self._text)

    def push(self, token: int) -> str:
        """Take the next token.

        Returns:
            The text that is certain now; characters that may not be whole yet are held back.
        """
        self._window.append(token)
        text = self._decode()
        whole = text.rstrip(_REPLACEMENT)
        certain = text[: max(len(whole), len(text) - _HELD_BACK)]
        new = certain[self._given :]
        self._given = max(self._given, len(certain))
        if certain == text:
            self._slide(text)
        return new

    def finish(self) -> str:
        """What is held back still, at the end of the tokens."""
        text = self._decode()
        new = text[self._given :]
        self._given = max(self._given, len(text))
        return new

    def _decode(self) -> str:
        text = self._tokenizer.decode(self._window)
        if text.startswith(self._text):
            return text
        # Invalid bytes have changed what was given already.
        return self._text + self._tokenizer.decode(self._window[self._known :])

    def _slide(self, text: str) -> None:
        """Decode only together with the newest tokens from now on, if they can stand at the beginning."""
        newest = self._window[self._known :]
        alone = self._tokenizer.decode(newest)
        if alone.strip(" " + _REPLACEMENT):
            self._window, text = newest, alone
            self._given = len(alone)
        self._known, self._text = len(self._window), text


class StreamedText:
    """The text of one continuation while its tokens come, up to a stop string.

    Args:
        tokenizer: Of the tokens.
        stops: Strings that end the text; they are not part of it.
        context: Tokens before the first one, such as the prompt's; they are not part of the text.

    Attributes:
        text: All text given so far.
        stopped: Whether a stop string has ended it.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), context: Sequence[int] = ()) -> None:
        self._decoder = IncrementalDecoder(tokenizer, context)
        self._stops = StopStrings(stops)
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    @property
    def stopped(self) -> bool:
        return self._stops.found is not None

    def push(self, token: int) -> str:
        """Take the next token; gives the text that is certain now, and nothing once it has stopped."""
        return self._give(self._stops.push(self._decoder.push(token)))

    def finish(self) -> str:
        """The rest, once no more tokens come."""
        return self._give(self._stops.push(self._decoder.finish()) + self._stops.finish())

    def _give(self, text: str) -> str:
        self._pieces.append(text)
        return text
