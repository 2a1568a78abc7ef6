"""Activation checkpointing: a block's inner results are forgotten, and computed again for its gradients."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@torch.compiler.disable(recursive=False)
def recomputed(compute: Callable[[], Tensor], modules: Iterable[nn.Module]) -> Tensor:
    """What ``compute`` returns, of which nothing is kept for the backward pass: that computes it once more.

    What it does beside, on the first time, is not done again: see :func:`unrecorded`. Nothing in it may be
    random.

    Args:
        compute: Gives the same tensor each time.
        modules: That it uses, with those inside them.
    """
    first = True

    @torch.compiler.disable(recursive=False)
    def run() -> Tensor:
        nonlocal first
        again, first = not first, False
        with unrecorded(modules) if again else nullcontext():
            return compute()

    result = checkpoint(run, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(result, Tensor)
    return result


@contextmanager
def unrecorded(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within it modules compute as ever, but no observer is told, nothing counted, and no statistics moved.

    Args:
        modules: With those inside them.
    """
    # The last two are BatchNorm's: its running statistics are moved by nothing.
    neutral = {"observers": [], "recording": False, "momentum": 0.0, "num_batches_tracked": None}
    changed = []
    for module in (inner for outer in modules for inner in outer.modules()):
        for name, value in neutral.items():
            if hasattr(module, name):
                changed.append((module, name, getattr(module, name)))
                setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in changed:
            setattr(module, name, value)
