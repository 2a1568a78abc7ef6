"""Assignment of a real model's parameters to optimizer groups."""

import pytest
import torch
from torch import nn

from memlm.memory import MemoryConfig
from memlm.optim import assign
from memlm.transformer import Transformer, TransformerConfig


def build(tie=False, memory=True, **options) -> Transformer:
    config = TransformerConfig(dim=16, layers=3, heads=2, feed_forward_dim=24, tie_embeddings=tie)
    chosen = {"half_keys": 4, "heads": 2, "reads": 2, "layers": [0, 2], **options}
    return Transformer(10, config, MemoryConfig(**chosen) if memory else None)


def names_by_group(model: Transformer) -> dict[str, set[str]]:
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = assign(model.named_parameters())
    return {group: {name_of[id(p)] for p in parameters} for group, parameters in groups.items()}


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("query_norm", ["none", "batch", "qk"])
def test_every_parameter_is_in_exactly_one_group(tie, query_norm):
    model = build(tie, query_norm=query_norm, layer_pools=["a", "b"])
    groups = assign(model.named_parameters())
    assigned = [id(p) for parameters in groups.values() for p in parameters]
    assert sorted(assigned) == sorted(id(p) for p in model.parameters())
    names = names_by_group(model)
    assert names["values"] == {"pools.a.values", "pools.b.values"}
    # What is decayed: the matrices that map hidden states, and only those.
    for name, parameter in model.named_parameters():
        layer = model.get_submodule(name.rpartition(".")[0])
        is_map = (
            isinstance(layer, nn.Linear) and parameter.ndim == 2 and parameter is not model.embedding.weight
        )
        assert (name in names["decay"]) == is_map, name


def test_undecayed_parameters_by_name():
    undecayed = names_by_group(build(query_norm="qk"))["no_decay"]
    assert {
        "embedding.weight",
        "norm.weight",
        "blocks.1.attention_norm.weight",
        "blocks.1.feed_forward_norm.weight",
        "blocks.0.memory.query.linear.bias",
        "blocks.0.memory.query.qk_gain",
        "blocks.0.memory.product_keys.keys",
        "blocks.0.memory.gate.bias",
        "blocks.0.memory.projection.bias",
    } <= undecayed
    assert "output.weight" not in undecayed
    batch = names_by_group(build(query_norm="batch"))["no_decay"]
    assert {f"blocks.0.memory.query.batch_norm.{part}" for part in ("weight", "bias")} <= batch


def test_tied_embeddings_are_assigned_once_and_not_decayed():
    names = names_by_group(build(tie=True))
    assert "embedding.weight" in names["no_decay"]
    assert not any("output.weight" in group for group in names.values())


def test_dense_models_and_frozen_parameters():
    assert set(names_by_group(build(memory=False))) == {"decay", "no_decay"}
    model = build()
    model.pools["main"].requires_grad_(False)
    model.embedding.requires_grad_(False)
    names = names_by_group(model)
    assert "values" not in names and "embedding.weight" not in names["no_decay"]


def test_first_match_wins_and_no_match_is_an_error():
    parameters = [("a.weight", nn.Parameter(torch.zeros(1))), ("b.weight", nn.Parameter(torch.zeros(1)))]
    groups = assign(parameters, [("^b", "second"), ("weight", "rest")])
    assert list(groups) == ["second", "rest"]
    assert groups["second"][0] is parameters[1][1]
    with pytest.raises(ValueError, match=r"b\.weight"):
        assign(parameters, [("^a", "first")])
