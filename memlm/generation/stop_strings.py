"""Texts that end a continuation, found as it comes, wherever the pieces of text are cut."""

from collections.abc import Sequence


class StopStrings:
    """Looks for stop strings in a text that comes in pieces, and gives the text before the first of them.

    A text has ended once any stop string is whole; of several that become whole with the same character the
    one that began first counts. What is found does not depend on how the text was cut into pieces. Text that
    may be the beginning of a stop string is held back until it is known not to be one.

    Args:
        stops: The strings; none of them empty.

    Attributes:
        found: The stop string that ended the text; None if none has so far.

    Raises:
        ValueError: A stop string is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise ValueError("a stop string is empty")
        self.stops = tuple(dict.fromkeys(stops))
        self.found: str | None = None
        self._held = ""

    def push(self, text: str) -> str:
        """Take the next piece of text.

        Returns:
            What can be given now: no part of it belongs to a stop string. Nothing once one was found.
        """
        if self.found is not None:
            return ""
        self._held += text
        places = [(at + len(stop), at, stop) for stop in self.stops if (at := self._held.find(stop)) >= 0]
        if places:
            _, at, self.found = min(places)
            given, self._held = self._held[:at], ""
            return given
        cut = len(self._held) - self._possible_beginning()
        given, self._held = self._held[:cut], self._held[cut:]
        return given

    def finish(self) -> str:
        """What is held back still, at the end of the text."""
        given, self._held = self._held, ""
        return given

    def _possible_beginning(self) -> int:
        """Characters at the end of the text that may be the beginning of a stop string."""
        longest = max((len(stop) for stop in self.stops), default=1)
        for length in range(min(len(self._held), longest - 1), 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self.stops):
                return length
        return 0
