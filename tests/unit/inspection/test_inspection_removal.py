import copy

import pytest
import torch
from inspected_models import KINDS, make, outputs_of, random_tokens, rebuilt

from memlm.evaluation.likelihood import score
from memlm.generation.decoding import generate
from memlm.inspection.reads import memory_blocks, reads_of
from memlm.inspection.removal import Removal, removed
from memlm.memory.quantised import held_as


def some_rows(model, tokens, block, count):
    """Rows that the tokens read in a block, and one that they do not if there is any."""
    reads = next(layer for layer in reads_of(model, tokens) if layer.place.block == block)
    read = reads.rows.unique()
    chosen = read[torch.randperm(len(read), generator=torch.Generator().manual_seed(0))[:count]]
    unread = [row for row in range(reads.place.slots) if row not in read.tolist()][:1]
    return torch.cat((chosen, torch.tensor(unread, dtype=chosen.dtype)))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_removed_everywhere_is_as_if_the_rows_were_zero(kind):
    model, tokens = make(kind), random_tokens(12)
    batch = torch.tensor([tokens, random_tokens(12, 9)])
    intact = model(batch)
    place = memory_blocks(model)[-1]
    rows = some_rows(model, tokens, place.block, 6)
    zeroed = copy.deepcopy(model)
    zeroed.pools[place.pool].values[rows] = 0
    expected = zeroed(batch)
    assert not torch.allclose(expected, intact, atol=1e-6)
    with removed(model, [Removal(place.pool, rows)]):
        torch.testing.assert_close(model(batch), expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(model(batch), intact)


@pytest.mark.parametrize(
    "kind", ["memory", "memory_plus", "several_pools", "beside", "expanded", "peer", "engram_shared"]
)
@torch.no_grad()
def test_removed_from_one_layer_is_as_if_it_had_a_table_of_its_own_with_zeros(kind):
    model, tokens = make(kind), random_tokens(12)
    batch = torch.tensor([tokens])
    first, second = memory_blocks(model)[:2]
    assert first.pool == second.pool
    rows = some_rows(model, tokens, second.block, 6)
    everywhere = copy.deepcopy(model)
    everywhere.pools[first.pool].values[rows] = 0
    split = copy.deepcopy(model)
    split.pools["own"] = copy.deepcopy(split.pools[second.pool])
    split.pools["own"].values[rows] = 0
    own = split.blocks[second.block]
    own.pool_names = ("own", *own.pool_names[1:])
    expected = split(batch)
    assert not torch.allclose(expected, everywhere(batch), atol=1e-6)
    with removed(model, [Removal(second.pool, rows, second.block)]):
        torch.testing.assert_close(model(batch), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("kind", "renormalise"),
    [(kind, choice) for kind in KINDS for choice in (False, True) if not (choice and "engram" in kind)],
)
@torch.no_grad()
def test_removed_from_one_head(kind, renormalise):
    """Against the first layer rebuilt from the intact reads: its input does not change."""
    model, tokens = make(kind), random_tokens(12)
    reads = reads_of(model, tokens)[0]
    block, pool = reads.place.block, reads.place.pool
    rows = reads.rows[:, 1].unique()[::2]
    gone = torch.zeros_like(reads.rows, dtype=torch.bool)
    gone[:, 1] = torch.isin(reads.rows[:, 1], rows)
    # Everything that head 0 reads for the last token, too: nothing is left of it to be renormalised.
    last = reads.rows[-1, 0]
    gone[:, 0] |= torch.isin(reads.rows[:, 0], last)
    expected = rebuilt(model, reads, gone, renormalise)
    with removed(model, [Removal(pool, rows, block, 1), Removal(pool, last, head=0)], renormalise):
        torch.testing.assert_close(outputs_of(model, tokens, block), expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(outputs_of(model, tokens, block), expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["memory_plus", "peer", "engram"])
@torch.no_grad()
def test_what_is_recorded_meanwhile_has_no_weight(kind):
    model, tokens = make(kind), random_tokens(12)
    place = memory_blocks(model)[0]
    rows = some_rows(model, tokens, place.block, 5)
    with removed(model, [Removal(place.pool, rows, place.block)]):
        reads = reads_of(model, tokens)[0]
    gone = torch.isin(reads.rows, rows)
    assert gone.any()
    if place.by_ngrams:  # the gate is that of the rows that remain
        intact = reads_of(model, tokens)[0]
        assert not torch.allclose(reads.weights, intact.weights)
    else:
        assert torch.equal(reads.weights == 0, gone)


@pytest.mark.parametrize("kind", ["memory_plus", "expanded", "peer", "engram", "engram_shared"])
def test_with_a_cache_too(kind):
    """Scoring a prefix once and generating step by step remove the same as a whole forward pass."""
    model, tokens = make(kind), random_tokens(30)
    place = memory_blocks(model)[1]
    rows = some_rows(model, tokens, place.block, 8)
    zeroed = copy.deepcopy(model)
    zeroed.pools[place.pool].values[rows] = 0
    pairs = [(tokens, random_tokens(3, seed)) for seed in range(4)]
    expected = score(zeroed, pairs, 100)
    with removed(model, [Removal(place.pool, rows)]):
        found, written = score(model, pairs, 100), generate(model, [tokens[:9]], 12)
    assert [each.log_likelihood for each in found] == pytest.approx(
        [e.log_likelihood for e in expected], abs=1e-5
    )
    assert written == generate(zeroed, [tokens[:9]], 12)


@torch.no_grad()
def test_contexts_within_each_other_add_up_and_end_even_after_an_error():
    model, tokens = make("memory_plus"), random_tokens(12)
    batch = torch.tensor([tokens])
    intact = model(batch)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = (some_rows(model, tokens, block, 4) for block in (0, 2))
    with removed(model, [Removal("main", torch.cat((first, second)))]):
        both = model(batch)
    with removed(model, [Removal("main", first)]):
        outer = model(batch)
        with removed(model, [Removal("main", second)]):
            torch.testing.assert_close(model(batch), both)
        assert torch.equal(model(batch), outer)
    with pytest.raises(KeyError), removed(model, [Removal("main", first)]):
        raise KeyError
    assert torch.equal(model(batch), intact)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with removed(model, []):
        assert torch.equal(model(batch), intact)


@pytest.mark.parametrize(
    ("kind", "removal", "message"),
    [
        ("several_pools", Removal("c", torch.tensor([0])), "'c' is no pool of values; the model has a, b"),
        ("peer", Removal("main_down", torch.tensor([0])), "'main_down' is no pool of values"),
        ("memory", Removal("main", torch.tensor([3, 36])), "rows must be from 0 to 35"),
        ("memory", Removal("main", torch.tensor([-1])), "rows must be from 0 to 35"),
        (
            "memory",
            Removal("main", torch.tensor([0]), block=1),
            r"block 1 does not read 'main'; blocks \[0, 2\]",
        ),
        ("memory", Removal("main", torch.tensor([0]), head=2), "head is 2, must be from 0 to 1"),
    ],
)
def test_what_does_not_exist(kind, removal, message):
    with pytest.raises(ValueError, match=message), removed(make(kind), [removal]):
        pass


def test_engram_has_nothing_to_renormalise():
    with pytest.raises(ValueError, match="no weights"), removed(make("engram"), [], renormalise=True):
        pass


@pytest.mark.parametrize("kind", ["memory_plus", "expanded_peer", "engram"])
@torch.no_grad()
def test_removed_from_quantised_values(kind):
    model, tokens = make(kind).float(), random_tokens(12)
    for name, pool in list(model.pools.items()):
        model.pools[name] = held_as(pool, "int8")
    batch, place = torch.tensor([tokens]), memory_blocks(model)[0]
    rows = some_rows(model, tokens, place.block, 6)
    intact = model(batch)
    with removed(model, [Removal(place.pool, rows)]):
        found = model(batch)
    model.pools[place.pool].scales[rows] = 0
    torch.testing.assert_close(found, model(batch))
    assert not torch.allclose(found, intact, atol=1e-4)
