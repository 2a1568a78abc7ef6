"""The weighted read and its gradients against torch's operators.

    python benchmarks/read.py --json benchmarks/results/read.json

On the CPU: fp32, 262,144 rows of 256 elements. On a GPU: bf16, 1,048,576 rows of 512 to 4,096 elements.
"""

import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.baselines import dense_read, gathered_read, sparse_read
from benchmarks.measure import Report, Setting, Timed, distinct, parse
from memlm.kernels.accounting import read_backward, read_forward
from memlm.kernels.backend import select
from memlm.memory import MemoryPool

READS = 128
GPU_DIMS = (512, 1024, 4096, 1536, 1000)
BARS = {
    "read_forward": (1.1, "<="),
    "read_backward_full": (0.40, "<="),
    "read_backward_3pct": (0.08, "<="),
    "read_backward_3pct_dense_reads": (0.08, "<="),
    **{f"g1_read_forward_{dim}": (0.80, ">=") for dim in GPU_DIMS},
    "g1c_vs_embedding_bag": (5.0, ">="),
    "g2_backward_vs_forward": (2.0, "<="),
    "g4_skew_penalty": (1.5, "<="),
}


def cpu(report: Report, slots: int, dim: int, tokens: int) -> None:
    """The CPU's bars.

    Args:
        report: Takes the results.
        slots: ``S``.
        dim: ``V``.
        tokens: ``N`` of the reads that touch most rows.
    """
    report.sizes |= {"slots": slots, "value_dim": dim, "tokens": tokens, "reads": READS, "dtype": "float32"}
    torch.manual_seed(0)
    values = torch.randn(slots, dim)
    _forward(report, values, torch.randint(slots, (tokens, READS)))
    cases = {
        "full": torch.randint(slots, (tokens, READS)),
        # Uniform reads touch 1 - exp(-reads / slots) of the rows.
        "3pct": torch.randint(slots, (max(1, round(-math.log(0.97) * slots / READS)), READS)),
        "3pct_dense_reads": torch.randperm(slots)[: round(0.03 * slots)][
            torch.randint(round(0.03 * slots), (tokens, READS))
        ],
    }
    for case, index in cases.items():
        _backward(report, values, index, case)


def _forward(report: Report, values: Tensor, index: Tensor) -> None:
    weights = torch.rand(index.shape)
    backend = select(values.device)
    narrow = index.to(torch.int32)
    operations: dict[str, Timed] = {
        "read": lambda: backend.weighted_read(values, narrow, weights),
        "F.embedding_bag": lambda: dense_read(values, index, weights),
        "gather + bmm": lambda: gathered_read(values, index, weights),
    }
    tokens, reads = index.shape
    moved = read_forward(tokens, reads, values.shape[1])
    limit = read_forward(tokens, reads, values.shape[1], fetched=distinct(index))
    report.measure(
        _size(values, index),
        operations,
        moved=dict.fromkeys(operations, moved),
        limit=dict.fromkeys(operations, limit),
    )
    report.ratio("read_forward", "read", "F.embedding_bag")


def _backward(report: Report, values: Tensor, index: Tensor, case: str) -> None:
    touched = distinct(index)
    report.sizes[f"share_touched_{case}"] = touched / values.shape[0]
    weights = torch.rand(index.shape)
    grad = torch.randn(index.shape[0], values.shape[1])
    narrow = index.to(torch.int32)
    backend = select(values.device)
    buffer = torch.zeros(touched * values.shape[1])
    with torch.device("meta"):
        pool = MemoryPool(values.shape[0], values.shape[1], alone=True)
    pool.values = nn.Parameter(values)

    def ours() -> None:
        backend.weighted_read(values, narrow, weights)
        backend.read_backward(values, narrow, weights, grad, buffer)

    ours_name, pool_name = f"read + backward, {case}", f"pool: the same, {case}"
    dense_name, sparse_name = f"dense gradient, {case}", f"sparse + coalesce, {case}"
    operations: dict[str, Timed] = {
        ours_name: ours,
        pool_name: _pool_step(pool, narrow, weights, grad),
        dense_name: _autograd_step(dense_read, values, index, weights, grad),
        sparse_name: _autograd_step(sparse_read, values, index, weights, grad),
    }
    if not case.endswith("dense_reads"):
        operations[f"gather + bmm, {case}"] = _autograd_step(gathered_read, values, index, weights, grad)
    tokens, reads = index.shape
    dim, slots = values.shape[1], values.shape[0]
    moved = read_forward(tokens, reads, dim) + read_backward(
        tokens, reads, dim, distinct=touched, slots=slots
    )
    limit = read_forward(tokens, reads, dim, fetched=touched) + read_backward(
        tokens, reads, dim, distinct=touched, slots=slots, fetched=tokens
    )
    report.measure(
        _size(values, index),
        operations,
        moved=dict.fromkeys((ours_name, pool_name), moved),
        limit=dict.fromkeys(operations, limit),
    )
    report.ratio(f"read_backward_{case}", ours_name, dense_name)
    report.ratio(f"read_backward_{case} / sparse and coalesced", ours_name, sparse_name)
    report.ratio(f"read_backward_{case} through the pool", pool_name, dense_name)


def _pool_step(
    pool: MemoryPool, slots: Tensor, weights: Tensor, grad: Tensor
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Through autograd, as a layer reads, to the compact gradient."""
    learned = weights.clone().requires_grad_()

    def prepare() -> None:
        pool.gradient.clear()
        learned.grad = None

    def run() -> None:
        pool.read(slots, learned).backward(grad)
        pool.gradient.compact()

    return prepare, run


def _autograd_step(
    read: Callable[[Tensor, Tensor, Tensor], Tensor],
    values: Tensor,
    slots: Tensor,
    weights: Tensor,
    grad: Tensor,
) -> tuple[Callable[[], None], Callable[[], None]]:
    table, learned = values.detach().requires_grad_(), weights.clone().requires_grad_()

    def prepare() -> None:
        table.grad = learned.grad = None

    def run() -> None:
        read(table, slots, learned).backward(grad)
        if table.grad is not None and table.grad.is_sparse:
            table.grad.coalesce()

    return prepare, run


def gpu(report: Report, slots: int, dims: tuple[int, ...], tokens: int) -> None:
    """The GPU's bars: uniform reads of a bf16 table.

    Args:
        report: Takes the results.
        slots: ``S``.
        dims: Value dims; the backward pass is measured at the second.
        tokens: ``N``.
    """
    device = report.setting.device
    report.sizes |= {
        "slots": slots,
        "value_dims": dims,
        "tokens": tokens,
        "reads": READS,
        "dtype": "bfloat16",
    }
    torch.manual_seed(0)
    index = torch.randint(slots, (tokens, READS), device=device, dtype=torch.int32)
    weights = torch.rand(tokens, READS, device=device)
    for dim in dims:
        with report.attempt(f"g1_read_forward_{dim}"):
            _gpu_forward(report, index, weights, slots, dim)
    with report.attempt("g1c_vs_embedding_bag"):
        _gpu_embedding_bag(report, index, weights, slots, dims[1])
    with report.attempt("g2_backward_vs_forward", "g4_skew_penalty"):
        _gpu_backward(report, index, weights, slots, dims[1])


def _gpu_forward(report: Report, index: Tensor, weights: Tensor, slots: int, dim: int) -> None:
    values = _normal_bf16(slots, dim, index.device)
    name = f"read, {dim}"
    moved = {name: read_forward(index.shape[0], READS, dim, value_bytes=2)}
    run = partial(select(values.device).weighted_read, values, index, weights)
    report.measure(_size(values, index), {name: run}, moved=moved)
    report.values[f"g1_read_forward_{dim}"] = report.of_copy(name)


def _gpu_embedding_bag(report: Report, index: Tensor, weights: Tensor, slots: int, dim: int) -> None:
    values = _normal_bf16(slots, dim, index.device)
    narrow = weights.bfloat16()  # it takes weights of the values' dtype only
    operations: dict[str, Timed] = {
        f"F.embedding_bag, {dim}": lambda: dense_read(values, index, narrow),
        f"read beside it, {dim}": partial(select(values.device).weighted_read, values, index, weights),
    }
    moved = read_forward(index.shape[0], READS, dim, value_bytes=2)
    report.measure(_size(values, index), operations, moved=dict.fromkeys(operations, moved))
    report.ratio("g1c_vs_embedding_bag", *operations)


def _gpu_backward(report: Report, index: Tensor, weights: Tensor, slots: int, dim: int) -> None:
    values = _normal_bf16(slots, dim, index.device)
    tokens = index.shape[0]
    backend = select(values.device)
    grad = torch.randn(tokens, dim, device=values.device).bfloat16()
    buffer = torch.zeros(min(slots, index.numel()) * dim, device=values.device)
    skewed = torch.where(torch.rand(index.shape, device=index.device) < 0.1, slots // 2, index)
    forward, uniform, hot = (
        f"{name}, {dim}" for name in ("forward", "backward", "backward, 10 % on one row")
    )
    operations: dict[str, Timed] = {
        forward: partial(backend.weighted_read, values, index, weights),
        uniform: partial(backend.read_backward, values, index, weights, grad, buffer),
        hot: partial(backend.read_backward, values, skewed, weights, grad, buffer),
    }
    moved = {forward: read_forward(tokens, READS, dim, value_bytes=2)}
    for name, read in ((uniform, index), (hot, skewed)):
        moved[name] = read_backward(
            tokens,
            READS,
            dim,
            distinct=distinct(read),
            slots=slots,
            value_bytes=2,
            gradient_bytes=2,
        )
    report.measure(_size(values, index), operations, moved=moved)
    report.ratio("g2_backward_vs_forward", uniform, forward)
    report.ratio("g4_skew_penalty", hot, uniform)


def _normal_bf16(slots: int, dim: int, device: torch.device) -> Tensor:
    return torch.empty(slots, dim, device=device, dtype=torch.bfloat16).normal_()


def _size(values: Tensor, index: Tensor) -> str:
    return f"{values.shape[0]:,} x {values.shape[1]}, {index.shape[0]:,} x {index.shape[1]} reads"


def run(setting: Setting) -> Report:
    """All bars of the setting's device."""
    report = Report(setting, BARS)
    if setting.device.type == "cuda":
        report.measure_copy(2**32)
        gpu(report, 2**18 if setting.quick else 2**20, GPU_DIMS, 8_192 if setting.quick else 32_768)
    else:
        report.measure_copy(2**26 if setting.quick else 2**28)
        cpu(report, *((2**16, 256, 1024) if setting.quick else (2**18, 256, 4096)))
    return report


if __name__ == "__main__":
    run(parse(__doc__.splitlines()[0], "read.py")).finish()
