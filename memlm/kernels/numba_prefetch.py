"""A prefetch for numba kernels that visit rows of a table in no order the hardware could guess.

Numba's cache on disk watches the file of a kernel, not those of its callees: after a change here, touch them.
"""

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

# Bytes between two prefetches: the cache line of x86 and most ARM.
_LINE = 64


@intrinsic
def _prefetch(typingctx, table, row, column):
    """Ask for the cache line of ``table[row, column]``; reads nothing, so that no address is wrong."""

    def generate(context, builder, signature, arguments):
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        index = [
            context.cast(builder, value, kind, types.intp)
            for value, kind in zip(arguments[1:], signature.args[1:], strict=True)
        ]
        pointer = cgutils.get_item_pointer(
            context, builder, signature.args[0], array, index, wraparound=False
        )
        pointer = builder.bitcast(pointer, ir.IntType(8).as_pointer())
        flag = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, flag, flag, flag])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [pointer.type], kind)
        # For reading, to keep in all caches, data.
        builder.call(prefetch, [pointer, flag(0), flag(3), flag(1)])
        return context.get_dummy_value()

    return types.void(table, row, column), generate


@njit
def prefetch_row(table, row):
    """Ask for all of ``table[row]``, a row of a 2-d array."""
    for column in range(0, table.shape[1], _LINE // table.itemsize):
        _prefetch(table, row, column)  # type: ignore[call-arg]
