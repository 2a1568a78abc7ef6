"""A whole training step of a memory layer against the same layer with a dense gradient, and public packages.

    python benchmarks/layer_step.py --json benchmarks/results/layer_step.json

On the CPU: fp32, 1,048,576 values of 256 elements, 4 heads x 32 reads, 1,024 tokens. On a GPU: bf16.
"""

import gc
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.baselines import DenseGradientMemory, dense_step, public_layers
from benchmarks.measure import Report, Setting, Timed, parse
from memlm.flops import read_flops
from memlm.memory import MemoryConfig, MemoryLayer, MemoryPool
from memlm.optim import MemoryAdamW, clip_gradients
from memlm.transformer.feed_forward import SwiGLU

ROOT = Path(__file__).resolve().parent.parent
HEADS, READS, KEY_DIM = 4, 32, 256
BARS = {
    "layer_step": (0.12, "<="),
    "peak_bytes": (0.15, "<="),
    "memory_vs_swiglu": (3.5, "<="),
    "g9_host_syncs": (0, "<="),
    "g11_recompiles": (0, "<="),
}


@dataclass
class Memlm:
    """A memory layer of memlm, its pool and its optimizer."""

    layer: MemoryLayer
    pool: MemoryPool
    optimizer: MemoryAdamW

    @classmethod
    def like(cls, dense: DenseGradientMemory, values: nn.Parameter | None = None) -> "Memlm":
        """The same layer with the same parameters.

        Args:
            dense: The layer.
            values: The table; default: a copy of the layer's.
        """
        heads, _, half_keys, half_key_dim = dense.keys.shape
        dim = dense.values.shape[1]
        config = MemoryConfig(half_keys=half_keys, heads=heads, reads=dense.reads, key_dim=2 * half_key_dim)
        layer = MemoryLayer(config, dim).to(dense.values)
        assert layer.gate is not None and layer.projection is not None
        with torch.device("meta"):
            pool = MemoryPool(config.slots, dim, dense.values.dtype, alone=True)
        pool.values = nn.Parameter(dense.values.detach().clone()) if values is None else values
        with torch.no_grad():
            layer.product_keys.keys.copy_(dense.keys.flatten(1, 2))
        layer.query.linear.load_state_dict(dense.query.state_dict())
        layer.gate.load_state_dict(dense.gate.state_dict())
        layer.projection.load_state_dict(dense.projection.state_dict())
        rows = {"params": [pool.values], "kind": "memory", "name": "values", "clip": 1.0}
        groups: list[dict[str, Any]] = [{"params": list(layer.parameters())}, rows]
        return cls(layer, pool, MemoryAdamW(groups, {pool.values: pool.gradient}))

    def zero_grad(self, hidden: Tensor) -> None:
        """Forget all gradients."""
        self.optimizer.zero_grad()
        hidden.grad = None

    def step(self, hidden: Tensor, grad: Tensor) -> None:
        """Forward, backward, clip, optimizer.

        Args:
            hidden: ``[N, D]``, gets a gradient too.
            grad: ``[N, D]`` gradient of the output.
        """
        self.zero_grad(hidden)
        self.layer(hidden, [self.pool]).backward(grad)
        clip_gradients(self.optimizer, 1.0)
        self.optimizer.step()


def cpu(report: Report, half_keys: int, dim: int, tokens: int, swiglu_tokens: int, peak_tokens: int) -> None:
    """The CPU's bars.

    Args:
        report: Takes the results.
        half_keys: ``K``.
        dim: ``D`` and ``V``.
        tokens: ``N`` of the step.
        swiglu_tokens: ``N`` of the comparison with SwiGLU.
        peak_tokens: ``N`` of the step whose peak memory is taken: its reads touch at most 5 % of the rows.
    """
    report.sizes |= {"half_keys": half_keys, "values": half_keys**2, "dim": dim, "heads": HEADS}
    report.sizes |= {"reads": READS, "key_dim": KEY_DIM, "tokens": tokens, "dtype": "float32"}
    _swiglu(report, dim, swiglu_tokens)
    _peak(report, half_keys, dim, peak_tokens)
    dense, ours = _layers(report, half_keys, dim)
    _steps(report, dense, ours, tokens)
    del dense  # make room for other tables
    _parts(report, ours, dim, tokens)
    _packages(report, ours, half_keys, dim, tokens)


def _data(tokens: int, dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    hidden = torch.randn(tokens, dim, device=like.device, dtype=like.dtype).requires_grad_()
    return hidden, torch.randn_like(hidden)


def _layers(report: Report, half_keys: int, dim: int) -> tuple[DenseGradientMemory, Memlm]:
    torch.manual_seed(0)
    device = report.setting.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        dense = DenseGradientMemory(dim, half_keys, HEADS, READS, KEY_DIM).to(dtype)
    return dense, Memlm.like(dense)


def _steps(report: Report, dense: DenseGradientMemory, ours: Memlm, tokens: int) -> None:
    half_keys, dim = dense.keys.shape[2], dense.values.shape[1]
    hidden, grad = _data(tokens, dim, dense.values)
    operations: dict[str, Timed] = {
        "step": lambda: ours.step(hidden, grad),
        "dense-gradient step": dense_step(dense, [dense.values], hidden, grad),
    }
    report.measure(_size(half_keys, dim, tokens), operations)
    report.ratio("layer_step", "step", "dense-gradient step")
    compact = ours.pool.gradient.compact()
    assert compact is not None
    rows = compact.rows.shape[0] if compact.count is None else int(compact.count)
    report.sizes["share_touched"] = rows / half_keys**2


def _parts(report: Report, ours: Memlm, dim: int, tokens: int) -> None:
    """Each part of the step by itself, after those before it."""
    hidden, grad = _data(tokens, dim, ours.pool.values)
    kept: dict[str, Tensor] = {}

    def address() -> None:
        kept["slots"], kept["weights"] = (part.flatten(1) for part in ours.layer.address(hidden))

    def forward() -> None:
        ours.zero_grad(hidden)
        kept["output"] = ours.layer(hidden, [ours.pool])

    def backward() -> None:
        forward()
        kept["output"].backward(grad)

    def clip() -> None:
        backward()
        clip_gradients(ours.optimizer, 1.0)

    operations: dict[str, Timed] = {
        "part: query, search, softmax": address,
        "part: read": (address, lambda: ours.pool.read(kept["slots"], kept["weights"])),
        "part: forward, the above within": (lambda: ours.zero_grad(hidden), forward),
        "part: backward, compact gradient": (forward, lambda: kept["output"].backward(grad)),
        "part: clip": (backward, lambda: clip_gradients(ours.optimizer, 1.0)),
        "part: optimizer": (clip, ours.optimizer.step),
    }
    report.measure(f"{tokens:,} tokens", operations)


def _packages(report: Report, ours: Memlm, half_keys: int, dim: int, tokens: int) -> None:
    """Layers of public packages, with dense gradients and fused AdamW as their authors leave it."""
    hidden, grad = _data(tokens, dim, ours.pool.values)
    skipped = {}
    for name, build in public_layers(dim, half_keys, HEADS, READS, KEY_DIM).items():
        if isinstance(build, str):
            skipped[name] = build
            print(f"{name}: {build}")
            continue
        gc.collect()  # the table of the one before
        module, tables = build()
        sequence, sequence_grad = hidden.detach()[None].requires_grad_(), grad[None]
        operations: dict[str, Timed] = {
            f"step beside {name}": lambda: ours.step(hidden, grad),
            name: dense_step(module, tables, sequence, sequence_grad),
        }
        report.measure(_size(half_keys, dim, tokens), operations)
        report.ratio(f"layer_step / {name}", *operations)
        del module, tables, operations
    report.extra["skipped_packages"] = skipped


def _swiglu(report: Report, dim: int, tokens: int) -> None:
    """Forward of Memory+ as configured by default against SwiGLU networks, as in training."""
    torch.manual_seed(0)
    half_keys = 256
    dense = DenseGradientMemory(dim, half_keys, HEADS, READS, dim // 2)
    ours = Memlm.like(dense)
    del dense
    hidden, _ = _data(tokens, dim, ours.pool.values)
    networks = {f"SwiGLU {width}": SwiGLU(dim, width) for width in (4 * dim, 3 * dim)}
    memory = "Memory+ forward"
    operations: dict[str, Timed] = {memory: lambda: ours.layer(hidden, [ours.pool])}
    for name, network in networks.items():
        operations[f"{name} forward"] = partial(network, hidden)
    report.measure(f"{tokens:,} x {dim}, {half_keys} half keys", operations)
    baseline, default = (f"{name} forward" for name in networks)
    report.ratio("memory_vs_swiglu", memory, baseline)
    report.ratio(f"memory / {default}", memory, default)
    report.extra["forward_flops_per_token"] = {
        "Memory+": (ours.layer.flops(0) + read_flops(HEADS * READS, dim)).forward,
        **{name: sum(2 * p.numel() for p in network.parameters()) for name, network in networks.items()},
    }


def _peak(report: Report, half_keys: int, dim: int, tokens: int) -> None:
    """Peak memory of a step, in processes of their own."""
    if sys.platform != "linux":
        report.unmeasured["peak_bytes"] = "needs /proc"
        return
    for name in ("memlm", "dense"):
        code = f"from benchmarks.layer_step import peak; peak({name!r}, {half_keys}, {dim}, {tokens})"
        command = [sys.executable, "-c", code]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if run.returncode:
            raise RuntimeError(f"{code} failed:\n{run.stderr[-2000:]}")
        report.extra[f"peak_{name}"] = result = json.loads(run.stdout)
        ratio = result["peak_bytes"] / result["table_bytes"]
        if name == "memlm":
            report.values["peak_bytes"] = ratio
        else:
            report.comparisons["peak_bytes of the dense-gradient layer"] = ratio


def peak(name: str, half_keys: int, dim: int, tokens: int) -> None:
    """Print, as JSON, by how many bytes a step exceeds values and moments; for a process of its own.

    Args:
        name: ``memlm`` or ``dense``.
        half_keys: ``K``.
        dim: ``D``.
        tokens: ``N``.
    """
    torch.manual_seed(0)

    def build(half_keys: int) -> tuple[DenseGradientMemory, Tensor, Tensor]:
        dense = DenseGradientMemory(dim, half_keys, HEADS, READS, KEY_DIM)
        return dense, *_data(tokens, dim, dense.values)

    result: dict[str, float] = {"table_bytes": half_keys**2 * dim * 4}
    for count in (32, half_keys):  # a small one first, for code that is loaded when it first runs
        dense, hidden, grad = build(count)
        if name == "memlm":
            ours = Memlm.like(dense, dense.values)  # a copy would be the peak
            before = resident("VmRSS")
            ours.step(hidden, grad)
            compact = ours.pool.gradient.compact()
            assert compact is not None
            result["share_touched"] = compact.rows.shape[0] / count**2
        else:
            step = dense_step(dense, [dense.values], hidden, grad)
            step()  # makes the moments
            dense.values.grad = None
            before = resident("VmRSS")
            step()
    result["peak_bytes"] = resident("VmHWM") - before
    print(json.dumps(result))


def resident(name: str) -> int:
    """Bytes of this process that Linux reports under a name: VmRSS, or VmHWM for the most so far."""
    # Not getrusage, whose peak a process inherits from the one that started it.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def gpu(report: Report, half_keys: int, dim: int, tokens: int) -> None:
    """The step in bf16, its host synchronisations, and its recompilations over five batch sizes.

    Args:
        report: Takes the results.
        half_keys: ``K``.
        dim: ``D`` and ``V``.
        tokens: ``N``.
    """
    report.sizes |= {"half_keys": half_keys, "values": half_keys**2, "dim": dim, "heads": HEADS}
    report.sizes |= {"reads": READS, "key_dim": KEY_DIM, "tokens": tokens}
    dense, ours = _layers(report, half_keys, dim)
    with report.attempt():
        _steps(report, dense, ours, tokens)
        report.comparisons["layer_step on the GPU"] = report.values.pop("layer_step")
    del dense
    with report.attempt():
        _parts(report, ours, dim, tokens)
    hidden, grad = _data(tokens, dim, ours.pool.values)
    with report.attempt("g9_host_syncs"):
        ours.step(hidden, grad)
        report.values["g9_host_syncs"] = _host_syncs(lambda: ours.step(hidden, grad), report)
    with report.attempt("g11_recompiles"):
        batches = [tokens, tokens - 24, tokens // 2, tokens // 2 - 1, tokens // 3]
        report.sizes["batches"] = batches
        with _compilations() as compiled:
            for batch in batches[1:]:
                ours.step(hidden[:batch].detach().requires_grad_(), grad[:batch])
        report.values["g11_recompiles"] = len(compiled)
        report.extra["recompiled"] = compiled


def _host_syncs(step: Callable[[], None], report: Report) -> int:
    """How often one step waits for the device (torch's sync debug mode)."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    report.extra["host_syncs"] = waits
    return len(waits)


@contextmanager
def _compilations() -> Iterator[list[str]]:
    """Names of the Triton kernels compiled inside, or taken from Triton's cache on disk."""
    from triton import knobs

    names: list[str] = []

    def note(*, repr: str, **_) -> None:
        names.append(repr)

    knobs.runtime.jit_cache_hook = note
    try:
        yield names
    finally:
        knobs.runtime.jit_cache_hook = None


def _size(half_keys: int, dim: int, tokens: int) -> str:
    return f"{half_keys**2:,} x {dim}, {tokens:,} tokens"


def run(setting: Setting) -> Report:
    """All bars of the setting's device."""
    report = Report(setting, BARS)
    if setting.device.type == "cuda":
        report.measure_copy(2**32)
        gpu(report, 512 if setting.quick else 1024, 1024, 4096 if setting.quick else 16_384)
    else:
        report.measure_copy(2**26 if setting.quick else 2**28)
        sizes = (512, 256, 256, 2048, 96) if setting.quick else (1024, 256, 1024, 2048, 384)
        cpu(report, *sizes)
    return report


if __name__ == "__main__":
    run(parse(__doc__.splitlines()[0], "layer_step.py")).finish()
