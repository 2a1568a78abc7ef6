"""A checkpoint that is written while training goes on."""

import threading
from collections.abc import Callable


class BackgroundSave:
    """Writes in a thread of its own, and then does what depends on the checkpoint's being there.

    The thread dies with its process: what it was writing is then not in place, and what was there before is.

    Args:
        write: Returns when the checkpoint is in place.
    """

    def __init__(self, write: Callable[[], None]) -> None:
        self._write = write
        self._actions: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self.placed = False
        """Whether the checkpoint is in place."""
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="background save", daemon=True)
        self._thread.start()

    def then(self, action: Callable[[], None]) -> None:
        """Do something once the checkpoint is in place: in this thread if it is, else in the other."""
        with self._lock:
            if not self.placed:
                self._actions.append(action)
                return
        action()

    def wait(self, seconds: float | None = None) -> None:
        """Wait until all is done, or some time has passed.

        Raises:
            Exception: What has failed in the thread.
        """
        self._thread.join(seconds)
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._write()
            with self._lock:
                self.placed = True
            for action in self._actions:
                action()
        except BaseException as error:  # raised by wait()
            self._error = error
