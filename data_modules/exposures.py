"""How often facts are trained in an epoch, where that differs from fact to fact."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class Exposures:
    """Numbers of exposures that trained facts take in turn.

    Args:
        per_epoch: How often the facts 0, 1, ... are trained in an epoch, over and over.

    Attributes:
        levels: The different numbers among them, ascending.
    """

    def __init__(self, per_epoch: Sequence[int]) -> None:
        self._per_epoch = np.array(per_epoch)
        self.levels = tuple(sorted(set(per_epoch)))

    def of(self, facts: NDArray[np.int64]) -> NDArray[np.int64]:
        """How often facts of these numbers are trained."""
        return self._per_epoch[facts % len(self._per_epoch)]

    def batch(self, facts: NDArray[np.int64], group: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        """What a batch of questions says of them (``exposures``, index into ``levels``); nothing if all are
        trained equally often.

        Args:
            facts: Number of each question's fact, int64 [B].
            group: Its group, int64 [B]; only those of groups 0 and 1 are trained, others get -1.
        """
        if len(self.levels) < 2:
            return {}
        level = np.searchsorted(np.array(self.levels), self.of(facts))
        return {"exposures": np.where((group == 0) | (group == 1), level, -1)}
