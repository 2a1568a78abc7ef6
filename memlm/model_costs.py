"""All that ``memlm params`` says of one model."""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from memlm.errors import ConfigError
from memlm.flops import count, parts
from memlm.matching import baselines
from memlm.meta_model import parse
from memlm.optim import configure
from memlm.parallel.traffic import traffic
from memlm.rank_memory import Mesh, autocast_dtype, convert, rank_memory


def describe(options: argparse.Namespace, files: list[str], words: list[str]) -> dict[str, Any]:
    """All values of one column.

    Args:
        options: Of ``memlm params``.
        files: The config files of the model.
        words: Further options, as of ``memlm fit``.

    Raises:
        UserError: A config does not parse, or does not tell what is needed.
    """
    rows = [] if options.vocab_size is None else [f"--model.transformer.vocab_size={options.vocab_size}"]
    parsed = parse([*(f"--config={file}" for file in files), *words, *rows])
    model, transformer = parsed.model, parsed.model.transformer
    length = options.sequence_length or parsed.sequence_length
    precision = options.precision or parsed.options.trainer.precision or "32-true"
    tokens = options.tokens_per_rank or parsed.tokens_per_step(length)
    if tokens is None:
        raise ConfigError("tokens_per_rank", "is needed, since the data has no batch_size")
    group = options.memory_group or (options.ranks if model.pools else 1)
    mesh = Mesh(
        options.ranks,
        group,
        options.shard_dense == "true",
        options.expert_group,
        torch.bfloat16 if options.wire_dtype else None,
        options.whole_gradients == "true",
    )
    convert(model, precision)
    optimizer, _ = configure(
        transformer.named_parameters(),
        {pool.values: pool.gradient for pool in model.pools.values()},
        model.dense_options,
        model.values_options,
        max_steps=sys.maxsize,
    )
    batches = parsed.options.trainer.accumulate_grad_batches
    held = rank_memory(transformer, optimizer, mesh, tokens, batches)
    sent = traffic(transformer, mesh, tokens, batches, autocast=autocast_dtype(precision))
    found = {
        "name": "+".join(Path(file).stem for file in files) or type(model).__name__,
        "configs": files,
        "class_path": model.architecture()["class_path"],
        "vocab_size": transformer.embedding.num_embeddings,
        "sequence_length": length,
        **count(transformer, length).as_dict(),
        "parts": parts(transformer),
        "rank": {
            **asdict(mesh),
            "wire_dtype": options.wire_dtype,
            "precision": str(precision),
            "tokens": tokens,
            "micro_batches": batches,
            "bytes": held.as_dict(),
            "sent": sent.as_dict(),
        },
    }
    memory = model.sections.get("memory")
    if options.match and memory is not None:
        found["baselines"] = [
            {"class_path": baseline.class_path, "missing": baseline.missing}
            if baseline.counts is None
            else {"class_path": baseline.class_path, **baseline.counts.as_dict(), "yaml": baseline.yaml()}
            for baseline in baselines(transformer.config, memory, found["total"], parsed.vocab_size, length)
        ]
    return found
