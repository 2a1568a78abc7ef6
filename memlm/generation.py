"""Continuing prompts, greedily or by sampling."""

import torch
from torch import Tensor, nn


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int | None = None,
    eos_id: int | None = None,
) -> list[list[int]]:
    """Continue a batch of prompts of any lengths.

    Every new token is computed from the whole sequence again. Prompts are padded on the right, which causal
    attention never looks at, so that a prompt's logits do not depend on what else is in the batch. Sampling
    draws from a generator of its own: the same seed gives the same tokens, and the global random state stays
    as it is. The model runs in evaluation mode; afterwards every module is in the mode it was in.

    Args:
        model: Gives logits ``[B, T, vocab]`` for tokens ``[B, T]``, causally.
        prompts: Token ids, at least one for each prompt.
        max_new_tokens: Most tokens that are added to a prompt.
        temperature: Divides the logits; 0 takes the likeliest token (the lowest id among equals).
        top_k: Sample among the k likeliest tokens only (ties with the k-th included); None: among all.
        seed: Of the sampling; None draws one from the operating system.
        eos_id: A continuation ends with this token; None: it never ends early.

    Returns:
        The new tokens of every prompt, the final ``eos_id`` included.

    Raises:
        ValueError: A prompt is empty, or an option is out of range.
    """
    if any(not prompt for prompt in prompts):
        raise ValueError("a prompt is empty: give at least the end-of-document token that begins a document")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}, must not be negative")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}, must be at least 1")
    if not prompts or max_new_tokens < 1:
        return [[] for _ in prompts]
    device = next(model.parameters()).device
    generator = torch.Generator()  # on the CPU, so that a seed means the same on every device
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    rows = torch.arange(len(prompts))
    tokens = torch.zeros(len(prompts), int(lengths.max()) + max_new_tokens, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    ended = torch.zeros(len(prompts), dtype=torch.bool)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for added in range(max_new_tokens):
            ends = lengths + added
            logits = model(tokens[:, : int(ends.max())].to(device))
            chosen = _choose(logits[rows, ends - 1].double().cpu(), temperature, top_k, generator)
            tokens[rows, ends] = chosen
            if eos_id is not None:
                ended |= chosen == eos_id
                if ended.all():
                    break
    finally:
        for module, training in modes:
            module.training = training
    new = [
        row[length : length + added + 1].tolist()
        for row, length in zip(tokens, lengths.tolist(), strict=True)
    ]
    return [ids[: ids.index(eos_id) + 1] if eos_id in ids else ids for ids in new]


def _choose(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> Tensor:
    """The next tokens ``[B]`` for logits ``[B, vocab]``."""
    if temperature == 0:
        return logits.argmax(-1)
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    # The highest logit at zero, so that a small temperature cannot overflow.
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    cumulative = logits.softmax(-1).cumsum(-1)
    # The inverse of the distribution function, and not torch.multinomial, which a model whose logits are not
    # numbers makes fail.
    drawn = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64) * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, drawn, right=True).squeeze(-1)
    return chosen.clamp(max=logits.shape[-1] - 1)
