"""Callbacks that tests name on the command line."""

import os
import random
import signal

import numpy as np
import torch
from lightning.pytorch import Callback


class Noise(Callback):
    """Logs a draw from every generator, so that metrics.csv shows whether random state was restored."""

    def on_train_batch_end(self, trainer, pl_module, *args):
        drawn = torch.rand(()).item() + np.random.rand() + random.random()
        pl_module.log("train/noise", drawn)


class Terminate(Callback):
    """Asks this process to end, as a scheduler does, in the middle of a step.

    Args:
        step: Optimizer steps taken when it happens.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


class Crash(Callback):
    """Stops the run in the middle of a step, as a bug or a lost machine would.

    Args:
        step: Optimizer steps taken when it happens.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == self.step:
            raise RuntimeError("crash")
