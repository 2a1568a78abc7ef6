"""Run directories of tiny random models of every architecture, made without training."""

from pathlib import Path

import torch
import yaml

from memlm import PEERLM, DenseLM, EngramLM, MemoryLM, MoELM
from memlm.memory import EngramConfig, MemoryConfig, PEERConfig
from memlm.transformer import MoEConfig, TransformerConfig

VOCABULARY = 257
CONTEXT = 64
ARCHITECTURES = ("dense", "moe", "memory_plus", "peer", "engram")


def tiny_module(architecture: str, seed: int = 0):
    """A LightningModule of byte tokens whose logits differ widely."""
    torch.manual_seed(seed)
    shape = TransformerConfig(dim=16, layers=2, heads=2, feed_forward_dim=24)
    memory = {"half_keys": 8, "heads": 2, "reads": 4, "key_dim": 8}
    module = {
        "dense": lambda: DenseLM(VOCABULARY, shape),
        "moe": lambda: MoELM(VOCABULARY, shape, MoEConfig(experts=4, top_k=2, expert_dim=8)),
        "memory_plus": lambda: MemoryLM(
            VOCABULARY, shape, MemoryConfig(**memory, layers=[0, 1], query_norm="qk")
        ),
        "peer": lambda: PEERLM(VOCABULARY, shape, PEERConfig(**memory, layers=[1])),
        "engram": lambda: EngramLM(
            VOCABULARY, shape, EngramConfig(slots=256, orders=[2, 3], heads=2, value_dim=8, layers=[1])
        ),
    }[architecture]()
    with torch.no_grad():
        for parameter in module.transformer.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.5)
    return module


def write_run(folder: Path, architecture: str, seed: int = 0, context: int = CONTEXT):
    """Makes ``folder`` the run directory of such a model; gives its transformer, ready to be read from."""
    module = tiny_module(architecture, seed)
    (folder / "checkpoints").mkdir(parents=True)
    torch.save(
        {
            "state_dict": module.state_dict(),
            "global_step": 3,
            "architecture": module.architecture(),
            "tokens_seen": 300,
        },
        folder / "checkpoints" / "last.ckpt",
    )
    data = {
        "class_path": "TextStream",
        "init_args": {"paths": ["no.txt"], "tokenizer": "bytes", "sequence_length": context},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    return module.transformer.eval()


@torch.no_grad()
def greedy(model, prompt: list[int], count: int, eos: int = 256) -> list[int]:
    """The likeliest next tokens, each from the whole sequence anew."""
    ids = list(prompt)
    while len(ids) < len(prompt) + count:
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] == eos:
            break
    return ids[len(prompt) :]
