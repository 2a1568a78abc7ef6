"""Random state in checkpoints, so that dropout and the like continue where they stopped."""

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info


class RandomState(Callback):
    """Saves the generators of torch (CPU and this process's CUDA device), numpy and Python for every rank.

    They are restored when training starts, after everything that Lightning draws while it sets up (a data
    loader's iterator draws a seed). On another number of ranks there is no exact continuation: then the
    generators stay as ``seed_everything`` left them, and a line says so.
    """

    def __init__(self) -> None:
        self._states: list[dict[str, Any]] | None = None

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        states = [random_state(pl_module.device)]
        if trainer.world_size > 1:
            states = [{} for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(states, random_state(pl_module.device))
        checkpoint["random_state"] = states

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._states = checkpoint.get("random_state")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        states, self._states = self._states, None
        if states is None:
            return
        if len(states) != trainer.world_size:
            rank_zero_info(
                f"The checkpoint holds the random state of {len(states)} processes, this run has "
                f"{trainer.world_size}: random numbers start anew from seed_everything."
            )
            return
        set_random_state(states[trainer.global_rank], pl_module.device)


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of all generators, as tensors and integers: safe for ``torch.load(weights_only=True)``.

    Args:
        device: The device whose CUDA generator is included, if it is one.
    """
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [kind, [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
        "python": [version, list(words), gauss],
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restores what :func:`random_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
