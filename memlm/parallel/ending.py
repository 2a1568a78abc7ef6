"""Ranks that end together: whoever is told to, all end after the same batch."""

import torch.distributed as dist


class Ending:
    """Agrees, without a collective, after which batch all ranks end.

    A rank that wants to end says so after a batch. The others are in that batch or in the next, for every
    batch has collectives of all ranks; so all know it after the next, and that is the last.

    Args:
        store: Of all ranks; not used for anything else.
    """

    def __init__(self, store: dist.Store) -> None:
        self._store = store
        self._batch = 0

    def agreed(self, wanted: bool) -> bool:
        """Whether this batch is the last, or the last is past; every rank asks after every batch.

        Args:
            wanted: Whether this rank wants to end.
        """
        self._batch += 1
        if wanted:
            self._store.compare_set("last", "", str(self._batch + 1))
        return self._store.check(["last"]) and self._batch >= int(self._store.get("last"))
