"""What a model remembers of the tokens it has seen, so that the next ones do not compute them again."""

import torch
from torch import Tensor

_LEAST = 64
"""Positions that a buffer has room for at first; it doubles when it is full."""


class Cache:
    """Keys, values and whatever else layers keep of earlier positions, for a batch of rows.

    Rows grow independently. A batch of ragged rows is padded on the right: what padding leaves behind is
    never looked at, and overwritten by the row's next tokens. So a row's position is the number of its own
    tokens before it, whatever else is in the batch.

    Args:
        rows: ``B``, sequences.
        blocks: Of the model.

    Attributes:
        lengths: ``[B]`` int64 on the CPU, tokens of each row so far.
        blocks: The memory of each block.
    """

    def __init__(self, rows: int, blocks: int) -> None:
        self.lengths = torch.zeros(rows, dtype=torch.long)
        self.blocks = [BlockCache(self) for _ in range(blocks)]
        self._start: int | None = 0

    def begin(self, length: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Make ready for ``length`` more tokens of every row.

        Args:
            length: ``T``, padding included.
            device: Of the tokens.

        Returns:
            Their positions, ``[T]`` if rows are equally long and ``[B, 1, T]`` if not; and the mask of their
            attention, ``[B or 1, 1, T, S]`` bool, or None where it is plain: causal if nothing came before,
            all of it for a single token after equally many.
        """
        first, last = int(self.lengths.min()), int(self.lengths.max())
        self.width = last + length
        self._start = first if first == last else None
        new = torch.arange(length)
        if self._start is not None:
            positions = new + first
            self.positions = positions.to(device)
            if first == 0 or length == 1:
                return self.positions, None
            return self.positions, self._mask(self.positions)[None, None]
        self.positions = (self.lengths[:, None] + new).to(device)
        self._rows = torch.arange(len(self.lengths), device=device)[:, None]
        return self.positions.unsqueeze(1), self._mask(self.positions).unsqueeze(1)

    def advance(self, counts: Tensor | None, length: int) -> None:
        """Count the tokens that all blocks have taken in: ``counts`` ``[B]`` of the ``length`` are real."""
        self.lengths = self.lengths + (length if counts is None else counts.cpu())

    def select(self, rows: Tensor, more: int = 0) -> "Cache":
        """A cache of some of the rows, in this order; a row may be taken several times.

        Args:
            rows: ``[B']`` int64 on the CPU.
            more: Positions that will be added at once: with room for them from the start, nothing is copied
                a second time.
        """
        chosen = Cache(len(rows), len(self.blocks))
        chosen.lengths = self.lengths[rows]
        kept = int(chosen.lengths.max()) if len(rows) else 0
        for new, old in zip(chosen.blocks, self.blocks, strict=True):
            new.take(old, rows, kept, kept + more)
        return chosen

    def _mask(self, positions: Tensor) -> Tensor:
        return torch.arange(self.width, device=positions.device) <= positions.unsqueeze(-1)

    def write(self, buffer: Tensor, new: Tensor) -> None:
        """Put ``new`` ``[B, T, ...]`` to its positions in ``buffer`` ``[B, S, ...]``."""
        if self._start is not None:
            buffer[:, self._start : self._start + new.shape[1]] = new
        else:
            buffer[self._rows, self.positions] = new

    def earlier(self, buffer: Tensor, back: int, fill: float) -> Tensor:
        """What ``buffer`` ``[B, S, ...]`` holds of the ``back`` positions before each row's new ones.

        Positions before a row's start are ``fill``.
        """
        places = self.lengths[:, None] + torch.arange(-back, 0)
        exist = (places >= 0).to(buffer.device)
        rows = torch.arange(len(places), device=buffer.device)[:, None]
        found = buffer[rows, places.clamp(min=0).to(buffer.device)]
        return torch.where(exist.view(*exist.shape, *[1] * (found.dim() - 2)), found, fill)


class BlockCache:
    """What one block remembers: a buffer ``[B, positions, ...]`` for each name.

    Args:
        cache: It is part of.
    """

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._buffers: dict[str, Tensor] = {}

    def extend(self, name: str, new: Tensor) -> Tensor:
        """Add what the new positions have, ``[B, T, ...]``.

        Returns:
            ``[B, S, ...]``, of all positions up to the last row's last; a view.
        """
        width = self._cache.width
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape[1] < width:
            room = max(_LEAST, width, 0 if buffer is None else 2 * buffer.shape[1])
            # Zeros: what no token has written meets weights of zero, and not a number would stay one.
            larger = new.new_zeros(new.shape[0], room, *new.shape[2:])
            if buffer is not None:
                larger[:, : buffer.shape[1]] = buffer
            buffer = self._buffers[name] = larger
        self._cache.write(buffer, new)
        return buffer[:, :width]

    def window(self, name: str, new: Tensor, back: int, fill: float = 0) -> Tensor:
        """Add what the new positions have, ``[B, T, ...]``.

        Returns:
            ``[B, back + T, ...]``: the ``back`` positions before them too, ``fill`` before a row's start.
        """
        buffer = self.extend(name, new)
        return torch.cat((self._cache.earlier(buffer, back, fill), new), dim=1)

    def take(self, other: "BlockCache", rows: Tensor, kept: int, room: int) -> None:
        """Copy rows of another, ``kept`` positions of each, into buffers of at least ``room`` positions."""
        for name, old in other._buffers.items():
            size = max(room, old.shape[1])
            buffer = self._buffers[name] = old.new_empty(len(rows), size, *old.shape[2:])
            torch.index_select(old[:, :kept], 0, rows.to(old.device), out=buffer[:, :kept])
            buffer[:, kept:] = 0  # see extend
