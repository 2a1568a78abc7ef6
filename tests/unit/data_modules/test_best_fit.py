from itertools import chain, pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_modules.packed.best_fit import best_fit_decreasing


def packed(lengths, capacity, offset=0):
    starts = offset + np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    order, firsts = best_fit_decreasing(starts, capacity)
    return [order[a:b].tolist() for a, b in pairwise(firsts)]


def naive_best_fit(lengths, capacity):
    """Rows of pieces, by looking at all rows for every piece."""
    rows, room, changed = [], [], []
    for time, piece in enumerate(sorted(range(len(lengths)), key=lambda piece: -lengths[piece])):
        fitting = [row for row in range(len(rows)) if room[row] >= lengths[piece]]
        if fitting:  # of several with the same room, the one changed last
            row = min(fitting, key=lambda row: (room[row], -changed[row]))
        else:
            row = len(rows)
            rows.append([])
            room.append(capacity)
            changed.append(0)
        rows[row].append(piece)
        room[row] -= lengths[piece]
        changed[row] = time
    return rows


@st.composite
def cases(draw):
    capacity = draw(st.integers(1, 70))
    return draw(st.lists(st.integers(1, capacity), min_size=1, max_size=80)), capacity


@settings(deadline=None, max_examples=200)
@given(cases(), st.integers(0, 2**40))
@example(([1], 1), 0)
@example(([2, 1, 1], 2), 0)
def test_it_packs_as_the_naive_algorithm_does(case, offset):
    lengths, capacity = case
    assert packed(lengths, capacity, offset) == naive_best_fit(lengths, capacity)


@pytest.mark.parametrize("capacity", [127, 128, 129])
def test_many_pieces(capacity):
    lengths = np.random.default_rng(0).geometric(0.03, 1500).clip(1, capacity).tolist()
    rows = packed(lengths, capacity)
    assert rows == naive_best_fit(lengths, capacity)
    assert len(rows) * capacity < 1.02 * sum(lengths)


def test_documents_of_natural_lengths_leave_next_to_no_room():
    lengths = np.random.default_rng(0).lognormal(6, 1.2, 20_000).astype(int).clip(1, 2048)
    rows = packed(lengths, 2048)
    used = [lengths[row].sum() for row in rows]
    assert max(used) <= 2048 and sorted(chain(*rows)) == list(range(20_000))
    assert 1 - sum(used) / (2048 * len(rows)) < 0.001
