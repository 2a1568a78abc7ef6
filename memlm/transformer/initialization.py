"""Initial values: every layer knows its own (its ``initialise``); here are those of the rest.

===================================  ==================================================================
parameter                            initial value
===================================  ==================================================================
token embedding, output layer        normal, std D^-1/2
norms                                1 (BatchNorm of the query: bias 0)
attention, SwiGLU, experts           normal, std fan_in^-1/2
... that write to the residual       the same, divided by sqrt(2 * layers) (GPT-2's rule)
memory                               see the layers in memlm/memory
===================================  ==================================================================
"""

from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from memlm.cost import Layer

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
        if isinstance(module, nn.RMSNorm | nn.BatchNorm1d):
            module.reset_parameters()
        elif hasattr(module, "initialise"):
            cast(Layer, module).initialise(residual_scale)
