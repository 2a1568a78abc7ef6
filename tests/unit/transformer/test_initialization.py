"""Initial values are those that the table in memlm/transformer/initialization.py promises."""

import math

import pytest
import torch

from memlm.memory import MemoryConfig
from memlm.transformer import Transformer, TransformerConfig
from memlm.transformer.initialization import initialise

DIM, INNER, LAYERS, VALUE_DIM, KEY_DIM = 128, 192, 3, 80, 32


def build(query_norm="none", tie=False) -> Transformer:
    torch.manual_seed(0)
    config = TransformerConfig(dim=DIM, layers=LAYERS, heads=4, feed_forward_dim=INNER, tie_embeddings=tie)
    memory = MemoryConfig(
        half_keys=20,
        heads=3,
        reads=4,
        key_dim=KEY_DIM,
        value_dim=VALUE_DIM,
        layers=[1],
        query_norm=query_norm,
    )
    return Transformer(300, config, memory)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return build()


RESIDUAL = (2 * LAYERS) ** -0.5


@pytest.mark.parametrize(
    "name,std",
    [
        ("embedding.weight", DIM**-0.5),
        ("output.weight", DIM**-0.5),
        ("blocks.0.attention.query.weight", DIM**-0.5),
        ("blocks.0.attention.key.weight", DIM**-0.5),
        ("blocks.0.attention.value.weight", DIM**-0.5),
        ("blocks.0.attention.output.weight", DIM**-0.5 * RESIDUAL),
        ("blocks.0.feed_forward.gate.weight", DIM**-0.5),
        ("blocks.0.feed_forward.up.weight", DIM**-0.5),
        ("blocks.0.feed_forward.down.weight", INNER**-0.5 * RESIDUAL),
        ("pools.main.values", VALUE_DIM**-0.5),
        ("blocks.1.memory.gate.weight", VALUE_DIM**-0.5),
        ("blocks.1.memory.projection.weight", DIM**-0.5),
        ("blocks.1.memory.product_keys.keys", KEY_DIM**-0.5 / math.sqrt(3)),
        ("blocks.1.memory.query.linear.weight", math.sqrt(2 / (DIM + 3 * KEY_DIM))),
    ],
)
def test_standard_deviations(model, name, std):
    parameter = model.get_parameter(name)
    # The deviation of n draws is known to about 1 / sqrt(2 n).
    assert parameter.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * parameter.numel()))
    assert abs(parameter.mean()) < 5 * std / math.sqrt(parameter.numel())


def test_bounds_constants_and_norms(model):
    assert model.blocks[1].memory.product_keys.keys.abs().max() <= KEY_DIM**-0.5
    for module in (build("qk"), build("batch")):
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                assert (parameter == 0).all(), name
            elif name.endswith("qk_gain"):
                assert torch.allclose(parameter, torch.tensor(16 / KEY_DIM).sqrt()), name
            elif "norm" in name:
                assert (parameter == 1).all(), name


def test_tied_embeddings_have_the_embedding_s_deviation():
    assert build(tie=True).output.weight.std().item() == pytest.approx(DIM**-0.5, rel=0.02)


@pytest.mark.parametrize("query_norm", ["none", "batch", "qk"])
def test_every_parameter_is_filled_and_the_seed_decides(query_norm):
    model = build(query_norm)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    torch.manual_seed(7)
    initialise(model)
    first = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert all(parameter.isfinite().all() for parameter in first.values())
    torch.manual_seed(7)
    initialise(model)
    assert all(torch.equal(first[name], parameter) for name, parameter in model.named_parameters())


def test_attention_and_feed_forward_outputs_start_near_the_size_of_the_rule():
    model = build()
    hidden = torch.randn(4, 50, DIM)
    hidden = model.norm(hidden)
    output = model.blocks[0].feed_forward(hidden)
    # silu of a unit normal has a second moment of 0.356.
    assert output.std().item() == pytest.approx(math.sqrt(0.356) * RESIDUAL, rel=0.15)
