"""From documents to rows of a fixed number of tokens.

A document is its tokens after one end-of-document token: ``eos t1 ... tn``. That token tells the model that a
document begins, so the first real token is predicted from it and from nothing else when attention is confined
to documents; and as the beginning of the next document it is what the last token must predict.

A row is T + 1 consecutive tokens, of which the first T are inputs and the last T are targets. The policies:

- ``concatenate``: one stream of all documents is cut every T tokens. Every token is a target once, nothing is
  padded, and a row may hold (parts of) several documents.
- ``documents``: no row holds two documents. A shorter document is padded, with no loss on the padding; a
  longer one goes on in the next row, so nothing is cut off.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from memlm.metrics import IGNORED

Packing = Literal["concatenate", "documents"]

Tokens = NDArray[np.int32]
Position = dict[str, int]


def concatenate(
    documents: Iterable[tuple[Position, Tokens]], length: int
) -> Iterator[tuple[Tokens, Position]]:
    """Cut the stream of documents into rows.

    Args:
        documents: Each document's position and tokens (from the offset ``position["token"]`` on).
        length: T.

    Yields:
        A row of T + 1 tokens (fewer in the last row of a finite stream) and the position where the next row
        starts: that of the document that holds its first token, with the offset in it as ``token``.
    """
    waiting: deque[tuple[Position, Tokens]] = deque()
    available = 0
    for position, tokens in documents:
        waiting.append((position, tokens))
        available += len(tokens)
        while available > length:
            row = np.concatenate(_first_tokens(waiting, length + 1))
            _drop(waiting, length)
            available -= length
            yield row, waiting[0][0]
    if available > 1:  # a single token left has been the last target already
        yield np.concatenate([tokens for _, tokens in waiting]), waiting[-1][0]


def _first_tokens(waiting: deque[tuple[Position, Tokens]], count: int) -> list[Tokens]:
    parts = []
    for _, tokens in waiting:
        parts.append(tokens[:count])
        count -= len(parts[-1])
        if count == 0:
            break
    return parts


def _drop(waiting: deque[tuple[Position, Tokens]], count: int) -> None:
    while count >= len(waiting[0][1]):
        count -= len(waiting.popleft()[1])
    position, tokens = waiting[0]
    waiting[0] = {**position, "token": position["token"] + count}, tokens[count:]


def one_document_a_row(
    documents: Iterable[tuple[Position, Tokens]], length: int, eos: int
) -> Iterator[tuple[Tokens, Position]]:
    """Give every document rows of its own.

    Args:
        documents: As for `concatenate`; positions count documents by their ``record``.
        length: T.
        eos: The end-of-document token, which the last token of a document has to predict.

    Yields:
        A row of at most T + 1 tokens and the position where the next row starts.
    """
    for position, tokens in documents:
        rest = np.append(tokens, np.int32(eos))
        for first in range(0, len(rest) - 1, length):
            if first + length < len(rest) - 1:
                after = {**position, "token": position["token"] + first + length}
            else:
                after = {**position, "record": position["record"] + 1, "token": 0}
            yield rest[first : first + length + 1], after


def batch_of_rows(rows: list[Tokens], length: int, eos: int, confine_attention: bool) -> dict[str, Any]:
    """Inputs and targets of rows, padded to T.

    Args:
        rows: B rows of at most T + 1 tokens; an empty row is padding throughout.
        length: T.
        eos: Fills the padding.
        confine_attention: Whether to number the documents of each row.

    Returns:
        ``tokens`` and ``targets`` int64 [B, T], and ``documents`` int64 [B, T] if wanted.
    """
    padded = np.full((len(rows), length + 1), eos, dtype=np.int64)
    targets = np.full((len(rows), length), IGNORED, dtype=np.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
        targets[i, : max(len(row) - 1, 0)] = row[1:]
    return as_batch(padded[:, :-1], targets, eos, confine_attention)


def as_batch(
    tokens: NDArray[np.int64], targets: NDArray[np.int64], eos: int, confine_attention: bool
) -> dict[str, Any]:
    """A batch dict of arrays [B, T]; a document starts at every end-of-document token."""
    batch = {
        "tokens": torch.from_numpy(np.ascontiguousarray(tokens)),
        "targets": torch.from_numpy(np.ascontiguousarray(targets)),
    }
    if confine_attention:
        started = np.cumsum(tokens == eos, axis=1)
        batch["documents"] = torch.from_numpy(started - started[:, :1])
    return batch
