"""The text that ``memlm params`` prints."""

from collections.abc import Callable
from typing import Any

from memlm.flops import PARTS

_COUNTS = (
    ("total", "total"),
    ("active", "active per token"),
    ("memory", "in values"),
    ("embedding", "in embedding and output layer"),
)
_BYTES = (
    ("dense_weights", "dense weights"),
    ("dense_gradients", "dense gradients"),
    ("dense_state", "dense optimizer state"),
    ("values", "values"),
    ("row_gradients", "row gradients, at most"),
    ("values_state", "values' optimizer state"),
    ("total", "all bytes"),
)
_SENT = (
    ("reads_forward", "reads forward"),
    ("reads_backward", "reads backward"),
    ("row_gradients", "row gradients, at most"),
    ("rows", "updated rows, at most"),
    ("dense_weights", "dense weights"),
    ("dense_gradients", "dense gradients"),
    ("experts", "tokens to experts and back"),
    ("batch_norms", "statistics of batch norms"),
    ("total", "all bytes"),
)


def table(models: list[dict[str, Any]]) -> str:
    """The values of :func:`memlm.model_costs.describe` as text, a column for each model."""
    lines: list[list[str]] = [["", *(model["name"] for model in models)]]

    def row(name: str, value: Callable[[dict[str, Any]], Any], form: Callable[[Any], str] = _count) -> None:
        values = [value(model) for model in models]
        lines.append([f"  {name}", *("-" if value is None else form(value) for value in values)])

    lines.append(["parameters"])
    for part in _part_names(models):
        row(part, lambda model, part=part: model["parts"].get(part))  # type: ignore[misc]
    for key, name in _COUNTS:
        row(name, lambda model, key=key: model[key])  # type: ignore[misc]
    row("total, in billions", lambda model: model["total"] / 1e9, lambda value: f"{value:,.3f}")
    lines.append(["of a token"])
    row("sequence length", lambda model: model["sequence_length"])
    row("FLOPs forward", lambda model: model["flops_per_token"])
    row("FLOPs backward", lambda model: model["backward_flops_per_token"])
    row("values read, rows", lambda model: model["values_read_per_token"])
    row("values read, bytes", lambda model: model["bytes_read_per_token"])
    lines.append(["on one rank"])
    for key, name in (
        ("ranks", "ranks"),
        ("memory_group", "ranks of a memory group"),
        ("shard_dense", "dense parameters sharded"),
        ("expert_group", "ranks of an expert group"),
        ("wire_dtype", "memory's numbers sent as"),
        ("precision", "precision"),
        ("tokens", "tokens in an optimizer step"),
        ("micro_batches", "micro-batches of it"),
        ("whole_gradients", "whole gradients added up"),
    ):
        row(name, lambda model, key=key: model["rank"][key], _plain)  # type: ignore[misc]
    for key, name in _BYTES:
        row(name, lambda model, key=key: model["rank"]["bytes"][key], size)  # type: ignore[misc]
    if all(model["rank"]["ranks"] == 1 for model in models):
        return _aligned(lines)
    lines.append(["sent by it in a step"])
    for key, name in _SENT:
        row(name, lambda model, key=key: model["rank"]["sent"][key], size)  # type: ignore[misc]
    return _aligned(lines)


def baseline_text(name: str, baseline: dict[str, Any]) -> str:
    """A matched baseline: what it costs as a comment above its YAML."""
    kind = baseline["class_path"].rsplit(".", 1)[-1]
    if "missing" in baseline:
        return f"# no {kind} matches {name}: {baseline['missing']}"
    return (
        f"# {kind} matched to {name}: {baseline['total']:,} parameters, {baseline['active']:,} active, "
        f"{baseline['flops_per_token']:,} forward FLOPs per token\n{baseline['yaml']}".rstrip()
    )


def size(number: int) -> str:
    """Bytes in the largest unit of powers of ten that leaves at least 1, to four digits."""
    value, unit = float(number), 0
    while value >= 999.95 and unit < 5:
        value, unit = value / 1000, unit + 1
    return f"{value:.4g} {('B', 'kB', 'MB', 'GB', 'TB', 'PB')[unit]}"


def _count(value: int) -> str:
    return f"{value:,}"


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return _count(value) if isinstance(value, int) else str(value)


def _part_names(models: list[dict[str, Any]]) -> list[str]:
    """Every part that a model has, in the order of PARTS, pools last."""
    names = dict.fromkeys(part for model in models for part in model["parts"])
    fixed = [part for _, part in PARTS]
    return [part for part in fixed if part in names] + [part for part in names if part not in fixed]


def _aligned(lines: list[list[str]]) -> str:
    columns = max(map(len, lines))
    widths = [max(len(line[column]) for line in lines if column < len(line)) for column in range(columns)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1 : len(line)])]).rstrip()
        for line in lines
    )
