"""What is measured of a language model: loss, perplexity, bits per byte, factual recall."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

IGNORED = -100
"""Target that is not counted."""

RECALL_GROUPS = ("recall", "recall_seen_phrasing", "recall_control")
"""Metric name of each value of a batch's ``group``: held-out phrasing, trained phrasing, untrained facts."""


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed next-token loss (nats), in fp32 (fp64 for fp64 logits); 0 if no target is counted.

    Args:
        logits: ``[B, T, vocab]``.
        targets: ``[B, T]`` int64, -100 where not counted.
    """
    logits = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum")


class TokenLoss(Metric):
    """Loss per token (nats), perplexity, and bits per UTF-8 byte of the counted targets.

    Bits per byte, ``nats / ln 2 / bytes``, compares models across tokenizers. Of several sets of data each
    has its own figures, and there are those of all their tokens together.

    Args:
        token_bytes: ``[vocab]`` bytes of text that each token stands for; None if unknown, then no
            bits per byte are reported.
        sets: Names of the sets.
    """

    full_state_update = False
    token_bytes: Tensor | None
    nats: Tensor
    tokens: Tensor
    bytes: Tensor

    def __init__(self, token_bytes: Tensor | None = None, sets: Sequence[str] = ("all",)) -> None:
        super().__init__()
        self.register_buffer("token_bytes", token_bytes, persistent=False)
        self.sets = tuple(sets)
        for name in ("nats", "tokens", "bytes"):
            self.add_state(name, torch.zeros(len(sets), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor, index: int = 0) -> None:
        """Add a batch.

        Args:
            logits: ``[B, T, vocab]``.
            targets: ``[B, T]`` int64, -100 where not counted.
            index: Which of the sets the batch is of.
        """
        counted = targets != IGNORED
        self.nats[index] += summed_loss(logits, targets).double()
        self.tokens[index] += counted.sum()
        if self.token_bytes is not None:
            self.bytes[index] += self.token_bytes[targets.clamp(min=0)].mul(counted).sum()

    def compute(self) -> dict[str, Tensor]:
        """``loss`` and so on over all sets, and if there are several also ``NAME/loss`` and so on.

        What has no counted target is left out.
        """
        result = self._figures(self.nats.sum(), self.tokens.sum(), self.bytes.sum())
        if len(self.sets) > 1:
            for name, *sums in zip(self.sets, self.nats, self.tokens, self.bytes, strict=True):
                result |= {f"{name}/{key}": value for key, value in self._figures(*sums).items()}
        return result

    @staticmethod
    def _figures(nats: Tensor, tokens: Tensor, size: Tensor) -> dict[str, Tensor]:
        if not tokens:
            return {}
        loss = nats / tokens
        figures = {"loss": loss.float(), "perplexity": loss.exp().float()}
        if size:
            figures["bits_per_byte"] = (nats / math.log(2) / size).float()
        return figures


class FactRecall(Metric):
    """Share of facts whose whole answer the model ranks first, token by token.

    With the right prefix given, all answer tokens ranking first is the same as greedy decoding
    producing exactly the answer. Where facts were trained unequally often, those of each frequency have
    figures of their own, too.

    Args:
        exposures: The different numbers of times that facts occur in an epoch; one alone tells nothing.
    """

    full_state_update = False
    recalled: Tensor
    asked: Tensor

    def __init__(self, exposures: Sequence[int] = ()) -> None:
        super().__init__()
        self.exposures = tuple(exposures) if len(exposures) > 1 else ()
        for name in ("recalled", "asked"):
            # The last column: facts that are not told apart by exposures (all of the control).
            zeros = torch.zeros(len(RECALL_GROUPS), len(self.exposures) + 1, dtype=torch.float64)
            self.add_state(name, zeros, dist_reduce_fx="sum")

    def update(self, logits: Tensor, answers: Tensor, group: Tensor, exposures: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            logits: ``[B, T, vocab]``.
            answers: ``[B, T]`` int64, -100 where nothing is asked; rows without any answer do not count.
            group: ``[B]`` int64, index into RECALL_GROUPS; rows of group -1 (padding) do not count.
            exposures: ``[B]`` int64, index into the numbers of exposures, -1 for facts never trained.
        """
        expected = answers != IGNORED
        asked = (expected.any(dim=1) & (group >= 0)).double()
        recalled = ((logits.argmax(-1) == answers) | ~expected).all(dim=1) * asked
        columns = len(self.exposures) + 1
        column = exposures if exposures is not None and columns > 1 else torch.full_like(group, -1)
        index = group.clamp(min=0) * columns + torch.where(column < 0, columns - 1, column)
        self.recalled.view(-1).index_add_(0, index, recalled)
        self.asked.view(-1).index_add_(0, index, asked)

    def compute(self) -> dict[str, Tensor]:
        """Recall of every group that was asked for; and of its facts of 4 exposures as ``recall_4x``."""
        result = {}
        for name, recalled, asked in zip(RECALL_GROUPS, self.recalled, self.asked, strict=True):
            if asked.sum():
                result[name] = (recalled.sum() / asked.sum()).float()
            for times, right, count in zip(self.exposures, recalled, asked, strict=False):
                if count:
                    result[f"{name}_{times}x"] = (right / count).float()
        return result
