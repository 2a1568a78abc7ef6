"""bf16 in numba kernels, which know no such type: its bits, as uint16, become fp32.

Numba's cache on disk watches the file of a kernel, not those of its callees: after a change here, touch them.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload


@intrinsic
def float_from_bits(typing_context, bits):
    """The float32 whose bits an uint32 holds."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


def as_float32(element):
    """In numba kernels: an element of a table, fp32 or the uint16 bits of a bf16, as fp32."""
    raise NotImplementedError("only inside numba kernels")


@overload(as_float32, inline="always")
def _as_float32(element):
    if element == types.uint16:
        return lambda element: float_from_bits(np.uint32(np.uint32(element) << np.uint32(16)))  # type: ignore[call-arg]
    if element == types.float32:
        return lambda element: element
    return None
