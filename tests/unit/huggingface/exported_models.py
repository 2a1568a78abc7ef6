"""Tiny models with random values in all their parameters and buffers, of every architecture that there is."""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch

from memlm.tokenizers import ByteTokenizer
from memlm.trained import TrainedModel, build

CONTEXT = 128
TINY = {"dim": 32, "layers": 3, "heads": 4, "feed_forward_dim": 40, "vocab_size": 264}
MEMORY = {"half_keys": 6, "heads": 2, "reads": 4, "layers": [0, 2], "query_norm": "qk"}
MOE = {"experts": 5, "expert_dim": 24}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "dense": {"class_path": "memlm.DenseLM"},
    "dense tied, grouped": {
        "class_path": "memlm.DenseLM", "transformer": {"kv_heads": 2, "tie_embeddings": True},
    },
    "dense biased": {"class_path": "memlm.DenseLM", "transformer": {"attention_bias": True}},
    "mixtral": {
        "class_path": "memlm.MoELM",
        "moe": {**MOE, "routing": "token_choice", "top_k": 2, "normalise_weights": True},
    },
    "moe expert choice": {"class_path": "memlm.MoELM", "moe": MOE},
    "moe sigmoid, shared, balanced": {
        "class_path": "memlm.MoELM",
        "moe": {
            **MOE, "routing": "token_choice", "top_k": 3, "score": "sigmoid", "normalise_weights": True,
            "shared_experts": 2, "balance_rate": 0.1, "layers": [0, 2],
        },
    },
    "memory": {
        "class_path": "memlm.MemoryLM",
        "memory": {
            **MEMORY, "gate": "none", "projection": False, "layers": None, "count": 1, "query_norm": "none",
        },
    },
    "memory plus": {
        "class_path": "memlm.MemoryLM",
        "memory": {**MEMORY, "half_keys": [7, 5], "value_dim": 24, "key_dim": 12, "layer_pools": ["a", "b"]},
        "transformer": {
            "kv_heads": 1, "head_dim": 10, "attention_bias": True, "rope_theta": 500.0,
            "rope_scaling": {"kind": "yarn", "factor": 4.0, "original_length": 16},
        },
    },
    "memory plus bf16": {"class_path": "memlm.MemoryLM", "memory": {**MEMORY, "values_dtype": "bfloat16"}},
    "memory in every block": {
        "class_path": "memlm.MemoryLM",
        "memory": {**MEMORY, "layers": [0, 1, 2]},
        "transformer": {"tie_embeddings": True, "rope_scaling": {"kind": "linear", "factor": 2.0}},
    },
    "memory beside experts": {
        "class_path": "memlm.MemoryLM",
        "memory": {**MEMORY, "mode": "beside", "query_norm": "batch"},
        "moe": {**MOE, "routing": "token_choice", "top_k": 2},
        "transformer": {
            "rope_scaling": {"kind": "llama3", "factor": 8.0, "original_length": 32, "slow_turns": 2.0},
        },
    },
    "ultramem": {
        "class_path": "memlm.MemoryLM",
        "memory": {
            **MEMORY, "mode": "beside", "gate": "silu", "value_expansion": 3, "value_dim": 16, "key_dim": 16,
            "tucker": {"rank": 2},
        },
    },
    "ultramem v2": {
        "class_path": "memlm.MemoryLM",
        "memory": {
            **MEMORY, "mode": "beside", "half_keys": [5, 9], "heads": 1, "value_dim": 16, "gate": "none",
            "pre_values": "silu", "layers": [0, 1, 2], "layer_pools": ["a", "a", "b"], "query_norm": "batch",
        },
    },
    "peer": {"class_path": "memlm.PEERLM", "memory": {"half_keys": 6, "heads": 2, "reads": 4, "key_dim": 8}},
    "engram": {
        "class_path": "memlm.EngramLM",
        "memory": {"slots": 97, "heads": 2, "orders": [1, 3], "layers": [0, 2]},
    },
    "engram without convolution": {
        "class_path": "memlm.EngramLM",
        "memory": {"slots": 97, "heads": 2, "convolution": False, "count": 1, "layer_pools": ["one"]},
    },
}  # fmt: skip
STANDARD = {
    "dense": "LlamaForCausalLM",
    "dense tied, grouped": "LlamaForCausalLM",
    "dense biased": "Qwen2ForCausalLM",
    "mixtral": "MixtralForCausalLM",
}


def trained(name: str) -> TrainedModel:
    """A model of one of the architectures, as if it had been loaded; the caller's own."""
    architecture, model = copy.deepcopy(_made(name))
    return TrainedModel(model, ByteTokenizer(), architecture, CONTEXT, Path("some.ckpt"), step=7, tokens=1234)


@cache
def _made(name: str) -> tuple[dict[str, Any], torch.nn.Module]:
    """Architecture and model; to read an architecture takes much longer than to copy such a model."""
    architecture = {"vocab_size": 257, **ARCHITECTURES[name]}
    architecture["transformer"] = TINY | architecture.get("transformer", {})
    model = build(architecture)
    model.to_empty(device="cpu")
    if model.config.tie_embeddings:
        model.output.weight = model.embedding.weight
    torch.manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5)
        for key, buffer in model.named_buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5) if "var" in key else buffer.normal_(std=0.3)
            else:
                buffer.zero_()
    return architecture, model.eval().requires_grad_(False)


@torch.no_grad()
def greedy(model: torch.nn.Module, prompt: list[int], length: int) -> list[int]:
    """New tokens, each the likeliest of a pass over all tokens before it."""
    tokens = list(prompt)
    for _ in range(length):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]
