"""Initial values of every parameter, in one place.

===================================  ==================================================================
parameter                            initial value
===================================  ==================================================================
token embedding, output layer        normal, std D^-1/2
linear maps of attention and SwiGLU  normal, std fan_in^-1/2
... that write to the residual       the same, divided by sqrt(2 * layers) (GPT-2's rule)
norms                                1 (BatchNorm of the query: bias 0)
memory: values                       normal, std V^-1/2 (released code of the paper)
memory: half keys                    U(-1/sqrt(key dim), 1/sqrt(key dim)), key dim = both halves
memory: query network                Xavier uniform, bias 0
memory: qk gain                      sqrt(8/C): scores then have std 4 whatever the half-key dim C
memory: gate, projection             normal, std out_dim^-1/2, bias 0
===================================  ==================================================================
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from memlm.memory import MemoryLayer, MemoryPool
from memlm.transformer.attention import Attention
from memlm.transformer.feed_forward import SwiGLU

if TYPE_CHECKING:
    from memlm.transformer.model import Transformer


@torch.no_grad()
def initialise(model: "Transformer") -> None:
    """Fill all parameters and buffers of a transformer from torch's global random generator."""
    residual_scale = (2 * model.config.layers) ** -0.5
    nn.init.normal_(model.embedding.weight, std=model.config.dim**-0.5)
    if not model.config.tie_embeddings:
        nn.init.normal_(model.output.weight, std=model.config.dim**-0.5)
    for module in model.modules():
        if isinstance(module, Attention):
            for linear in (module.query, module.key, module.value):
                _fan_in(linear)
            _fan_in(module.output, residual_scale)
        elif isinstance(module, SwiGLU):
            _fan_in(module.gate)
            _fan_in(module.up)
            _fan_in(module.down, residual_scale)
        elif isinstance(module, nn.RMSNorm | nn.BatchNorm1d):
            module.reset_parameters()
        elif isinstance(module, MemoryLayer):
            _memory_layer(module)
        elif isinstance(module, MemoryPool):
            nn.init.normal_(module.values, std=module.value_dim**-0.5)


def _fan_in(linear: nn.Linear, scale: float = 1.0) -> None:
    nn.init.normal_(linear.weight, std=scale / math.sqrt(linear.in_features))


def _memory_layer(layer: MemoryLayer) -> None:
    bound = (2 * layer.product_keys.half_key_dim) ** -0.5
    nn.init.uniform_(layer.product_keys.keys, -bound, bound)
    nn.init.xavier_uniform_(layer.query.linear.weight)
    nn.init.zeros_(layer.query.linear.bias)
    if layer.query.qk_gain is not None:
        # With a gain of 1 the scores' std would be sqrt(2 C), and the softmax of a wide model one-hot.
        nn.init.constant_(layer.query.qk_gain, (8 / layer.product_keys.half_key_dim) ** 0.5)
    for linear in (layer.gate, layer.projection):
        if linear is not None:
            nn.init.normal_(linear.weight, std=linear.out_features**-0.5)
            nn.init.zeros_(linear.bias)
