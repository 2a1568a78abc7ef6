"""A read of a table whose columns lie on several ranks, in parts between which a layer can do other work.

Two times something is on its way: to each rank the slots and weights of all the group's tokens; then, once it
has read its columns for them, the answers to the tokens' own ranks.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

Arriving = Callable[[], Tensor]
"""Waits for what is on its way, and gives it; to be called once."""


class Exchange(Protocol):
    """What ranks that hold columns of one table send each other; see :mod:`memlm.parallel.group_exchange`.

    Each method begins to send, and does not wait. What it is given must not change before it has arrived.
    """

    size: int
    rank: int

    def gather(self, x: Tensor) -> Arriving:
        """``[N, ...]`` to those of all ranks ``[G * N, ...]``."""
        ...

    def columns_to_tokens(self, x: Tensor) -> Arriving:
        """``[G * N, V / G]`` to ``[N, V]``."""
        ...

    def tokens_to_columns(self, x: Tensor) -> Arriving:
        """``[N, V]`` to ``[G * N, V / G]``."""
        ...

    def sum_to_tokens(self, x: Tensor) -> Arriving:
        """``[G * N, ...]`` to ``[N, ...]``, summed over the ranks."""
        ...


class Alone:
    """The exchange of a rank that holds all columns: what it is given is there at once."""

    size, rank = 1, 0

    def gather(self, x: Tensor) -> Arriving:
        """``x``, as from all other methods."""
        return lambda: x

    columns_to_tokens = tokens_to_columns = sum_to_tokens = gather


class Sent:
    """Slots that the tokens of this rank read, on their way to the group; several reads may use them.

    Args:
        own: ``[N, L]`` in ``[0, E * S)``.
        arriving: Those of all ranks, ``[G * N, L]``.
        rows: ``S``, of the table.
        expansion: ``E``, virtual tables over it; see :mod:`memlm.memory.value_expansion`.
    """

    def __init__(self, own: Tensor, arriving: Arriving, rows: int, expansion: int = 1) -> None:
        self.own, self._all, self._rows, self.expansion = own, own, rows, expansion
        self._arriving: Arriving | None = arriving

    def of_all(self) -> Tensor:
        """``[G * N, L]``; waits for them the first time."""
        if self._arriving is not None:
            self._all, self._arriving = self._arriving(), None
        return self._all

    def rows_of(self, slots: Tensor) -> Tensor:
        """The rows that are these slots, each in ``[0, S)``."""
        return slots if self.expansion == 1 else slots % self._rows


class Pending:
    """A read, or a dot, that has begun.

    Args:
        answer: Waits for what all ranks' tokens ask, answers it, and begins to send the answers.
    """

    def __init__(self, answer: Callable[[], Arriving]) -> None:
        self._answer: Callable[[], Arriving] | None = answer
        self._arriving: Arriving | None = None

    def advance(self) -> None:
        """Answer what others ask of this rank, unless that is done; what this one has asked is on its way."""
        if self._answer is not None:
            self._arriving, self._answer = self._answer(), None

    def finish(self) -> Tensor:
        """The result; to be called once."""
        self.advance()
        assert self._arriving is not None
        arriving, self._arriving = self._arriving, None
        return arriving()
