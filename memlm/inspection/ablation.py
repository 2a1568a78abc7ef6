"""What becomes of an answer's likelihood when slots are removed."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from memlm.evaluation.likelihood import Scored, score
from memlm.inspection.reads import LayerReads, reads_of
from memlm.inspection.removal import Removal, removed
from memlm.inspection.slots import Slot, WeightedSlot, heaviest_slots
from memlm.transformer import Transformer

Kind = Literal["layer", "head", "slot", "together"]


@dataclass(frozen=True)
class Control:
    """The same number of other slots removed in the same places."""

    what: Literal["random", "also read"]
    """random: any others of the pool, read or not. also read: others that the prompt reads."""
    slots: int
    """How many were removed; fewer than in the ablation if there are no more."""
    log_likelihoods: list[float]
    """Of each draw, nats."""

    @property
    def mean(self) -> float:
        """Mean of the draws, nats."""
        return math.fsum(self.log_likelihoods) / len(self.log_likelihoods)


@dataclass(frozen=True)
class Ablation:
    """One removal, and the answer's likelihood under it."""

    kind: Kind
    slots: int
    """Distinct slots that were removed."""
    scored: Scored
    controls: list[Control]
    block: int | None = None
    """Of a layer or head."""
    head: int | None = None
    """Of a head."""
    head_name: str | None = None
    """What it is called, see :attr:`memlm.inspection.reads.MemoryBlock.heads`."""
    slot: WeightedSlot | None = None
    """Of a slot, with the weight that the prompt gives it."""


@dataclass(frozen=True)
class AblationReport:
    """All removals for one prompt and answer."""

    intact: Scored
    """Nothing removed."""
    ablations: list[Ablation]


def ablate(
    model: Transformer,
    prompt: list[int],
    answer: list[int],
    context: int,
    remove: int = 8,
    last: int | None = None,
    renormalise: bool = False,
    draws: int = 3,
    seed: int = 0,
) -> AblationReport:
    """Remove the slots that a prompt reads, and measure the answer's log-likelihood each time.

    Removed are, in this order: all slots that the prompt reads in a layer, from that layer alone; in a head,
    from that head alone; the ``remove`` slots with the largest summed weights, one at a time, from all layers
    and heads; and these together. A slot that is removed is so for every token, the answer's too.

    The control of a layer or head is as many random others of its pool, removed from that layer or head; of
    the heaviest slots together, as many others of each pool: random ones, and such as the prompt reads too.

    Args:
        model: In evaluation mode; its table and parameters are not changed.
        prompt: Token ids, the one that begins a document included.
        answer: Token ids that follow.
        context: Longest input of the model, tokens.
        remove: Number of the heaviest slots.
        last: Only the slots that so many last tokens of the prompt read; None: all tokens.
        renormalise: See :func:`memlm.inspection.removal.removed`.
        draws: Random draws for each control.
        seed: Of the draws.

    Raises:
        ValueError: Prompt or answer are empty or do not fit into the context, or the model has no memory.
    """
    if len(prompt) + len(answer) - 1 > context:
        raise ValueError(
            f"prompt and answer have {len(prompt) + len(answer)} tokens; "
            f"the context has room for {context + 1}"
        )
    source = random.Random(seed)

    def scored(removals: Sequence[Removal]) -> Scored:
        with removed(model, removals, renormalise):
            return score(model, [(prompt, answer)], context)[0]

    intact = score(model, [(prompt, answer)], context)[0]
    layers = reads_of(model, prompt)
    last = len(prompt) if last is None else last

    def drawn(
        what: Literal["random", "also read"],
        of_pools: dict[str, set[int]],
        block: int | None,
        head: int | None,
    ) -> list[Control]:
        results, count = [], 0
        for _ in range(draws):
            removals = []
            for pool, taken in of_pools.items():
                rows = _others(layers, pool, taken, what, last, source)
                if rows:
                    removals.append(Removal(pool, torch.tensor(rows), block, head))
            count = sum(len(removal.rows) for removal in removals)
            if count:
                results.append(scored(removals).log_likelihood)
        return [Control(what, count, results)] if results else []

    ablations: list[Ablation] = []
    for layer in layers:
        block, pool = layer.place.block, layer.place.pool
        for head in (None, *range(len(layer.place.heads))):
            rows = layer.rows[-last:] if head is None else layer.rows[-last:, head]
            rows = rows.unique().cpu()
            kind: Kind = "layer" if head is None else "head"
            without = scored([Removal(pool, rows, block, head)])
            controls = drawn("random", {pool: set(rows.tolist())}, block, head)
            name = None if head is None else layer.place.heads[head]
            ablations.append(Ablation(kind, len(rows), without, controls, block, head, name))
    heaviest = heaviest_slots(layers, remove, last=last)
    for found in heaviest:
        ablations.append(Ablation("slot", 1, scored(_removals([found.slot])), [], slot=found))
    if heaviest:
        slots = [found.slot for found in heaviest]
        taken = {r.pool: set(r.rows.tolist()) for r in _removals(slots)}
        controls = drawn("random", taken, None, None) + drawn("also read", taken, None, None)
        ablations.append(Ablation("together", len(slots), scored(_removals(slots)), controls))
    return AblationReport(intact, ablations)


def _removals(slots: Sequence[Slot]) -> list[Removal]:
    """From all layers and heads, one removal a pool."""
    rows: dict[str, list[int]] = {}
    for pool, row in slots:
        rows.setdefault(pool, []).append(row)
    return [Removal(pool, torch.tensor(of_pool)) for pool, of_pool in rows.items()]


def _others(
    layers: Sequence[LayerReads],
    pool: str,
    taken: set[int],
    what: Literal["random", "also read"],
    last: int,
    source: random.Random,
) -> list[int]:
    """As many rows of a pool as are taken, or as there are, none of them taken."""
    own = [layer for layer in layers if layer.place.pool == pool]
    candidates: Sequence[int]
    if what == "random":
        candidates = range(own[0].place.slots)
    else:
        candidates = sorted({row for layer in own for row in layer.rows[-last:].unique().tolist()} - taken)
    # Twice as many as wanted hold enough that are not taken; no list of all slots is made.
    drawn = source.sample(candidates, min(2 * len(taken), len(candidates)))
    return [row for row in drawn if row not in taken][: len(taken)]
