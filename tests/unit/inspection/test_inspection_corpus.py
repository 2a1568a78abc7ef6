import itertools

import pytest
import torch
import torch.nn.functional as F
from inspected_models import KINDS, VOCABULARY, make, random_tokens

from memlm.inspection.corpus import look_through
from memlm.inspection.reads import reads_of
from memlm.inspection.slots import Slot, slots_of
from memlm.memory.quantised import held_as

LENGTHS = [3, 17, 1, 8, 30, 5, 12, 9]
CONTEXT = 16


def corpus():
    return [random_tokens(length, seed) for seed, length in enumerate(LENGTHS)]


def by_windows(model):
    """What the layers read in the corpus, one window at a time: (document, start, layer)."""
    return [
        (number, start, layer)
        for number, ids in enumerate(corpus())
        for start in range(0, len(ids), CONTEXT)
        for layer in reads_of(model, ids[start : start + CONTEXT])
    ]


def every_read(windows, slot):
    """All reads of a slot in the corpus: (document, start, position, block, head, factor)."""
    found = []
    for number, start, layer in windows:
        if layer.place.pool != slot.pool:
            continue
        rows, factors = layer.rows.tolist(), layer.factors.tolist()
        for n, h, r in itertools.product(*map(range, layer.rows.shape)):
            if rows[n][h][r] == slot.row:
                found.append((number, start, n, layer.place.block, h, factors[n][h][r]))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_counts_and_contexts_are_those_of_one_window_at_a_time(kind):
    model, top = make(kind), 3
    slots = slots_of(model, random_tokens(8, 3), 4)
    windows, texts = by_windows(model), corpus()
    reports = look_through(model, texts, slots, CONTEXT, VOCABULARY, top, batch_tokens=40)
    for batch_tokens in (1, 4096):
        # How windows come together in batches changes the last digits alone.
        others = look_through(model, texts, slots, CONTEXT, VOCABULARY, top, batch_tokens)
        for report, other in zip(reports, others, strict=True):
            assert (other.tokens, other.readers, other.reads) == (report.tokens, report.readers, report.reads)
            assert other.weight == pytest.approx(report.weight, rel=1e-12)
            assert [c.weight for c in other.contexts] == pytest.approx([c.weight for c in report.contexts])
    for slot, report in zip(slots, reports, strict=True):
        reads = every_read(windows, slot)
        assert report.slot == slot
        assert report.tokens == sum(LENGTHS)
        assert sum(report.reads.values()) == len(reads) > 0
        for (block, head), count in report.reads.items():
            assert count == sum(read[3:5] == (block, head) for read in reads)
        assert report.weight == pytest.approx(sum(abs(read[-1]) for read in reads))
        best = {}
        for read in reads:
            if abs(read[-1]) > abs(best.get(read[:3], read)[-1]) or read[:3] not in best:
                best[read[:3]] = read
        assert report.readers == len(best)
        expected = sorted(best.values(), key=lambda read: -abs(read[-1]))[:top]
        assert [c.weight for c in report.contexts] == pytest.approx([read[-1] for read in expected])
        for context in report.contexts:
            read = next(
                r for r in best.values() if abs(r[-1] - context.weight) < 1e-12 and r[0] == context.document
            )
            number, start, position, block, head, _ = read
            assert (context.block, context.head, context.position) == (block, head, position)
            assert context.tokens == texts[number][start : start + CONTEXT]


def mean_effect(model, windows, slot, block, table):
    """What the slot's reads in a block add to the residual stream, in all of the corpus together ``[D]``."""
    total, value = 0, model.pools[slot.pool].values[slot.row]
    for layer in (layer for *_, layer in windows if layer.place.block == block):
        made, factors = layer.place.layer, layer.factors
        hits = (layer.rows == slot.row) & (layer.tables == table)
        for n, h, r in hits.nonzero().tolist():
            part = value * factors[n, h, r]
            if layer.place.by_ngrams:
                joined = torch.zeros(layer.rows.shape[1], len(value), dtype=value.dtype)
                joined[h] = part
                total = total + made.value(joined.flatten())
                continue
            if made.gate is not None:
                part = part * F.silu(made.gate(layer.hidden[n]))
            if made.projection is not None:
                virtual = torch.zeros(layer.place.virtual_tables, len(value), dtype=value.dtype)
                virtual[table] = part
                part = made.projection.weight @ virtual.flatten()
            total = total + part
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_pushed_tokens_are_those_of_what_the_reads_added(kind):
    model = make(kind)
    slots, windows = slots_of(model, random_tokens(8, 3), 3), by_windows(model)
    for report in look_through(model, corpus(), slots, CONTEXT, vocabulary=25, top=6):
        assert {push.block for push in report.pushes} == {block for block, _ in report.reads}
        for push in report.pushes:
            assert push.in_corpus
            added = mean_effect(model, windows, report.slot, push.block, push.table)
            logits = (model.output.weight @ (model.norm.weight * added))[:25]
            logits = (logits - logits.mean()) / logits.std(correction=0)
            expected = [(i, logits[i].item()) for i in logits.argsort(descending=True)[:6].tolist()]
            assert [token for token, _ in push.tokens] == [i for i, score in expected if score > 0]
            for (_, found), (_, score) in zip(push.tokens, expected, strict=False):
                assert found == pytest.approx(score, rel=1e-6)


def test_a_slot_that_the_corpus_never_reads_is_shown_with_an_open_gate():
    model = make("expanded")
    (report,) = look_through(model, [], [Slot("main", 4)], CONTEXT, VOCABULARY)
    assert (report.tokens, report.readers, report.contexts) == (0, 0, [])
    assert [(p.block, p.table, p.in_corpus) for p in report.pushes] == [
        (block, table, False) for block in (0, 2) for table in range(4)
    ]
    push, value = report.pushes[5], model.pools["main"].values[4]
    projected = model.blocks[2].memory.projection.weight[:, 5:10] @ value
    logits = model.output.weight @ (model.norm.weight * projected)
    assert push.tokens[0][0] == int(logits.argmax())
    model.pools["main"].values[4] = 0
    (report,) = look_through(model, [], [Slot("main", 4)], CONTEXT, VOCABULARY)
    assert all(push.tokens == [] for push in report.pushes)


@pytest.mark.parametrize("kind", ["memory_plus", "expanded_peer", "engram"])
def test_quantised_values_are_looked_through_as_they_are_read(kind):
    """As a model whose tables hold what the quantised ones stand for."""
    quantised = make(kind).float()
    for name, pool in list(quantised.pools.items()):
        quantised.pools[name] = held_as(pool, "int8")
    exact = make(kind).float()
    for name, pool in quantised.pools.items():
        exact.pools[name].values[:] = pool.values.float() * pool.scales.unsqueeze(1)
    slots = slots_of(exact, random_tokens(8, 3), 3)
    assert slots_of(quantised, random_tokens(8, 3), 3) == slots
    found, expected = (
        look_through(model, corpus(), slots, CONTEXT, VOCABULARY) for model in (quantised, exact)
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.reads == theirs.reads
        assert ours.weight == pytest.approx(theirs.weight, rel=1e-4)
        assert [p.tokens[0][0] for p in ours.pushes] == [p.tokens[0][0] for p in theirs.pushes]
