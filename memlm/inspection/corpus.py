"""What slots answer to: the tokens of a corpus that read them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from memlm.inspection.push import MeanFactor, Push, gates_of, pushes_of
from memlm.inspection.reads import LayerReads, recorded
from memlm.inspection.slots import Slot, check_slots
from memlm.transformer import Transformer


@dataclass(frozen=True)
class Context:
    """A token that reads a slot."""

    document: int
    """Number of the document in the corpus, from 0."""
    tokens: list[int]
    """Of the window that was read."""
    position: int
    """Of the token in ``tokens``."""
    block: int
    head: int
    """Which of the block's heads gave the slot the largest weight."""
    weight: float
    """That weight; of PEER times the activation, with its sign."""


@dataclass
class SlotReport:
    """What a corpus tells of a slot."""

    slot: Slot
    tokens: int = 0
    """Tokens of the corpus."""
    readers: int = 0
    """Tokens that read the slot, in any head and layer."""
    weight: float = 0.0
    """Sum of ``|factor|`` of all reads."""
    reads: dict[tuple[int, int], int] = field(default_factory=dict)
    """Number of reads by block and head."""
    contexts: list[Context] = field(default_factory=list)
    """By descending size of weight; a token is listed once."""
    pushes: list[Push] = field(default_factory=list)


@torch.no_grad()
def look_through(
    model: Transformer,
    documents: Iterable[list[int]],
    slots: Sequence[Slot],
    context: int,
    vocabulary: int,
    top: int = 8,
    batch_tokens: int = 4096,
) -> list[SlotReport]:
    """Look through a corpus for the tokens that read certain slots.

    Memory depends on the batch and the longest document, not on the corpus.

    Args:
        model: In evaluation mode.
        documents: Token ids, the one that begins a document included. Longer ones than the context are read
            in windows one after the other, each as if it stood alone.
        slots: To look for.
        context: Longest sequence of the model, tokens.
        vocabulary: Tokens of the tokenizer; further rows of the output layer are padding.
        top: Most contexts of a slot, and most tokens of a push.
        batch_tokens: Most tokens of a forward pass, padding included.

    Returns:
        A report for each slot, in order.

    Raises:
        ValueError: A slot or its pool does not exist, or the model has no memory.
    """
    check_slots(model, slots)
    reports = [SlotReport(slot) for slot in slots]
    factors: list[dict[tuple[int, int], MeanFactor]] = [{} for _ in slots]
    with recorded(model) as found:
        for batch in _batches(documents, context, batch_tokens):
            length = max(len(ids) for _, ids in batch)
            tokens = torch.zeros(len(batch), length, dtype=torch.long)
            for place, (_, ids) in enumerate(batch):
                tokens[place, : len(ids)] = torch.tensor(ids)
            # Padding on the right, which no causal layer looks at.
            real = torch.arange(length) < torch.tensor([[len(ids)] for _, ids in batch])
            model.hidden_states(tokens.to(model.embedding.weight.device))
            for report, means in zip(reports, factors, strict=True):
                _add(report, means, batch, real.flatten(), length, found, top)
            found.clear()
    for report, means in zip(reports, factors, strict=True):
        report.pushes = pushes_of(model, report.slot, means, vocabulary, top)
    return reports


def _batches(
    documents: Iterable[list[int]], context: int, batch_tokens: int
) -> Iterator[list[tuple[int, list[int]]]]:
    """Windows with the number of their document, as many as ``batch_tokens`` hold, at least one."""
    batch: list[tuple[int, list[int]]] = []
    longest = 0
    for number, ids in enumerate(documents):
        for start in range(0, len(ids), context):
            window = ids[start : start + context]
            if batch and (len(batch) + 1) * max(longest, len(window)) > batch_tokens:
                yield batch
                batch, longest = [], 0
            batch.append((number, window))
            longest = max(longest, len(window))
    if batch:
        yield batch


def _add(
    report: SlotReport,
    means: dict[tuple[int, int], MeanFactor],
    batch: list[tuple[int, list[int]]],
    real: Tensor,
    length: int,
    layers: list[LayerReads],
    top: int,
) -> None:
    """Count the reads of one slot in one batch."""
    report.tokens += int(real.sum())
    own = [layer for layer in layers if layer.place.pool == report.slot.pool]
    readers = torch.zeros_like(real)
    best: dict[int, tuple[int, int, float]] = {}
    for layer in own:
        hits = (layer.rows == report.slot.row) & real.to(layer.rows.device).view(-1, 1, 1)
        token, head, _ = hits.nonzero(as_tuple=True)
        if not len(token):
            continue
        block, factors = layer.place.block, layer.factors[hits].double()
        report.weight += float(factors.abs().sum())
        for each, count in enumerate(head.bincount().tolist()):
            if count:
                report.reads[block, each] = report.reads.get((block, each), 0) + count
        readers[token.cpu()] = True
        tables = layer.tables[hits]
        for table in tables.unique().tolist():
            chosen = tables == table
            mean = means.setdefault((block, table), MeanFactor())
            mean.add(factors[chosen], gates_of(layer, token[chosen]))
        # No token beyond a layer's heaviest can be among the heaviest of all layers.
        for place in _heaviest_tokens(token, factors.abs(), top):
            at, factor = int(token[place]), float(factors[place])
            if at not in best or abs(factor) > abs(best[at][2]):
                best[at] = (block, int(head[place]), factor)
    report.readers += int(readers.sum())
    for at, (block, each, factor) in best.items():
        number, ids = batch[at // length]
        report.contexts.append(Context(number, ids, at % length, block, each, factor))
    report.contexts.sort(key=lambda found: -abs(found.weight))
    del report.contexts[top:]


def _heaviest_tokens(token: Tensor, sizes: Tensor, top: int) -> list[int]:
    """Places of the largest sizes, one for each of the ``top`` tokens that have them."""
    chosen: dict[int, int] = {}
    tokens = token.tolist()
    for place in sizes.argsort(descending=True).tolist():
        chosen.setdefault(tokens[place], place)
        if len(chosen) == top:
            break
    return list(chosen.values())
