"""Tiny random models of every kind of memory, in float64, and layers rebuilt from their recorded reads."""

import torch
import torch.nn.functional as F
from torch import nn

from memlm.memory import EngramConfig, MemoryConfig, PEERConfig, TuckerConfig
from memlm.transformer import Transformer, TransformerConfig

VOCABULARY = 30
DIM = 12
SMALL = {"half_keys": 6, "heads": 2, "reads": 4, "key_dim": 6, "layers": [0, 2]}
KINDS = {
    "memory": lambda: MemoryConfig(**SMALL, gate="none", projection=False),
    "memory_plus": lambda: MemoryConfig(**SMALL, value_dim=7, query_norm="qk"),
    "several_pools": lambda: MemoryConfig(**{**SMALL, "layers": [0, 1, 2]}, layer_pools=["a", "a", "b"]),
    "beside": lambda: MemoryConfig(**SMALL, mode="beside", pre_values="silu", gate="none"),
    "tucker": lambda: MemoryConfig(**SMALL, tucker=TuckerConfig(rank=3)),
    "expanded": lambda: MemoryConfig(**SMALL, value_expansion=4, value_dim=5),
    "expanded_peer": lambda: MemoryConfig(**SMALL, value_expansion=3, pre_values="gelu"),
    "uneven": lambda: MemoryConfig(**{**SMALL, "half_keys": (5, 9), "heads": 3}),
    "peer": lambda: PEERConfig(**SMALL),
    "engram": lambda: EngramConfig(slots=90, heads=2, layers=[0, 2], value_dim=5),
    "engram_shared": lambda: EngramConfig(
        slots=60, heads=2, orders=[1, 3], layers=[1, 2], layer_pools=["x", "x"], convolution=False
    ),
}


def make(kind: str, seed: int = 0, memory=None) -> Transformer:
    torch.manual_seed(seed)
    config = TransformerConfig(DIM, 3, 2, feed_forward_dim=16)
    model = Transformer(VOCABULARY, config, memory or (KINDS[kind]() if kind != "dense" else None))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.6)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.double().eval().requires_grad_(False)


def random_tokens(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (length,), generator=generator).tolist()


def rebuilt(model: Transformer, reads, gone=None, renormalise=False) -> torch.Tensor:
    """The output ``[N, D]`` of a layer from what was recorded, by gathering rows; Engram without convolution.

    ``gone`` ``[N, H, R]`` marks reads that count as zero.
    """
    layer, table = reads.place.layer, model.pools[reads.place.pool].values
    kept = torch.ones_like(reads.weights) if gone is None else (~gone).to(reads.weights)
    rows = table[reads.rows]  # [N, H, R, V]
    if reads.place.by_ngrams:
        memory = (rows * kept.unsqueeze(-1)).flatten(1)
        key = layer.key_norm(layer.key(memory))
        gate = torch.sigmoid((layer.hidden_norm(reads.hidden) * key).sum(-1, keepdim=True) / DIM**0.5)
        if gone is None:
            torch.testing.assert_close(gate.expand(-1, reads.weights.shape[1]), reads.weights[..., 0])
        return gate * layer.value(memory)
    weights = reads.weights * kept
    if renormalise:
        weights = torch.nan_to_num(weights / weights.sum(-1, keepdim=True))
    factors = weights if reads.activations is None else weights * reads.activations
    parts = []
    for virtual in range(reads.place.virtual_tables):
        own = factors * (reads.tables == virtual)
        part = torch.einsum("nhr,nhrv->nv", own, rows)
        parts.append(part if layer.gate is None else part * F.silu(layer.gate(reads.hidden)))
    output = torch.cat(parts, -1)
    return output if layer.projection is None else layer.projection(output)


def outputs_of(model: Transformer, tokens: list[int], block: int) -> torch.Tensor:
    """What the memory layer of a block gives, ``[N, D]``; of Engram, before its convolution's part."""
    memory, found = model.blocks[block].memory, []
    if getattr(memory, "convolution_norm", None) is not None:
        hook = memory.convolution_norm.register_forward_pre_hook(lambda _, given: found.append(given[0]))
    else:
        hook = memory.register_forward_hook(
            lambda _, given, output: found.append(output if torch.is_tensor(output) else output[0])
        )
    model(torch.tensor([tokens]))
    hook.remove()
    return found[0][0]
