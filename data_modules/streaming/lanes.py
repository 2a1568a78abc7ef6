"""Lanes: parts of a run's rows that can be made apart from one another, whoever makes them.

Row k of a run is the next row of lane k mod lanes. A rank takes every ``world``-th row, so it needs only some
of the lanes, and its loader processes share those; how many ranks and processes there are changes nothing in
what a lane gives.
"""

from collections.abc import Callable, Iterable, Iterator
from math import gcd
from typing import Any

from data_modules.mixture import Mixture
from data_modules.packing import Position, Tokens

Rows = Iterator[tuple[Tokens, Position]]
LaneCursor = dict[str, Any]
"""``row``: rows given by all lanes; ``lanes``: each one's positions, None where only another rank knows."""

_ASSIGNED_AT_ONCE = 1024


def lanes_of_rank(lanes: int, world: int) -> int:
    """How many lanes each rank needs."""
    return lanes // gcd(lanes, world)


def own_lanes(row: int, lanes: int, world: int, rank: int, worker: int = 0, workers: int = 1) -> list[int]:
    """The lanes that a loader process of a rank makes.

    Args:
        row: Rows given before.
        lanes: Number of lanes.
        world: Number of ranks.
        rank: Which of them this is.
        worker: Which of the rank's loader processes this is.
        workers: Their number.
    """
    needed = [(row + rank + world * i) % lanes for i in range(lanes_of_rank(lanes, world))]
    return needed[worker::workers]


def joined(cursors: Iterable[LaneCursor]) -> LaneCursor:
    """One cursor of those that different processes have after the same row."""
    first, *others = cursors
    lanes = list(first["lanes"])
    for cursor in others:
        assert cursor["row"] == first["row"]
        lanes = [a if a is not None else b for a, b in zip(lanes, cursor["lanes"], strict=True)]
    return {"row": first["row"], "lanes": lanes}


class Lane:
    """The rows of one lane, from one stream or from several by weights.

    Args:
        positions: Where each stream goes on.
        given: Rows that the lane has given before.
        mixture: Which of the streams gives which row; None if there is one stream.
        open_stream: Makes the rows of a stream from a position on, each with the position after it.
    """

    def __init__(
        self,
        positions: list[Position],
        given: int,
        mixture: Mixture | None,
        open_stream: Callable[[int, Position], Rows],
    ) -> None:
        self.positions = list(positions)
        self._order = _order(mixture, given)
        self._open_stream = open_stream
        self._streams: dict[int, Rows] = {}

    def next_row(self) -> Tokens:
        """The lane's next row; moves ``positions`` behind it."""
        stream = next(self._order)
        if stream not in self._streams:
            self._streams[stream] = self._open_stream(stream, self.positions[stream])
        row, self.positions[stream] = next(self._streams[stream])
        return row


def rows_given(row: int, lane: int, lanes: int) -> int:
    """How many of a run's first rows are of this lane."""
    return (row - lane + lanes - 1) // lanes


def _order(mixture: Mixture | None, given: int) -> Iterator[int]:
    while True:
        if mixture is None:
            yield 0
            continue
        yield from mixture.assign(given, _ASSIGNED_AT_ONCE)[0].tolist()
        given += _ASSIGNED_AT_ONCE
