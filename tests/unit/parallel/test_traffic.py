"""The formulas of traffic against numbers worked out by hand."""

import pytest
import torch

from memlm.memory import MemoryConfig
from memlm.parallel.dense_split import share, split_dimension
from memlm.parallel.traffic import Rows, gathered, reduced, scattered, traffic
from memlm.rank_memory import Mesh
from memlm.transformer import Transformer, TransformerConfig


def build():
    with torch.device("meta"):
        memory = MemoryConfig(half_keys=64, heads=2, reads=3, key_dim=8, value_dim=8, layers=[1])
        return Transformer(40, TransformerConfig(16, 3, 2, feed_forward_dim=32), memory)


def test_the_convention():
    assert gathered(10, 4) == 30
    assert scattered(40, 4) == 30
    assert reduced(40, 4) == 60


def test_one_rank_sends_nothing():
    assert traffic(build(), Mesh(1, 1, True), 100).total == 0


def test_reads_within_a_group():
    found = traffic(build(), Mesh(4, 4), 10)
    slots, weights, answers = 10 * 6 * 4 * 3, 10 * 6 * 4 * 3, 10 * 8 * 4 * 3 / 4
    assert found.reads_forward == slots + weights + answers
    assert found.reads_backward == weights + answers
    assert found.rows == 0


def test_rows_between_groups():
    rows = Rows(read=100, leaving=50, owned=90, most_owned=95)
    found = traffic(build(), Mesh(4, 2), 10, rows={"main": rows})
    assert found.row_gradients == 50 * (4 * 4 + 4) + 90 * 4  # squares: 2 * 90 * 4 / 2
    assert found.rows == 95 * (4 * 4 + 4)


def test_bf16_on_the_wire_halves_all_but_slots_numbers_squares_and_rows():
    rows = Rows(read=100, leaving=50, owned=90, most_owned=95)
    found = traffic(build(), Mesh(4, 2, wire_dtype=torch.bfloat16), 10, rows={"main": rows})
    slots, weights, answers = 10 * 6 * 4, 10 * 6 * 2, 10 * 8 * 2 / 2
    assert found.reads_forward == slots + weights + answers
    assert found.reads_backward == weights + answers
    assert found.row_gradients == 50 * (4 * 2 + 4) + 90 * 4
    assert found.rows == 95 * (4 * 4 + 4)


def test_all_rows_between_groups_where_most_are_touched():
    rows = Rows(read=4096, leaving=2048, owned=2048, most_owned=2048)
    found = traffic(build(), Mesh(2, 1), 10, rows={"main": rows})
    assert found.row_gradients == 2048 * (8 * 4 + 1)
    assert found.rows == 2048 * 8 * 4


@pytest.mark.parametrize(
    "shape,ranks,dimension,elements",
    [((8, 6), 4, 0, 12), ((5, 6), 4, 0, 12), ((2, 8, 3), 4, 1, 12), ((2, 3), 4, 0, 3), ((3,), 4, 0, 1)],
)
def test_how_dense_parameters_are_split(shape, ranks, dimension, elements):
    assert split_dimension(shape, ranks) == dimension
    assert share(shape, ranks) == elements


def test_accumulated_gradients_are_sent_once_where_they_are_kept_whole():
    at_once = traffic(build(), Mesh(4, 2, True), 10)
    whole = traffic(build(), Mesh(4, 2, True), 10, micro_batches=3)
    parts = traffic(build(), Mesh(4, 2, True, whole_gradients=False), 10, micro_batches=3)
    assert whole.dense_weights == parts.dense_weights == 3 * at_once.dense_weights
    assert whole.dense_gradients == at_once.dense_gradients
    assert parts.dense_gradients == 3 * at_once.dense_gradients
