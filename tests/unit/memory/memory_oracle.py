"""A memory layer by brute force: explicit full keys, every slot scored, dense tables. Shares only names."""

import itertools

import torch
import torch.nn.functional as F

from memlm.memory import MemoryConfig, MemoryLayer, MemoryPool

DIM = 6
ACTIVATIONS = {
    "identity": lambda x: x,
    "relu": lambda x: x.clamp(min=0),
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
}


def build(dtype=torch.float64, seed=0, layers=1, table_dtype=None, kind=MemoryConfig, **options):
    """Layers that share their pools, as the options say, all parameters random, biases and gains too."""
    generator = torch.Generator().manual_seed(seed)
    config = kind(**{"half_keys": 7, "heads": 2, "reads": 4, "key_dim": 4, **options})
    config.layers = list(range(layers))
    config.validate(DIM, layers)
    pools, placed = config.build(DIM, layers)
    made = [placed[block].layer.to(dtype) for block in range(layers)]
    tables = [pool.to(table_dtype or dtype) for pool in pools.values()]
    for module in (*made, *tables):
        for parameter in module.parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = drawn.to(parameter.dtype)
    return made, tables


def brute_force(layer: MemoryLayer, pre_values: str, parameters: dict, hidden, tables):
    """The layer's formula.

    Args:
        layer: For its sizes.
        pre_values: Name of the activation.
        parameters: By name.
        hidden: The input.
        tables: The values ``[S, V]``, and the pre-values ``[S, D]``.
    """
    keys = parameters["product_keys.keys"]
    heads, half_keys, half = keys.shape[0], layer.product_keys.half_keys, keys.shape[-1]
    values = tables[0]
    tokens = hidden.flatten(0, -2)
    query = tokens @ parameters["query.linear.weight"].T + parameters["query.linear.bias"]
    if "query.batch_norm.weight" in parameters:
        centred = query - query.mean(0)
        query = centred / (centred.square().mean(0) + 1e-5).sqrt()
        query = query * parameters["query.batch_norm.weight"] + parameters["query.batch_norm.bias"]
    query = query.view(len(tokens), heads, 2, half)
    if "query.qk_gain" in parameters:
        query = query / query.square().mean(-1, keepdim=True).sqrt() * parameters["query.qk_gain"]
        keys = keys / keys.square().mean(-1, keepdim=True).sqrt()
    pairs = list(itertools.product(*map(range, half_keys)))
    full_keys = torch.stack(
        [torch.cat((keys[:, i], keys[:, half_keys[0] + j]), -1) for i, j in pairs], 1
    )  # [H, virtual slots, 2C]
    scores = torch.einsum("nhc,hsc->nhs", query.flatten(2), full_keys)
    chosen = scores.argsort(-1, descending=True)[..., : layer.product_keys.reads]
    weights = scores.gather(-1, chosen).softmax(-1)
    dense = torch.zeros_like(scores).scatter(-1, chosen, weights).sum(1)  # [N, virtual slots]
    projection = parameters.get("projection.weight")
    outputs = []
    for table in range(len(pairs) // len(values)):
        own = dense[:, table * len(values) : (table + 1) * len(values)]
        if pre_values != "none":
            own = own * ACTIVATIONS[pre_values](tokens @ tables[1].T)
        output = own @ values
        if "gate.weight" in parameters:
            output = output * F.silu(tokens @ parameters["gate.weight"].T + parameters["gate.bias"])
        if projection is not None:
            output = output @ projection.view(DIM, -1, values.shape[1])[:, table].T
        outputs.append(output)
    result = sum(outputs)
    if projection is not None:
        result = result + parameters["projection.bias"]
    return result.view_as(hidden)


def dense_gradient(pool: MemoryPool) -> torch.Tensor:
    """The compact gradient of a pool as one of the whole table, in float64."""
    result = torch.zeros(pool.values.shape, dtype=torch.float64)
    compact = pool.gradient.compact()
    assert compact is not None
    count = len(compact.rows) if compact.count is None else int(compact.count)
    rows, sums = compact.rows[:count], compact.sums[:count]
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert not sums.requires_grad
    return result.index_copy_(0, rows.long(), sums.double())


def leaves(module) -> dict:
    """Copies of all parameters in float64, each a leaf."""
    return {name: p.detach().double().requires_grad_() for name, p in module.named_parameters()}


def check_against_brute_force(
    layers, pools, pre_values="none", tolerance=1e-10, micro_batches=1, skewed=False, tokens=(3, 5)
):
    """Output and all gradients of layers one after the other, against those of the brute-force layers."""
    generator = torch.Generator().manual_seed(5)
    dtype = layers[0].query.linear.weight.dtype
    oracle = [leaves(layer) for layer in layers]
    tables = [pool.values.detach().double().requires_grad_() for pool in pools]

    def close(found, expected, name):
        scale = tolerance * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(
            found.double(), expected, rtol=tolerance, atol=scale, msg=lambda m: f"{name}: {m}"
        )

    for _ in range(micro_batches):
        hidden = torch.randn(*tokens, DIM, generator=generator, dtype=torch.float64)
        if skewed:  # nearly equal tokens, which read the same rows
            hidden = hidden[:1, :1] + 1e-3 * hidden
        grad = torch.randn(*tokens, DIM, generator=generator, dtype=torch.float64).to(dtype)
        hidden = hidden.to(dtype)
        ours, theirs = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
        output, expected = ours, theirs
        for layer, parameters in zip(layers, oracle, strict=True):
            output = layer(output, pools)
            expected = brute_force(layer, pre_values, parameters, expected, tables)
        close(output, expected, "output")
        output.backward(grad)
        expected.backward(grad.double())
        close(ours.grad, theirs.grad, "input")
    for layer, parameters in zip(layers, oracle, strict=True):
        for name, parameter in layer.named_parameters():
            close(parameter.grad, parameters[name].grad, name)
    for number, (pool, table) in enumerate(zip(pools, tables, strict=True)):
        assert pool.values.grad is None
        close(dense_gradient(pool), table.grad, f"table {number}")
