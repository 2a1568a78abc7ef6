"""What memlm is measured against: the same layer with a dense gradient, as public code computes it.

Written from the paper's description (arXiv 2412.09764, section 3) and from what the released code is known to
compute: all ``R * R`` sums and their slots of a head in memory, a gradient as large as the table, and a dense
optimizer over all of it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memlm.kernels.backend import select


def second_stage(
    best: tuple[Tensor, Tensor], index: tuple[Tensor, Tensor], half_keys: int, reads: int
) -> tuple[Tensor, Tensor]:
    """The best of all ``R * R`` sums of two lists.

    Args:
        best: Two ``[..., R]`` lists of half scores.
        index: ``[..., R]`` their half keys.
        half_keys: ``K`` of the second set.
        reads: ``R``.

    Returns:
        Slots and sums, ``[..., R]``.
    """
    sums = (best[0].unsqueeze(-1) + best[1].unsqueeze(-2)).flatten(-2)
    slots = (index[0].unsqueeze(-1) * half_keys + index[1].unsqueeze(-2)).flatten(-2)
    top, chosen = sums.topk(reads, dim=-1)
    return slots.gather(-1, chosen), top


def search(first: Tensor, second: Tensor, reads: int) -> tuple[Tensor, Tensor]:
    """Two ``topk`` and all ``R * R`` sums; differentiable.

    Args:
        first: ``[..., K0]`` half scores.
        second: ``[..., K1]``.
        reads: ``R``.

    Returns:
        Slots and sums, ``[..., R]``.
    """
    (best0, index0), (best1, index1) = first.topk(reads, dim=-1), second.topk(reads, dim=-1)
    return second_stage((best0, best1), (index0, index1), second.shape[-1], reads)


def retrieve(query: Tensor, keys: Tensor, reads: int) -> tuple[Tensor, Tensor]:
    """Half scores and :func:`search`; the backward pass makes a gradient of every half score.

    Args:
        query: ``[N, H, 2, C]``.
        keys: ``[H, 2, K, C]``.
        reads: ``R``.

    Returns:
        Slots and scores, ``[N, H, R]``.
    """
    scores = torch.einsum("nhsc,hskc->snhk", query, keys)
    return search(scores[0], scores[1], reads)


def dense_read(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """``F.embedding_bag``, whose gradient for the values is as large as they are."""
    return F.embedding_bag(slots, values, per_sample_weights=weights, mode="sum")


def sparse_read(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """The same with a sparse gradient: one row for every read until it is coalesced."""
    return F.embedding_bag(slots, values, per_sample_weights=weights, mode="sum", sparse=True)


class _KernelRead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(values, slots, weights)
        return select(values.device).weighted_read(values, slots, weights)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        values, slots, weights = ctx.saved_tensors
        backend = select(values.device)
        grad_weights, sums = backend.read_backward(values, slots, weights, grad_output.contiguous())
        rows = sums.rows.long()
        if sums.count is not None:  # rows beyond it go to one more row, which is cut off
            beyond = torch.arange(len(rows), device=rows.device) >= sums.count
            rows = rows.masked_fill(beyond, len(values))
        table = values.new_zeros(len(values) + 1, values.shape[1])
        table.index_copy_(0, rows, sums.sums.to(values.dtype))
        return table[:-1], None, grad_weights.to(weights.dtype)


def kernel_read(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """Our kernels and a dense gradient: ``F.embedding_bag`` has none for weights in bf16 on CUDA."""
    return _KernelRead.apply(values, slots, weights)


def gathered_read(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """A gather of all rows, then a batched matrix product."""
    return torch.bmm(weights.unsqueeze(1), values[slots]).squeeze(1)


class DenseGradientMemory(nn.Module):
    """Memory+ with its own table, differentiated by autograd alone.

    Args:
        dim: ``D``, also the value dim.
        half_keys: ``K``.
        heads: ``H``.
        reads: ``R`` of a head.
        key_dim: Elements of a key, both halves together.
    """

    def __init__(self, dim: int, half_keys: int, heads: int, reads: int, key_dim: int) -> None:
        super().__init__()
        self.reads = reads
        self.query = nn.Linear(dim, heads * key_dim)
        self.keys = nn.Parameter(torch.empty(heads, 2, half_keys, key_dim // 2))
        self.values = nn.Parameter(torch.empty(half_keys**2, dim))
        self.gate = nn.Linear(dim, dim)
        self.projection = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.query.weight)
        nn.init.uniform_(self.keys, -(key_dim**-0.5), key_dim**-0.5)
        nn.init.normal_(self.values, std=dim**-0.5)
        for linear in (self.gate, self.projection):
            nn.init.normal_(linear.weight, std=dim**-0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        """``[N, D]`` to ``[N, D]``."""
        heads, _, _, half_key_dim = self.keys.shape
        query = self.query(hidden).unflatten(-1, (heads, 2, half_key_dim))
        slots, scores = retrieve(query, self.keys, self.reads)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(self.values.dtype)
        cuda_bf16 = self.values.is_cuda and self.values.dtype == torch.bfloat16
        read = kernel_read if cuda_bf16 else dense_read
        output = read(self.values, slots.flatten(1), weights.flatten(1))
        return self.projection(output * F.silu(self.gate(hidden)))


def dense_step(
    module: nn.Module, table: list[nn.Parameter], hidden: Tensor, grad: Tensor
) -> Callable[[], None]:
    """A training step that clips the table apart from the rest and moves all by fused AdamW.

    Args:
        module: Called with ``hidden``.
        table: Those of its parameters that are clipped apart.
        hidden: Its input, which gets a gradient too.
        grad: Gradient of its output.

    Returns:
        The step.
    """
    tables = {id(parameter) for parameter in table}
    rest = [parameter for parameter in module.parameters() if id(parameter) not in tables]
    optimizer = torch.optim.AdamW([*rest, *table], betas=(0.9, 0.95), fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        hidden.grad = None
        module(hidden).backward(grad)
        nn.utils.clip_grad_norm_(rest, 1.0)
        nn.utils.clip_grad_norm_(table, 1.0)
        optimizer.step()

    return step


def public_layers(
    dim: int, half_keys: int, heads: int, reads: int, key_dim: int
) -> Mapping[str, Callable[[], tuple[nn.Module, list[nn.Parameter]]] | str]:
    """Layers of public packages at the same sizes: how to build each and its tables, or why it cannot be had.

    Args:
        dim: ``D``.
        half_keys: ``K``.
        heads: ``H``.
        reads: ``R`` of a head.
        key_dim: Elements of a key, both halves together.
    """
    result: dict[str, Any] = {}
    try:
        from product_key_memory import PKM
    except ImportError as error:
        result["product-key-memory"] = f"not installed: {error}"
    else:

        def product_key_memory() -> tuple[nn.Module, list[nn.Parameter]]:
            layer = PKM(dim, heads=heads, num_keys=half_keys, topk=reads, dim_head=key_dim // 2)
            return layer, [layer.values.weight]

        result["product-key-memory"] = product_key_memory
    try:
        from PEER_pytorch import PEER
    except ImportError as error:
        result["PEER-pytorch"] = f"not installed: {error}"
    else:

        def peer() -> tuple[nn.Module, list[nn.Parameter]]:
            layer = PEER(
                dim,
                heads=heads,
                num_experts=half_keys**2,
                num_experts_per_head=reads,
                dim_key=key_dim // 2,
                non_competing_scores=False,  # else it would read one expert a head
            )
            return layer, [layer.weight_down_embed.weight, layer.weight_up_embed.weight]

        result["PEER-pytorch"] = peer
    return result
