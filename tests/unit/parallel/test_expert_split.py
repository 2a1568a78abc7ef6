"""Which groups experts can be split over; what no group can do is refused with the key and the numbers."""

import pytest
import torch

from memlm.errors import ConfigError
from memlm.optim.meshes import by_mesh
from memlm.parallel.expert_split import EXPERT_KEY, check_experts, expert_dimension, split_experts
from memlm.transformer import MoEConfig, Transformer, TransformerConfig


def build(experts=8, width=24, **options):
    moe = MoEConfig(experts=experts, expert_dim=width, **options) if experts else None
    with torch.device("meta"):
        return Transformer(40, TransformerConfig(16, 3, 2, feed_forward_dim=32), moe=moe)


@pytest.mark.parametrize(
    "experts,ranks,group", [(8, 8, 1), (8, 8, 2), (8, 8, 8), (6, 3, 3), (None, 4, 1), (6, 36, 3), (5, 5, 5)]
)
def test_groups_that_can_be(experts, ranks, group):
    check_experts(build(experts), ranks, group, EXPERT_KEY)


@pytest.mark.parametrize(
    "experts,ranks,group,message",
    [
        (8, 4, 3, r"is 3, must divide the number of processes \(4\)"),
        (8, 4, 0, r"is 0, must divide the number of processes \(4\)"),
        (None, 4, 2, r"is 2, but the model has no experts \(model.moe\)"),
        (6, 8, 4, "is 4, must divide the 6 experts of block 0"),
        (8, 10, 2, "is 2, which leaves 5 groups of 10 processes to split each expert; .* 48 or 16"),
    ],
)
def test_groups_that_cannot_be(experts, ranks, group, message):
    with pytest.raises(ConfigError, match=f"trainer.strategy.init_args.expert_group: {message}"):
        check_experts(build(experts), ranks, group, EXPERT_KEY)


@pytest.mark.parametrize(
    "shape,replicas,dimension",
    [((2, 48, 16), 4, 1), ((2, 48, 16), 32, None), ((2, 24, 16), 16, 2), ((4, 6, 8), 1, 1)],
)
def test_the_dimension_that_groups_split(shape, replicas, dimension):
    assert expert_dimension(shape, replicas) == dimension


def test_which_parameters_are_split():
    model = build(layers=[0, 2])
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    found = sorted(named[key] for key in split_experts(model, 2))
    assert found == [f"blocks.{i}.feed_forward.{name}" for i in (0, 2) for name in ("down", "gate_up")]
    assert split_experts(model, 1) == {}


def test_tensors_by_mesh():
    plain, other = torch.zeros(1), torch.zeros(2)
    on_a, on_b = torch.zeros(3), torch.zeros(4)
    on_a.device_mesh, on_b.device_mesh = "a", "b"
    found = by_mesh([plain, on_a, other, on_b])
    assert [[id(tensor) for tensor in group] for group in found] == [
        [id(plain), id(other)],
        [id(on_a)],
        [id(on_b)],
    ]
