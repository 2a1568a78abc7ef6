"""On a GPU: the same losses as on the CPU, finite ones in bf16, and the same rows moved."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from memlm.language_models import PEERLM, DenseLM, EngramLM, LanguageModel, MemoryLM, MoELM
from memlm.memory import EngramConfig, MemoryConfig, MemoryPool, PEERConfig
from memlm.optim import MemoryAdamW, OptimizerConfig, ValuesOptimizerConfig
from memlm.transformer import MoEConfig, TransformerConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"
VOCAB = 61


def make(kind: str) -> LanguageModel:
    transformer = TransformerConfig(dim=32, layers=3, heads=2, feed_forward_dim=64)
    optimizer = OptimizerConfig(learning_rate=3e-3)
    torch.manual_seed(0)
    if kind == "dense":
        return DenseLM(VOCAB, transformer, optimizer)
    if kind == "token_choice":
        moe = MoEConfig(experts=4, routing=kind, top_k=2, auxiliary_loss=0.01, balance_rate=1e-3)
        return MoELM(VOCAB, transformer, moe, optimizer)
    if kind == "expert_choice":
        return MoELM(VOCAB, transformer, MoEConfig(experts=4), optimizer)
    values_optimizer = ValuesOptimizerConfig(learning_rate=3e-2)
    if kind == "peer":
        peer = PEERConfig(half_keys=16, heads=2, reads=8, key_dim=8)
        return PEERLM(VOCAB, transformer, peer, optimizer, values_optimizer)
    if kind == "engram":
        engram = EngramConfig(slots=200, heads=2, layers=[1])
        return EngramLM(VOCAB, transformer, engram, optimizer, values_optimizer)
    norm = kind.removeprefix("memory-")
    memory = MemoryConfig(half_keys=16, heads=2, reads=8, layers=[0, 2], query_norm=norm)  # type: ignore[arg-type]
    return MemoryLM(VOCAB, transformer, memory, optimizer, values_optimizer)


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(VOCAB, (count, 4, 65), generator=generator)
    return [{"tokens": row[:, :-1].contiguous(), "targets": row[:, 1:].contiguous()} for row in rows]


class Losses(pl.Callback):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, *args):
        self.values.append(outputs["loss"].item())


def train(model: LanguageModel, accelerator: str, precision: str = "32-true") -> list[float]:
    """Losses of three steps."""
    losses = Losses()
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        max_steps=3,
        gradient_clip_val=1.0,
        callbacks=[losses],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(batches(3), batch_size=None))  # type: ignore[arg-type]
    return losses.values


OTHERS = ["token_choice", "expert_choice", "peer", "engram"]


@pytest.mark.parametrize("kind", ["dense", "memory-none", "memory-qk", "memory-batch", *OTHERS])
def test_three_steps_as_on_the_cpu(kind):
    model = make(kind)
    there = copy.deepcopy(model)
    expected = train(model, "cpu")
    assert train(there, "gpu") == pytest.approx(expected, abs=1e-4)
    assert len(set(expected)) == 3
    for pool in there.pools.values():
        assert pool.values.grad is None


@pytest.mark.parametrize("kind", ["dense", "memory-qk", *OTHERS])
def test_mixed_precision(kind):
    expected = train(make(kind), "cpu")
    model = make(kind)
    losses = train(model, "gpu", "bf16-mixed")
    # bf16 keeps 8 bits of a number: a loss of 4 may be off by some hundredths.
    assert losses == pytest.approx(expected, abs=0.1)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_rows_move_as_on_the_cpu():
    """Three steps of MemoryAdamW: rows read agree, all others stay as they were to the bit."""

    def moved(device: str) -> tuple[torch.Tensor, torch.Tensor]:
        pool = MemoryPool(slots=50, value_dim=12)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            pool.values.copy_(torch.randn(50, 12, generator=generator))
        before = pool.values.detach().clone()
        pool.to(device)
        group = {"params": [pool.values], "kind": "memory", "lr": 0.1, "weight_decay": 0.01}
        optimizer = MemoryAdamW([group], {pool.values: pool.gradient})
        for _ in range(3):
            slots = torch.randint(0, 30, (20, 4), generator=generator)
            weights = torch.rand(20, 4, generator=generator)
            target = torch.randn(20, 12, generator=generator)
            out = pool.read(slots.to(device), weights.to(device).requires_grad_())
            optimizer.zero_grad()
            nn.functional.mse_loss(out, target.to(device)).backward()
            optimizer.step()
        return before, pool.values.detach().cpu()

    before, expected = moved("cpu")
    _, result = moved(DEVICE)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(result[30:], before[30:])
    assert (result[:30] != before[:30]).any(dim=1).all()
