import math

import pytest
import torch
from inspected_models import KINDS, make, outputs_of, random_tokens, rebuilt

from memlm.inspection.reads import memory_blocks, reads_of, recorded


@pytest.mark.parametrize("kind", KINDS)
def test_the_layers_outputs_can_be_rebuilt_from_their_reads(kind):
    model, tokens = make(kind), random_tokens(9)
    layers = reads_of(model, tokens)
    assert [layer.place.block for layer in layers] == [i for i, b in enumerate(model.blocks) if b.memory]
    for layer in layers:
        expected = outputs_of(model, tokens, layer.place.block)
        torch.testing.assert_close(rebuilt(model, layer), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["memory", "memory_plus", "uneven", "expanded", "peer"])
def test_slots_and_weights_are_those_of_full_keys(kind):
    """Every slot scored with its whole key, the best taken: nothing of the search is shared."""
    model, tokens = make(kind), random_tokens(7)
    for reads in reads_of(model, tokens):
        layer = reads.place.layer
        first, second = layer.product_keys.half_keys
        keys = layer.query.normalise_keys(layer.product_keys.keys)
        query = layer.query(reads.hidden)  # [N, H, 2, C]
        for head in range(len(reads.place.heads)):
            pairs = [
                torch.cat((keys[head, i], keys[head, first + j])) for i in range(first) for j in range(second)
            ]
            scores = query[:, head].flatten(1) @ torch.stack(pairs).T
            best = scores.sort(-1, descending=True)
            count = reads.slots.shape[-1]
            assert torch.equal(best.indices[:, :count], reads.slots[:, head])
            torch.testing.assert_close(best.values[:, :count].softmax(-1), reads.weights[:, head])


def test_virtual_slots_and_rows():
    model = make("expanded")
    for reads in reads_of(model, random_tokens(30)):
        size = model.pools["main"].slots
        assert size == 9
        assert reads.tables.unique().tolist() == [0, 1, 2, 3]
        assert int(reads.rows.max()) < size
        assert torch.equal(reads.rows + size * reads.tables, reads.slots)


@pytest.mark.parametrize("kind", KINDS)
def test_entropy_effective_slots_and_concentration(kind):
    for reads in reads_of(make(kind), random_tokens(6)):
        for token, head in [(0, 0), (5, len(reads.place.heads) - 1), (3, 1)]:
            weights = reads.weights[token, head].tolist()
            shares = [weight / sum(weights) for weight in weights]
            entropy = -sum(share * math.log(share) for share in shares if share)
            assert reads.entropy[token, head].item() == pytest.approx(entropy, abs=1e-12)
            assert reads.effective[token, head].item() == pytest.approx(math.exp(entropy))
            assert reads.concentration[token, head].item() == max(weights)


def test_heads_are_named_after_ngrams_where_they_are_tables():
    names = memory_blocks(make("engram_shared"))[0]
    assert names.heads == ("1-gram 0", "1-gram 1", "3-gram 0", "3-gram 1")
    assert names.short_heads == ("1g0", "1g1", "3g0", "3g1")
    assert memory_blocks(make("uneven"))[0].heads == ("head 0", "head 1", "head 2")


@pytest.mark.parametrize("kind", ["memory_plus", "peer", "engram"])
@torch.no_grad()
def test_recording_changes_nothing_and_leaves_nothing_behind(kind):
    model, tokens = make(kind), torch.tensor([random_tokens(8), random_tokens(8, 1)])
    before = model(tokens)
    with recorded(model) as found:
        assert torch.equal(model(tokens), before)
        assert len(found) == 2
        # Both rows, one after the other.
        for row, alone in enumerate(tokens.tolist()):
            for both, single in zip(found[:2], reads_of(model, alone), strict=True):
                assert torch.equal(both.slots.chunk(2)[row], single.slots)
                torch.testing.assert_close(both.weights.chunk(2)[row], single.weights)
    count = len(found)
    model(tokens)
    assert len(found) == count
    assert not any(block.memory._forward_pre_hooks for block in model.blocks if block.memory is not None)


def test_what_cannot_be_looked_at():
    with pytest.raises(ValueError, match="has no memory layers"):
        reads_of(make("dense"), [1, 2])
    with pytest.raises(ValueError, match="no token"):
        reads_of(make("memory"), [])
