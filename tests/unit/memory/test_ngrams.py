"""Slots of n-grams against plain Python, and how evenly they are spread."""

import random

import pytest
import torch
from ngram_oracle import python_slots, random_documents

from memlm.memory.ngrams import _is_prime, ngram_hashes, ngram_slots


def slots_of(grams: torch.Tensor, hashes) -> torch.Tensor:
    """Slots ``[n, G]`` of n-grams ``[n, order]``, each a row of its own."""
    length = grams.shape[1]
    return ngram_slots(grams, None, hashes).view(-1, length, len(hashes.sizes))[:, -1].long()


@pytest.mark.parametrize("seed", range(8))
def test_slots_are_those_of_plain_python(seed):
    source = random.Random(seed)
    orders = sorted(source.sample(range(1, 6), source.randint(1, 3)))
    hashes = ngram_hashes(orders, source.randint(1, 4), source.choice([50, 10_000, 2**24]), seed, "main")
    rows, length = source.randint(1, 3), source.choice([1, 2, 3, 17])
    vocabulary = source.choice([3, 50_000, 2**31 - 1])
    tokens = [[source.randrange(vocabulary) for _ in range(length)] for _ in range(rows)]
    documents = None if seed % 3 == 0 else random_documents(source, rows, length)
    found = ngram_slots(torch.tensor(tokens), None if documents is None else torch.tensor(documents), hashes)
    assert found.dtype == torch.int32
    assert found.tolist() == python_slots(tokens, documents, hashes)


def test_the_largest_token_ids_do_not_overflow():
    hashes = ngram_hashes([1, 2, 3, 4], 8, 2**20, 3, "main")
    tokens = [[2**31 - 2, 2**31 - 2, 2**31 - 3, 0, 2**31 - 2]]
    assert ngram_slots(torch.tensor(tokens), None, hashes).tolist() == python_slots(tokens, None, hashes)


def test_pools_of_more_than_two_to_the_31_slots_have_int64_slots():
    hashes = ngram_hashes([2], 2, 2**33, 0, "main")
    tokens = torch.randint(50_000, (1, 64), generator=torch.Generator().manual_seed(0))
    slots = ngram_slots(tokens, None, hashes)
    assert slots.dtype == torch.int64 and slots.max() > 2**32
    assert slots.tolist() == python_slots(tokens.tolist(), None, hashes)


def test_slots_stay_what_they_are():
    """A table trained under other slots would be worth nothing."""
    hashes = ngram_hashes([2, 3], 2, 1000, 7, "block1")
    assert hashes.sizes == (251, 257, 263, 269)
    tokens = torch.tensor([[5, 6, 50_000, 6]])
    assert ngram_slots(tokens, None, hashes).tolist() == [
        [237, 395, 767, 1039],
        [155, 404, 695, 1037],
        [242, 288, 535, 979],
        [195, 335, 671, 850],
    ]


@pytest.mark.parametrize("orders", [[2, 3], [1, 4]])
def test_a_token_changes_the_slots_of_the_n_grams_it_is_part_of_and_no_others(orders):
    generator = torch.Generator().manual_seed(1)
    hashes = ngram_hashes(orders, 4, 2**22, 0, "main")
    tokens = torch.randint(1000, (1, 20), generator=generator)
    changed = tokens.clone()
    changed[0, 9] += 1
    differs = ngram_slots(tokens, None, hashes) != ngram_slots(changed, None, hashes)
    for group, order in enumerate(orders):
        expected = torch.zeros(20, 4, dtype=torch.bool)
        expected[9 : 9 + order] = True
        assert torch.equal(differs[:, 4 * group : 4 * group + 4], expected)


def test_documents_in_a_row_are_as_rows_of_their_own():
    generator = torch.Generator().manual_seed(2)
    hashes = ngram_hashes([2, 3, 4], 2, 10_000, 0, "main")
    lengths = [1, 5, 2, 3, 1]
    tokens = torch.randint(100, (1, sum(lengths)), generator=generator)
    documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).unsqueeze(0)
    alone = [ngram_slots(part, None, hashes) for part in tokens.split(lengths, dim=1)]
    assert torch.equal(ngram_slots(tokens, documents, hashes), torch.cat(alone))
    one = torch.full_like(documents, 3)
    assert torch.equal(ngram_slots(tokens, one, hashes), ngram_slots(tokens, None, hashes))


def test_what_lies_before_a_document_is_no_token():
    hashes = ngram_hashes([2], 8, 2**24, 0, "main")
    start = ngram_slots(torch.tensor([[5]]), None, hashes)[0]
    after = slots_of(torch.stack((torch.arange(50_000), torch.full((50_000,), 5)), 1), hashes)
    assert (after == start).sum(0).max() <= 1  # of 50,000 tokens in tables of two million


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"name": "block5"}, {"heads": 3}], ids=["seed", "name", "heads"]
)
def test_which_hashes_are_alike(other):
    options = {"orders": [2, 3], "heads": 2, "slots": 10_000, "seed": 0, "name": "block1"}
    hashes, twin = ngram_hashes(**options), ngram_hashes(**options)
    assert hashes == twin
    different = ngram_hashes(**{**options, **other})
    drawn = [set(sum(made.multipliers, ())) - {0} for made in (hashes, different)]
    if "heads" in other:  # more heads leave those there are as they are
        assert drawn[0] < drawn[1]
    else:
        assert not drawn[0] & drawn[1]


def test_multipliers_are_odd_of_31_bits_all_different_and_zero_outside_the_n_gram():
    hashes = ngram_hashes([1, 3], 2, 1000, 0, "main")
    present, before, last = hashes.multipliers
    assert before[:2] == last[:2] == (0, 0)
    drawn = [*present, *before[2:], *last[2:]]
    assert len(set(drawn)) == 8
    assert all(2**30 < number < 2**31 and number % 2 for number in drawn)


@pytest.mark.parametrize("slots,tables", [(8, 4), (100, 16), (2**16, 16), (2**30, 8)])
def test_tables_are_the_next_primes(slots, tables):
    hashes = ngram_hashes([2], tables, slots, 0, "main")
    least = -(-slots // tables)
    expected, number = [], least
    while len(expected) < tables:
        if number > 1 and all(number % factor for factor in range(2, int(number**0.5) + 1)):
            expected.append(number)
        number += 1
    assert list(hashes.sizes) == expected
    assert hashes.slots == sum(expected) >= slots


def test_primes_are_recognised():
    sieve = [True] * 20_000
    sieve[0] = sieve[1] = False
    for number in range(2, 142):
        sieve[number * number :: number] = [False] * len(sieve[number * number :: number])
    assert [_is_prime(number) for number in range(20_000)] == sieve
    # Composites that pass Miller-Rabin for the first 4 and 9 primes as bases.
    for composite in (3215031751, 3825123056546413051):
        assert not _is_prime(composite)
    for prime in (2**31 - 1, 2**61 - 1, 4294967311):
        assert _is_prime(prime)


def text(generator: torch.Generator, order: int) -> torch.Tensor:
    """N-grams of ids as skewed as those of words: id ``i`` about in proportion to ``1 / i``."""
    ids = torch.exp(torch.rand(150_000, order, generator=generator) * 10.8).long() - 1
    return ids.unique(dim=0)


def one_differs(generator: torch.Generator, order: int) -> torch.Tensor:
    """N-grams that differ in their first token alone."""
    return torch.cat((torch.arange(50_000).unsqueeze(1), torch.full((50_000, order - 1), 7)), 1)


def all_of_a_few(generator: torch.Generator, order: int) -> torch.Tensor:
    """Every n-gram of a small vocabulary."""
    return torch.cartesian_prod(*[torch.arange(int(50_000 ** (1 / order)))] * order)


def counting(generator: torch.Generator, order: int) -> torch.Tensor:
    """``(x, x + 1, ...)``."""
    return torch.arange(50_000).unsqueeze(1) + torch.arange(order)


def deviation(slots: torch.Tensor, size: int) -> float:
    """Of the chi-squared statistic of slots ``[n]`` from that of uniform ones, in standard deviations."""
    expected = len(slots) / size
    counts = torch.bincount(slots, minlength=size)
    return (((counts - expected) ** 2 / expected).sum().item() - size) / (2 * size) ** 0.5


@pytest.mark.parametrize("grams", [text, one_differs, all_of_a_few, counting])
@pytest.mark.parametrize("slots", [16_000, 1_000_000])
def test_slots_are_as_even_as_chance(grams, slots):
    generator = torch.Generator().manual_seed(0)
    for order in (2, 3):
        hashes = ngram_hashes([order], 16, slots, 0, "main")
        found = slots_of(grams(generator, order), hashes)
        first = 0
        deviations = []
        for table, size in enumerate(hashes.sizes):
            deviations.append(deviation(found[:, table] - first, size))
            first += size
        assert max(map(abs, deviations)) < 4, deviations
        assert abs(sum(deviations)) < 4 * len(deviations) ** 0.5, deviations


def test_the_measure_of_evenness_notices_a_poor_hash():
    grams = all_of_a_few(torch.Generator(), 2)
    assert deviation((grams[:, 0] * 3 + grams[:, 1]) % 1009, 1009) > 100
    assert deviation(torch.arange(50_000) % 1009, 1009) < -10  # too even is no chance either


def pairs(slots: torch.Tensor) -> int:
    """How many pairs of n-grams have one slot."""
    counts = slots.unique(return_counts=True)[1]
    return int((counts * (counts - 1) // 2).sum())


@pytest.mark.parametrize("grams", [text, one_differs, all_of_a_few, counting])
def test_n_grams_that_collide_in_one_table_collide_in_another_no_more_than_others(grams):
    generator = torch.Generator().manual_seed(0)
    found = grams(generator, 3)
    hashes = ngram_hashes([3], 6, 6_000, 0, "main")
    slots = slots_of(found, hashes)
    total = len(found) * (len(found) - 1) / 2
    for left, right in [(0, 1), (1, 2), (0, 5)]:
        both = pairs(slots[:, left] * hashes.slots + slots[:, right])
        expected = total / (hashes.sizes[left] * hashes.sizes[right])
        assert expected > 500
        assert abs(both - expected) < 5 * expected**0.5
        assert pairs(slots[:, left] * hashes.slots + slots[:, left]) > 500 * both  # the control


def test_slots_are_part_of_a_compiled_graph_and_of_inference():
    hashes = ngram_hashes([2, 3], 2, 1234, 5, "compiled")
    tokens = torch.randint(100, (2, 9), generator=torch.Generator().manual_seed(0))
    documents = torch.tensor([[0] * 4 + [1] * 5, [0] * 9])
    with torch.inference_mode():
        first = ngram_slots(tokens, documents, hashes).tolist()
    compiled = torch.compile(ngram_slots, backend="eager", fullgraph=True)
    expected = python_slots(tokens.tolist(), documents.tolist(), hashes)
    assert first == expected
    assert compiled(tokens, documents, hashes).tolist() == expected
    assert ngram_slots(tokens, documents, hashes).tolist() == expected
