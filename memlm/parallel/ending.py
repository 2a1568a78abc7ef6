"""Ranks that end together: whoever is told to, all end after the same batch."""

import torch.distributed as dist


class Ending:
    """Agrees, without a collective, after which batch all ranks end.

    A rank that wants to end says so after a batch. Every batch has collectives of all ranks, and Lightning
    waits for one at its beginning; but on GPUs a rank that waits for one batch's may have ended that batch
    while another is still launching it. So others may be past the next batch, but not past the one after it:
    all know it by then, and that is the last.

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
            self._store.compare_set("last", "", str(self._batch + 2))
        return self._store.check(["last"]) and self._batch >= int(self._store.get("last"))
