import copy

import pytest
import torch

from memlm.memory import EngramConfig, MemoryConfig, PEERConfig
from memlm.metrics import summed_loss
from memlm.transformer import MoEConfig, Transformer, TransformerConfig
from memlm.transformer.cache import Cache

SMALL = {"half_keys": 9, "heads": 2, "reads": 4, "key_dim": 8}
MEMORIES = {
    "none": None,
    "memory": MemoryConfig(**SMALL, layers=[0, 2]),
    "beside": MemoryConfig(**SMALL, layers=[1], mode="beside"),
    "batch norm": MemoryConfig(**SMALL, layers=[1], query_norm="batch"),
    "expanded": MemoryConfig(**SMALL | {"half_keys": 8}, layers=[1], value_expansion=4),
    "peer": PEERConfig(**SMALL, layers=[1]),
    "engram": EngramConfig(slots=300, heads=2, layers=[1], value_dim=8),
}
EXPERTS = {
    "none": None,
    "tokens choose": MoEConfig(
        experts=4, top_k=2, routing="token_choice", balance_rate=0.1, auxiliary_loss=0.1, z_loss=0.1
    ),
    "experts choose": MoEConfig(experts=4, top_k=2, routing="expert_choice", z_loss=0.1),
}


def twins(memory, moe):
    """A model that keeps what its blocks compute, and one that does not."""
    torch.manual_seed(0)
    whole = Transformer(50, TransformerConfig(16, 3, 2, feed_forward_dim=32), memory, moe).double()
    again = copy.deepcopy(whole)
    for block in again.blocks:
        block.recomputed = True
    return whole, again


def losses_of(model):
    return [
        loss for module in model.modules() if hasattr(module, "take_losses")
        for loss in module.take_losses().values()
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("memory", "moe"),
    [*((name, "none") for name in MEMORIES), ("none", "tokens choose"), ("memory", "experts choose")],
)
def test_the_same_gradients_and_everything_counted_once(memory, moe):
    observed = []
    for model in twins(MEMORIES[memory], EXPERTS[moe]):
        seen = []
        for module in model.modules():
            if hasattr(module, "observers"):
                module.observers.append(lambda *what, to=seen: to.append([x.sum().item() for x in what]))
        generator = torch.Generator().manual_seed(1)
        for _ in range(2):  # two micro-batches
            tokens = torch.randint(50, (3, 12), generator=generator)
            loss = summed_loss(model(tokens[:, :-1]), tokens[:, 1:])
            (loss + sum(losses_of(model))).backward()
            assert not losses_of(model)  # none left of the second time
        rows = [pool.gradient.compact() for pool in model.pools.values()]
        observed.append((model, seen, rows))
    (whole, seen, rows), (again, seen_again, rows_again) = observed
    assert seen == seen_again
    for name, own in whole.named_parameters():
        if not name.endswith(".values"):
            torch.testing.assert_close(again.get_parameter(name).grad, own.grad, msg=name)
    for ours, theirs in zip(rows, rows_again, strict=True):
        assert torch.equal(ours.rows, theirs.rows)
        torch.testing.assert_close(theirs.sums, ours.sums)
    for (name, own), theirs in zip(whole.named_buffers(), again.buffers(), strict=True):
        torch.testing.assert_close(theirs, own, msg=name)


def test_the_option_keeps_less_in_training_alone():
    held = {}
    for kept in (False, True):
        torch.manual_seed(0)
        config = TransformerConfig(16, 3, 2, feed_forward_dim=32, activation_checkpointing=not kept)
        model = Transformer(50, config, MEMORIES["memory"])
        tokens = torch.randint(50, (3, 12))
        for training in (True, False):
            model.train(training)
            saved = []
            with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
                model(tokens)
            held[kept, training] = len(saved)
    assert held[False, True] < held[True, True] / 2
    assert held[False, False] == held[True, False]


def test_a_cache_is_filled_in_training_mode_too():
    """Without gradients there is no second pass."""
    _, again = twins(None, None)
    tokens = torch.randint(50, (2, 9))
    with torch.no_grad():
        cache = Cache(2, len(again.blocks))
        parts = [again(part, cache=cache) for part in tokens.split(3, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), again(tokens))


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["memory", "peer"])
def test_compiled(memory):
    results = []
    for model in twins(MEMORIES[memory], None):
        model.float()
        if model.blocks[0].recomputed:
            model.compile()
        tokens = torch.randint(50, (3, 12), generator=torch.Generator().manual_seed(1))
        for _ in range(2):
            summed_loss(model(tokens[:, :-1]), tokens[:, 1:]).backward()
        gradients = {name: own.grad for name, own in model.named_parameters() if own.grad is not None}
        results.append((gradients, [pool.gradient.compact() for pool in model.pools.values()]))
    (gradients, rows), (compiled, compiled_rows) = results
    for name, own in gradients.items():
        torch.testing.assert_close(compiled[name], own, rtol=1e-4, atol=1e-5, msg=name)
    for ours, theirs in zip(rows, compiled_rows, strict=True):
        assert torch.equal(ours.rows, theirs.rows)
        torch.testing.assert_close(theirs.sums, ours.sums, rtol=1e-4, atol=1e-5)
