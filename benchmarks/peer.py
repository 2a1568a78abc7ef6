"""A training step of a PEER layer against the layer of the package PEER-pytorch.

    python benchmarks/peer.py --json benchmarks/results/peer.json

65,536 experts of one neuron, 8 heads of 16 reads, fp32. Both layers have the same parameters and the same
output; the package gathers the rows of every read, has a gradient as large as its tables, and torch's fused
AdamW.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.baselines import dense_step, public_layers
from benchmarks.layer_step import resident
from benchmarks.measure import Report, Setting, Timed, parse
from memlm.memory import MemoryLayer, MemoryPool, PEERConfig
from memlm.optim import MemoryAdamW, clip_gradients

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "PEER-pytorch"
HEADS, READS = 8, 16


@dataclass
class Ours:
    """A PEER layer of memlm, its two pools and its optimizer."""

    layer: MemoryLayer
    pools: list[MemoryPool]
    optimizer: MemoryAdamW

    @classmethod
    def build(cls, half_keys: int, dim: int, device: torch.device | str = "cpu") -> "Ours":
        """A layer like the package's: no normalisation of the query, half keys of half the model dim.

        Args:
            half_keys: ``K``, the root of the number of experts.
            dim: ``D``.
            device: Where.
        """
        config = PEERConfig(
            half_keys=half_keys, heads=HEADS, reads=READS, key_dim=dim, query_norm="none", layers=[0]
        )
        with torch.device(device):
            tables, placed = config.build(dim, 1)
        layer, pools = placed[0].layer, list(tables.values())
        assert isinstance(layer, MemoryLayer)
        with torch.no_grad():
            layer.initialise(1.0)
            for pool in pools:
                pool.initialise(1.0)
        values = [pool.values for pool in pools]
        rows = {"params": values, "kind": "memory", "name": "values", "clip": 1.0}
        groups: list[dict[str, Any]] = [{"params": list(layer.parameters())}, rows]
        return cls(layer, pools, MemoryAdamW(groups, {pool.values: pool.gradient for pool in pools}))

    @torch.no_grad()
    def take(self, package: nn.Module) -> None:
        """Take the parameters of the package's layer."""
        keys = package.get_parameter("keys")  # [H, K, 2, C]
        heads, _, _, width = keys.shape
        weight = package.get_parameter("to_queries.0.weight")  # [2 * H * C, D]
        weight = weight.unflatten(0, (2, heads, width)).transpose(0, 1).flatten(0, 2)
        self.layer.query.linear.weight.copy_(weight)
        self.layer.query.linear.bias.zero_()
        self.layer.product_keys.keys.copy_(keys.transpose(1, 2).flatten(1, 2))
        for pool, name in zip(self.pools, ("up", "down"), strict=True):
            pool.values.copy_(package.get_parameter(f"weight_{name}_embed.weight"))

    def step(self, hidden: Tensor, grad: Tensor) -> None:
        """Forward, backward, clip, optimizer.

        Args:
            hidden: ``[1, N, D]``, gets a gradient too.
            grad: ``[1, N, D]`` gradient of the output.
        """
        self.optimizer.zero_grad()
        hidden.grad = None
        self.layer(hidden, self.pools).backward(grad)
        clip_gradients(self.optimizer, 1.0)
        self.optimizer.step()


def package_layer(half_keys: int, dim: int) -> tuple[nn.Module, list[nn.Parameter]] | str:
    """The package's layer and its tables; or why it cannot be had."""
    build = public_layers(dim, half_keys, HEADS, READS, dim)[PACKAGE]
    return build if isinstance(build, str) else build()


def compare(report: Report, half_keys: int, dims: tuple[int, ...], tokens: tuple[int, ...]) -> None:
    """Time of a step and peak memory, ours over the package's, at every pair of sizes.

    Args:
        report: Takes the results.
        half_keys: ``K``.
        dims: Several ``D``.
        tokens: Several ``N``.
    """
    report.sizes |= {"half_keys": half_keys, "experts": half_keys**2, "heads": HEADS, "reads": READS}
    report.sizes |= {"dims": dims, "tokens": tokens, "dtype": "float32"}
    for dim in dims:
        for count in tokens:
            with report.attempt():
                _step(report, half_keys, dim, count)
            if report.setting.device.type == "cpu" and sys.platform == "linux":
                with report.attempt():
                    _peaks(report, half_keys, dim, count)


def _step(report: Report, half_keys: int, dim: int, tokens: int) -> None:
    torch.manual_seed(0)
    device = report.setting.device
    ours = Ours.build(half_keys, dim, device)
    hidden, grad = torch.randn(2, 1, tokens, dim, device=device).unbind()
    hidden.requires_grad_()
    size = _size(half_keys, dim, tokens)
    operations: dict[str, Timed] = {f"PEER step, {dim}, {tokens:,} tokens": lambda: ours.step(hidden, grad)}
    found = package_layer(half_keys, dim)
    if isinstance(found, str):
        report.extra["skipped_packages"] = {PACKAGE: found}
        print(f"{PACKAGE}: {found}")
    else:
        module, tables = found[0].to(device), found[1]
        ours.take(module)
        operations[f"{PACKAGE}, {dim}, {tokens:,} tokens"] = dense_step(module, tables, hidden, grad)
    report.measure(size, operations)
    if len(operations) == 2:
        report.ratio(f"time, {dim}, {tokens:,} tokens", *operations)


def _peaks(report: Report, half_keys: int, dim: int, tokens: int) -> None:
    """Peak memory of two steps, in processes of their own."""
    if PACKAGE in report.extra.get("skipped_packages", ()):
        return
    peaks = {}
    for name in ("memlm", PACKAGE):
        code = f"from benchmarks.peer import peak; peak({name!r}, {half_keys}, {dim}, {tokens})"
        command = [sys.executable, "-c", code]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if run.returncode:
            raise RuntimeError(f"{code} failed:\n{run.stderr[-2000:]}")
        peaks[name] = json.loads(run.stdout)
    report.extra.setdefault("peaks", {})[f"{dim}, {tokens:,} tokens"] = peaks
    for part in ("step", "all"):
        ratio = peaks["memlm"][part] / peaks[PACKAGE][part]
        report.comparisons[f"peak of {part}, {dim}, {tokens:,} tokens"] = ratio


def peak(name: str, half_keys: int, dim: int, tokens: int) -> None:
    """Print, as JSON, the peak bytes of two steps; for a process of its own.

    ``all`` is what the process takes beyond its imports and a step of a tiny layer, ``step`` what it takes
    beyond the tables, the other parameters and the moments, all of whose pages are in memory.

    Args:
        name: ``memlm`` or the package.
        half_keys: ``K``.
        dim: ``D``.
        tokens: ``N``.
    """
    torch.manual_seed(0)
    result = {}
    for count, width, size in ((READS, 8, 2), (half_keys, dim, tokens)):
        start = resident("VmRSS")
        hidden, grad = torch.randn(2, 1, size, width).unbind()
        hidden.requires_grad_()
        parameters: list[nn.Parameter]
        if name == "memlm":
            ours = Ours.build(count, width)
            parameters = [*ours.layer.parameters(), *(pool.values for pool in ours.pools)]
            for state in ours.optimizer.state.values():
                for moments in state.values():
                    if isinstance(moments, Tensor):
                        moments.add_(1e-12)  # zeros are not in memory before they are written
            step = partial(ours.step, hidden, grad)
        else:
            found = package_layer(count, width)
            assert not isinstance(found, str)
            module, tables = found
            parameters = list(module.parameters())
            step = partial(dense_step(module, tables, hidden, grad))
        step()  # makes the moments of the package
        step()
        result["all"] = resident("VmHWM") - start
        kept = 3 * sum(parameter.nbytes for parameter in parameters)  # each with two moments
        result["step"] = result["all"] - kept
    print(json.dumps(result))


def _size(half_keys: int, dim: int, tokens: int) -> str:
    return f"2 x {half_keys**2:,} x {dim}, {tokens:,} tokens"


def run(setting: Setting) -> Report:
    """All sizes."""
    report = Report(setting, {})
    report.measure_copy(2**26 if setting.quick else 2**28)
    sizes = (64, (64,), (128, 512)) if setting.quick else (256, (256, 512), (1024, 4096))
    compare(report, *sizes)
    return report


if __name__ == "__main__":
    run(parse(__doc__.splitlines()[0], "peer.py")).finish()
