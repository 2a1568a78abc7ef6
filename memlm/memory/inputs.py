"""What a batch offers to layers beside hidden states."""

from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """The tokens of a batch, for layers that look them up themselves."""

    tokens: Tensor
    """``[B, T]`` int64."""
    documents: Tensor | None = None
    """``[B, T]`` document indices, or None where a row is one document."""
