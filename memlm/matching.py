"""Baselines of a memory model: dense, mixture of experts and PEER models to compare it with.

Memory Layers at Scale (arXiv 2412.09764), section 4.1: one base for all, and the sparse ones have at least as
many parameters as the memory model, by the smallest step that their kind allows. With memory in the place of
a few feed-forward networks FLOPs then differ little. With memory beside the networks, or in many blocks, they
do not, and the width of the networks must make up for it: the counts of each baseline say how much.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from math import isqrt
from typing import Any

import torch
import yaml

from memlm.errors import ConfigError
from memlm.flops import Counts, count
from memlm.memory import MemoryConfig, MemoryPlan, PEERConfig
from memlm.transformer import MoEConfig, Transformer, TransformerConfig

_PEER_STEPS = 16
"""PEER's half keys are a multiple of this share of the memory's: 768 for 1,024."""
_MOST_EXPERTS = 1 << 20
_MOST_STEPS = 64 * _PEER_STEPS
"""Sizes beyond which nothing is looked for, far beyond every match."""

_SIZES = ("dim", "layers", "experts", "routing", "top_k", "half_keys", "heads", "reads")
"""Options that the YAML of a baseline names even where they are defaults."""


@dataclass
class Baseline:
    """A model to compare with."""

    class_path: str
    """Its class."""
    init_args: dict[str, Any]
    """Options of its architecture that are not defaults."""
    counts: Counts | None
    """What it costs; None where there is no such model."""
    missing: str = ""
    """Why there is none."""

    def yaml(self) -> str:
        """The ``model`` section of its config, optimizers left out."""
        section = {"model": {"class_path": self.class_path, "init_args": self.init_args}}
        return yaml.safe_dump(section, sort_keys=False)


def baselines(
    transformer: TransformerConfig, memory: MemoryPlan, total: int, vocab_size: int, sequence_length: int
) -> list[Baseline]:
    """The matched baselines of a memory model.

    - Dense: the same transformer.
    - Mixture of experts: experts as wide as the feed-forward networks in every block, each token in one of
      them; the lowest number whose total exceeds the memory model's.
    - PEER, for memory layers with product keys: one layer, with the same heads and reads; the lowest multiple
      of ``K / 16`` half keys whose total exceeds the memory model's (``K * K`` slots).

    Args:
        transformer: Of the memory model.
        memory: Its memory.
        total: Its parameters.
        vocab_size: Entries of the tokenizer.
        sequence_length: ``T``, at which FLOPs are counted.

    Returns:
        One of each kind, also where there is no such model: experts need dims that are multiples of 8.
    """

    def counts(memory: MemoryPlan | None = None, moe: MoEConfig | None = None) -> Counts:
        with torch.device("meta"):
            return count(Transformer(vocab_size, transformer, memory, moe), sequence_length)

    shared = _set(transformer)
    found = [Baseline("memlm.DenseLM", {"transformer": shared}, counts())]

    def add(class_path: str, section: str, config: Callable[[int], Any], sizes: range) -> None:
        def size_of(number: int) -> Counts:
            plan = config(number)
            return counts(moe=plan) if isinstance(plan, MoEConfig) else counts(plan)

        try:
            index = bisect_right(sizes, total, key=lambda number: size_of(number).total)
        except ConfigError as error:
            found.append(Baseline(class_path, {}, None, str(error)))
            return
        options = {"transformer": shared, section: _set(config(sizes[index]))}
        found.append(Baseline(class_path, options, size_of(sizes[index])))

    add("memlm.MoELM", "moe", lambda number: MoEConfig(experts=number, top_k=1), range(2, _MOST_EXPERTS))
    if isinstance(memory, MemoryConfig) and memory.pre_values == "none":
        step = max(1, isqrt(memory.virtual_slots) // _PEER_STEPS)
        first = -(-memory.reads // step)
        add(
            "memlm.PEERLM",
            "memory",
            lambda number: PEERConfig(half_keys=number, heads=memory.heads, reads=memory.reads),
            range(first * step, _MOST_STEPS * step, step),
        )
    return found


def _set(config: Any) -> dict[str, Any]:
    """Fields of an options dataclass that say its size, or are not defaults."""
    default, values = type(config)(), asdict(config)
    named = [name for name in _SIZES if values.get(name) is not None]
    return {
        field.name: values[field.name]
        for field in fields(config)
        if field.name in named or getattr(config, field.name) != getattr(default, field.name)
    }
