"""Which experts a token uses: scores, choice, and the losses that keep the choice balanced.

Everything is computed in fp32 at least. ``N`` tokens, ``E`` experts; ``M`` rows, the chosen pairs of a token
and an expert.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from memlm.transformer.grouped import Groups
from memlm.transformer.moe_config import Score


def router_logits(tokens: Tensor, weight: Tensor) -> Tensor:
    """Logits ``[N, E]`` of tokens ``[N, D]`` by a router's weight ``[E, D]``, in fp32 even under autocast."""
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    with torch.autocast(tokens.device.type, enabled=False):
        return F.linear(tokens.to(dtype), weight.to(dtype))


def expert_scores(logits: Tensor, score: Score) -> Tensor:
    """Weights ``[N, E]`` in (0, 1): softmax over the experts, or sigmoid of each logit."""
    return logits.softmax(-1) if score == "softmax" else logits.sigmoid()


def token_choice(
    scores: Tensor, top_k: int, normalise: bool = False, bias: Tensor | None = None
) -> tuple[Groups, Tensor]:
    """Every token takes its ``top_k`` best experts (arXiv 2101.03961, 2401.04088), none is dropped.

    Args:
        scores: ``[N, E]``.
        top_k: Experts a token.
        normalise: Whether a token's weights are divided by their sum.
        bias: ``[E]``, added to the scores for choosing only (arXiv 2408.15664).

    Returns:
        The ``N * top_k`` rows, and their weights ``[M]``.
    """
    number, experts = scores.shape
    chosen = (scores if bias is None else scores + bias).detach().topk(top_k, dim=-1).indices
    weights = scores.gather(1, chosen)
    if normalise:
        # Sigmoids may all underflow to zero.
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    experts_sorted, order = chosen.flatten().sort(stable=True)
    every = torch.arange(number * top_k, device=scores.device)
    every_expert = torch.arange(experts, device=scores.device)
    groups = Groups(
        tokens=order // top_k,
        ends=torch.searchsorted(experts_sorted, every_expert, right=True, out_int32=True),
        rows=torch.empty_like(order).scatter_(0, order, every),
        starts=every[::top_k].contiguous(),
    )
    return groups, weights.flatten().index_select(0, order)


def expert_choice(scores: Tensor, top_k: int) -> tuple[Groups, Tensor]:
    """Every expert takes the tokens that score best with it (arXiv 2202.09368), the same number each.

    Whether a token is taken depends on all other tokens, later ones too: this is for training only.

    Args:
        scores: ``[N, E]``.
        top_k: Experts a token on average; an expert takes ``ceil(N * top_k / E)`` tokens.

    Returns:
        The ``E * capacity`` rows, and their weights ``[M]``.
    """
    number, experts = scores.shape
    capacity = -(-number * top_k // experts)
    weights, chosen = scores.t().topk(capacity, dim=-1)
    tokens = chosen.flatten()
    tokens_sorted, rows = tokens.sort(stable=True)
    groups = Groups(
        tokens=tokens,
        ends=torch.arange(1, experts + 1, dtype=torch.int32, device=scores.device) * capacity,
        rows=rows,
        starts=torch.searchsorted(tokens_sorted, torch.arange(number, device=scores.device)),
    )
    return groups, weights.flatten()


def balance_loss(scores: Tensor, counts: Tensor) -> Tensor:
    """``E * sum_e f_e P_e``, with the share ``f`` of rows and of probability ``P`` that an expert has.

    Switch Transformers (arXiv 2101.03961, equations 4 to 6), with the shares of all rows where a token has
    several: 1 for an even load, whatever ``top_k``. Sigmoid scores are first divided by their sum over the
    experts, as in DeepSeek-V3 (arXiv 2412.19437, equation 19). Only ``P`` has a gradient.

    Args:
        scores: ``[N, E]``.
        counts: ``[E]`` rows of each expert.

    Returns:
        Scalar; 0 for no tokens.
    """
    share = counts / counts.sum().clamp(min=1)
    probability = F.normalize(scores, p=1, dim=-1).sum(0) / max(scores.shape[0], 1)
    return scores.shape[1] * (share * probability).sum()


def z_loss(logits: Tensor) -> Tensor:
    """Mean over tokens of ``logsumexp(logits)^2`` (ST-MoE, arXiv 2202.08906, equation 5); 0 for no tokens."""
    return logits.logsumexp(-1).square().sum() / max(logits.shape[0], 1)
