"""Which backend serves a device."""

import os
from importlib import import_module
from typing import Literal, cast, get_args

import torch

from memlm.errors import ConfigError
from memlm.kernels.interface import Backend

Kernels = Literal["auto", "reference", "cpu", "triton"]

ENVIRONMENT = "MEMLM_KERNELS"
"""Environment variable that overrides every configuration with the name of a backend."""

_BY_DEVICE = {"cpu": "cpu", "cuda": "triton"}


def select(device: torch.device | str, kernels: str = "auto") -> Backend:
    """The backend for tensors on a device.

    Args:
        device: Where the tensors are.
        kernels: ``auto`` (by device: cpu, or triton on CUDA, the reference elsewhere), or a backend's name.
            The environment variable ``MEMLM_KERNELS`` overrides it.

    Raises:
        ConfigError: There is no such backend, or it does not serve the device.
    """
    kind = torch.device(device).type
    key = "model.memory.kernels"
    if os.environ.get(ENVIRONMENT):
        key, kernels = f"environment variable {ENVIRONMENT}", os.environ[ENVIRONMENT]
    if kernels not in get_args(Kernels):
        raise ConfigError(key, f"is {kernels!r}, must be one of {', '.join(get_args(Kernels))}")
    if kernels == "auto":
        kernels = _BY_DEVICE.get(kind, "reference")
    if kernels == "cpu" and kind != "cpu":
        raise ConfigError(key, f"is cpu, but the model is on {kind}")
    if kernels == "triton" and kind != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(key, f"is triton, which needs a CUDA device, but the model is on {kind}")
    return cast(Backend, import_module(f"memlm.kernels.{kernels}"))
