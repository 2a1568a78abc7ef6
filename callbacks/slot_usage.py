"""How evenly a memory model uses its slots."""

import json
import math
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from callbacks.run_folder import run_folder
from memlm.errors import ConfigError
from memlm.memory import MemoryPool
from memlm.metrics import IGNORED
from memlm.run_directory import write_json


class SlotUsage(Callback):
    """Logs, for every pool, the share of its slots that are read and how unevenly they are.

    As in Large Memory Layers with Product Keys (arXiv 1907.05242, section 4.3), over all evaluation batches:
    ``w`` is the read weight of each slot, summed over tokens, heads and layers that share the pool, and
    normalised to one. Of pre-values (``<pool>_down``) every read weighs one; with them the weight of a value
    is the size of what it is multiplied by, ``|softmax weight * activation|``. With validation (``test/...``
    likewise with a test):

    - ``memory/<pool>/slots_read``: share of the slots with a weight above zero;
    - ``memory/<pool>/kl_from_uniform``: ``log S + sum w log w``, nats; 0 if all slots weigh the same, log S
      if all weight lies on one;
    - ``memory/<pool>/slots_read_in_training``: share of the slots with a weight above zero in the sampled
      training steps since the previous validation. An evaluation set that is small or unlike the training
      data leaves slots unread that training does use; slots unread here are dead.

    Positions after the last one of a row that counts in a loss or an answer, such as padding, are left out.

    ``slot_usage.json`` in the run directory holds the same, with the heaviest slots, for the last validation
    (``val``) and the last test (``test``). The weights are summed where they are, in one fp64 number a slot,
    and looked at only when an evaluation ends.

    Args:
        every_n_steps: Every how many optimizer steps a training step is sampled.
        heaviest: How many of the heaviest slots of each pool the file lists, with their shares of the weight.
    """

    def __init__(self, every_n_steps: int = 10, heaviest: int = 10) -> None:
        if every_n_steps < 1:
            raise ConfigError(
                "trainer.callbacks: SlotUsage.every_n_steps", f"is {every_n_steps}, must be at least 1 step"
            )
        if heaviest < 0:
            raise ConfigError("trainer.callbacks: SlotUsage.heaviest", f"is {heaviest}, must not be negative")
        self.every_n_steps = every_n_steps
        self.heaviest = heaviest
        self._training: dict[str, Tensor] = {}
        """Summed read weights [S] of each pool since the last validation."""
        self._evaluation: dict[str, Tensor] = {}
        """Likewise in the evaluation that runs."""
        self._sums: dict[str, Tensor] | None = None
        """Which of the two the reads of this moment belong to, if any."""
        self._counted: Tensor | None = None
        """Which tokens [N] of the batch count."""
        self._observed: list[tuple[MemoryPool, Any]] = []
        self._report: dict[str, Any] = {}
        self._said = False

    # -- observing

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self._remove_observers()
        if not pl_module.pools and not self._said:
            rank_zero_info("SlotUsage does nothing: the model has no memory.")
            self._said = True
        for name, pool in pl_module.pools.items():
            observer = partial(self._observe, name, pool.slots)
            pool.observers.append(observer)
            self._observed.append((pool, observer))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._remove_observers()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._remove_observers()  # there is no teardown then

    def _remove_observers(self) -> None:
        for pool, observer in self._observed:
            pool.observers.remove(observer)
        self._observed = []
        self._sums = None

    def _observe(self, name: str, size: int, slots: Tensor, weights: Tensor) -> None:
        """Adds the reads ``[N, L]`` of one layer to a pool of ``size`` slots.

        ``N`` is the batch's tokens, or a multiple of them where each token reads in several parts.
        """
        if self._sums is None or self._counted is None:
            return
        sums = self._sums.get(name)
        if sums is None:
            sums = self._sums[name] = torch.zeros(size, dtype=torch.float64, device=slots.device)
        tokens = self._counted.repeat_interleave(len(slots) // len(self._counted))
        counted = weights.abs() * tokens.unsqueeze(1)
        sums.index_add_(0, slots.flatten(), counted.flatten().double())

    def _begin(self, sums: dict[str, Tensor], batch: dict[str, Any]) -> None:
        self._sums, self._counted = sums, _counted_positions(batch)

    def _end(self) -> None:
        self._sums = self._counted = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._training = {name: sums.to(pl_module.device) for name, sums in self._training.items()}

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: dict[str, Any], batch_idx: int
    ) -> None:
        if self._observed and trainer.global_step % self.every_n_steps == 0:
            self._begin(self._training, batch)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._end()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluation = {}

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: dict[str, Any], *args: Any
    ) -> None:
        if self._observed:
            self._begin(self._evaluation, batch)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._end()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluation = {}

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: dict[str, Any], *args: Any
    ) -> None:
        self.on_validation_batch_start(trainer, pl_module, batch)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._end()

    # -- reporting

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        pools = self._evaluated(trainer, pl_module, "")
        for name, sums in self._training.items():
            read = (_over_ranks(trainer, sums) > 0).double().mean()
            pl_module.log(f"memory/{name}/slots_read_in_training", read.float(), sync_dist=True)
            pools.setdefault(name, {})["slots_read_in_training"] = read.item()
        self._training = {}
        if trainer.state.fn == TrainerFn.FITTING and pools:
            tokens = getattr(pl_module, "tokens_seen", None)
            self._write(trainer, "val", {"step": trainer.global_step, "tokens": tokens, "pools": pools})

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pools = self._evaluated(trainer, pl_module, "test/")
        if pools:
            self._write(trainer, "test", {"pools": pools})

    def _evaluated(self, trainer: Trainer, pl_module: LightningModule, prefix: str) -> dict[str, Any]:
        """Logs the usage of every pool in the evaluation that ends; returns it with the heaviest slots."""
        pools: dict[str, Any] = {}
        for name, sums in self._evaluation.items():
            sums = _over_ranks(trainer, sums)
            usage = {"slots_read": slots_read(sums), "kl_from_uniform": kl_from_uniform(sums)}
            for metric, value in usage.items():
                pl_module.log(f"{prefix}memory/{name}/{metric}", value.float(), sync_dist=True)
            shares, slots = (sums / sums.sum()).topk(min(self.heaviest, len(sums)))
            heaviest = zip(slots.tolist(), shares.tolist(), strict=True)
            pools[name] = {
                "slots": len(sums),
                **{metric: value.item() for metric, value in usage.items()},
                "heaviest": [{"slot": slot, "share": share} for slot, share in heaviest],
            }
        self._evaluation = {}
        return pools

    def _write(self, trainer: Trainer, stage: str, content: dict[str, Any]) -> None:
        folder = run_folder(trainer)
        if folder is None:
            return
        path = folder / "slot_usage.json"
        earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        write_json(path, earlier | {stage: content})

    # -- checkpoints

    def state_dict(self) -> dict[str, Any]:
        # Empty in a checkpoint that follows a validation; else a byte a slot.
        return {"read_in_training": {name: sums > 0 for name, sums in self._training.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._training = {name: read.double() for name, read in state_dict["read_in_training"].items()}


def slots_read(weights: Tensor) -> Tensor:
    """Share (scalar) of the slots whose summed read weight ``[S]`` is above zero."""
    return (weights > 0).double().mean()


def kl_from_uniform(weights: Tensor) -> Tensor:
    """KL divergence (scalar, nats) of summed read weights ``[S]``, normalised, from uniform ones."""
    return math.log(len(weights)) - torch.special.entr(weights / weights.sum()).sum()


def _over_ranks(trainer: Trainer, sums: Tensor) -> Tensor:
    return trainer.strategy.reduce(sums, reduce_op="sum")


def _counted_positions(batch: dict[str, Any]) -> Tensor:
    """Tokens ``[N]`` (bool) up to the last target or answer of their row: the rest can change no result."""
    measured = batch["targets"] != IGNORED
    if "answers" in batch:
        measured = measured | (batch["answers"] != IGNORED)
    return (measured.flip(1).cumsum(1) > 0).flip(1).flatten()
