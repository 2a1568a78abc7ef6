"""Tucker-decomposed retrieval against loops over every pair of half keys, in float64."""

import numpy as np
import pytest
import torch
from memory_oracle import DIM, build, dense_gradient
from torch.utils.flop_counter import FlopCounterMode

from memlm.errors import ConfigError
from memlm.flops import read_flops
from memlm.memory import MemoryConfig, TuckerConfig
from memlm.memory.tucker import TuckerKeys


def draw(tokens=5, heads=2, half_keys=(6, 9), width=6, reads=4, rank=3, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    keys = TuckerKeys(heads, half_keys, width, reads, TuckerConfig(rank=rank, **options)).double()
    for parameter in keys.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    query = torch.randn(tokens, heads, 2, width, generator=generator, dtype=torch.float64)
    return keys, query.requires_grad_()


def by_loops(module: TuckerKeys, query, keys, core):
    """Slots and scores; one token, head and pair at a time."""
    rank, first, reads = module.config.rank, module.half_keys[0], module.reads
    slots, scores = [], []
    for n in range(query.shape[0]):
        for h in range(module.heads):
            halves = []
            for half, rows in enumerate((keys[h, :first], keys[h, first:])):
                parts = zip(query[n, h, half].chunk(rank), rows.chunk(rank, 1), strict=True)
                halves.append(torch.stack([part_keys @ part for part, part_keys in parts], 1))  # [K, r]
            left, _, right = np.linalg.svd(core[h].detach().numpy())
            u, t = left[:, 0], right[0]
            if u.sum() + t.sum() < 0:
                u, t = -u, -t
            rows = np.argsort(-(halves[0].detach().numpy() @ u))[:reads]
            columns = np.argsort(-(halves[1].detach().numpy() @ t))[:reads]
            pairs = {}
            for i in rows:
                for j in columns:
                    pairs[int(i) * len(halves[1]) + int(j)] = halves[0][i] @ core[h] @ halves[1][j]
            best = sorted(pairs, key=lambda slot: -pairs[slot].item())[:reads]
            slots.append(best)
            scores.append(torch.stack([pairs[slot] for slot in best]))
    shape = (query.shape[0], module.heads, reads)
    return torch.tensor(slots).view(shape), torch.stack(scores).view(shape)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank": 2, "heads": 1, "half_keys": (8, 8), "reads": 8},
        {"rank": 6, "half_keys": (4, 11), "reads": 3},
        {"reads": 1, "tokens": 1},
        {"rank": 2, "width": 2, "half_keys": (1, 5), "reads": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", range(3))
def test_slots_scores_and_gradients_equal_loops(options, seed):
    module, query = draw(seed=seed, **options)
    twins = [tensor.detach().clone().requires_grad_() for tensor in (query, module.keys, module.core)]
    slots, scores = module(query)
    expected_slots, expected = by_loops(module, *twins)
    assert torch.equal(slots, expected_slots)
    torch.testing.assert_close(scores, expected)
    grad = torch.randn(scores.shape, dtype=torch.float64)
    scores.backward(grad)
    expected.backward(grad)
    for found, twin in zip((query, module.keys, module.core), twins, strict=True):
        torch.testing.assert_close(found.grad, twin.grad)


@pytest.mark.parametrize("seed", range(4))
def test_with_every_half_key_preselected_the_search_is_exact(seed):
    module, query = draw(half_keys=(7, 7), reads=7, seed=seed)
    _, scores = module(query)
    first, second = (half.unflatten(-1, (3, -1)) for half in module.keys.split(7, 1))
    parts = query.unflatten(-1, (3, -1))
    a = torch.einsum("nhrc,hirc->nhir", parts[:, :, 0], first)
    b = torch.einsum("nhrc,hjrc->nhjr", parts[:, :, 1], second)
    everything = torch.einsum("nhir,hrs,nhjs->nhij", a, module.core, b).flatten(-2)
    torch.testing.assert_close(scores, everything.topk(7).values)


def test_the_sign_of_the_singular_vectors_does_not_matter(monkeypatch):
    module, query = draw()
    module.initialise(1.0)
    slots, scores = module(query)
    svd = torch.linalg.svd

    def flipped(core):
        left, values, right = svd(core)
        return -left, values, -right

    monkeypatch.setattr(torch.linalg, "svd", flipped)
    again = module(query)
    assert torch.equal(again[0], slots)
    torch.testing.assert_close(again[1], scores)


def test_the_loss_is_that_of_the_smaller_singular_values():
    module, _ = draw(heads=3, rank=3, loss=0.5, margin=0.2)
    loss = module.take_losses()["tucker"]
    expected = []
    for core in module.core.detach().numpy():
        values = np.linalg.svd(core, compute_uv=False)
        expected.append(sum(max(0.0, value - 0.2) ** 2 for value in values[1:]) / 2)
    assert loss.item() == pytest.approx(0.5 * np.mean(expected))
    optimizer = torch.optim.SGD([module.core], lr=1.0)
    for _ in range(200):
        optimizer.zero_grad()
        module.take_losses()["tucker"].backward()
        optimizer.step()
    values = torch.linalg.svdvals(module.core)
    assert values[:, 1:].max() < 0.25  # down to the margin, and not to zero
    assert values[:, 1:].max() > 0.15
    assert values[:, 0].min() > 0.5
    module.config.loss = 0
    assert module.take_losses() == {}


def test_the_core_begins_near_rank_one_with_positive_leading_vectors():
    torch.manual_seed(0)
    module = TuckerKeys(50, (4, 4), 8, 2, TuckerConfig(rank=4))
    with torch.no_grad():
        module.initialise(1.0)
    values = torch.linalg.svdvals(module.core)
    assert ((values[:, 0] - 1).abs() < 0.15).all()
    assert (values[:, 1] < 0.2).all()
    left, right = module._leading(module.core)
    assert (left > 0).all()
    assert (right > 0).all()


def test_a_layer_reads_what_it_finds_and_trains_it():
    tucker = TuckerConfig(rank=2)
    (layer,), (pool,) = build(key_dim=8, tucker=tucker, query_norm="qk", value_dim=5)
    hidden = torch.randn(2, 5, DIM, dtype=torch.float64, requires_grad=True)
    output = layer(hidden, [pool])
    slots, weights = layer.address(hidden.flatten(0, 1))
    read = (pool.values[slots.flatten(1)] * weights.flatten(1).unsqueeze(-1)).sum(1)
    gated = read * torch.nn.functional.silu(layer.gate(hidden.flatten(0, 1)))
    torch.testing.assert_close(output.flatten(0, 1), layer.projection(gated))
    output.square().sum().backward()
    assert layer.product_keys.core.grad.abs().min() > 0
    assert set(dense_gradient(pool).any(1).nonzero().flatten().tolist()) == set(slots.flatten().tolist())


def test_flops_are_those_that_torch_counts():
    config = MemoryConfig(
        half_keys=(10, 14), heads=3, reads=5, key_dim=12, layers=[0], tucker=TuckerConfig(rank=3)
    )
    config.validate(32, 1)
    pools, placed = config.build(32, 1)
    layer, pool = placed[0].layer, pools["main"]
    for module in (layer, pool):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter)
    expected = layer.flops(16) + read_flops(15, 32)
    hidden = torch.randn(2, 16, 32, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        output = layer(hidden, [pool])
    assert counter.get_total_flops() / 32 == pytest.approx(expected.forward, rel=0.02)
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    assert counter.get_total_flops() / 32 == pytest.approx(expected.backward, rel=0.02)


def test_one_graph_under_torch_compile():
    torch._dynamo.reset()
    module, query = draw()
    module.initialise(1.0)
    slots, scores = module(query)
    found = torch.compile(module, fullgraph=True, backend="aot_eager")(query)
    assert torch.equal(found[0], slots)
    torch.testing.assert_close(found[1], scores)


@pytest.mark.parametrize(
    "options,key,parts",
    [
        ({"rank": 1}, "rank", ["1", "at least 2"]),
        ({"rank": 5}, "rank", ["5", "(16)"]),
        ({"loss": -1.0}, "loss", ["-1.0"]),
        ({"margin": -0.1}, "margin", ["-0.1"]),
    ],
)
def test_errors_name_key_and_values(options, key, parts):
    with pytest.raises(ConfigError) as error:
        MemoryConfig(tucker=TuckerConfig(**options)).validate(dim=64, depth=12)
    assert error.value.key == f"model.memory.tucker.{key}"
    assert all(part in str(error.value) for part in parts), str(error.value)
