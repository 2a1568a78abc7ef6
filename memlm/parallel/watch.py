"""Says which rank died or hangs, and ends those that would wait for it.

A rank that is killed leaves the others in a collective: gloo then raises an error of a closed connection that
names an address, NCCL waits for its time-out. So a thread of each rank counts up in the store at which the
ranks met, and looks whether its neighbour does: ten small requests a second of each rank, of however many.
"""

import os
import socket
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from memlm.parallel.agreement import digest_of

EVERY = 0.5
"""Seconds between beats."""
PATIENCE = 30.0
"""Seconds without a beat after which a rank counts as lost."""
PATIENCE_AFTER_FAILURE = 2.5
"""The same once some rank has failed."""
GRACE = 5.0
"""Seconds that a process is given to end by itself, once a rank is lost."""
GRACE_AFTER_REFUSAL = 10.0
"""The same once some rank has ended for a reason that a user can mend."""


class Watch:
    """Beats for this rank, and watches the next one; all ranks have one.

    Args:
        rank: Of this process.
        world: Number of ranks.
        address: Of the store.
        port: Of the store.
    """

    def __init__(self, rank: int, world: int, address: str, port: int) -> None:
        self.rank, self.next = rank, (rank + 1) % world
        self._stopped, self._lost = threading.Event(), threading.Event()
        self._message = ""
        store = _client(address, port)
        # A process may have several, one after the other, all ranks equally many.
        self._number = store.add(f"memlm_watches/{rank}", 1)
        self._address, self._port = address, port
        self._store = dist.PrefixStore(f"memlm_watch_{self._number}", store)
        self._store.set(f"who/{rank}", f"rank {rank} (process {os.getpid()} on {socket.gethostname()})")
        self._store.add(f"beat/{rank}", 1)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def meeting_place(self) -> dist.Store:
        """A store of the ranks with this watch: whoever waits in it does not hold up the watch."""
        return dist.PrefixStore(f"memlm_meeting_{self._number}", _client(self._address, self._port))

    def refuse(self, line: str) -> bool:
        """Tell the others that this rank ends for a reason that a user can mend; they end, too.

        Args:
            line: What there is to say.

        Returns:
            Whether it is for this rank to say it: no other has said the same.
        """
        try:
            self._store.set("refused", "1")
            return self._store.add(f"said/{digest_of([line])}", 1) == 1
        except RuntimeError:  # of a store that is gone
            return True

    def refused(self) -> bool:
        """Whether some rank has ended for a reason that a user can mend, and has said it."""
        try:
            return self._store.check(["refused"])
        except RuntimeError:
            return False

    def explain(self, error: BaseException) -> str | None:
        """What another rank's end has to do with an error of this one; looks for some seconds.

        Args:
            error: Which ends this process.

        Returns:
            A line that names the rank that is lost or was the first to fail; None if it was this one.
        """
        try:
            self._store.set("failed", "1")
            if self._store.add("failures", 1) == 1:
                self._store.set("first", f"{self.rank} {type(error).__name__}: {error}"[:500])
            if self._lost.wait(PATIENCE_AFTER_FAILURE + 4 * EVERY):
                return self._message
            rank, reason = self._store.get("first").decode().split(" ", 1)
        except RuntimeError:  # of a store that is gone
            return self._message or _STORE_GONE
        return None if int(rank) == self.rank else f"rank {rank} failed first: {reason}"

    def stop(self) -> None:
        """This rank ends as it should, or has said why."""
        self._stopped.set()
        self._thread.join(timeout=GRACE)

    # -- helpers

    def _run(self) -> None:
        try:
            found = self._watch()
        except RuntimeError:
            found = _STORE_GONE
            # The rank that has the store may just have ended before this one.
            if self._stopped.wait(GRACE):
                return
        if found is None:
            return
        if found == _REFUSED:
            if not self._stopped.wait(GRACE_AFTER_REFUSAL):
                os._exit(2)
            return
        self._message = found
        self._lost.set()
        if not self._stopped.wait(GRACE + PATIENCE_AFTER_FAILURE):
            print(f"memlm: rank {self.rank} ends: {found}", file=sys.stderr, flush=True)
            os._exit(1)

    def _watch(self) -> str | None:
        """Waits until a rank is lost, and says which; None if this one has stopped."""
        store = self._store
        last, since = -1, time.monotonic()
        while not self._stopped.wait(EVERY):
            store.add(f"beat/{self.rank}", 1)
            if store.check(["refused"]):
                return _REFUSED
            beat = store.add(f"beat/{self.next}", 0)
            if beat != last or store.check([f"left/{self.next}"]):
                last, since = beat, time.monotonic()
            patience = PATIENCE_AFTER_FAILURE if store.check(["failed"]) else PATIENCE
            if (silent := time.monotonic() - since) > patience and not store.check(["lost"]):
                who = store.get(f"who/{self.next}").decode()
                store.set("lost", f"{who} has not answered for {silent:.0f} s: it was killed, or hangs")
            if store.check(["lost"]):
                return store.get("lost").decode()
        store.set(f"left/{self.rank}", "1")
        return None


_REFUSED = "refused"
_STORE_GONE = "rank 0, or its launcher, at whose store the ranks meet, no longer answers: it was killed"


def _client(address: str, port: int) -> dist.TCPStore:
    return dist.TCPStore(
        address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=PATIENCE)
    )
