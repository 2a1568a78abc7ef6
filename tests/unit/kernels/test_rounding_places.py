"""A part of a table is rounded with the random bits that its elements have in the whole one."""

import pytest
import torch

from memlm.kernels import cpu, reference
from memlm.kernels.interface import RowState, RowSums, RowUpdate

ROWS, COLUMNS = 12, 8


@pytest.mark.parametrize("backend", [reference, cpu])
def test_parts_of_a_table_as_the_whole(backend):
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(ROWS, COLUMNS, generator=generator).bfloat16()
    gradient = torch.randn(ROWS, COLUMNS, generator=generator)
    update = {"method": "sgd", "step": 3, "lr": 0.01, "seed": 5}

    def step(table, sums, **place):
        rows = torch.arange(len(table), dtype=torch.int32)
        moved = RowSums(rows, sums.contiguous(), sums.square().sum(-1))
        backend.update_rows(table, RowState(), moved, None, RowUpdate(**update, **place))
        return table

    expected = step(whole.clone(), gradient)
    for first_row, first_column in ((0, 4), (5, 0), (7, 2)):
        part = whole[first_row:, first_column:].clone()
        found = step(
            part, gradient[first_row:, first_column:], first_row=first_row, first_column=first_column
        )
        assert torch.equal(found, expected[first_row:, first_column:])
        if first_row or first_column:
            unplaced = step(whole[first_row:, first_column:].clone(), gradient[first_row:, first_column:])
            assert not torch.equal(unplaced, found)
