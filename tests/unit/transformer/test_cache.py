import pytest
import torch
from torch import nn

from memlm.memory import EngramConfig, MemoryConfig, PEERConfig
from memlm.transformer import Cache, MoEConfig, Transformer, TransformerConfig
from memlm.transformer.config import RopeScaling

CASES = {
    "dense": {},
    "grouped": {"kv_heads": 1},
    "yarn": {"rope_scaling": RopeScaling("yarn", 4.0, 32)},
    "memory": {"memory": MemoryConfig(half_keys=8, heads=2, reads=4, key_dim=8, layers=[1])},
    "expanded": {
        "memory": MemoryConfig(half_keys=8, heads=2, reads=4, key_dim=8, layers=[1], value_expansion=4)
    },
    "peer": {"memory": PEERConfig(half_keys=8, heads=2, reads=4, key_dim=8, layers=[0, 1])},
    "engram": {"memory": EngramConfig(slots=500, heads=2, layers=[0, 2], orders=[1, 3])},
    "experts": {"moe": MoEConfig(experts=4, top_k=2, shared_experts=1)},
}


@pytest.fixture(params=CASES)
def model(request):
    torch.manual_seed(0)
    case = dict(CASES[request.param])
    memory, moe = case.pop("memory", None), case.pop("moe", None)
    made = Transformer(30, TransformerConfig(16, 3, 4, feed_forward_dim=16, **case), memory, moe)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.4)
    return made.double().eval() if memory is None and moe is None else made.eval()


@pytest.mark.parametrize("steps", [[9], [1] * 9, [4, 5], [3, 1, 1, 4], [70, 1, 80]])
@torch.no_grad()
def test_in_steps_as_at_once(model, steps):
    tokens = torch.randint(30, (3, sum(steps)))
    cache = Cache(3, 3)
    parts = [model(part, cache=cache) for part in tokens.split(steps, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens), rtol=1e-4, atol=1e-4)
    assert cache.lengths.tolist() == [sum(steps)] * 3


@torch.no_grad()
def test_ragged_rows_as_each_alone(model):
    """Rows that take in different numbers of tokens in every step, padded on the right with anything."""
    generator = torch.Generator().manual_seed(2)
    whole = [torch.randint(30, (40,), generator=generator) for _ in range(4)]
    taken, cache = [0] * 4, Cache(4, 3)
    for _ in range(6):
        counts = torch.randint(1, 7, (4,), generator=generator)
        batch = torch.randint(30, (4, 6), generator=generator)
        for row, count in enumerate(counts.tolist()):
            batch[row, :count] = whole[row][taken[row] : taken[row] + count]
        logits = model(batch, cache=cache, counts=counts)
        for row, count in enumerate(counts.tolist()):
            taken[row] += count
            expected = model(whole[row][None, : taken[row]])[0, -count:]
            torch.testing.assert_close(logits[row, :count], expected, rtol=1e-4, atol=1e-4)
    assert cache.lengths.tolist() == taken


@torch.no_grad()
def test_rows_are_dropped_and_repeated(model):
    tokens, counts = torch.randint(30, (3, 5)), torch.tensor([5, 2, 4])
    cache = Cache(3, 3)
    model(tokens, cache=cache, counts=counts)
    rows = torch.tensor([2, 0, 2])
    chosen = cache.select(rows)
    more = torch.randint(30, (3, 4))
    logits = model(more, cache=chosen)
    roomy = cache.select(rows, 4)
    torch.testing.assert_close(model(more, cache=roomy), logits, rtol=0, atol=0)
    for place, row in enumerate(rows.tolist()):
        alone = torch.cat((tokens[row, : counts[row]], more[place]))[None]
        torch.testing.assert_close(logits[place], model(alone)[0, -4:], rtol=1e-4, atol=1e-4)
    assert cache.lengths.tolist() == [5, 2, 4]  # the first one is as it was
    again = model(more[:, :1], cache=cache)
    assert again.shape == (3, 1, 30)


@torch.no_grad()
def test_room_for_more_is_made_at_once(model):
    cache = Cache(1, 3)
    model(torch.randint(30, (1, 70)), cache=cache)
    chosen = cache.select(torch.tensor([0, 0]), more=30)
    before = [buffer.data_ptr() for block in chosen.blocks for buffer in block._buffers.values()]
    model(torch.randint(30, (2, 30)), cache=chosen)
    after = [buffer.data_ptr() for block in chosen.blocks for buffer in block._buffers.values()]
    assert before and before == after


@torch.no_grad()
def test_only_the_last_logits(model):
    tokens, counts = torch.randint(30, (3, 5)), torch.tensor([5, 2, 4])
    every = model(tokens)
    torch.testing.assert_close(model(tokens, last=True), every[:, -1:])
    last = model(tokens, cache=Cache(3, 3), counts=counts, last=True)
    torch.testing.assert_close(last, every[torch.arange(3), counts - 1].unsqueeze(1), rtol=1e-4, atol=1e-4)


def test_documents_are_refused(model):
    tokens = torch.zeros(1, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="documents"):
        model(tokens, documents=tokens, cache=Cache(1, 3))


@torch.no_grad()
def test_no_rows(model):
    assert Cache(2, 3).select(torch.tensor([], dtype=torch.long)).lengths.tolist() == []
