"""Engram: a hashed n-gram memory, and its options (arXiv 2601.07372)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memlm.cost import Flops, products
from memlm.errors import ConfigError
from memlm.kernels.backend import Kernels
from memlm.memory.inputs import Inputs
from memlm.memory.ngrams import NgramHashes, ngram_hashes, ngram_slots, shifted
from memlm.memory.placement import Mode, Placed, PlacementConfig, build_pools
from memlm.memory.pool import MemoryPool

# Of the norms: far below the squares of the vectors that are normalised, see EngramLayer.initialise.
_EPS = 1e-6


@dataclass
class EngramConfig(PlacementConfig):
    """Engram layers (Conditional Memory via Scalable Lookup, arXiv 2601.07372, section 2).

    The slots that a token reads are hashes of the last tokens: no search, and known before the model runs.
    """

    count: int = 2
    """Number of Engram layers, from block 1 on: the first block's attention gives the gate its context. Only
    used if layers is not given."""
    stride: int = 4
    """Distance in blocks between two of them; only used if layers is not given."""
    layer_pools: list[str] | None = None
    """Name of the pool of each Engram layer, in their order. Default: each has a pool of its own, "block1"
    for that of block 1. Layers of one pool hash alike: an n-gram has one set of rows in it."""
    orders: list[int] = field(default_factory=lambda: [2, 3])
    """Lengths of the n-grams in tokens, ascending."""
    heads: int = 8
    """Hashes of each n-gram, each into a table of its own: n-grams that collide in one differ in others."""
    slots: int = 2**22
    """Rows of each pool, at least: divided among orders * heads tables, each rounded up to the next prime."""
    value_dim: int | None = None
    """V: elements of a row; the orders * heads rows of a token are joined, not added. Default: model dim /
    (orders * heads), rounded down to a multiple of 8, at least 8."""
    convolution: bool = True
    """Whether a short causal convolution over positions follows the gate."""
    hash_seed: int = 0
    """Seed of the hash functions. Rows trained under one mean nothing under another."""
    values_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the value table. bfloat16 halves it; for small updates see model.values_optimizer.rounding."""
    kernels: Kernels = "auto"
    """Which kernels read: auto (by device), reference (plain PyTorch), cpu (numba) or triton. The environment
    variable MEMLM_KERNELS overrides it."""

    def validate(self, dim: int, depth: int) -> None:
        """Check all values against each other and the model.

        Args:
            dim: ``D`` of the model.
            depth: Number of blocks.

        Raises:
            ConfigError: Names the key at fault.
        """
        if not self.orders or min(self.orders) < 1 or sorted(set(self.orders)) != list(self.orders):
            raise ConfigError(
                "model.memory.orders",
                f"is {self.orders}, must be lengths from 1 token on, ascending without repeats",
            )
        if self.heads < 1:
            raise ConfigError("model.memory.heads", f"is {self.heads}, must be at least 1")
        if self.slots < 2 * self.tables:
            raise ConfigError(
                "model.memory.slots",
                f"is {self.slots}, must be at least {2 * self.tables}: 2 for each of the {self.tables} "
                f"tables of model.memory.orders ({self.orders}) and model.memory.heads ({self.heads})",
            )
        if self.value_dim is not None and self.value_dim < 1:
            raise ConfigError("model.memory.value_dim", f"is {self.value_dim}, must be at least 1")
        self.validate_placement(depth)

    @property
    def placed(self) -> Mode:
        """Before attention, on the residual stream (section 2.3)."""
        return "before"

    def build(self, dim: int, depth: int) -> tuple[dict[str, MemoryPool], dict[int, Placed]]:
        """The pools by name, and the Engram layers by block."""
        names = self.pool_names(depth)
        hashes = {name: self.hashes(name) for name in names.values()}
        pools = build_pools(
            list(names.values()),
            next(iter(hashes.values())).slots,
            self.resolved_value_dim(dim),
            self.values_dtype,
            self.kernels,
            "model.memory.slots",
        )
        layers = {
            block: Placed(EngramLayer(self, dim, hashes[name]), (name,)) for block, name in names.items()
        }
        return pools, layers

    def placement(self, depth: int) -> list[int]:
        """The blocks that hold memory, ascending: as listed, or ``count`` from 1 on, ``stride`` apart.

        The paper's best single place is the second block, and better still are two, the second and the sixth
        of twelve (section 6.2, figure 5): ``count: 2, stride: 4``.
        """
        if self.layers is not None:
            return list(self.layers)
        return [1 + i * self.stride for i in range(self.count)]

    def pool_names(self, depth: int) -> dict[int, str]:
        """Name of the pool for each block that holds memory; in the paper each layer has its own tables."""
        placement = self.placement(depth)
        return dict(zip(placement, self.layer_pools or [f"block{i}" for i in placement], strict=True))

    def hashes(self, name: str) -> NgramHashes:
        """The hash functions of a pool."""
        return ngram_hashes(self.orders, self.heads, self.slots, self.hash_seed, name)

    def resolved_value_dim(self, dim: int) -> int:
        """Elements of a row."""
        return max(dim // self.tables // 8 * 8, 8) if self.value_dim is None else self.value_dim

    @property
    def tables(self) -> int:
        """``G``: tables of a pool, and rows that a token reads."""
        return len(self.orders) * self.heads


class EngramLayer(nn.Module):
    """Reads the rows of each token's n-grams, and lets the hidden state decide how much of them to add.

    With ``e`` the ``G`` rows joined (equations 3 to 5)::

        k = W_K e        v = W_V e
        alpha = sigmoid(<norm(hidden), norm(k)> / sqrt(D))
        u = alpha * v
        output = silu(convolution(norm(u))) + u

    Args:
        config: Options.
        dim: ``D`` of the model.
        hashes: Of its pool.

    Attributes:
        rows_read: Rows of its pool that one token reads, ``G``.
    """

    def __init__(self, config: EngramConfig, dim: int, hashes: NgramHashes) -> None:
        super().__init__()
        self.hashes = hashes
        self.rows_read = config.tables
        self.start_at_zero = config.start_at_zero
        inner_dim = config.tables * config.resolved_value_dim(dim)
        self.key = nn.Linear(inner_dim, dim, bias=False)
        self.value = nn.Linear(inner_dim, dim, bias=False)
        self.hidden_norm = nn.RMSNorm(dim, eps=_EPS)
        self.key_norm = nn.RMSNorm(dim, eps=_EPS)
        self.convolution_norm = nn.RMSNorm(dim, eps=_EPS) if config.convolution else None
        self.convolution = (
            CausalConvolution(dim, taps=4, dilation=max(config.orders)) if config.convolution else None
        )

    def address(self, inputs: Inputs) -> Tensor:
        """The slots that tokens read, ``[N, G]``: of the tokens alone, so that rows can be fetched ahead."""
        if inputs.history is None:
            return ngram_slots(inputs.tokens, inputs.documents, self.hashes)
        back = len(self.hashes.multipliers) - 1
        window = inputs.history.window("tokens", inputs.tokens, back, fill=-1)
        slots = ngram_slots(window, None, self.hashes)
        return slots.view(*window.shape, -1)[:, back:].flatten(0, 1)

    def forward(self, hidden: Tensor, pools: Sequence[MemoryPool], inputs: Inputs) -> Tensor:
        """Read.

        Args:
            hidden: ``[B, T, D]``, the residual stream.
            pools: The pool of values.
            inputs: The tokens.

        Returns:
            ``[B, T, D]``.
        """
        (pool,) = pools
        slots = self.address(inputs).reshape(-1, 1)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        # Rows are joined and not added: a bag of one row for every token and table.
        rows = pool.read(slots, torch.ones_like(slots, dtype=wide))
        memory = rows.view(*hidden.shape[:-1], -1).to(hidden.dtype)
        key = self.key(memory).to(self.key_norm.weight.dtype)
        logit = (self.hidden_norm(hidden) * self.key_norm(key)).sum(-1, keepdim=True, dtype=wide)
        output = (logit * hidden.shape[-1] ** -0.5).sigmoid().to(hidden.dtype) * self.value(memory)
        if self.convolution is not None and self.convolution_norm is not None:
            output = output + F.silu(self.convolution(self.convolution_norm(output), inputs))
        return output.to(hidden.dtype)

    def flops(self, sequence_length: int) -> Flops:
        """See :class:`memlm.cost.Layer`; gate and convolution are elementwise."""
        return products(self.key.weight, self.value.weight)

    def active_parameters(self) -> int:
        """See :class:`memlm.cost.Layer`: all, the pool's rows left out."""
        return sum(parameter.numel() for parameter in self.parameters())

    def initialise(self, residual_scale: float) -> None:
        """See :class:`memlm.cost.Layer`: normal, std ``fan_in^-1/2``, of ``W_V`` times ``residual_scale``.

        Key and hidden state are normalised and start independent, so that the gate's logits have std 1 and
        its sigmoid is where it is steep. The rows start normal and not at zero (see :class:`MemoryPool`):
        the norm of a key near zero would blow the rows' gradient up to ``eps^-1/2`` times its size, and
        ``W_K`` and ``W_V`` would have none. With ``start_at_zero``, ``W_V`` is zero: it alone has a gradient
        in the first step, and rows and gate from the second on. The convolution starts at zero (the paper),
        which passes ``u`` through unchanged.
        """
        nn.init.normal_(self.key.weight, std=self.key.in_features**-0.5)
        std = 0.0 if self.start_at_zero else residual_scale * self.value.in_features**-0.5
        nn.init.normal_(self.value.weight, std=std)


class CausalConvolution(nn.Module):
    """A convolution over the positions of a document, each channel by itself; no bias.

    Args:
        dim: ``D``.
        taps: Positions that it looks at, the present one among them.
        dilation: Distance between two of them.
    """

    def __init__(self, dim: int, taps: int, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.weight = nn.Parameter(torch.empty(taps, dim))

    def forward(self, x: Tensor, inputs: Inputs) -> Tensor:
        """``sum over i of weight[i] * x[t - i * dilation]``, ``[B, T, D]`` to ``[B, T, D]``.

        What lies before the row, or in another document, counts as zero.
        """
        if inputs.history is None:
            return self._convolve(x, inputs.documents)
        back = (len(self.weight) - 1) * self.dilation
        return self._convolve(inputs.history.window("convolution", x, back), None)[:, back:]

    def _convolve(self, x: Tensor, documents: Tensor | None) -> Tensor:
        length = x.shape[1]
        output = x * self.weight[0]
        for tap in range(1, len(self.weight)):
            back = tap * self.dilation
            if back >= length:
                break
            earlier = F.pad(x[:, : length - back] * self.weight[tap], (0, 0, back, 0))
            if documents is not None:
                other = documents != shifted(documents, back)
                earlier = earlier.masked_fill(other.unsqueeze(-1), 0)
            output = output + earlier
        return output

    def initialise(self, residual_scale: float) -> None:
        """See :class:`memlm.cost.Layer`: zero."""
        nn.init.zeros_(self.weight)
