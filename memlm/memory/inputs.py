"""What a batch offers to layers beside hidden states."""

from typing import NamedTuple, Protocol

from torch import Tensor


class History(Protocol):
    """What a block has kept of earlier positions; see :class:`memlm.transformer.cache.BlockCache`."""

    def window(self, name: str, new: Tensor, back: int, fill: float = 0) -> Tensor:
        """``[B, back + T, ...]``: ``new`` ``[B, T, ...]``, which is kept, after what came before it."""
        ...


class Inputs(NamedTuple):
    """The tokens of a batch, for layers that look them up themselves."""

    tokens: Tensor
    """``[B, T]`` int64."""
    documents: Tensor | None = None
    """``[B, T]`` document indices, or None where a row is one document."""
    history: History | None = None
    """Earlier positions of the same rows, of which the batch holds the next ones; None where it holds all."""
