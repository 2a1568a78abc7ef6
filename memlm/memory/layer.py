"""The memory layer: query -> product keys -> read -> gate -> projection."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memlm.cost import Flops, products
from memlm.memory.inputs import Inputs
from memlm.memory.pool import MemoryPool
from memlm.memory.product_keys import ProductKeys
from memlm.memory.query import QueryNetwork
from memlm.memory.tucker import TuckerKeys

if TYPE_CHECKING:
    from memlm.memory.config import MemoryConfig


PreValues = Literal["none", "identity", "relu", "silu", "gelu"]

_ACTIVATIONS = {"identity": nn.Identity, "relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU}


class MemoryLayer(nn.Module):
    """A memory layer (Memory Layers at Scale, sections 3.1, 3.2), with or without pre-values (PEER).

    Per head: ``I = top-R slots of <query, key>``, ``s = softmax(scores of I)`` in fp32. The heads'
    reads are one weighted bag: ``y = sum over heads and reads of s * values[I]``. Memory+ then gives
    ``(y * silu(x W1)) W2``; vanilla Memory gives ``y``. With pre-values ``u``, rows of a second pool, a slot
    is an expert of one neuron: ``y = sum of s * activation(<u[I], x>) * values[I]`` (Mixture of A Million
    Experts, arXiv 2407.04153, section 2).

    Args:
        config: Options.
        dim: ``D`` of the model.

    Attributes:
        rows_read: Rows of each of its pools that one token reads.
    """

    def __init__(self, config: "MemoryConfig", dim: int) -> None:
        super().__init__()
        half_key_dim = config.resolved_key_dim(dim) // 2
        value_dim = config.resolved_value_dim(dim)
        self.query = QueryNetwork(dim, config.heads, half_key_dim, config.query_norm)
        sizes = (config.heads, config.key_grid, half_key_dim, config.reads)
        self.product_keys: ProductKeys | TuckerKeys
        if config.tucker is None:
            self.product_keys = ProductKeys(*sizes, config.kernels)
        else:
            self.product_keys = TuckerKeys(*sizes, config.tucker)
        self.rows_read = config.heads * config.reads
        self.start_at_zero = config.start_at_zero
        self.value_expansion = config.value_expansion
        self.activation = None if config.pre_values == "none" else _ACTIVATIONS[config.pre_values]()
        self.gate = nn.Linear(dim, value_dim) if config.gate == "silu" else None
        self.projection = nn.Linear(value_dim * self.value_expansion, dim) if config.projection else None

    def address(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Which slots tokens read, and how much of each.

        Args:
            hidden: ``[N, D]``.

        Returns:
            slots: ``[N, H, R]`` int32 (int64 above 2^31 slots); virtual ones, if values are expanded.
            weights: ``[N, H, R]`` fp32 (fp64 for fp64 input); they sum to one over the reads of a head.
        """
        query = self.query(hidden)
        slots, scores = self.product_keys(query, self.query.normalise_keys(self.product_keys.keys))
        dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
        return slots, scores.softmax(dim=-1, dtype=dtype)

    def forward(
        self,
        hidden: Tensor,
        pools: Sequence[MemoryPool],
        inputs: Inputs | None = None,
        beside: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Read.

        Where the pools' columns lie on several ranks, what needs no read is calculated while slots, weights
        and answers are on their way: ``beside`` first, since slots and weights are most of it.

        Args:
            hidden: ``[B, T, D]``, already normalised.
            pools: The pool of values ``[S, V]``, and that of pre-values ``[S, D]`` if there are any.
            inputs: Not looked at.
            beside: What else is to be calculated of ``hidden``.

        Returns:
            ``[B, T, D]``; and what ``beside`` gives, if there is one.
        """
        values, *down = pools
        tokens = hidden.flatten(0, -2)
        slots, weights = (part.flatten(1) for part in self.address(tokens))
        sent = values.send(slots, self.value_expansion)
        if self.activation is None:
            first = values.start_read(sent, weights)
        else:
            (pre_values,) = down
            first = pre_values.start_dot(sent, tokens)
        other = None
        if beside is not None:
            other = beside(hidden)
            first.advance()
        gate = None if self.gate is None else F.silu(self.gate(tokens))
        output = first.finish()
        if self.activation is not None:
            output = values.start_read(sent, weights * self.activation(output)).finish()
        if self.value_expansion > 1:
            output = output.unflatten(0, (len(tokens), self.value_expansion))
        if gate is not None:
            output = output * (gate if self.value_expansion == 1 else gate.unsqueeze(1))
        output = output.flatten(1).to(hidden.dtype)
        if self.projection is not None:
            output = self.projection(output)
        output = output.view_as(hidden)
        return output if other is None else (output, other)

    def flops(self, sequence_length: int) -> Flops:
        """See :class:`memlm.cost.Layer`.

        Of an expanded read the products with zero are counted here: they are calculated.
        """
        linears = (self.query.linear, self.gate, self.projection)
        flops = products(*(linear.weight for linear in linears if linear is not None))
        flops += self.product_keys.flops()
        if self.projection is not None:
            zeros = self.rows_read * self.projection.in_features * (1 - 1 / self.value_expansion)
            flops += Flops(2, 4) * round(zeros)
        return flops

    def active_parameters(self) -> int:
        """See :class:`memlm.cost.Layer`: all, the pool's rows left out."""
        return sum(parameter.numel() for parameter in self.parameters())

    def initialise(self, residual_scale: float) -> None:
        """See :class:`memlm.cost.Layer`.

        Half keys are uniform in ``+-1/sqrt(key dim)``, the query network Xavier uniform, gate and projection
        normal with std ``out_dim^-1/2`` (released code of the paper). With the learned gain of ``qk`` at 1
        the scores' std would be ``sqrt(2 C)``, and the softmax of a wide model one-hot: it starts at
        ``sqrt(8/C)``, which gives scores of std 4 whatever ``C``; at ``sqrt(4/C)`` where they are products of
        two half scores (Tucker), and not sums.
        """
        half_key_dim = self.product_keys.half_key_dim
        bound = (2 * half_key_dim) ** -0.5
        nn.init.uniform_(self.product_keys.keys, -bound, bound)
        nn.init.xavier_uniform_(self.query.linear.weight)
        nn.init.zeros_(self.query.linear.bias)
        if self.query.qk_gain is not None:
            square = 4 if isinstance(self.product_keys, TuckerKeys) else 8
            nn.init.constant_(self.query.qk_gain, (square / half_key_dim) ** 0.5)
        for linear in (self.gate, self.projection):
            if linear is not None:
                nn.init.normal_(linear.weight, std=linear.out_features**-0.5)
                nn.init.zeros_(linear.bias)
        if self.start_at_zero and self.projection is not None:
            nn.init.zeros_(self.projection.weight)
