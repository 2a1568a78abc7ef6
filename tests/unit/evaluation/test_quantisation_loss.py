"""The loss with the values in another format is that of a model which has them in that format."""

import math

import pytest
import torch
import torch.nn.functional as F

from memlm.evaluation.quantisation_loss import measure_loss
from memlm.memory import MemoryConfig, PEERConfig
from memlm.memory.quantised import FORMATS, quantise
from memlm.transformer import Transformer, TransformerConfig

MEMORY = {"half_keys": 9, "heads": 2, "reads": 4, "key_dim": 8, "layers": [0, 1]}


def model_of(plan):
    torch.manual_seed(0)
    config = TransformerConfig(dim=32, layers=2, heads=2, feed_forward_dim=48)
    model = Transformer(50, config, plan).eval().requires_grad_(False)
    for pool in model.pools.values():
        # One element in each row dwarfs the others, so that a byte is too little for them.
        pool.values[:, 0] *= 50
    return model


def batches(count=3, confined=False):
    generator = torch.Generator().manual_seed(1)
    made = []
    for length in range(5, 5 + count):
        tokens = torch.randint(50, (2, length + 1), generator=generator)
        batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:].clone()}
        batch["targets"][0, :2] = -100
        if confined:
            batch["documents"] = (torch.arange(length) > 2).long().expand(2, -1)
        made.append(batch)
    return made


def brute_force(model, data):
    """In float64, token by token."""
    model = model.double()
    losses = []
    for batch in data:
        logits = model(batch["tokens"], batch.get("documents"))
        every = F.cross_entropy(logits.transpose(1, 2), batch["targets"].clamp(min=0), reduction="none")
        losses += every[batch["targets"] != -100].tolist()
    return math.fsum(losses) / len(losses)


@pytest.mark.parametrize("confined", [False, True])
@pytest.mark.parametrize("plan", [MemoryConfig(**MEMORY), PEERConfig(**MEMORY)])
def test_losses_are_those_of_the_dequantised_models(plan, confined):
    model, data = model_of(plan), batches(confined=confined)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pools = dict(model.pools.items())
    losses = measure_loss(model, iter(data), FORMATS)
    assert list(losses) == list(FORMATS)
    for format, loss in losses.items():
        other = model_of(plan)
        for pool in other.pools.values():
            codes, scales = quantise(pool.values, format)
            values = codes.double() if scales is None else codes.double() * scales.double().unsqueeze(1)
            pool.values = torch.nn.Parameter(values, requires_grad=False)
        # Reads of a bf16 table give bf16.
        assert loss == pytest.approx(brute_force(other, data), abs=2e-3 if format == "bfloat16" else 1e-5)
    assert len(set(losses.values())) == len(FORMATS)
    assert dict(model.pools.items()) == pools
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_model_is_as_before_when_it_fails():
    model = model_of(MemoryConfig(**MEMORY))
    pools = dict(model.pools.items())
    with pytest.raises(ValueError, match="no target that counts"):
        measure_loss(model, [], ["int8"])
    with pytest.raises(ValueError, match="no format 'int4'"):
        measure_loss(model, batches(), ["fp8", "int4"])
    model.pools["main"].values[5] = math.nan
    with pytest.raises(ValueError, match="row 5 of the values holds NaN"):
        measure_loss(model, batches(), ["int8"])
    assert dict(model.pools.items()) == pools


def test_a_model_without_memory_loses_nothing():
    config = TransformerConfig(dim=32, layers=2, heads=2, feed_forward_dim=48)
    losses = measure_loss(Transformer(50, config).eval(), batches(), ["float32", "int8"])
    assert losses["float32"] == losses["int8"]
