"""The product-key search, of the reference and the CPU kernels, against a full search, ties included."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlm.kernels import cpu, reference
from memlm.kernels.reference import candidate_pairs

BACKENDS = pytest.mark.parametrize("backend", [reference, cpu], ids=["reference", "cpu"])


@pytest.mark.parametrize("reads,count", [(1, 1), (4, 8), (8, 20), (16, 50), (32, 119), (64, 280)])
def test_candidates_are_the_pairs_under_the_hyperbola(reads, count):
    pairs = {tuple(pair) for pair in candidate_pairs(reads).tolist()}
    assert len(pairs) == count
    assert pairs == {(i, j) for i in range(reads) for j in range(reads) if (i + 1) * (j + 1) <= reads}


def full_search(first, second, reads):
    """Descending sums of the best pairs, ``[N, H, R]``."""
    sums = first.float().unsqueeze(-1) + second.float().unsqueeze(-2)
    return sums.flatten(2).topk(reads, dim=-1).values.transpose(0, 1)


def check(backend, first, second, reads):
    slots, sums = backend.best_slots(first, second, reads)
    assert torch.equal(sums, full_search(first, second, reads))
    pairs = first.float().unsqueeze(-1) + second.float().unsqueeze(-2)
    assert torch.equal(pairs.flatten(2).transpose(0, 1).gather(-1, slots.long()), sums)
    assert all(len(set(row)) == reads for row in slots.flatten(0, 1).tolist())
    expected = reference.best_slots(first, second, reads)
    assert torch.equal(slots, expected[0]) and slots.dtype == torch.int32


@BACKENDS
@pytest.mark.parametrize(
    "heads,tokens,width0,width1,reads",
    [(1, 1, 1, 1, 1), (3, 20, 9, 9, 9), (2, 70, 40, 77, 16), (4, 9, 1024, 300, 32), (1, 5, 513, 2000, 20)],
)
@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "wide", "bf16"])
def test_equals_the_full_search(backend, heads, tokens, width0, width1, reads, kind):
    generator = torch.Generator().manual_seed(width0)
    first = torch.randn(heads, tokens, width0, generator=generator)
    second = torch.randn(heads, tokens, width1, generator=generator)
    if kind == "ties":  # small integers, both zeros among them
        first, second = first.round(), second.round()
    elif kind == "equal":
        first, second = torch.zeros_like(first), torch.full_like(second, -0.0)
    elif kind == "wide":  # far apart exponents, infinity
        first, second = first * 1e30, second.abs() * -1e-30
        first[0, 0, width0 // 2] = float("inf")
    elif kind == "bf16":
        first, second = first.bfloat16(), second.bfloat16()
    check(backend, first, second, reads)


@BACKENDS
@settings(max_examples=50, deadline=None)
@given(data=st.data(), seed=st.integers(0, 1000), levels=st.integers(1, 50))
def test_random_shapes_with_ties(backend, data, seed, levels):
    width0, width1 = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 90))
    reads = data.draw(st.integers(1, min(width0, width1)))
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(-levels, levels, (2, 5, width0), generator=generator).float()
    second = torch.randint(-levels, levels, (2, 5, width1), generator=generator).float()
    check(backend, first, second, reads)


def test_equal_scores_rank_by_index_and_equal_sums_by_rank():
    first = torch.tensor([[[1.0, 2.0, 2.0]]])
    second = torch.tensor([[[0.0, 0.0, -1.0]]])
    slots, sums = cpu.best_slots(first, second, 3)
    assert sums.tolist() == [[[2.0, 2.0, 2.0]]]
    assert slots.tolist() == [[[3, 4, 6]]]  # ranks (0, 0), (0, 1), (1, 0)


def test_ascending_scores_and_descending_ones():
    first = torch.arange(3000.0).view(1, 1, -1)
    check(cpu, first, first.flip(-1), 32)
    check(cpu, torch.cat([first] * 3, -1), first, 32)


def test_slots_above_two_billion_are_int64():
    width = 50_000
    first, second = torch.zeros(1, 1, width), torch.zeros(1, 1, width)
    first[..., -1], second[..., -1] = 1, 1
    for backend in (reference, cpu):
        slots, _ = backend.best_slots(first, second, 1)
        assert slots.dtype == torch.int64 and slots.item() == width * width - 1


def test_float64_scores_are_searched_in_float64():
    first = torch.tensor([[[1.0, 1.0 + 1e-12]]], dtype=torch.float64)
    slots, sums = cpu.best_slots(first, torch.zeros_like(first), 1)
    assert slots.item() == 2 and sums.dtype == torch.float64


def test_any_number_of_threads_gives_the_same_result():
    first, second = torch.randn(3, 200, 64).round(), torch.randn(3, 200, 96).round()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = cpu.best_slots(first, second, 16)
        torch.set_num_threads(2)
        assert all(torch.equal(a, b) for a, b in zip(alone, cpu.best_slots(first, second, 16), strict=True))
    finally:
        torch.set_num_threads(threads)
