"""Continuing prompts, greedily or by sampling."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from memlm.transformer.cache import Cache
from memlm.transformer.model import Transformer


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen among the likely ones.

    The temperature is applied first, then the limits in this order, each to what the ones before it have
    left. With all limits off and temperature 1 tokens are drawn from the model's own distribution.
    """

    temperature: float = 0.0
    """Divides the logits; 0 takes the likeliest token (the lowest id among equals), whatever else is set."""
    top_k: int | None = None
    """Only the k likeliest tokens (ties with the k-th included)."""
    top_p: float | None = None
    """Only the fewest likeliest tokens whose probabilities sum to this at least (arXiv 1904.09751)."""
    min_p: float | None = None
    """Only tokens of at least this share of the likeliest one's probability (arXiv 2407.01082)."""
    seed: int | None = None
    """None draws one from the operating system."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}, must not be negative")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}, must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, must be above 0 and at most 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}, must be between 0 and 1")
        if self.seed is not None and self.seed < 0:
            raise ValueError(f"seed is {self.seed}, must not be negative")


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    *,
    eos_id: int | None = None,
    on_token: Callable[[int, int], bool | None] | None = None,
    batch_size: int = 16,
    first: int = 0,
) -> list[list[int]]:
    """Continue prompts of any lengths.

    Prompts of like lengths are continued together; a row leaves its batch when it has ended. What a prompt
    becomes depends on the seed and on its place among the prompts, and on nothing else in its batch; the
    global random state stays as it is. The model runs in evaluation mode; afterwards every module is in the
    mode it was in.

    Args:
        model: Any decoder.
        prompts: Token ids, at least one for each prompt.
        max_new_tokens: Most tokens that are added to a prompt.
        sampling: How tokens are chosen.
        eos_id: A continuation ends with this token; None: none is special.
        on_token: Called with a prompt's number and each of its new tokens, as they come; where it returns
            true, the prompt's continuation has ended.
        batch_size: Prompts that are continued together.
        first: Number of the first prompt, where these are a part of many that are continued one after the
            other; decides the samples alone.

    Returns:
        The new tokens of every prompt, the final ``eos_id`` included.

    Raises:
        ValueError: A prompt is empty, or the batch size is not positive.
    """
    if any(not prompt for prompt in prompts):
        raise ValueError("a prompt is empty: give at least the end-of-document token that begins a document")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, must be at least 1")
    new: list[list[int]] = [[] for _ in prompts]
    if max_new_tokens < 1:
        return new
    entropy = np.random.SeedSequence().entropy if sampling.seed is None else sampling.seed
    assert isinstance(entropy, int)
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))

    def ended(number: int, token: int) -> bool:
        new[number].append(token)
        stopped = on_token is not None and bool(on_token(number, token))
        return stopped or token == eos_id or len(new[number]) == max_new_tokens

    with evaluating(model):
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            _continue(model, numbers, prompts, sampling, entropy, first, max_new_tokens, ended)
    return new


def _continue(
    model: Transformer,
    numbers: list[int],
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    entropy: int,
    first: int,
    most: int,
    ended: Callable[[int, int], bool],
) -> None:
    """Continue the prompts of these numbers until ``ended(number, token)`` says of each that it has ended."""
    device = model.embedding.weight.device
    tokens, counts = padded([prompts[number] for number in numbers])
    cache = Cache(len(numbers), len(model.blocks))
    logits = model(tokens.to(device), cache=cache, counts=counts, last=True)[:, 0]
    draws = None
    if sampling.temperature > 0:
        # By numpy, so that a seed means the same on every device; one stream for each prompt.
        streams = [np.random.default_rng([entropy, first + number]) for number in numbers]
        draws = torch.from_numpy(np.stack([stream.random(most) for stream in streams])).to(device)
    for step in range(most):
        chosen = choose(logits, sampling, None if draws is None else draws[:, step])
        ids = chosen.tolist()
        going = [row for row, number in enumerate(numbers) if not ended(number, ids[row])]
        if not going:
            return
        if len(going) < len(numbers):
            rows = torch.tensor(going)
            numbers = [numbers[row] for row in going]
            cache, chosen = cache.select(rows), chosen[rows.to(device)]
            draws = None if draws is None else draws[rows.to(device)]
        logits = model(chosen.unsqueeze(1), cache=cache, last=True)[:, 0]


def choose(logits: Tensor, sampling: Sampling, draws: Tensor | None) -> Tensor:
    """The next token of each row.

    Args:
        logits: ``[B, vocab]``.
        sampling: How to choose.
        draws: ``[B]`` fp64, uniform in [0, 1); not looked at with temperature 0.

    Returns:
        ``[B]`` int64.
    """
    if sampling.temperature == 0 or draws is None:
        return logits.argmax(-1)
    # The highest logit at zero, so that a small temperature cannot overflow.
    logits = logits.double()
    logits = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, places = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter_(-1, places, before >= sampling.top_p)
        logits = logits.masked_fill(dropped, float("-inf"))
    if sampling.min_p:
        logits = logits.masked_fill(logits < np.log(sampling.min_p), float("-inf"))
    cumulative = logits.softmax(-1).cumsum(-1)
    # The inverse of the distribution function, and not torch.multinomial, which a model whose logits are not
    # numbers makes fail.
    drawn = draws.unsqueeze(-1) * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, drawn, right=True).squeeze(-1)
    return chosen.clamp(max=logits.shape[-1] - 1)


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Rows of token ids as one batch ``[B, T]``, padded on the right with id 0, and their lengths ``[B]``."""
    counts = torch.tensor([len(row) for row in rows])
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids)
    return tokens, counts


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within the block, and not compiled: every length would be compiled anew."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, training in modes:
            module.training = training
