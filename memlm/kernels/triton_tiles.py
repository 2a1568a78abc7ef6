"""What the Triton kernels share: the size of their tiles, and the way to a narrower float."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements that each warp of 32 threads holds of a tile: 32 a thread, so that a bf16 tile is four loads of
# 16 bytes in flight for each, and the fp32 tile and its accumulator leave room in 128 registers.
_WARP_ELEMENTS = 1024
_WIDEST = 1024


class Tile(NamedTuple):
    """A block of ``rows`` gathered rows by ``columns`` of their elements, both powers of two."""

    rows: int
    columns: int
    warps: int


def tile(dim: int) -> Tile:
    """The tile for rows of ``dim`` elements.

    Columns: the power of two up to 1024 that pads ``dim`` least, of those within a factor of four (512 for
    1536, 1024 for 1000). One warp for each 256 columns, each of which then loads four rows at a time.
    """
    widest = min(_WIDEST, max(16, triton.next_power_of_2(dim)))
    choices = [columns for columns in (widest, widest // 2, widest // 4) if columns >= 16]
    columns = min(choices, key=lambda columns: (-(-dim // columns) * columns, -columns))
    warps = max(1, columns // 256)
    return Tile(warps * _WARP_ELEMENTS // columns, columns, warps)


def check_table(table: Tensor) -> None:
    """Raise unless the kernels can read the rows of ``table`` in place."""
    if table.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"the Triton kernels read float32, bfloat16 and float16 values, not {table.dtype}")
    if not table.is_contiguous():
        raise ValueError(f"the values must be contiguous; their strides are {table.stride()}")


@triton.jit
def narrowed(x, dtype: tl.constexpr):
    """fp32 to ``dtype``, to the nearest, ties to even."""
    if dtype == tl.bfloat16:
        # By hand, because the interpreter truncates.
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(x == x, nearest, (bits >> 16) | 0x40)  # a NaN must not be rounded to infinity
        result = bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = x.to(dtype)
    return result
