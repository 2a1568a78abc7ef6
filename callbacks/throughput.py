"""Speed of training: tokens a second, share of the device's peak, bytes of values read, waiting for data."""

from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.trainer.states import TrainerFn

from callbacks.peak_flops import peak_flops
from memlm.errors import ConfigError

_FETCH = "[_TrainingEpochLoop].train_dataloader_next"


class Throughput(Callback):
    """Logs how fast training goes, in the rows that the Trainer writes anyway.

    Training seconds run from the first batch on, without validation and what follows it until the next batch
    (checkpoints, samples), and continue over a resume. In every row of training and of validation:

    - ``train/seconds``: training seconds so far.

    About every ``every_n_steps`` (in the first row that ``trainer.log_every_n_steps`` gives at or after a
    multiple of it) and at the last step, over the training seconds since the previous such row:

    - ``train/tokens_per_second``: positions trained on, padding included, over all devices;
    - ``train/model_flops_utilisation``: FLOPs forward and backward (as model.json counts them) over what
      the devices could do at most in that precision; only on GPUs whose peak is known;
    - ``train/value_bytes_per_second``: bytes of value rows that the forward passes read, over all devices;
      memory models only;
    - ``train/data_wait_share``: share of the time in which the loop waited for the data loader to hand over
      the next batch (preparing it, if ``data.num_workers`` is 0); moving it to the device is not included.

    Seconds and waiting are those of the first process. The first step of a process is left out of these: it
    allocates, compiles and warms up. A GPU is waited for only where such a window begins or ends, and before
    validation.

    Args:
        every_n_steps: Optimizer steps between two measurements of speed.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise ConfigError(
                "trainer.callbacks: Throughput.every_n_steps", f"is {every_n_steps}, must be at least 1 step"
            )
        self.every_n_steps = every_n_steps
        self._seconds_before = 0.0
        """Training seconds up to the moment when the clock was last stopped."""
        self._running_since: float | None = None
        self._warm_after = 0
        """The optimizer step that ends the warm-up."""
        self._window: tuple[int, int, float, float] | None = None
        """Step, tokens, training seconds and seconds of waiting at the start of the window."""
        self._measured_step = -1
        self._logged: list[str] = []
        """Metrics of the previous row that hold for that row alone."""
        self._fetches: _FetchTimer | None = None
        self._flops_per_token = 0
        self._value_bytes_per_token = 0

    @property
    def seconds(self) -> float:
        """Training seconds so far."""
        running = 0.0 if self._running_since is None else perf_counter() - self._running_since
        return self._seconds_before + running

    # -- the clock

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._warm_after = trainer.global_step + 1
        self._window = None
        self._running_since = None
        own: Profiler = trainer.profiler  # type: ignore[attr-defined]
        self._fetches = trainer.profiler = _FetchTimer(own, lambda: self._running_since is not None)  # type: ignore[attr-defined]

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        if self._running_since is None:
            self._running_since = perf_counter()
        if not self._flops_per_token:
            counts = pl_module.counts(batch["tokens"].shape[1])
            self._flops_per_token = counts.flops_per_token + counts.backward_flops_per_token
            self._value_bytes_per_token = counts.bytes_read_per_token

    def stop_training_clock(self, device: torch.device) -> None:
        """What follows, until the next batch, is no training."""
        if self._running_since is not None:
            _finish_queued_work(device)
            self._stop()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.stop_training_clock(pl_module.device)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.stop_training_clock(pl_module.device)
        self._release(trainer)
        if self._window is not None and self._measured_step < trainer.global_step > self._window[0]:
            # The last step had no row, or stopped a run that expected to go on.
            metrics = self._measure(trainer, pl_module)
            metrics |= {"train/seconds": self.seconds, "train/tokens": float(pl_module.tokens_seen)}  # type: ignore[arg-type]
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step - 1)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()
        self._release(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seconds_before = state_dict["seconds"]

    def _stop(self) -> None:
        self._seconds_before = self.seconds
        self._running_since = None

    def _release(self, trainer: Trainer) -> None:
        if self._fetches is not None and trainer.profiler is self._fetches:  # type: ignore[attr-defined]
            trainer.profiler = self._fetches.inner  # type: ignore[attr-defined]

    # -- measurements

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._logged:
            _forget(trainer, self._logged)
            self._logged = []
        if trainer.fit_loop._should_accumulate():
            return
        step = trainer.global_step
        if self._window is None:
            if step >= self._warm_after:
                _finish_queued_work(pl_module.device)
                self._window = self._now(trainer, pl_module)
        elif trainer._logger_connector.should_update_logs and (
            step // self.every_n_steps > self._window[0] // self.every_n_steps or step == trainer.max_steps
        ):
            _finish_queued_work(pl_module.device)
            metrics = self._measure(trainer, pl_module)
            for name, value in metrics.items():
                pl_module.log(name, value)
            self._logged = list(metrics)
        if trainer._logger_connector.should_update_logs:
            pl_module.log("train/seconds", self.seconds)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            pl_module.log("train/seconds", self._seconds_before, sync_dist=True)

    def _now(self, trainer: Trainer, pl_module: Any) -> tuple[int, int, float, float]:
        waited = self._fetches.seconds if self._fetches is not None else 0.0
        return trainer.global_step, pl_module.tokens_seen, self.seconds, waited

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Metrics of the window that ends now; begins the next."""
        assert self._window is not None
        _, tokens, seconds, waited = self._window
        self._window = self._now(trainer, pl_module)
        self._measured_step = trainer.global_step
        elapsed = self._window[2] - seconds
        speed = (self._window[1] - tokens) / elapsed
        metrics = {"train/tokens_per_second": speed}
        peak = peak_flops(pl_module.device, str(trainer.precision))
        if peak is not None:
            metrics["train/model_flops_utilisation"] = (
                self._flops_per_token * speed / trainer.world_size / peak
            )
        if self._value_bytes_per_token:
            metrics["train/value_bytes_per_second"] = self._value_bytes_per_token * speed
        metrics["train/data_wait_share"] = (self._window[3] - waited) / elapsed
        return metrics


class _FetchTimer(Profiler):
    """Times the fetching of training batches, and tells the Trainer's own profiler, which it stands in for.

    Neither callbacks nor data modules have a hook before a batch is fetched, and the time between two batches
    holds other callbacks' work and, where metrics are turned into numbers, waiting for the GPU.

    Args:
        inner: The Trainer's own profiler.
        counts: Whether a fetch that ends now belongs to the training seconds.
    """

    def __init__(self, inner: Profiler, counts: Callable[[], bool]) -> None:
        super().__init__()
        self.inner = inner
        self.counts = counts
        self.seconds = 0.0
        self._since = 0.0

    def start(self, action_name: str) -> None:
        self.inner.start(action_name)
        if action_name == _FETCH:
            self._since = perf_counter()

    def stop(self, action_name: str) -> None:
        if action_name == _FETCH and self.counts():
            self.seconds += perf_counter() - self._since
        self.inner.stop(action_name)


def _finish_queued_work(device: torch.device) -> None:
    """Waits for the GPU: the end of its work ends a measurement, not the end of launching it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _forget(trainer: Trainer, names: list[str]) -> None:
    """Keeps metrics that were logged at the end of a batch out of the rows to come."""
    assert trainer._results is not None
    for name in names:
        trainer._results.pop(f"on_train_batch_end.{name}", None)
