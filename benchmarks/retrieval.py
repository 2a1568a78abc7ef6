"""The product-key search and its gradient against torch.topk, all pairs, and dense score gradients.

    python benchmarks/retrieval.py --json benchmarks/results/retrieval.json

On the CPU: fp32, 4 heads x 32 reads. On a GPU: bf16 half scores of 32,768 tokens x 4 heads x 1,024 half keys.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.baselines import retrieve, search, second_stage
from benchmarks.measure import Report, Setting, Timed, parse
from memlm.kernels.accounting import best_slots, half_scores, read_forward, row_sums
from memlm.kernels.backend import select
from memlm.kernels.reference import candidate_pairs
from memlm.memory import ProductKeys

HEADS, READS, HALF_KEY_DIM = 4, 32, 128
BARS = {
    "second_stage": (0.33, "<="),
    "search_256": (1 / 1.7, "<="),
    "search_1024": (1 / 1.25, "<="),
    "g5_retrieval": (3.0, ">="),
}


def cpu(report: Report, tokens: int, half_keys: tuple[int, ...], stage_tokens: int) -> None:
    """The CPU's bars.

    Args:
        report: Takes the results.
        tokens: ``N`` of the whole search.
        half_keys: ``K`` of each whole search.
        stage_tokens: ``N`` of the second stage alone.
    """
    report.sizes |= {"heads": HEADS, "reads": READS, "half_key_dim": HALF_KEY_DIM, "dtype": "float32"}
    report.sizes |= {"tokens": tokens, "tokens_second_stage": stage_tokens}
    torch.manual_seed(0)
    _second_stage(report, stage_tokens)
    for count in half_keys:
        _search(report, tokens, count)
        _gradient(report, tokens, count)


def _second_stage(report: Report, tokens: int) -> None:
    """From both sorted lists of 32 to the best 32 sums.

    Ours searches half keys and pairs in one kernel; given 32 half keys, it does the second stage and a first
    one that has nothing to leave out.
    """
    backend = select("cpu")
    scores = torch.randn(2, HEADS, tokens, 512)
    best, index = scores.topk(READS, dim=-1)
    lists = (best[0].contiguous(), best[1].contiguous())
    halves = (index[0].contiguous(), index[1].contiguous())
    left, right = candidate_pairs(READS).unbind(1)

    def candidates() -> Tensor:
        _, chosen = (lists[0][..., left] + lists[1][..., right]).topk(READS, dim=-1)
        return halves[0].gather(-1, left[chosen]) * 512 + halves[1].gather(-1, right[chosen])

    operations: dict[str, Timed] = {
        "second stage": lambda: backend.best_slots(*lists, READS),
        "second stage, 119 pairs in torch": candidates,
        "second stage, all 1,024 pairs": lambda: second_stage(lists, halves, 512, READS),
    }
    cost = best_slots(tokens, HEADS, (READS, READS), READS)
    size = f"{tokens:,} tokens x {HEADS} heads"
    report.measure(size, operations, moved=dict.fromkeys(operations, cost))
    report.ratio("second_stage", "second stage", "second stage, all 1,024 pairs")


def _search(report: Report, tokens: int, half_keys: int) -> None:
    """From half scores to slots."""
    backend = select("cpu")
    first, second = torch.randn(2, HEADS, tokens, half_keys)
    ours, baseline = f"search, {half_keys}", f"topk + all pairs, {half_keys}"
    operations: dict[str, Timed] = {
        ours: lambda: backend.best_slots(first, second, READS),
        baseline: lambda: search(first, second, READS),
    }
    cost = best_slots(tokens, HEADS, (half_keys, half_keys), READS)
    report.measure(_size(tokens, half_keys), operations, moved=dict.fromkeys(operations, cost))
    report.ratio(f"search_{half_keys}", ours, baseline)


def _gradient(report: Report, tokens: int, half_keys: int) -> None:
    """From queries to scores, and back to queries and half keys."""
    query = torch.randn(tokens, HEADS, 2, HALF_KEY_DIM, requires_grad=True)
    ours = ProductKeys(HEADS, (half_keys, half_keys), HALF_KEY_DIM, READS)
    nn.init.normal_(ours.keys)
    keys = nn.Parameter(ours.keys.detach().unflatten(1, (2, half_keys)).clone())
    grad = torch.randn(tokens, HEADS, READS)

    def backward(
        forward: Callable[[], tuple[Tensor, Tensor]], parameter: nn.Parameter
    ) -> tuple[Callable[[], None], Callable[[], None]]:
        scores: list[Tensor] = []

        def prepare() -> None:
            query.grad = parameter.grad = None
            scores[:] = [forward()[1]]

        return prepare, lambda: scores[0].backward(grad)

    forwards = {
        f"retrieval {{}}, {half_keys}": (lambda: ours(query), ours.keys),
        f"dense retrieval {{}}, {half_keys}": (lambda: retrieve(query, keys, READS), keys),
    }
    operations: dict[str, Timed] = {}
    for name, (forward, parameter) in forwards.items():
        operations[name.format("forward")] = forward
        operations[name.format("backward")] = backward(forward, parameter)
    score = half_scores(tokens, HEADS, (half_keys, half_keys), HALF_KEY_DIM)
    forward_cost = score + best_slots(tokens, HEADS, (half_keys, half_keys), READS)
    rows, bags = HEADS * 2 * half_keys, tokens * HEADS * 2
    backward_cost = read_forward(bags, READS, HALF_KEY_DIM, fetched=rows) + row_sums(
        bags, READS, HALF_KEY_DIM, distinct=rows, slots=rows, fetched=bags
    )
    costs = {name: forward_cost if "forward" in name else backward_cost for name in operations}
    report.measure(_size(tokens, half_keys), operations, moved=costs)
    for part in ("forward", "backward"):
        names = [name.format(part) for name in forwards]
        report.ratio(f"retrieval {part}, {half_keys}", *names)


def gpu(report: Report, tokens: int, half_keys: int) -> None:
    """The GPU's bar: the search, given half scores in bf16.

    Args:
        report: Takes the results.
        tokens: ``N``.
        half_keys: ``K``.
    """
    device = report.setting.device
    report.sizes |= {"heads": HEADS, "reads": READS, "tokens": tokens, "half_keys": half_keys}
    report.sizes["dtype"] = "bfloat16"
    torch.manual_seed(0)
    backend = select(device)
    first, second = torch.randn(2, HEADS, tokens, half_keys, device=device, dtype=torch.bfloat16)
    operations: dict[str, Timed] = {
        "search": lambda: backend.best_slots(first, second, READS),
        "topk + all pairs": lambda: search(first, second, READS),
    }
    cost = best_slots(tokens, HEADS, (half_keys, half_keys), READS, score_bytes=2)
    report.measure(_size(tokens, half_keys), operations, moved=dict.fromkeys(operations, cost))
    report.ratio("g5_retrieval", "topk + all pairs", "search")


def _size(tokens: int, half_keys: int) -> str:
    return f"{tokens:,} x {HEADS} heads, 2 x {half_keys:,}"


def run(setting: Setting) -> Report:
    """All bars of the setting's device."""
    report = Report(setting, BARS)
    if setting.device.type == "cuda":
        report.measure_copy(2**32)
        with report.attempt("g5_retrieval"):
            gpu(report, 8_192 if setting.quick else 32_768, 1024)
    else:
        report.measure_copy(2**26 if setting.quick else 2**28)
        cpu(report, 1024, (256, 1024), 2048 if setting.quick else 8192)
    return report


if __name__ == "__main__":
    run(parse(__doc__.splitlines()[0], "retrieval.py")).finish()
