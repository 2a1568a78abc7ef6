"""What a rank is said to hold, against the tensors of a real model after a real step."""

import pytest
import torch
import torch.nn.functional as F

from memlm.errors import ConfigError
from memlm.memory import MemoryConfig, PEERConfig
from memlm.memory.engram import EngramConfig
from memlm.optim import OptimizerConfig, ValuesOptimizerConfig, configure
from memlm.rank_memory import Mesh, RankMemory, convert, rank_memory, reads_per_token
from memlm.transformer import MoEConfig, Transformer, TransformerConfig

MEMORY = {"half_keys": 12, "heads": 3, "reads": 5, "key_dim": 8, "layers": [0, 2]}


def build(memory=None, moe=None, device="cpu") -> Transformer:
    with torch.device(device):
        config = TransformerConfig(dim=32, layers=3, heads=4, feed_forward_dim=64)
        return Transformer(37, config, memory, moe)


def optimizer_of(model: Transformer, values: ValuesOptimizerConfig | None = None):
    gradients = {pool.values: pool.gradient for pool in model.pools.values()}
    options = values or ValuesOptimizerConfig()
    return configure(model.named_parameters(), gradients, OptimizerConfig(), options, 10)[0]


def bytes_of(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def trained(model: Transformer, optimizer, tokens: torch.Tensor) -> dict[str, int]:
    """One real step; the bytes of everything there is after it."""
    F.cross_entropy(model(tokens).float().flatten(0, 1), tokens.flatten()).backward()
    tables = [pool.values for pool in model.pools.values()]
    dense = [p for p in model.parameters() if not any(p is table for table in tables)]
    rows = [pool.gradient.compact() for pool in model.pools.values()]
    optimizer.step()
    return {
        "dense_weights": bytes_of(dense),
        "dense_gradients": bytes_of(p.grad for p in dense if p.grad is not None),
        "dense_state": bytes_of(state for p in dense for state in optimizer.state[p].values()),
        "values": bytes_of(tables),
        "row_gradients": bytes_of(sums.sums for sums in rows if sums is not None),
        "values_state": bytes_of(state for p in tables for state in optimizer.state[p].values()),
    }


PLANS = {
    "dense": dict,
    "experts": lambda: {"moe": MoEConfig(experts=4)},
    "Memory+": lambda: {"memory": MemoryConfig(**MEMORY, value_dim=20)},
    "bf16 values": lambda: {"memory": MemoryConfig(**MEMORY, values_dtype="bfloat16")},
    "two pools": lambda: {"memory": MemoryConfig(**MEMORY, layer_pools=["a", "b"])},
    "PEER": lambda: {"memory": PEERConfig(**MEMORY)},
    "Engram": lambda: {"memory": EngramConfig(slots=200, layers=[1, 2])},
}
OPTIONS = {
    "adamw": {},
    "rowwise": {"method": "adamw_rowwise", "moments": "caught_up"},
    "no first moments": {"betas": (0.0, 0.95), "weight_decay": 0.1},
    "sgd": {"method": "sgd"},
    "masters": {"rounding": "master", "method": "sgd"},
}


def check(plan, precision, options) -> None:
    values = ValuesOptimizerConfig(**options)
    real, meta = build(**plan()), build(**plan(), device="meta")
    for model in (real, meta):
        convert(model, precision)
    tokens = torch.randint(37, (2, 6), generator=torch.Generator().manual_seed(0))
    found = trained(real, optimizer_of(real, values), tokens)
    counted = rank_memory(meta, optimizer_of(meta, values), Mesh(), tokens.numel()).as_dict()
    assert counted.pop("total") == sum(counted.values())
    rows, most = found.pop("row_gradients"), counted.pop("row_gradients")
    assert rows <= most
    assert counted == found


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_equals_a_real_step(plan, precision):
    check(plan, precision, {})


@pytest.mark.parametrize("plan", ["Memory+", "bf16 values"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_equals_a_real_step_under_every_option_of_the_values(plan, options):
    check(PLANS[plan], "bf16-mixed", options)


def test_double_precision():
    check(lambda: {"memory": MemoryConfig(**MEMORY, kernels="reference")}, "64-true", {})


def test_rows_are_counted_exactly_where_every_read_is_of_another_row():
    plan = {"memory": MemoryConfig(**MEMORY | {"layers": [1], "heads": 1}, value_dim=20)}
    model = build(**plan)
    found = trained(model, optimizer_of(model), torch.tensor([[3]]))
    assert found["row_gradients"] == 5 * 20 * 4
    assert rank_memory(model, optimizer_of(model), Mesh(), 1).row_gradients == 5 * 20 * 4


def test_no_more_rows_than_slots():
    model = build(MemoryConfig(**MEMORY, value_dim=20), device="meta")
    held = rank_memory(model, optimizer_of(model), Mesh(), 1000)
    assert held.row_gradients == 144 * 20 * 4


def test_frozen_parameters_have_neither_gradient_nor_state():
    model = build(MemoryConfig(**MEMORY))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("pools.") or ".memory." in name)
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    found = trained(model, optimizer_of(model), tokens)
    counted = rank_memory(model, optimizer_of(model), Mesh(), 8).as_dict()
    for name in ("dense_weights", "dense_gradients", "dense_state", "values_state"):
        assert counted[name] == found[name]
    assert counted["dense_gradients"] < counted["dense_weights"]


def largest(tensor: torch.Tensor, rows: int, columns: int = 1) -> torch.Tensor:
    """The first part of it, as torch cuts tensors, which is never smaller than the others."""
    if tensor.ndim:
        tensor = tensor.chunk(rows, dim=0)[0]
    return tensor.chunk(columns, dim=1)[0] if tensor.ndim > 1 else tensor


def largest_dense(tensor: torch.Tensor, ranks: int) -> torch.Tensor:
    """The same along the first dimension that has a part for every rank."""
    even = [dim for dim, size in enumerate(tensor.shape) if size % ranks == 0]
    short = tensor.ndim and tensor.shape[0] < ranks
    return tensor.chunk(ranks, dim=even[0])[0] if short and even else largest(tensor, ranks)


@pytest.mark.parametrize(
    "mesh",
    [Mesh(4, 1), Mesh(4, 4), Mesh(10, 5, shard_dense=True), Mesh(8, 2, shard_dense=True)],
    ids=lambda mesh: f"{mesh.ranks}-{mesh.memory_group}-{mesh.shard_dense}",
)
@pytest.mark.parametrize("method", ["adamw", "adamw_rowwise"])
def test_a_mesh_splits_by_torch_s_own_chunks(mesh, method):
    model = build(MemoryConfig(**MEMORY, value_dim=20), MoEConfig(experts=4))
    options = ValuesOptimizerConfig(method=method, weight_decay=0.1)
    optimizer = optimizer_of(model, options)
    held = rank_memory(model, optimizer, mesh, tokens=1)
    table = model.pools["main"].values
    dense = [parameter for parameter in model.parameters() if parameter is not table]
    split, group = mesh.ranks if mesh.shard_dense else 1, mesh.memory_group
    groups = mesh.ranks // group
    state = [tensor for parameter in dense for tensor in optimizer.state[parameter].values()]
    columns = table.chunk(group, dim=1)[0].shape[1]
    assert held == RankMemory(
        dense_weights=bytes_of(largest_dense(parameter, split) for parameter in dense),
        dense_gradients=bytes_of(largest_dense(parameter, split) for parameter in dense),
        dense_state=bytes_of(largest_dense(tensor, split) for tensor in state),
        values=bytes_of([largest(table, 1, group)]),
        # Two layers, 15 reads of each for every token of the group.
        # Then the rows that this one updates, of what all groups have read, where there are several.
        row_gradients=(min(30 * group, 144) + (groups > 1) * -(-min(30 * mesh.ranks, 144) // groups))
        * columns
        * 4,
        values_state=bytes_of(largest(tensor, groups, group) for tensor in optimizer.state[table].values()),
    )


@pytest.mark.parametrize("group", [1, 2])
def test_accumulated_gradients_are_whole(group):
    model = build(moe=MoEConfig(experts=4))
    optimizer = optimizer_of(model)
    experts = sum(p.numel() for layer in model.experts.values() for p in (layer.gate_up, layer.down))
    others = sum(p.numel() for p in model.parameters()) - experts
    mesh = {"ranks": 4, "shard_dense": True, "expert_group": group}
    whole = rank_memory(model, optimizer, Mesh(**mesh), 1, micro_batches=2)
    assert whole.dense_gradients == 4 * (others + experts // group)
    parts = rank_memory(model, optimizer, Mesh(**mesh, whole_gradients=False), 1, micro_batches=2)
    at_once = rank_memory(model, optimizer, Mesh(**mesh), 1)
    assert parts == at_once
    assert parts.dense_gradients < whole.dense_gradients / 3 * group


def test_reads_are_counted_over_all_layers_of_a_pool():
    memory = MemoryConfig(**MEMORY | {"layers": [0, 1, 2]}, layer_pools=["a", "b", "a"])
    assert reads_per_token(build(memory, device="meta")) == {"a": 30, "b": 15}
    assert reads_per_token(build(PEERConfig(**MEMORY), device="meta")) == {"main": 30, "main_down": 30}
    assert reads_per_token(build(device="meta")) == {}


@pytest.mark.parametrize("precision", ["32-true", "32", 32, None, "bf16-mixed", "bf16", "16-mixed", 16])
def test_precisions_that_leave_parameters_alone(precision):
    model = build(MemoryConfig(**MEMORY, values_dtype="bfloat16"), device="meta")
    convert(model, precision)
    assert model.pools["main"].values.dtype == torch.bfloat16
    assert model.embedding.weight.dtype == torch.float32


@pytest.mark.parametrize(
    "precision,dtype",
    [
        ("bf16-true", torch.bfloat16),
        ("16-true", torch.float16),
        ("64-true", torch.float64),
        (64, torch.float64),
    ],
)
def test_precisions_that_convert_parameters(precision, dtype):
    model = build(MemoryConfig(**MEMORY), device="meta")
    convert(model, precision)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_an_unknown_precision():
    with pytest.raises(
        ConfigError, match=r"precision: is transformer-engine, .* known are 32-true, bf16-mixed"
    ):
        convert(build(device="meta"), "transformer-engine")


@pytest.mark.parametrize(
    "options,message",
    [
        ({"ranks": 0}, "ranks: is 0, must be at least 1"),
        ({"ranks": 2, "memory_group": -1}, "memory_group: is -1, must be at least 1"),
        ({"ranks": 6, "memory_group": 4}, r"memory_group: is 4, must divide ranks \(6\)"),
    ],
)
def test_meshes_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        Mesh(**options)


def test_a_memory_group_that_does_not_divide_a_value():
    model = build(MemoryConfig(**MEMORY, value_dim=20), device="meta")
    with pytest.raises(
        ConfigError, match="memory_group: is 8, must divide the 20 elements of a value of pool 'main'"
    ):
        rank_memory(model, optimizer_of(model), Mesh(8, 8), 1)
