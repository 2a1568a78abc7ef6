"""Counts what a rank really sends, by the convention of :mod:`memlm.parallel.traffic`."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor

from memlm.parallel.traffic import gathered, reduced, scattered


def _all_to_all(call: dict[str, Any], ranks: int, rank: int) -> float:
    sent: Tensor = call["input"]
    splits = call["input_split_sizes"]
    if splits is None or not len(sent):
        return scattered(_bytes(sent), ranks)
    return _bytes(sent) * (1 - splits[rank] / len(sent))


def _gather(call: dict[str, Any], ranks: int, rank: int) -> float:
    return gathered(_bytes(call.get("input_tensor", call.get("tensor"))), ranks)


def _scatter(call: dict[str, Any], ranks: int, rank: int) -> float:
    return scattered(_bytes(call["input"]), ranks)


def _reduce(call: dict[str, Any], ranks: int, rank: int) -> float:
    return reduced(_bytes(call["tensor"]), ranks)


_SENT: dict[str, Callable[[dict[str, Any], int, int], float]] = {
    "all_gather": _gather,
    "all_gather_into_tensor": _gather,
    "all_gather_single": _gather,
    "reduce_scatter_tensor": _scatter,
    "reduce_scatter_single": _scatter,
    "all_to_all_single": _all_to_all,
    "all_reduce": _reduce,
}


class Sent:
    """Bytes that this rank has sent, by collective.

    Attributes:
        bytes: Of each collective's calls, but those of scalars.
        scalars: Of calls with no more than a number for each rank: norms, and counts of rows.
    """

    def __init__(self) -> None:
        self.bytes: dict[str, float] = {}
        self.scalars = 0.0
        self._inside = False

    @property
    def total(self) -> float:
        """All of them but scalars."""
        return sum(self.bytes.values())

    def watch(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose calls are counted, but not those that another watched function makes."""
        signature = inspect.signature(function)

        @functools.wraps(function)
        def counted(*arguments: Any, **options: Any) -> Any:
            if self._inside:
                return function(*arguments, **options)
            bound = signature.bind(*arguments, **options)
            bound.apply_defaults()
            call = bound.arguments
            group = call["group"] or dist.distributed_c10d._get_default_group()
            sent = _SENT[name](call, group.size(), group.rank())
            payload: Any = call.get("input_tensor", call.get("input", call.get("tensor")))
            if payload.numel() <= group.size():
                self.scalars += sent
            else:
                self.bytes[name] = self.bytes.get(name, 0.0) + sent
            self._inside = True
            try:
                return function(*arguments, **options)
            finally:
                self._inside = False

        return counted


@contextmanager
def counted() -> Iterator[Sent]:
    """Within it, calls of torch.distributed's collectives are counted.

    Those that a DTensor makes on its own account are not: here that is the norm of the dense gradients.
    """
    sent = Sent()
    with ExitStack() as stack:
        for name in _SENT:
            if hasattr(dist, name):
                stack.enter_context(patch.object(dist, name, sent.watch(name, getattr(dist, name))))
        yield sent


def _bytes(tensor: Any) -> int:
    return tensor.numel() * tensor.element_size()
