"""What experts send and take when they are split over groups, against numbers worked out by hand."""

import pytest
import torch

from memlm.errors import ConfigError
from memlm.optim import OptimizerConfig, configure
from memlm.parallel.expert_traffic import Routed
from memlm.parallel.traffic import traffic
from memlm.rank_memory import Mesh, autocast_dtype, rank_memory
from memlm.transformer import MoEConfig, Transformer, TransformerConfig

D, F, E = 16, 8, 4


def build(**options):
    moe = MoEConfig(experts=E, routing="token_choice", top_k=2, expert_dim=F, layers=[1], **options)
    with torch.device("meta"):
        return Transformer(40, TransformerConfig(D, 3, 2, feed_forward_dim=32), moe=moe)


def test_even_loads():
    found = traffic(build(), Mesh(8, 1, True, expert_group=2), 100, micro_batches=3).experts
    row, weight, leaving = 4 * D, 4, 100 * 2 / 2
    counts = 3 * 8 * E / 2
    # Tokens and weights there, outputs back; the same backward.
    assert found == leaving * (2 * row + weight) * 2 + counts


def test_autocast_halves_the_rows_and_leaves_the_weights():
    mesh = Mesh(2, 1, True, expert_group=2)
    found = traffic(build(), mesh, 100, autocast=autocast_dtype("bf16-mixed")).experts
    assert found == 100 * (2 * 2 * D + 4) * 2 + 8 * E / 2


def test_rows_as_routed():
    mesh = Mesh(2, 1, True, expert_group=2)
    found = traffic(build(), mesh, 100, routed={1: Routed(leaving=10, coming=30)}).experts
    assert found == (10 + 30) * (2 * 4 * D + 4) + 8 * E / 2


def test_nothing_where_they_are_not_split():
    assert traffic(build(), Mesh(4, 1, True), 100).experts == 0


def test_matrices_go_between_groups_alone():
    ranks, elements = 8, E * 3 * F * D
    split = traffic(build(), Mesh(ranks, 1, True, expert_group=4), 1)
    whole = traffic(build(), Mesh(ranks, 1, True), 1)
    share = elements * 4 / ranks
    assert whole.dense_gradients - split.dense_gradients == share * (7 - 1)
    assert whole.dense_weights - split.dense_weights == 2 * share * (7 - 1)
    alone = traffic(build(), Mesh(ranks, 1, True, expert_group=8 // 2), 1)
    assert alone == split


@pytest.mark.parametrize("group", [2, 4])
def test_every_rank_holds_its_share_of_the_experts(group):
    model = build()
    optimizer, _ = configure(model.named_parameters(), {}, OptimizerConfig(), None, 10)
    # 16 ranks: FSDP2 alone would pad the first dimension of 4 experts, or split another.
    split = rank_memory(model, optimizer, Mesh(16, 1, True, expert_group=group), 1)
    experts = E * 3 * F * D // 16 * 4
    for layer in model.experts.values():
        del layer.gate_up, layer.down
    rest = rank_memory(model, optimizer, Mesh(16, 1, True), 1)
    assert split.dense_weights - rest.dense_weights == experts
    assert split.dense_gradients - rest.dense_gradients == experts
    assert split.dense_state - rest.dense_state == 2 * experts + 2 * 4  # and two counts of steps


@pytest.mark.parametrize(
    "options,message",
    [
        ({"expert_group": 0}, "expert_group: is 0, must be at least 1"),
        ({"expert_group": 3}, r"expert_group: is 3, must divide ranks \(4\)"),
        ({"expert_group": 2, "shard_dense": False}, "expert_group: is 2, and goes with shard_dense true"),
    ],
)
def test_meshes_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        Mesh(**({"ranks": 4, "shard_dense": True} | options))
