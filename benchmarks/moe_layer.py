"""A mixture-of-experts layer, forward and backward, against one SwiGLU network of the same FLOPs a token.

    python benchmarks/moe_layer.py --threads 1 --json benchmarks/results/moe_layer.json

The dense network is as wide as the experts that a token uses: ``top_k * expert_dim``. Bars are for fp32 on a
CPU and bf16 on a GPU, with 256 tokens or more an expert; other types are printed beside them. ``autocast``
has fp32 parameters, of which each forward pass casts all experts, used by few tokens or many.
"""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import Report, Setting, Timed, parse
from memlm.transformer.feed_forward import SwiGLU
from memlm.transformer.mixture_of_experts import MixtureOfExperts
from memlm.transformer.moe_config import MoEConfig, Routing


@dataclass(frozen=True)
class Shape:
    """A layer and its batch."""

    experts: int
    top_k: int
    dim: int
    expert_dim: int
    tokens: int
    routing: Routing = "token_choice"

    @property
    def name(self) -> str:
        """Short, for tables."""
        return f"{self.routing}_{self.experts}_top{self.top_k}"

    @property
    def size(self) -> str:
        """For tables."""
        an_expert = self.tokens * self.top_k // self.experts
        return f"{self.dim} x {self.expert_dim}, {self.tokens:,} tokens, {an_expert} an expert"


CPU = (
    Shape(8, 2, 512, 1024, 2048),
    Shape(64, 8, 512, 256, 2048),
    Shape(16, 1, 768, 2048, 4096),
    Shape(16, 1, 768, 2048, 4096, "expert_choice"),
)
QUICK = (
    Shape(8, 2, 256, 512, 1024),
    Shape(64, 8, 256, 64, 2048),
    Shape(16, 1, 256, 512, 4096),
    Shape(16, 1, 256, 512, 4096, "expert_choice"),
)
GPU = (
    Shape(8, 2, 4096, 14336, 8192),
    Shape(64, 8, 2048, 1024, 16_384),
    Shape(16, 1, 768, 2048, 65_536, "expert_choice"),
)
BARS = {f"moe_{shape.name}": (1.5, "<=") for shape in CPU} | {
    f"g8_{shape.name}": (0.7, ">=") for shape in GPU
}


def layers(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The mixture of experts and the dense network, in training."""
    torch.manual_seed(0)
    config = MoEConfig(shape.experts, shape.routing, shape.top_k, shape.expert_dim)
    with device:
        experts = MixtureOfExperts(config, shape.dim, shape.expert_dim)
        dense = SwiGLU(shape.dim, shape.top_k * shape.expert_dim)
    with torch.no_grad():
        experts.initialise(1.0)
    return {"experts": experts.to(dtype), "dense": dense.to(dtype)}


def step(layer: nn.Module, hidden: Tensor, grad: Tensor, autocast: bool) -> tuple[Callable[[], None], Any]:
    """Clearing of the gradients, which is not timed, and forward and backward, which are."""

    def clear() -> None:
        layer.zero_grad()
        hidden.grad = None

    def run() -> None:
        with torch.autocast(hidden.device.type, torch.bfloat16) if autocast else nullcontext():
            output = layer(hidden)
        output.backward(grad)

    return clear, run


def compare(report: Report, shape: Shape, kind: str, bar: str | None = None) -> None:
    """Time of the experts and of the dense network.

    Args:
        report: Takes the results.
        shape: Of the layer.
        kind: ``fp32``, ``bf16`` or ``autocast``.
        bar: Name of the ratio's bar, or None; one that starts with ``g`` is of speeds, not times.
    """
    device = report.setting.device
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    operations: dict[str, Timed] = {}
    for name, layer in layers(shape, device, dtype).items():
        hidden = torch.randn(1, shape.tokens, shape.dim, device=device, dtype=dtype, requires_grad=True)
        grad_dtype = torch.float32 if kind == "fp32" else torch.bfloat16
        grad = torch.randn(hidden.shape, device=device, dtype=grad_dtype)
        operations[f"{shape.name} {kind}, {name}"] = step(layer, hidden, grad, kind == "autocast")
    report.measure(shape.size, operations)
    experts, dense = operations
    if bar is not None and bar.startswith("g"):
        report.ratio(bar, dense, experts)
    else:
        report.ratio(bar or f"{kind}, {shape.name}", experts, dense)


def cpu(report: Report, shapes: tuple[Shape, ...]) -> None:
    """Every shape in fp32, which has the bars, in bf16 and under autocast."""
    report.sizes["shapes"] = [shape.__dict__ for shape in shapes]
    for shape in shapes:
        bar = f"moe_{shape.name}"
        with report.attempt(bar):
            compare(report, shape, "fp32", bar)
        for kind in ("bf16", "autocast"):
            with report.attempt():
                compare(report, shape, kind)


def gpu(report: Report, shapes: tuple[Shape, ...]) -> None:
    """Every shape in bf16, which has the bars, and under autocast."""
    report.sizes["shapes"] = [shape.__dict__ for shape in shapes]
    for shape in shapes:
        bar = f"g8_{shape.name}"
        with report.attempt(bar):
            compare(report, shape, "bf16", bar)
        with report.attempt():
            compare(report, shape, "autocast")


def run(setting: Setting) -> Report:
    """All bars of the setting's device."""
    report = Report(setting, BARS)
    if setting.device.type == "cuda":
        gpu(report, GPU)
    else:
        cpu(report, QUICK if setting.quick else CPU)
    return report


if __name__ == "__main__":
    run(parse(__doc__.splitlines()[0], "moe_layer.py")).finish()
