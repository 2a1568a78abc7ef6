"""Along which dimension a dense parameter is split over all ranks."""

from collections.abc import Sequence


def split_dimension(shape: Sequence[int], ranks: int) -> int:
    """The first dimension, as FSDP2 has it, unless it is too short and another divides evenly.

    FSDP2 pads the first dimension to a multiple of the ranks: of the half keys of 4 heads it would send 64
    times as much as they are among 256 ranks. Others it does not pad.
    """
    if shape and shape[0] < ranks:
        for dimension, size in enumerate(shape):
            if size % ranks == 0:
                return dimension
    return 0


def share(shape: Sequence[int], ranks: int) -> int:
    """Elements of the largest part."""
    total = 1
    for dimension, size in enumerate(shape):
        total *= -(-size // ranks) if dimension == split_dimension(shape, ranks) else size
    return total
