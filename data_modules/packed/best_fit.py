"""Best-fit-decreasing packing of pieces into rows, some millions a second.

Ding et al.: Fewer Truncations Improve Language Modeling (ICML 2024), algorithm 1: pieces from the longest
to the shortest, each into the row with the least room that still takes it. Lengths are small integers, so
sorting is by counting, and the search is in a tree over the possible rooms.
"""

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray


def best_fit_decreasing(starts: NDArray[np.int64], capacity: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Distribute pieces over rows.

    Needs 16 bytes for each piece at its peak, of which 4 bytes a piece and 4 bytes a row remain (twice that
    from 2^31 pieces on), beside ``starts``.

    Args:
        starts: Where each piece starts, ascending, and where the last one ends, int64 [pieces + 1]. No piece
            is longer than ``capacity``.
        capacity: Length of a row.

    Returns:
        The pieces row by row (in a row the longest first), [pieces]; and where each row starts in them and
        the last one ends, [rows + 1].
    """
    pieces = len(starts) - 1
    dtype = np.int32 if pieces < 1 << 31 else np.int64
    # Any two rows but the last hold more than one row's length together, else they would be one.
    most = min(pieces, 2 * int(starts[-1] - starts[0]) // capacity + 1)
    order, link = np.empty(pieces, dtype), np.empty(pieces, dtype)
    last, below = np.empty(most, dtype), np.empty(most, dtype)
    _sort_by_length(starts, capacity, order)
    rows = _pack(starts, capacity, order, link, last, below)
    firsts = np.empty(rows + 1, dtype)
    _list_rows(link, last[:rows], order, firsts)
    return order, firsts


@njit(cache=True)
def _sort_by_length(starts, capacity, order):
    """Pieces from the longest to the shortest, those of one length in their order."""
    place = np.zeros(capacity + 2, np.int64)  # place[c - n]: where the next piece of length n goes
    for piece in range(len(order)):
        place[capacity - (starts[piece + 1] - starts[piece]) + 1] += 1
    for i in range(1, capacity + 2):
        place[i] += place[i - 1]
    for piece in range(len(order)):
        i = capacity - (starts[piece + 1] - starts[piece])
        order[place[i]] = piece
        place[i] += 1


@njit(cache=True)
def _pack(starts, capacity, order, link, last, below):
    """Chain the pieces of each row: ``last[row]``, then ``link[piece]``, to -1; returns the number of rows.

    Rows with equal room form a stack (``top[room]``, then ``below[row]``). A leaf of the tree is a room, and
    a node is set if any stack below it holds a row.
    """
    leaves = 1
    while leaves <= capacity:
        leaves *= 2
    tree = np.zeros(2 * leaves, np.bool_)
    top = np.full(capacity + 1, -1, last.dtype)
    rows = 0
    for i in range(len(order)):
        piece = order[i]
        length = starts[piece + 1] - starts[piece]
        room = _least_room(tree, leaves, length)
        if room < 0:
            row, room = rows, capacity
            rows += 1
            last[row] = -1
        else:
            row = top[room]
            top[room] = below[row]
            if top[room] < 0:
                node = leaves + room
                tree[node] = False
                while node > 1 and not tree[node ^ 1]:
                    node >>= 1
                    tree[node] = False
        link[piece] = last[row]
        last[row] = piece
        room -= length
        if room:
            below[row] = top[room]
            top[room] = row
            node = leaves + room
            while node and not tree[node]:
                tree[node] = True
                node >>= 1
    return rows


@njit(cache=True)
def _least_room(tree, leaves, length):
    """The least room of at least ``length`` that any row has, or -1."""
    node = leaves + length
    if tree[node]:
        return length
    while node > 1 and (node & 1 or not tree[node + 1]):  # until a subtree of more room holds something
        node >>= 1
    if node == 1:
        return -1
    node += 1
    while node < leaves:
        node *= 2
        if not tree[node]:
            node += 1
    return node - leaves


@njit(cache=True)
def _list_rows(link, last, order, firsts):
    """Write out the chains, the last of which is each row's first."""
    end = 0
    firsts[0] = 0
    for row in range(len(last)):
        piece = last[row]
        while piece >= 0:
            end += 1
            piece = link[piece]
        firsts[row + 1] = end
        place = end
        piece = last[row]
        while piece >= 0:
            place -= 1
            order[place] = piece
            piece = link[piece]
