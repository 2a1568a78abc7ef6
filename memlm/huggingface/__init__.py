"""Checkpoints in the Hugging Face format: Llama, Mistral, Qwen2, Mixtral and their like."""

from memlm.huggingface.config import config_json, moe_options, transformer_config
from memlm.huggingface.folder import Checkpoint, load_pretrained, read_architecture, read_config
from memlm.huggingface.tensors import from_hf, to_hf

__all__ = [
    "Checkpoint",
    "config_json",
    "from_hf",
    "load_pretrained",
    "moe_options",
    "read_architecture",
    "read_config",
    "to_hf",
    "transformer_config",
]
