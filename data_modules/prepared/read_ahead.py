"""A thread that reads on while the results of what it read are worked on, by so much and no more."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class ReadAhead(Generic[Item]):
    """Makes items in a thread of its own.

    The thread does not begin another item while those that were made and not released are as large as the
    limit. So at most one item more than the limit is held, however large single items are.

    Args:
        items: Made in the thread.
        size: Of an item.
        limit: On the sizes of all items that are not released.
    """

    def __init__(self, items: Iterator[Item], size: Callable[[Item], int], limit: int) -> None:
        self._items = items
        self._size = size
        self._limit = limit
        self._ready: deque[Item] = deque()
        self._held = 0
        self._ended = self._closed = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._make, name="read ahead", daemon=True)

    def __enter__(self) -> "ReadAhead[Item]":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def take(self, wait: bool) -> Item | None:
        """The next item.

        Args:
            wait: Whether to wait for it.

        Returns:
            None if there is none, now or (after waiting) ever.

        Raises:
            BaseException: What making the items raised, after those before it were taken.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._ended or not wait)
            if self._ready:
                return self._ready.popleft()
            if self._error is not None:
                raise self._error
            return None

    def release(self, item: Item) -> None:
        """Say that an item taken is held no longer."""
        with self._changed:
            self._held -= self._size(item)
            self._changed.notify_all()

    def _make(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._held < self._limit or self._closed)
                    if self._closed:
                        return
                item = next(self._items, None)
                if item is None:
                    return
                with self._changed:
                    self._ready.append(item)
                    self._held += self._size(item)
                    self._changed.notify_all()
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()
