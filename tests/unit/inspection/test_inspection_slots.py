import itertools

import pytest
from inspected_models import KINDS, make, random_tokens

from memlm.inspection.corpus import look_through
from memlm.inspection.reads import memory_blocks, reads_of
from memlm.inspection.slots import Slot, check_slots, heaviest_slots


@pytest.mark.parametrize("kind", KINDS)
def test_the_heaviest_slots_are_those_of_the_largest_sums(kind):
    layers = reads_of(make(kind), random_tokens(8))
    for last in (None, 1, 3):
        sums = {}
        for layer in layers:
            tokens, heads, reads = layer.rows.shape
            rows, factors = layer.rows.tolist(), layer.factors.tolist()
            for n in range(tokens - (last or tokens), tokens):
                for h, r in itertools.product(range(heads), range(reads)):
                    slot = Slot(layer.place.pool, rows[n][h][r])
                    sums[slot] = sums.get(slot, 0.0) + abs(factors[n][h][r])
        found = heaviest_slots(layers, 6, last=last)
        assert len(found) == min(6, len(sums))
        assert [f.weight for f in found] == pytest.approx(sorted(sums.values(), reverse=True)[: len(found)])
        assert all(found.weight == pytest.approx(sums[found.slot]) for found in found)
        of_one = heaviest_slots(layers, 1000, layers[0].place.pool, last)
        assert {f.slot for f in of_one} == {slot for slot in sums if slot.pool == layers[0].place.pool}


def test_slots_that_do_not_exist():
    model = make("several_pools")
    assert [place.slots for place in memory_blocks(model)] == [36, 36, 36]
    check_slots(model, [Slot("a", 0), Slot("b", 35)])
    for slot, message in [
        (Slot("a", 36), "36 is no slot of the pool 'a', whose are 0 to 35"),
        (Slot("c", 0), "'c' is no pool of values; the model has a, b"),
    ]:
        with pytest.raises(ValueError, match=message):
            look_through(model, [], [slot], 16, 30)
