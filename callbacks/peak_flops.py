"""How many FLOP/s a device can do at most, for model FLOPs utilisation."""

import re

import torch

PEAKS: list[tuple[str, float, float, float]] = [
    ("A100[ -].*", 312e12, 156e12, 19.5e12),
    ("A40", 149.7e12, 74.8e12, 37.4e12),
    ("A10", 125e12, 62.5e12, 31.2e12),
    ("A10G", 70e12, 35e12, 35e12),
    ("RTX A6000", 154.8e12, 77.4e12, 38.7e12),
    ("H100 PCIe", 756e12, 378e12, 51.2e12),
    ("H100 NVL", 835.5e12, 417.5e12, 60e12),
    ("H100( 80GB HBM3)?", 989.4e12, 494.7e12, 66.9e12),
    ("H200 NVL", 835.5e12, 417.5e12, 60e12),
    ("H200", 989.4e12, 494.7e12, 66.9e12),
    ("L40S", 362e12, 183e12, 91.6e12),
    ("L40", 181e12, 90.5e12, 90.5e12),
    ("L4", 121e12, 60e12, 30.3e12),
    ("(GeForce )?RTX 4090", 165.2e12, 82.6e12, 82.6e12),
    ("(GeForce )?RTX 3090", 71e12, 35.6e12, 35.6e12),
]
"""Pattern of the whole device name after "NVIDIA", and its peaks in FLOP/s for bf16 or fp16, TF32 and fp32.

From NVIDIA's data sheets: matrix products that accumulate in fp32, without sparsity (where only the number
with sparsity is given, half of it). A part of a device (MIG) has another name, hence no peak."""


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Most FLOP/s that a device can do in matrix products, or None where that is not known.

    Args:
        device: Any device; only NVIDIA GPUs have known peaks.
        precision: The Trainer's: bf16-mixed, bf16-true, 16-mixed, 16-true or 32-true. The latter means TF32
            where ``torch.set_float32_matmul_precision`` allows it.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).removeprefix("NVIDIA ")
    for pattern, half, tf32, single in PEAKS:
        if re.fullmatch(pattern, name):
            if precision.startswith(("bf16", "16")):
                return half
            if precision == "32-true":
                return single if torch.get_float32_matmul_precision() == "highest" else tf32
    return None
