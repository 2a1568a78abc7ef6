"""Generation and likelihoods: what the cache and batches gain, and transformers beside it.

    python benchmarks/generation.py --json benchmarks/results/generation.json

``cached`` and ``recomputed`` go from a prompt of 32 tokens to 512, by the small memory model; ``batch of 16``
and ``one by one`` continue 16 prompts of 32 to 62 tokens by 64. transformers generates with the dense model
as exported (LlamaForCausalLM), from the same prompts as ours, all of one length. ``plain forward`` is the
call that gives the logits of a batch of 32 rows of 128 tokens, ``likelihood`` their log-likelihoods.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import Report, parse
from memlm.evaluation.likelihood import score_texts
from memlm.generation.decoding import generate
from memlm.huggingface import config_json, to_hf
from memlm.memory import MemoryConfig
from memlm.transformer import Transformer, TransformerConfig

BARS: dict[str, tuple[Any, str]] = {
    "recomputed / cached": (5.0, ">="),
    "one by one / batch of 16": (6.0, ">="),
    "transformers / ours, 1 row": (1.0, ">="),
    "transformers / ours, 16 rows": (1.0, ">="),
    "plain forward / likelihood": (0.9, ">="),
}


@dataclass(frozen=True)
class Sizes:
    """Of models and texts."""

    dim: int = 256
    layers: int = 8
    heads: int = 4
    vocab: int = 8192
    half_keys: int = 256
    prompt: int = 32
    length: int = 512
    new: int = 64
    rows: int = 16
    scored_rows: int = 32
    scored_length: int = 128


QUICK = Sizes(layers=4, half_keys=64, length=128, new=16)


def models(sizes: Sizes, device: torch.device) -> tuple[Transformer, Transformer]:
    """A memory model with two memory layers, and the dense one that it would be without."""
    torch.manual_seed(0)
    config = TransformerConfig(sizes.dim, sizes.layers, sizes.heads)
    memory = MemoryConfig(half_keys=sizes.half_keys, layers=[sizes.layers // 3, 2 * sizes.layers // 3])
    with device:
        made = Transformer(sizes.vocab, config, memory), Transformer(sizes.vocab, config)
    for model in made:
        model.eval().requires_grad_(False)
    return made


@torch.no_grad()
def recomputed(model: Transformer, prompt: list[int], length: int) -> list[int]:
    """Greedily to ``length`` tokens, each from the whole sequence again."""
    tokens = torch.tensor([prompt], device=model.embedding.weight.device)
    while tokens.shape[1] < length:
        tokens = torch.cat((tokens, model(tokens, last=True)[:, -1].argmax(-1, keepdim=True)), dim=1)
    return tokens[0, len(prompt) :].tolist()


def decoding(report: Report, model: Transformer, sizes: Sizes) -> None:
    """The cache, and batches of ragged prompts."""
    vocab, prompt = sizes.vocab, sizes.prompt
    start = torch.randint(vocab, (prompt,)).tolist()
    new = sizes.length - prompt
    with report.attempt("recomputed / cached"):
        if generate(model, [start], new) != [recomputed(model, start, sizes.length)]:
            print("not the same tokens: equally likely ones, or the cache is wrong")
        report.measure(
            f"memory, {prompt} to {sizes.length} tokens",
            {
                "cached": lambda: generate(model, [start], new),
                "recomputed": lambda: recomputed(model, start, sizes.length),
            },
        )
        report.ratio("recomputed / cached", "recomputed", "cached")
    prompts = [torch.randint(vocab, (prompt + 2 * row,)).tolist() for row in range(sizes.rows)]
    report.measure(
        f"memory, {sizes.rows} prompts, {sizes.new} tokens",
        {
            "batch of 16": lambda: generate(model, prompts, sizes.new, batch_size=sizes.rows),
            "one by one": lambda: generate(model, prompts, sizes.new, batch_size=1),
        },
    )
    report.ratio("one by one / batch of 16", "one by one", "batch of 16")


def exported(model: Transformer, folder: Path, context: int) -> Any:
    """The model as transformers loads it."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    vocab = model.embedding.num_embeddings
    (folder / "config.json").write_text(json.dumps(config_json(model.config, vocab, context)))
    tensors = {name: tensor.contiguous() for name, tensor in to_hf(model.state_dict(), model.config).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def beside_transformers(report: Report, model: Transformer, sizes: Sizes) -> None:
    """Greedy generation by the dense model, here and there."""
    device = model.embedding.weight.device
    with tempfile.TemporaryDirectory() as folder:
        theirs = exported(model, Path(folder), sizes.length).to(device)
    for rows in (1, sizes.rows):
        tokens = torch.randint(sizes.vocab, (rows, sizes.prompt), device=device)
        options = {
            "max_new_tokens": sizes.new,
            "min_new_tokens": sizes.new,
            "do_sample": False,
            "pad_token_id": 0,
        }

        def generate_theirs(tokens: Any = tokens, options: Any = options) -> Any:
            with torch.no_grad():
                return theirs.generate(tokens, attention_mask=torch.ones_like(tokens), **options)

        prompts = tokens.tolist()
        if generate_theirs()[:, sizes.prompt :].tolist() != generate(model, prompts, sizes.new):
            print("transformers has generated other tokens")
        operations: dict[str, Callable[[], Any]] = {
            f"ours, {rows}": lambda prompts=prompts: generate(model, prompts, sizes.new),
            f"transformers, {rows}": generate_theirs,
        }
        report.measure(f"dense, {rows} prompts, {sizes.new} tokens", operations)
        name = f"transformers / ours, {rows} row{'s' if rows > 1 else ''}"
        report.ratio(name, f"transformers, {rows}", f"ours, {rows}")


def likelihood(report: Report, model: Transformer, sizes: Sizes) -> None:
    """Log-likelihoods of texts against the forward pass that they need."""
    device = model.embedding.weight.device
    texts = torch.randint(1, sizes.vocab, (sizes.scored_rows, sizes.scored_length))
    tokens = torch.cat((torch.zeros(len(texts), 1, dtype=torch.long), texts[:, :-1]), dim=1).to(device)
    lists, count = texts.tolist(), tokens.numel()

    def forward() -> None:
        with torch.no_grad():
            model(tokens)

    report.measure(
        f"memory, {sizes.scored_rows} rows of {sizes.scored_length} tokens",
        {
            "plain forward": forward,
            "likelihood": lambda: score_texts(model, lists, sizes.scored_length, 0, batch_tokens=count),
        },
    )
    report.ratio("plain forward / likelihood", "plain forward", "likelihood")


def main() -> None:
    """Run and report."""
    setting = parse(__doc__.split("\n")[0], Path(__file__).name)
    sizes = QUICK if setting.quick else Sizes()
    report = Report(setting, BARS, sizes=vars(sizes).copy())
    memory, dense = models(sizes, setting.device)
    decoding(report, memory, sizes)
    likelihood(report, memory, sizes)
    with report.attempt("transformers / ours, 1 row", "transformers / ours, 16 rows"):
        beside_transformers(report, dense, sizes)
    report.finish()


if __name__ == "__main__":
    main()
