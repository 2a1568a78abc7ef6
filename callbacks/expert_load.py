"""How evenly the mixture-of-experts layers use their experts."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from memlm.errors import ConfigError
from memlm.transformer.mixture_of_experts import MixtureOfExperts


class ExpertLoad(Callback):
    """Logs, for every block with experts, how its tokens are spread over them.

    The load of an expert is how many tokens use it. Over all evaluation batches, with validation
    (``test/...`` likewise with a test):

    - ``experts/<block>/max_load``: the largest load over the mean; 1 if even, at most the number of experts
      over ``top_k``. With experts on several devices the slowest one takes that much longer;
    - ``experts/<block>/idle``: share of the experts that no token uses;
    - ``experts/<block>/evenness``: entropy of the loads' shares over its maximum, log of the number of
      experts; 1 if even, 0 if all tokens use one.

    The same of the sampled training steps since the previous validation, as ``..._in_training``. With
    ``expert_choice`` the load is even there by construction, and logged instead is

    - ``experts/<block>/unchosen_in_training``: share of the tokens that no expert chose.

    Padding counts like other tokens, and so do the rows of padding that give several processes equally many.
    Loads are summed where they are, and looked at only when an evaluation ends.

    Args:
        every_n_steps: Every how many optimizer steps a training step is sampled.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        if every_n_steps < 1:
            raise ConfigError(
                "trainer.callbacks: ExpertLoad.every_n_steps", f"is {every_n_steps}, must be at least 1 step"
            )
        self.every_n_steps = every_n_steps
        self._training: dict[str, Tensor] = {}
        """Loads [E] of each block since the last validation."""
        self._unchosen: dict[str, Tensor] = {}
        """Shares of tokens that no expert chose, summed, and their number [2], likewise."""
        self._evaluation: dict[str, Tensor] = {}
        """Loads in the evaluation that runs."""
        self._loads: dict[str, Tensor] | None = None
        """Which of the two the tokens of this moment belong to, if any."""
        self._observed: list[tuple[MixtureOfExperts, Callable[[Tensor], None]]] = []
        self._said = False

    # -- observing

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self._remove_observers()
        for name, layer in pl_module.transformer.named_modules():
            if isinstance(layer, MixtureOfExperts):
                observer = partial(self._observe, block_of(name), layer)
                layer.observers.append(observer)
                self._observed.append((layer, observer))
        if not self._observed and not self._said:
            rank_zero_info("ExpertLoad does nothing: the model has no experts.")
            self._said = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._remove_observers()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._remove_observers()  # there is no teardown then

    def _remove_observers(self) -> None:
        for layer, observer in self._observed:
            layer.observers.remove(observer)
        self._observed = []
        self._loads = None

    def _observe(self, block: str, layer: MixtureOfExperts, counts: Tensor) -> None:
        """Adds the loads ``[E]`` of one forward pass, or the share that no expert chose."""
        if self._loads is None:
            return
        if layer.training and layer.config.routing == "expert_choice":
            # That of the step so far: its first micro-batches count in the shares of the later ones too.
            share = layer.unchosen().double()
            _add(self._unchosen, block, torch.stack((share, torch.ones_like(share))))
        else:
            _add(self._loads, block, counts)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for sums in (self._training, self._unchosen):
            sums |= {block: values.to(pl_module.device) for block, values in sums.items()}

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            self._loads = self._training

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._loads = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluation = {}

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._loads = self._evaluation

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._loads = None

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluation = {}

    def on_test_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._loads = self._evaluation

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._loads = None

    # -- reporting

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self._log_loads(trainer, pl_module, self._evaluation, "", "")
        self._log_loads(trainer, pl_module, self._training, "", "_in_training")
        for block, sums in self._unchosen.items():
            share, number = _over_ranks(trainer, sums)
            name = f"experts/{block}/unchosen_in_training"
            pl_module.log(name, (share / number).float(), sync_dist=True)
        self._evaluation, self._training, self._unchosen = {}, {}, {}

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log_loads(trainer, pl_module, self._evaluation, "test/", "")
        self._evaluation = {}

    def _log_loads(
        self, trainer: Trainer, pl_module: LightningModule, sums: dict[str, Tensor], prefix: str, suffix: str
    ) -> None:
        for block, loads in sums.items():
            loads = _over_ranks(trainer, loads)
            values = {"max_load": max_load(loads), "idle": idle(loads), "evenness": evenness(loads)}
            for name, value in values.items():
                pl_module.log(f"{prefix}experts/{block}/{name}{suffix}", value.float(), sync_dist=True)

    # -- checkpoints

    def state_dict(self) -> dict[str, Any]:
        return {"training": dict(self._training), "unchosen": dict(self._unchosen)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._training, self._unchosen = dict(state_dict["training"]), dict(state_dict["unchosen"])


def max_load(loads: Tensor) -> Tensor:
    """Largest of the loads ``[E]`` over their mean, a scalar."""
    return loads.max() / loads.double().mean()


def idle(loads: Tensor) -> Tensor:
    """Share (scalar) of the loads ``[E]`` that are zero."""
    return (loads == 0).double().mean()


def evenness(loads: Tensor) -> Tensor:
    """Entropy of the shares of the loads ``[E]``, over that of an even load; a scalar in [0, 1]."""
    shares = loads / loads.sum()
    return torch.special.entr(shares).sum() / torch.log(torch.tensor(float(len(loads)), device=loads.device))


def block_of(name: str) -> str:
    """Number of the block in a module's name such as ``blocks.3.feed_forward``."""
    return next((part for part in name.split(".") if part.isdigit()), name)


def _add(sums: dict[str, Tensor], block: str, values: Tensor) -> None:
    sums[block] = sums[block] + values if block in sums else values


def _over_ranks(trainer: Trainer, sums: Tensor) -> Tensor:
    return trainer.strategy.reduce(sums, reduce_op="sum")
