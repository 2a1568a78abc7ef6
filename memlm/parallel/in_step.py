"""Evaluation on ranks that need each other for every forward pass, each of other texts."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from memlm.generation.decoding import evaluating
from memlm.memory import MemoryPool
from memlm.memory.exchange import Arriving, Exchange
from memlm.transformer import Transformer
from memlm.transformer.recomputation import unrecorded


@contextmanager
def in_step(model: Transformer, context: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Within it ranks may run a split model on different inputs, and different numbers of times.

    Before each forward pass, ranks tell each other how many tokens they have. What a memory group exchanges
    is padded to the most of all ranks. A rank that leaves the block stays to run the model on a single token
    for as long as others go on. No gradients are made in it.

    Args:
        model: Split over all ranks, each of which must enter the block.
        context: Under which others run the model (autocast): who waits must send as many bytes as they.
    """
    steps = _Steps(model)
    before = model.register_forward_pre_hook(steps.begin, prepend=True)
    after = model.register_forward_hook(steps.end, always_call=True)
    try:
        with torch.no_grad():
            yield
            with evaluating(model), unrecorded([model]), context():
                steps.wait()
    finally:
        before.remove()
        after.remove()


class _Steps:
    """The forward passes of all ranks, one after the other.

    Args:
        model: Split over all ranks.
    """

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self._device = model.embedding.weight.device
        pools = (cast(MemoryPool, pool) for pool in model.pools.values())
        self._exchanges = [(pool, pool.exchange) for pool in pools if pool.exchange is not None]
        self._waiting = False

    @torch.compiler.disable
    def begin(self, module: Any, arguments: tuple[Any, ...]) -> None:
        """Before a forward pass; all ranks have one now."""
        if self._waiting:
            most = self._most  # told with the question whether others go on
        else:
            most = self._tell(True, arguments[0].numel())
        for pool, exchange in self._exchanges:
            pool.exchange = _Padded(exchange, arguments[0].numel(), most)

    @torch.compiler.disable
    def end(self, *_: Any) -> None:
        """After it."""
        for pool, exchange in self._exchanges:
            pool.exchange = exchange

    def wait(self) -> None:
        """Run the model as often as others do."""
        self._waiting = True
        while (most := self._tell(False, 1)) > 0:
            self._most = most
            self.model(torch.zeros(1, 1, dtype=torch.long, device=self._device), hidden=True)

    def _tell(self, going: bool, tokens: int) -> int:
        """The most tokens that a rank has; 0 if none has a pass to make."""
        both = torch.tensor([int(going), tokens], device=self._device)
        dist.all_reduce(both, op=dist.ReduceOp.MAX)
        anyone, most = both.tolist()
        return int(anyone * most)


class _Padded:
    """An exchange among ranks of different numbers of tokens: each sends as many as the one that has most.

    Args:
        exchange: Of equally many.
        own: Tokens of this rank. What is exchanged has them, or a multiple of them, as its first dimension.
        most: Tokens of the rank that has most.
    """

    def __init__(self, exchange: Exchange, own: int, most: int) -> None:
        self.size, self.rank = exchange.size, exchange.rank
        self._exchange, self._own, self._most = exchange, own, most

    def gather(self, x: Tensor) -> Arriving:
        """See :class:`memlm.memory.exchange.Exchange`, also of the others."""
        return self._exchange.gather(self._padded(x))

    def columns_to_tokens(self, x: Tensor) -> Arriving:
        return self._cut(self._exchange.columns_to_tokens(x))

    def tokens_to_columns(self, x: Tensor) -> Arriving:
        return self._exchange.tokens_to_columns(self._padded(x))

    def sum_to_tokens(self, x: Tensor) -> Arriving:
        return self._cut(self._exchange.sum_to_tokens(x))

    def _padded(self, x: Tensor) -> Tensor:
        """With slots and weights of zero, which read nothing of a row that there is."""
        if self._own == self._most:
            return x
        return torch.cat([x, x.new_zeros(len(x) // self._own * (self._most - self._own), *x.shape[1:])])

    def _cut(self, arriving: Arriving) -> Arriving:
        def own() -> Tensor:
            x = arriving()
            return x[: len(x) // self._most * self._own]

        return own
