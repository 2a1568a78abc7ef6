"""How likely a model finds texts: batches of ragged rows, each prefix computed once."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from memlm.generation.decoding import evaluating, padded
from memlm.transformer.cache import Cache
from memlm.transformer.model import Transformer

_LOGITS_AT_ONCE = 1 << 21
"""Elements: few enough to stay in a processor's cache between the passes over them."""

_LEAST_SHARED = 16
"""Tokens: a beginning that rows share is computed apart from this length on."""


class Scored(NamedTuple):
    """What a model makes of one continuation."""

    log_likelihood: float
    """Sum over its tokens, nats."""
    greedy: bool
    """Whether each of its tokens is the likeliest."""
    tokens: int
    """Of the continuation."""


_HELD = 4
"""Batches of tokens whose keys and values rows may hold of what they share: memory, but no computing."""


class _Row(NamedTuple):
    """Tokens that go into the model, and those that its last outputs are to predict.

    Pairs of the same inputs are one row: answers that differ in their last token alone, such as letters.
    """

    inputs: tuple[int, ...]
    predicting: int
    """The last so many outputs."""
    asked: list[tuple[int, tuple[int, ...]]]
    """Numbers of pairs, and the tokens to be predicted."""

    @property
    def stem(self) -> tuple[int, ...]:
        """The inputs before those whose outputs are looked at."""
        return self.inputs[: len(self.inputs) - self.predicting]


Report = Callable[[int], None]
T = TypeVar("T")


@torch.no_grad()
def score(
    model: Transformer,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    context: int,
    batch_tokens: int = 4096,
    report: Report | None = None,
) -> list[Scored]:
    """Log-likelihoods of continuations, each after its prefix.

    Rows are batched by length. A beginning that several of them share, be it a question with several answers
    or the examples before every question of a task, is computed once.

    Args:
        model: Any decoder.
        pairs: Token ids of prefix and continuation, at least one each. Where both together have more than
            ``context`` + 1 tokens, the prefix loses its first ones.
        context: Longest input of the model, tokens.
        batch_tokens: Most tokens in a batch, padding included; a row has at least one batch to itself. Of
            what its rows share, a batch holds keys and values of up to four times as many.
        report: Called with a number of pairs that have been scored since the last call.

    Raises:
        ValueError: A prefix or a continuation is empty, or a continuation is longer than the context.
    """
    rows: dict[tuple[tuple[int, ...], int], _Row] = {}
    for number, (prefix, continuation) in enumerate(pairs):
        if not prefix or not continuation:
            raise ValueError(f"pair {number} has an empty {'continuation' if prefix else 'prefix'}")
        if len(continuation) > context:
            raise ValueError(
                f"pair {number} has a continuation of {len(continuation)} tokens, more than the context "
                f"of {context}"
            )
        whole = (*prefix, *continuation)[-context - 1 :]
        key = whole[:-1], len(continuation)
        rows.setdefault(key, _Row(*key, [])).asked.append((number, tuple(continuation)))
    result: dict[int, Scored] = {}
    with evaluating(model):
        for beginning, members in _families(list(rows.values()), batch_tokens):
            _score_family(model, beginning, members, batch_tokens, result, report)
    return [result[number] for number in range(len(pairs))]


def score_texts(
    model: Transformer,
    texts: Sequence[Sequence[int]],
    context: int,
    prefix_id: int,
    batch_tokens: int = 4096,
    report: Report | None = None,
) -> list[Scored]:
    """Log-likelihoods of whole texts of any length, each token predicted once.

    A text is cut into windows of ``context`` tokens one after the other; the last one begins as much earlier
    as it is shorter. (So does lm-evaluation-harness in its rolling log-likelihoods.)

    Args:
        model: Any decoder.
        texts: Token ids.
        context: Longest input of the model, tokens.
        prefix_id: Stands before a text, for its first token to be predicted from.
        batch_tokens: See :func:`score`.
        report: See :func:`score`; counts windows.

    Returns:
        Of an empty text zero, greedy, and no tokens.
    """
    pairs, owners = [], []
    for owner, text in enumerate(texts):
        ids = [prefix_id, *text]
        for start in range(0, len(text), context):
            stop = min(start + context, len(text))
            first = max(stop - context, 0)
            pairs.append((ids[first : start + 1], ids[start + 1 : stop + 1]))
            owners.append(owner)
    totals = [Scored(0.0, True, 0) for _ in texts]
    for owner, part in zip(owners, score(model, pairs, context, batch_tokens, report), strict=True):
        so_far = totals[owner]
        totals[owner] = Scored(
            so_far.log_likelihood + part.log_likelihood,
            so_far.greedy and part.greedy,
            so_far.tokens + part.tokens,
        )
    return totals


def _score_family(
    model: Transformer,
    beginning: tuple[int, ...],
    rows: list[_Row],
    batch_tokens: int,
    result: dict[int, Scored],
    report: Report | None,
) -> None:
    """Score rows that have a beginning in common, which may be empty."""
    done = len(beginning)
    root = Cache(1, len(model.blocks))
    if done:
        _extend(model, root, [beginning])
    stems: dict[tuple[int, ...], list[_Row]] = {}
    for row in rows:
        stems.setdefault(row.stem[done:], []).append(row)
    # A stem of several rows is computed before them; that of a single one together with it.
    shared, single = [], []
    for stem, members in stems.items():
        if len(members) > 1 and len(stem) >= _LEAST_SHARED:
            shared.append(stem)
        else:
            single += members
    for batch in _batches(single, lambda row: len(row.inputs) - done, batch_tokens, done):
        own = [row.inputs[done:] for row in batch]
        cache = root.select(torch.zeros(len(batch), dtype=torch.long), len(own[0])) if done else None
        _score_batch(model, cache, batch, own, result, report)
    for stem_batch in _batches(shared, len, batch_tokens, done):
        cache = root.select(torch.zeros(len(stem_batch), dtype=torch.long), len(stem_batch[0]))
        _extend(model, cache, stem_batch)
        held = done + len(stem_batch[0])
        branches = [(place, row) for place, stem in enumerate(stem_batch) for row in stems[stem]]
        for part in _batches(branches, lambda branch: branch[1].predicting, batch_tokens, held):
            places = torch.tensor([place for place, _ in part])
            batch = [row for _, row in part]
            own = [row.inputs[len(row.inputs) - row.predicting :] for row in batch]
            _score_batch(model, cache.select(places, len(own[0])), batch, own, result, report)


def _extend(model: Transformer, cache: Cache, rows: Sequence[Sequence[int]]) -> None:
    tokens, counts = padded(rows)
    model.hidden_states(tokens.to(model.embedding.weight.device), cache=cache, counts=counts)


def _score_batch(
    model: Transformer,
    cache: Cache | None,
    rows: Sequence[_Row],
    inputs: Sequence[Sequence[int]],
    result: dict[int, Scored],
    report: Report | None,
) -> None:
    """Score one batch: ``inputs`` of ``rows`` follow what the cache holds."""
    device = model.embedding.weight.device
    tokens, counts = padded(inputs)
    hidden = model.hidden_states(tokens.to(device), cache=cache, counts=counts).flatten(0, 1)
    length = tokens.shape[1]
    asked, wanted = [], []
    for place, (row, count) in enumerate(zip(rows, counts.tolist(), strict=True)):
        end = place * length + count
        asked += row.asked
        wanted += [*range(end - row.predicting, end)] * len(row.asked)
    targets = torch.tensor([token for _, continuation in asked for token in continuation], device=device)
    if wanted != list(range(len(hidden))):
        hidden = hidden[torch.tensor(wanted, device=device)]
    likelihoods, best = _token_scores(model, hidden, targets)
    sizes = [len(continuation) for _, continuation in asked]
    parts = zip(asked, likelihoods.cpu().split(sizes), best.cpu().split(sizes), strict=True)
    for (number, continuation), likelihood, is_best in parts:
        result[number] = Scored(float(likelihood.sum()), bool(is_best.all()), len(continuation))
    if report is not None:
        report(len(asked))


def _token_scores(model: Transformer, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-likelihood ``[N]`` (fp64 nats) of each target, and whether it is the likeliest token.

    The logits of a whole batch are the largest thing in a likelihood: they are made and used in parts.
    """
    size = max(_LOGITS_AT_ONCE // model.output.out_features, 1)
    likelihoods, best = [], []
    for part, wanted in zip(hidden.split(size), targets.split(size), strict=True):
        logits = model.output(part)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        best.append(logits.argmax(-1) == wanted)
        # One pass fewer than logsumexp, and no temporary but its result.
        likelihoods.append(logits.log_softmax(-1).gather(-1, wanted.unsqueeze(-1)).squeeze(-1).double())
    return torch.cat(likelihoods), torch.cat(best)


def _families(rows: list[_Row], batch_tokens: int) -> Iterator[tuple[tuple[int, ...], list[_Row]]]:
    """Rows by a long beginning that they share, which leaves each its last input and what is to be predicted.

    In lexical order, neighbours share more than others do: a family goes on as long as at least half of the
    next row's beginning is what the family shares. One that saves less than half a batch is not worth the
    smaller batches; such rows come last, together.
    """
    lonely: list[_Row] = []
    for shared, family in _runs(sorted(rows, key=lambda row: row.inputs)):
        stems = {row.stem for row in family}
        if 2 * len(shared) * (len(stems) - 1) >= batch_tokens:
            yield shared, family
        else:
            lonely += family
    if lonely:
        yield (), lonely


def _runs(ordered: list[_Row]) -> Iterator[tuple[tuple[int, ...], list[_Row]]]:
    family: list[_Row] = []
    shared: tuple[int, ...] = ()
    for row in ordered:
        stem = row.stem
        common = _common(shared, stem)
        if family and common >= max(_LEAST_SHARED, len(stem) // 2, len(shared) // 2):
            shared = shared[:common]
            family.append(row)
            continue
        if family:
            yield shared, family
        family, shared = [row], stem
    if family:
        yield shared, family


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that two sequences begin with alike."""
    for place, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return place
    return min(len(a), len(b))


def _batches(
    items: list[T], length: Callable[[T], int], batch_tokens: int, held: int = 0
) -> Iterator[list[T]]:
    """Items of like lengths together, the longest first: what does not fit into memory shows at once.

    Args:
        items: What to batch.
        length: Tokens of an item, at least one.
        batch_tokens: Most tokens of a batch, padding included.
        held: Tokens that a cache holds of each item besides.
    """
    batch: list[T] = []
    for item in sorted(items, key=length, reverse=True):
        if batch:
            rows, longest = len(batch) + 1, length(batch[0])
            if rows * longest > batch_tokens or rows * (held + longest) > _HELD * batch_tokens:
                yield batch
                batch = []
        batch.append(item)
    if batch:
        yield batch
