"""A tiny model of bytes, and what it says of a text, computed by hand."""

import torch
from torch import nn

from memlm.evaluation.evaluator import Evaluator
from memlm.tokenizers import ByteTokenizer
from memlm.transformer import Transformer, TransformerConfig

EOS = ByteTokenizer.eos_id


def byte_model(seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    made = Transformer(ByteTokenizer.vocab_size, TransformerConfig(16, 2, 4, kv_heads=2, feed_forward_dim=16))
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.4)
    return made.eval()


def evaluator(context: int = 600, **options) -> Evaluator:
    return Evaluator(byte_model(), ByteTokenizer(), context, **options)


@torch.no_grad()
def log_likelihood(model: nn.Module, prompt: str, continuation: str) -> float:
    """Nats of a continuation after a prompt, from the logits of the whole sequence."""
    ids = [EOS, *prompt.encode(), *continuation.encode()]
    chances = model(torch.tensor([ids]))[0].double().log_softmax(-1)
    first = len(ids) - len(continuation.encode())
    return sum(float(chances[place - 1, ids[place]]) for place in range(first, len(ids)))


@torch.no_grad()
def greedy(model: nn.Module, prompt: str, tokens: int) -> str:
    """The likeliest continuation, each token from the whole sequence anew."""
    ids = [EOS, *prompt.encode()]
    start = len(ids)
    for _ in range(tokens):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] == EOS:
            break
    return ByteTokenizer().decode(ids[start:])
