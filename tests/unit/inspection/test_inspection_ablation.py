import copy

import pytest
import torch
from inspected_models import KINDS, make, random_tokens

from memlm.inspection import ablation as module
from memlm.inspection.ablation import ablate
from memlm.inspection.reads import reads_of
from memlm.inspection.removal import removed
from memlm.inspection.slots import Slot, heaviest_slots
from memlm.memory import MemoryConfig

PROMPT, ANSWER = random_tokens(9), random_tokens(3, 5)


@torch.no_grad()
def log_likelihood(model):
    logits = model(torch.tensor([PROMPT + ANSWER]))[0, len(PROMPT) - 1 : -1].log_softmax(-1)
    return sum(logits[i, token].item() for i, token in enumerate(ANSWER))


def without(model, slots):
    copied = copy.deepcopy(model)
    for pool, row in slots:
        copied.pools[pool].values[row] = 0
    return log_likelihood(copied)


@pytest.mark.parametrize(
    ("kind", "last"), [*((kind, None) for kind in KINDS), ("several_pools", 2), ("engram", 2)]
)
def test_likelihoods_are_those_of_models_with_zeroed_rows(kind, last):
    model = make(kind)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    report = ablate(model, PROMPT, ANSWER, 40, remove=4, last=last, draws=2)
    assert report.intact.log_likelihood == pytest.approx(log_likelihood(model), abs=1e-6)
    layers = reads_of(model, PROMPT)
    heaviest = [found.slot for found in heaviest_slots(layers, 4, last=last)]
    single = [each for each in report.ablations if each.kind == "slot"]
    assert [each.slot.slot for each in single] == heaviest
    for each in single:
        assert each.scored.log_likelihood == pytest.approx(without(model, [each.slot.slot]), abs=1e-6)
    together = report.ablations[-1]
    assert (together.kind, together.slots) == ("together", 4)
    assert together.scored.log_likelihood == pytest.approx(without(model, heaviest), abs=1e-6)
    # Layers and heads: as many as there are, and how many slots the prompt reads in each.
    expected = []
    for layer in layers:
        rows = layer.rows if last is None else layer.rows[-last:]
        expected.append(("layer", layer.place.block, None, len(rows.unique())))
        for head in range(rows.shape[1]):
            expected.append(("head", layer.place.block, head, len(rows[:, head].unique())))
    found = [(e.kind, e.block, e.head, e.slots) for e in report.ablations if e.kind in ("layer", "head")]
    assert found == expected
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["memory_plus", "several_pools", "peer", "expanded"])
@torch.no_grad()
def test_a_layer_without_all_its_slots_adds_its_bias_alone_for_the_prompt(kind):
    model = make(kind)
    answer = ANSWER[:1]  # so that the prompt's tokens are all that is computed
    report = ablate(model, PROMPT, answer, 40, draws=1)
    for each in report.ablations:
        if each.kind != "layer":
            continue
        emptied = copy.deepcopy(model)
        memory = emptied.blocks[each.block].memory
        bias = 0 if memory.projection is None else memory.projection.bias
        memory.forward = lambda hidden, *_, bias=bias: torch.zeros_like(hidden) + bias
        logits = emptied(torch.tensor([PROMPT]))[0, -1].log_softmax(-1)
        assert each.scored.log_likelihood == pytest.approx(logits[answer[0]].item(), abs=1e-6)
        assert each.scored.greedy == (int(logits.argmax()) == answer[0])


@pytest.mark.parametrize("kind", ["memory_plus", "several_pools", "engram"])
def test_controls_are_as_many_others_in_the_same_place(kind, monkeypatch):
    model, seen = make(kind), []

    def spied(model, removals, renormalise):
        seen.append({(r.pool, row, r.block, r.head) for r in removals for row in r.rows.tolist()})
        return removed(model, removals, renormalise)

    monkeypatch.setattr(module, "removed", spied)
    report = ablate(model, PROMPT, ANSWER, 40, remove=4, draws=3)
    calls = iter(seen)
    read = {
        Slot(layer.place.pool, row)
        for layer in reads_of(model, PROMPT)
        for row in layer.rows.unique().tolist()
    }
    for each in report.ablations:
        taken = next(calls) if each.kind in ("layer", "head", "slot") else None
        drawn = [[next(calls) for _ in control.log_likelihoods] for control in each.controls]
        if taken is None:
            taken = next(calls)
        assert len(taken) == each.slots
        assert {(block, head) for *_, block, head in taken} == {(each.block, each.head)}
        for control, draws in zip(each.controls, drawn, strict=True):
            assert len(draws) == 3
            for draw in draws:
                assert not draw & taken
                assert len(draw) == control.slots <= each.slots
                assert {(block, head) for *_, block, head in draw} == {(each.block, each.head)}
                assert {pool for pool, *_ in draw} <= {pool for pool, *_ in taken}
                if control.what == "also read":
                    assert {Slot(pool, row) for pool, row, *_ in draw} <= read
    assert [control.what for control in report.ablations[-1].controls] == ["random", "also read"]
    assert not any(each.controls for each in report.ablations if each.kind == "slot")


def test_the_seed_decides_the_draws():
    model = make("memory_plus")
    first, again, other = (
        [each.controls for each in ablate(model, PROMPT, ANSWER, 40, seed=seed).ablations]
        for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize("kind", ["memory_plus", "peer"])
def test_renormalised(kind):
    model = make(kind)
    plain, renormalised = (ablate(model, PROMPT, ANSWER, 40, renormalise=r) for r in (False, True))
    assert plain.intact == renormalised.intact
    assert plain.ablations[-1].scored != renormalised.ablations[-1].scored


def test_where_a_prompt_reads_the_whole_pool_there_is_no_control():
    memory = MemoryConfig(half_keys=3, heads=2, reads=3, key_dim=6, layers=[1])
    model = make("memory", memory=memory)
    prompt = random_tokens(39, 2)
    assert len(reads_of(model, prompt)[0].rows.unique()) == 9
    layer, *heads, together = [
        e for e in ablate(model, prompt, ANSWER[:1], 40, remove=7).ablations if e.slot is None
    ]
    assert (layer.kind, layer.slots, layer.controls) == ("layer", 9, [])
    assert len(heads) == 2
    assert [(control.what, control.slots) for control in together.controls] == [
        ("random", 2),
        ("also read", 2),
    ]


def test_what_cannot_be_removed():
    with pytest.raises(ValueError, match="12 tokens; the context has room for 11"):
        ablate(make("memory"), PROMPT, ANSWER, 10)
    with pytest.raises(ValueError, match="no memory layers"):
        ablate(make("dense"), PROMPT, ANSWER, 40)
    with pytest.raises(ValueError, match="no weights"):
        ablate(make("engram"), PROMPT, ANSWER, 40, renormalise=True)
