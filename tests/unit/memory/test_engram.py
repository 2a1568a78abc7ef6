"""The Engram layer against a float64 layer that goes token by token, and what it must never look at."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from ngram_oracle import python_slots, random_documents
from test_no_table_sized_temporary import LargestNewTensor
from torch.utils.flop_counter import FlopCounterMode

from memlm.errors import ConfigError
from memlm.memory import Inputs
from memlm.memory.engram import EngramConfig
from memlm.optim import MemoryAdamW, assign, clip_gradients
from memlm.transformer import Transformer, TransformerConfig

DIM = 6
SMALL = {"heads": 2, "slots": 80, "value_dim": 3}


def build(dtype=torch.float64, seed=0, depth=1, **options):
    """Layers of blocks 0 to ``depth - 1`` and their pools, all parameters random, gains too."""
    config = EngramConfig(**{"layers": list(range(depth)), **SMALL, **options})
    config.validate(DIM, depth)
    pools, placed = config.build(DIM, depth)
    generator = torch.Generator().manual_seed(seed)
    layers = [placed[block].layer for block in range(depth)]
    for module in (*layers, *pools.values()):
        module.to(dtype)
        for parameter in module.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
    return config, layers, [pools[placed[block].pools[0]] for block in range(depth)]


def random_inputs(seed, rows, length, vocabulary=20):
    source = random.Random(seed)
    tokens = torch.tensor([[source.randrange(vocabulary) for _ in range(length)] for _ in range(rows)])
    documents = None if seed % 3 == 0 else torch.tensor(random_documents(source, rows, length))
    return Inputs(tokens, documents)


def rms(x):
    return x / (x.square().mean() + 1e-6).sqrt()


def brute_force(config, parameters, table, hidden, inputs, hashes):
    """The paper's equations 1 to 5, a token at a time."""
    documents = torch.zeros_like(inputs.tokens) if inputs.documents is None else inputs.documents
    slots = python_slots(inputs.tokens.tolist(), documents.tolist(), hashes)
    rows, length, dim = hidden.shape
    result = []
    for row in range(rows):
        gated = []
        for t in range(length):
            e = torch.cat([table[slot] for slot in slots[row * length + t]])
            key, value = parameters["key.weight"] @ e, parameters["value.weight"] @ e
            query = rms(hidden[row, t]) * parameters["hidden_norm.weight"]
            logit = (query * rms(key) * parameters["key_norm.weight"]).sum() / dim**0.5
            gated.append(value / (1 + torch.exp(-logit)))
        for t in range(length):
            output = gated[t]
            if config.convolution:
                total = torch.zeros(dim, dtype=torch.float64)
                for tap in range(4):
                    at = t - tap * max(config.orders)
                    if at >= 0 and documents[row, at] == documents[row, t]:
                        normed = rms(gated[at]) * parameters["convolution_norm.weight"]
                        total = total + parameters["convolution.weight"][tap] * normed
                output = output + total / (1 + torch.exp(-total))
            result.append(output)
    return torch.stack(result).view(rows, length, dim)


def dense_gradient(pool):
    result = torch.zeros(pool.values.shape, dtype=torch.float64)
    compact = pool.gradient.compact()
    assert compact is not None
    count = len(compact.rows) if compact.count is None else int(compact.count)
    return result.index_copy_(0, compact.rows[:count].long(), compact.sums[:count].double())


def leaves(module):
    return {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}


@pytest.mark.parametrize("convolution", [True, False])
@pytest.mark.parametrize(
    "seed,orders,rows,length",
    [
        (0, [2, 3], 2, 11),
        (1, [2, 3], 2, 14),
        (2, [1], 3, 6),
        (3, [2, 4], 1, 17),
        (4, [3], 2, 2),
        (5, [2], 1, 1),
    ],
)
def test_outputs_and_gradients_are_those_of_brute_force(convolution, seed, orders, rows, length):
    config, (layer,), (pool,) = build(seed=seed, orders=orders, convolution=convolution)
    inputs = random_inputs(seed, rows, length)
    generator = torch.Generator().manual_seed(100 + seed)
    hidden, grad = torch.randn(2, rows, length, DIM, generator=generator, dtype=torch.float64)
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    table, parameters = pool.values.detach().clone().requires_grad_(), leaves(layer)
    output = layer(ours, [pool], inputs)
    expected = brute_force(config, parameters, table, theirs, inputs, layer.hashes)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    output.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(dense_gradient(pool), table.grad, rtol=1e-9, atol=1e-9)
    assert pool.values.grad is None
    for name, parameter in layer.named_parameters():
        if parameters[name].grad is not None:
            torch.testing.assert_close(parameter.grad, parameters[name].grad, rtol=1e-9, atol=1e-9)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters.values())


def test_layers_of_one_pool_read_the_same_rows_and_add_their_gradients():
    config, layers, pools = build(depth=2, layer_pools=["shared", "shared"])
    assert pools[0] is pools[1]
    inputs = random_inputs(1, 2, 9)
    assert torch.equal(layers[0].address(inputs), layers[1].address(inputs))
    hidden = torch.randn(2, 9, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table = pools[0].values.detach().clone().requires_grad_()
    expected = torch.zeros(())
    for layer in layers:
        layer(hidden, [pools[0]], inputs).square().sum().backward()
        output = brute_force(config, leaves(layer), table, hidden, inputs, layer.hashes)
        expected = expected + output.square().sum()
    expected.backward()
    torch.testing.assert_close(dense_gradient(pools[0]), table.grad, rtol=1e-9, atol=1e-9)


def test_each_layer_has_a_pool_and_hashes_of_its_own():
    _, layers, pools = build(depth=2, slots=2**20)
    assert pools[0] is not pools[1]
    inputs = random_inputs(1, 2, 9)
    same = layers[0].address(inputs) == layers[1].address(inputs)
    assert not same.any()
    assert EngramConfig().pool_names(12) == {1: "block1", 5: "block5"}


@pytest.mark.parametrize("convolution", [True, False])
@pytest.mark.parametrize("packed", [False, True])
def test_a_token_changes_nothing_before_it(convolution, packed):
    _, (layer,), (pool,) = build(convolution=convolution, slots=10_000)
    inputs = random_inputs(1 if packed else 0, 2, 30)
    hidden = torch.randn(2, 30, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = layer(hidden, [pool], inputs)
    for at in (0, 7, 29):
        tokens, changed = inputs.tokens.clone(), hidden.clone()
        tokens[:, at] += 1
        changed[:, at] += 1
        after = layer(changed, [pool], inputs._replace(tokens=tokens))
        assert torch.equal(before[:, :at], after[:, :at])
        differs = (before != after).any(-1)
        assert differs[:, at].all()
        # Two tokens back by the trigram, and 3 * 3 further by the convolution.
        reach = 2 + (9 if convolution else 0)
        assert not differs[:, at + reach + 1 :].any()
        if not packed:
            assert differs[:, : at + reach + 1].sum() == 2 * min(reach + 1, 30 - at)


def transformer(seed=0, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    config = TransformerConfig(dim=24, layers=3, heads=2, feed_forward_dim=32)
    memory = EngramConfig(**{"layers": [0, 2], "heads": 2, "slots": 300, "value_dim": 4, **options})
    model = Transformer(30, config, memory).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "convolution.weight" in name:
                parameter.normal_(std=0.5)
    return model


@pytest.mark.parametrize("convolution", [True, False])
def test_documents_packed_into_a_row_are_as_rows_of_their_own(convolution):
    _, (layer,), (pool,) = build(convolution=convolution)
    lengths = [7, 1, 12]
    tokens = torch.randint(30, (1, 20), generator=torch.Generator().manual_seed(3))
    documents = torch.arange(3).repeat_interleave(torch.tensor(lengths)).unsqueeze(0)
    hidden = torch.randn(1, 20, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    packed = layer(hidden, [pool], Inputs(tokens, documents))
    parts = zip(hidden.split(lengths, dim=1), tokens.split(lengths, dim=1), strict=True)
    alone = torch.cat([layer(part, [pool], Inputs(ids)) for part, ids in parts], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-12, atol=1e-12)
    assert (packed - layer(hidden, [pool], Inputs(tokens))).abs().max() > 1e-3  # it is what keeps them apart

    model = transformer(convolution=convolution)
    alone = torch.cat([model(part) for part in tokens.split(lengths, dim=1)], dim=1)
    # Rotary positions, which count from the row's start, are fp32.
    torch.testing.assert_close(model(tokens, documents), alone, rtol=1e-4, atol=1e-5)


def test_memory_is_added_to_the_residual_stream_before_attention():
    model = transformer()
    inputs = random_inputs(1, 2, 9)
    block = model.blocks[2]
    seen = {}
    block.attention_norm.register_forward_pre_hook(lambda _, args: seen.update(attended=args[0]))
    block.memory.register_forward_hook(lambda _, args, output: seen.update(hidden=args[0], added=output))
    model(*inputs)
    torch.testing.assert_close(seen["attended"], seen["hidden"] + seen["added"])
    assert model.blocks[1].memory is None
    assert all(block.feed_forward is not None for block in model.blocks)
    assert set(model.pools) == {"block0", "block2"}


def test_a_model_that_starts_at_zero_equals_the_one_without_memory_and_learns():
    config = TransformerConfig(dim=24, layers=3, heads=2, feed_forward_dim=32)
    torch.manual_seed(0)
    options = {"heads": 2, "slots": 300, "value_dim": 4, "count": 1, "start_at_zero": True}
    model = Transformer(30, config, EngramConfig(**options))
    dense = Transformer(30, config)
    dense.load_state_dict({name: model.state_dict()[name] for name in dense.state_dict()})
    tokens = torch.randint(30, (2, 16), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(tokens), dense(tokens))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "block" in name}
    optimizer = optimise(model)
    for _ in range(3):
        step(model, optimizer, tokens)
    for name, parameter in model.named_parameters():
        if name in before:
            assert (parameter != before[name]).any(), name


def optimise(model) -> MemoryAdamW:
    groups = [
        {"params": parameters, "name": name, "kind": "memory" if name == "values" else "dense", "clip": 1.0}
        for name, parameters in assign(model.named_parameters()).items()
    ]
    gradients = {pool.values: pool.gradient for pool in model.pools.values()}
    return MemoryAdamW(groups, gradients, lr=1e-2)


def step(model, optimizer, tokens) -> float:
    optimizer.zero_grad()
    logits = model(tokens[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    clip_gradients(optimizer, 1.0)
    optimizer.step()
    return loss.item()


def test_training_moves_the_rows_read_and_no_others_and_learns():
    model = transformer(dtype=torch.float32, slots=2000)
    tokens = torch.randint(30, (4, 12), generator=torch.Generator().manual_seed(0))
    pool = model.pools["block2"]
    before = pool.values.detach().clone()
    optimizer = optimise(model)
    losses = [step(model, optimizer, tokens) for _ in range(20)]
    read = model.blocks[2].memory.address(Inputs(tokens[:, :-1])).unique()
    moved = (pool.values != before).any(1).nonzero().squeeze(1)
    assert moved.tolist() == read.tolist() and len(moved) < 200
    assert losses[-1] < 0.3 * losses[0]


def test_every_optimizer_group_gets_its_part():
    model = transformer()
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {
        group: {names[id(p)].split("memory.")[-1] for p in parameters if "memory" in names[id(p)]}
        for group, parameters in assign(model.named_parameters()).items()
    }
    assert groups["decay"] == {"key.weight", "value.weight", "convolution.weight"}
    assert groups["no_decay"] == {"hidden_norm.weight", "key_norm.weight", "convolution_norm.weight"}
    assert set(model.state_dict()) >= {"pools.block0.values", "blocks.0.memory.convolution.weight"}


def test_a_step_makes_nothing_of_the_table_s_size():
    model = transformer(dtype=torch.float32, slots=100_000)
    optimizer = optimise(model)
    tables = [pool.values for pool in model.pools.values()]
    known = [*tables, *(tensor for table in tables for tensor in optimizer.state[table].values())]
    tokens = torch.randint(30, (2, 12), generator=torch.Generator().manual_seed(0))
    with LargestNewTensor(known) as largest:
        step(model, optimizer, tokens)
        step(model, optimizer, tokens)
    assert 0 < largest.elements < tables[0].numel() // 50, largest.operation


def test_a_table_of_2_to_the_36_elements_can_be_described():
    config = EngramConfig(slots=2**30, value_dim=64)
    with torch.device("meta"):
        model = Transformer(100, TransformerConfig(dim=64, layers=6, heads=2), config)
        logits = model(torch.zeros(2, 8, dtype=torch.int64), torch.zeros(2, 8, dtype=torch.int64))
    assert logits.shape == (2, 8, 100)
    values = model.pools["block1"].values
    assert values.is_meta and values.numel() >= 2**36
    assert values.shape[0] - 2**30 < 16 * 1000


@pytest.mark.parametrize("rows,printed", [(2_262_400, 5.7e9), (7_239_680, 18.5e9)])
def test_the_paper_s_tables_have_their_size(rows, printed):
    """Of its models of 27B and 40B parameters (table 5): rows of each table, and elements of all."""
    config = EngramConfig(slots=16 * rows, value_dim=1280 // 16, layers=[1, 14])
    with torch.device("meta"):
        pools, _ = config.build(2560, 30)
    assert sum(pool.values.numel() for pool in pools.values()) == pytest.approx(printed, rel=0.02)


def test_initial_values():
    torch.manual_seed(0)
    config = TransformerConfig(dim=256, layers=8, heads=4, feed_forward_dim=64)
    model = Transformer(5000, config, EngramConfig(slots=20_000))
    layer, pool = model.blocks[1].memory, model.pools["block1"]
    assert (layer.convolution.weight == 0).all()
    for norm in (layer.hidden_norm, layer.key_norm, layer.convolution_norm):
        assert (norm.weight == 1).all()
    inner = 16 * pool.value_dim
    assert layer.key.weight.std().item() == pytest.approx(inner**-0.5, rel=0.02)
    assert layer.value.weight.std().item() == pytest.approx(inner**-0.5 / 4, rel=0.02)
    assert pool.values.std().item() == pytest.approx(pool.value_dim**-0.5, rel=0.02)
    tokens = torch.randint(5000, (4, 64))
    seen = {}
    layer.hidden_norm.register_forward_hook(lambda _, args, output: seen.update(query=output))
    layer.key_norm.register_forward_hook(lambda _, args, output: seen.update(key=output))
    model(tokens).logsumexp(-1).mean().backward()
    logits = (seen["query"] * seen["key"]).sum(-1) / 16
    assert logits.std().item() == pytest.approx(1, rel=0.25)
    sums = pool.gradient.compact().sums
    assert (sums.abs().sum(1) > 0).all()  # every row read has a gradient in the first step
    assert layer.convolution.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("convolution", [True, False])
def test_flops_and_parameters(convolution):
    _, (layer,), (pool,) = build(torch.float32, convolution=convolution)
    inputs = random_inputs(1, 2, 9)
    hidden = torch.randn(2, 9, DIM, requires_grad=True)
    counts = []
    for backward in (False, True):
        with FlopCounterMode(display=False) as counter:
            output = layer(hidden, [pool], inputs)
            if backward:
                output.sum().backward()
        counts.append(counter.get_flop_counts()["Global"][torch.ops.aten.mm] / 18)
    flops = layer.flops(9)
    assert counts == [flops.forward, flops.forward + flops.backward]
    assert layer.rows_read == 4
    assert layer.active_parameters() == 2 * DIM * 12 + 2 * DIM + (5 * DIM if convolution else 0)


def test_outputs_are_the_same_to_the_bit_every_time():
    model = transformer(dtype=torch.float32)
    inputs = random_inputs(1, 2, 15)
    results = []
    for twin in (model, copy.deepcopy(model), model):
        for pool in twin.pools.values():
            pool.gradient.clear()
        twin.zero_grad()
        twin(*inputs).square().mean().backward()
        results.append([dense_gradient(twin.pools["block2"]), twin.blocks[2].memory.key.weight.grad.clone()])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16])
def test_half_precision_comes_near_full(table_dtype):
    _, (layer,), (pool,) = build(torch.float32)
    inputs = random_inputs(1, 2, 40)
    hidden = torch.randn(2, 40, DIM, generator=torch.Generator().manual_seed(0))
    exact = layer(hidden, [pool], inputs)
    pool.to(table_dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(hidden, [pool], inputs)
    assert output.dtype == torch.float32
    assert 0 < (output - exact).norm() / exact.norm() < 0.03
    output.sum().backward()
    assert pool.gradient.compact().sums.isfinite().all()
    pure = layer.bfloat16()(hidden.bfloat16(), [pool], inputs)
    assert pure.dtype == torch.bfloat16
    assert (pure.float() - exact).norm() / exact.norm() < 0.05


def test_compiled_it_gives_the_same():
    model = transformer(dtype=torch.float32)
    inputs = random_inputs(1, 2, 9)
    expected = model(*inputs)
    expected.sum().backward()
    gradient = dense_gradient(model.pools["block0"])
    model.pools["block0"].gradient.clear()
    output = torch.compile(model, backend="eager")(*inputs)
    torch.testing.assert_close(output, expected)
    output.sum().backward()
    torch.testing.assert_close(dense_gradient(model.pools["block0"]), gradient)


@pytest.mark.parametrize(
    "options,depth,expected",
    [
        ({}, 12, [1, 5]),  # the paper's ablation: the second and the sixth of twelve
        ({"stride": 13}, 30, [1, 14]),  # the paper's 27B model: the second and the fifteenth of thirty
        ({"count": 1}, 2, [1]),
        ({"layers": [0, 3]}, 4, [0, 3]),
    ],
)
def test_placement(options, depth, expected):
    config = EngramConfig(**options)
    config.validate(64, depth)
    assert config.placement(depth) == expected
    assert list(config.pool_names(depth).values()) == [f"block{block}" for block in expected]


def test_defaults_follow_the_model():
    config = EngramConfig()
    assert [config.resolved_value_dim(dim) for dim in (64, 768, 1000, 2560)] == [8, 48, 56, 160]
    assert EngramConfig(value_dim=5).resolved_value_dim(768) == 5
    assert EngramConfig(orders=[2], heads=4).resolved_value_dim(768) == 192
    assert config.tables == 16
    assert config.placed == "before"


@pytest.mark.parametrize(
    "options,key,parts",
    [
        ({"orders": []}, "orders", ["[]", "from 1 token on"]),
        ({"orders": [0, 2]}, "orders", ["[0, 2]", "from 1 token on"]),
        ({"orders": [3, 2]}, "orders", ["[3, 2]", "ascending"]),
        ({"orders": [2, 2]}, "orders", ["[2, 2]", "repeats"]),
        ({"heads": 0}, "heads", ["0", "at least 1"]),
        ({"slots": 31}, "slots", ["31", "at least 32", "16 tables", "[2, 3]", "(8)"]),
        ({"value_dim": 0}, "value_dim", ["0", "at least 1"]),
        ({"count": 0}, "count", ["0", "at least 1"]),
        ({"stride": 0}, "stride", ["0", "at least 1"]),
        ({"layers": []}, "layers", ["empty"]),
        ({"layers": [12]}, "layers", ["[12]", "0 to 11"]),
        ({"count": 4}, "stride", ["[1, 5, 9, 13]", "0 to 11"]),
        ({"layer_pools": ["a"]}, "layer_pools", ["1 pools", "2 memory layers"]),
        ({"layer_pools": ["a", "b c"]}, "layer_pools", ["'b c'"]),
    ],
)
def test_errors_name_the_key_at_fault(options, key, parts):
    with pytest.raises(ConfigError) as caught:
        EngramConfig(**options).validate(64, 12)
    assert caught.value.key == f"model.memory.{key}"
    for part in parts:
        assert part in str(caught.value)


def test_the_least_slots_are_enough():
    config = EngramConfig(slots=32, layers=[0])
    config.validate(64, 1)
    pools, _ = config.build(64, 1)
    assert pools["block0"].slots >= 32


def test_a_table_that_does_not_fit_is_the_fault_of_its_size(monkeypatch):
    def no_room(*_, **__):
        raise RuntimeError("no memory")

    monkeypatch.setattr("memlm.memory.placement.MemoryPool", no_room)
    with pytest.raises(ConfigError, match="could not be allocated") as caught:
        EngramConfig().build(64, 6)
    assert caught.value.key == "model.memory.slots"
