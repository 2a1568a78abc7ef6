"""What tasks have given, as a table for the screen and as files of the run directory."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memlm.errors import DataError
from memlm.evaluation.estimates import Estimate
from memlm.evaluation.task import TaskResult
from memlm.run_directory import write_json, write_text


def table(results: Sequence[TaskResult]) -> str:
    """A row for each task and metric: value, 95 % confidence interval, examples, seconds of the task."""
    lines = [("task", "metric", "value", "95 % interval", "n", "seconds")]
    for result in results:
        for position, (metric, estimate) in enumerate(result.metrics.items()):
            first = position == 0
            lines.append(
                (
                    result.name if first else "",
                    metric,
                    _number(estimate.value),
                    _interval(estimate),
                    f"{estimate.n:,}",
                    f"{result.seconds:.1f}" if first else "",
                )
            )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = [
        "  ".join([*map(str.ljust, line[:2], widths), *map(str.rjust, line[2:], widths[2:])]).rstrip()
        for line in lines
    ]
    shown.insert(1, "  ".join("-" * width for width in widths))
    for result in results:
        if result.notes:
            notes = ", ".join(f"{count:,} {key.replace('_', ' ')}" for key, count in result.notes.items())
            shown.append(f"{result.name}: {notes} (the context was too short)")
    return "\n".join(shown)


def as_dict(result: TaskResult) -> dict[str, Any]:
    """A result without its records, for JSON; what is not finite is a string (``inf``), as JSON has none."""
    content: dict[str, Any] = {
        "examples": result.examples,
        "seconds": round(result.seconds, 3),
        "metrics": _metrics(result.metrics),
    }
    if result.groups:
        content["groups"] = {name: _metrics(metrics) for name, metrics in result.groups.items()}
    return content | ({"notes": result.notes} if result.notes else {})


def read_results(path: Path) -> dict[str, Any]:
    """What `write_results` has written, by task; empty if there is no such file.

    Raises:
        DataError: The file is not one of results.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return dict(content["tasks"])
    except (ValueError, KeyError, TypeError):
        message = "is not a file of task results, so they cannot be added to it; move it away"
        raise DataError(path, message) from None


def write_results(path: Path, results: Sequence[TaskResult], source: Mapping[str, Any]) -> None:
    """Writes results into a file whole or not at all; those of other tasks that it holds already are kept.

    Args:
        path: The JSON file.
        results: The results.
        source: What else to say of each, such as the checkpoint that was evaluated.

    Raises:
        DataError: The file holds something else.
    """
    tasks = read_results(path)
    tasks |= {result.name: as_dict(result) | dict(source) for result in results}
    write_json(path, {"tasks": tasks})


def write_records(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Writes the records of a task's examples as JSON lines, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def _metrics(metrics: Mapping[str, Estimate]) -> dict[str, Any]:
    return {name: {key: _plain(v) for key, v in e._asdict().items()} for name, e in metrics.items()}


def _plain(value: float | None) -> float | str | None:
    return value if value is None or abs(value) < float("inf") else str(value)


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"


def _interval(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return "-"
    return f"{_number(estimate.low)} .. {_number(estimate.high)}"
