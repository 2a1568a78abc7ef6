"""``memlm compare``: one table of several runs, and a picture of how they learned."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from memlm.errors import DataError
from memlm.run_directory import RunFiles
from memlm.run_metrics import Series, read_metrics
from memlm.verb_parser import VerbParser


class Measure(NamedTuple):
    """One row of the table: its key in JSON (qualities: after ``val/`` or ``test/``), name and format."""

    key: str
    name: str
    form: Callable[[float], str]


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _decimals(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:,.{digits}f}"


MEASURES = (
    Measure("parameters_total", "total parameters", _count),
    Measure("parameters_active", "active parameters per token", _count),
    Measure("flops_per_token", "forward FLOPs per token", _count),
    Measure("values_read_per_token", "values read per token", _count),
    Measure("steps", "steps", _count),
    Measure("tokens", "tokens seen, padding included", _count),
    Measure("tokens_per_second", "tokens per second of training", _count),
    Measure("train_seconds", "seconds of training", _decimals(1)),
    Measure("loss", "loss (nats per token)", _decimals(4)),
    Measure("bits_per_byte", "bits_per_byte", _decimals(4)),
    Measure("recall", "recall (held-out phrasing)", _decimals(3)),
    Measure("recall_seen_phrasing", "recall_seen_phrasing", _decimals(3)),
    Measure("recall_control", "recall_control (never trained)", _decimals(3)),
    Measure("recall_majority", "recall_majority (most common)", _decimals(3)),
)
_QUALITIES = (
    "loss",
    "bits_per_byte",
    "recall",
    "recall_seen_phrasing",
    "recall_control",
    "recall_majority",
)
_FURTHER = r"(val|test)/(.+/bits_per_byte|recall\w*_\d+x)|tasks/.+"
"""Qualities that only some runs have: of each evaluation set, of facts by exposures, of tasks."""


class Run:
    """What the files of a run say.

    Args:
        directory: The run directory.

    Raises:
        DataError: if it is not one, or a file of it is malformed.
    """

    def __init__(self, directory: str) -> None:
        self.files = RunFiles(directory)
        if not self.files.directory.is_dir():
            raise DataError(directory, "is not a run directory: there is no such folder")
        # A run that was imported and tested has no metrics of training.
        if not any(path.is_file() for path in (self.files.metrics, self.files.test, self.files.tasks)):
            raise DataError(
                self.files.metrics,
                f"is missing, and so are test.json and tasks.json: {directory} is not a run directory, or "
                "nothing was measured in it",
            )
        self.name = self.files.directory.resolve().name
        self.metrics = read_metrics(self.files.metrics) if self.files.metrics.is_file() else []
        self.model = _read_json(self.files.model)
        self.environment = _read_json(self.files.environment)
        self.test = _read_json(self.files.test)
        self.tasks = _read_json(self.files.tasks).get("tasks", {})

    def validated(self) -> dict[str, float]:
        """The last validation: metric values and ``step``; empty if none ran."""
        rows = [row for row in self.metrics if "val/loss" in row]
        return rows[-1] if rows else {}

    def measures(self, on_test: bool) -> dict[str, Any]:
        """Values of MEASURES, None where the run does not tell, and qualities that only some runs have."""
        tokens = self.environment.get("tokens") or self._last("train/tokens")
        seconds = self.environment.get("train_seconds") or self._last("train/seconds")
        speed = tokens / seconds if tokens and seconds else self._last("train/tokens_per_second")
        source, prefix = (self.test, "test/") if on_test else (self.validated(), "val/")
        return {
            "parameters_total": self.model.get("total"),
            "parameters_active": self.model.get("active"),
            "flops_per_token": self.model.get("flops_per_token"),
            "values_read_per_token": self.model.get("values_read_per_token"),
            "steps": self._last("step"),
            "tokens": tokens,
            "tokens_per_second": speed,
            "train_seconds": seconds,
            **{prefix + key: source.get(prefix + key) for key in _QUALITIES},
            **{key: value for key, value in source.items() if re.fullmatch(_FURTHER, key)},
            **self._task_figures(on_test),
        }

    def _task_figures(self, on_test: bool) -> dict[str, float]:
        """Those of ``tasks.json``, or the last that were logged in training."""
        if not on_test:
            names = dict.fromkeys(key for row in self.metrics for key in row if key.startswith("tasks/"))
            return {name: value for name in names if (value := self._last(name)) is not None}
        return {
            f"tasks/{task}/{metric}": float(estimate["value"])
            for task, result in self.tasks.items()
            for metric, estimate in result["metrics"].items()
        }

    def measured(self, on_test: bool) -> str:
        """Which weights and data the qualities come from."""
        if on_test:
            checkpoint = Path(str(self.test.get("checkpoint", "?"))).name
            return f"test, {checkpoint}, step {self.test.get('step', '?')}"
        step = self.validated().get("step")
        return f"validation, step {step:.0f}" if step is not None else "not validated"

    def data(self) -> dict[str, Any]:
        """The data section of the configuration, flat; empty if there is none."""
        if not self.files.config.is_file():
            return {}
        try:
            data = yaml.safe_load(self.files.config.read_text(encoding="utf-8")).get("data") or {}
        except (yaml.YAMLError, AttributeError) as error:
            raise DataError(self.files.config, "is not the YAML of a run's configuration") from error
        return {"class_path": data.get("class_path"), **(data.get("init_args") or {})}

    def series(self, metric: str, against: str) -> Series:
        """A validation metric against a training counter such as ``train/tokens``."""
        return Series.of(self.metrics, metric, against)

    def _last(self, column: str) -> float | None:
        values = [row[column] for row in self.metrics if column in row]
        return values[-1] if values else None


def compare(directories: list[str]) -> dict[str, Any]:
    """Everything that the table shows.

    Test results are used when every run has them, else every run's last validation: never one beside the
    other.

    Args:
        directories: Run directories.

    Returns:
        ``measured_on`` (test or validation), ``warnings``, and ``runs``: for each its directory,
        ``measured``, the values of MEASURES, bits per byte of every evaluation set if there are several,
        recall by exposures, and the figures of tasks.

    Raises:
        DataError: if one of them is not a run directory.
    """
    runs = [Run(directory) for directory in directories]
    on_test = all(run.test for run in runs)
    return {
        "measured_on": "test" if on_test else "validation",
        "warnings": _differences(runs)
        + _left_aside(runs, on_test)
        + _outdated(runs, on_test)
        + _other_weights(runs, on_test),
        "runs": [
            {"run": str(run.files.directory), "measured": run.measured(on_test), **run.measures(on_test)}
            for run in runs
        ],
    }


def table(comparison: dict[str, Any]) -> str:
    """The comparison as text: a row for each measure, a column for each run."""
    runs = comparison["runs"]
    prefix = "test/" if comparison["measured_on"] == "test" else "val/"
    lines = [["", *(run["run"] for run in runs)]]
    for measure in MEASURES:
        is_quality = measure.key in _QUALITIES
        values = [run[prefix + measure.key if is_quality else measure.key] for run in runs]
        shown = ["-" if value is None else measure.form(value) for value in values]
        lines.append([prefix + measure.name if is_quality else measure.name, *shown])
    for key in dict.fromkeys(key for run in runs for key in run if re.fullmatch(_FURTHER, key)):
        values = [run.get(key) for run in runs]
        lines.append([key, *("-" if value is None else f"{value:.4f}" for value in values)])
    lines.append(["measured on", *(run["measured"] for run in runs)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(runs) + 1)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(map(str.rjust, line[1:], widths[1:]))]).rstrip()
        for line in lines
    )


def main(arguments: list[str]) -> int:
    """Runs ``memlm compare``."""
    parser = VerbParser("memlm compare", "Print one table of runs and draw them.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory, such as runs/quickstart")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the table's values here")
    parser.add_argument(
        "--png", type=Path, metavar="PATH", help="the picture [compare.png beside the first run]"
    )
    options = parser.parse_args(arguments)
    comparison = compare(options.runs)
    print(table(comparison))
    for warning in comparison["warnings"]:
        print(f"warning: {warning}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(comparison, indent=2) + "\n", encoding="utf-8")
        print(f"Values: {options.json}")
    # Drawing needs half a second of imports, which the table above need not wait for.
    from memlm.compare_plot import draw

    png = options.png or Path(options.runs[0]).resolve().parent / "compare.png"
    draw([Run(directory) for directory in options.runs], png)
    print(f"Picture: {png}")
    return 0


def _differences(runs: list[Run]) -> list[str]:
    """One warning for each run whose data are not those of the first."""
    warnings = []
    first = runs[0].data()
    for run in runs[1:]:
        data = run.data()
        keys = [key for key in dict.fromkeys([*first, *data]) if key not in ("num_workers", "verify")]
        different = [key for key in keys if first.get(key) != data.get(key)]
        if different:
            shown = ", ".join(f"{key} {first.get(key)!r} and {data.get(key)!r}" for key in different)
            warnings.append(f"{runs[0].name} and {run.name} were trained on different data: {shown}")
    return warnings


def _left_aside(runs: list[Run], on_test: bool) -> list[str]:
    tested = [run.name for run in runs if run.test]
    if on_test or not tested:
        return []
    untested = [run.name for run in runs if not run.test]
    return [f"test results of {', '.join(tested)} are left aside, since {', '.join(untested)} has none"]


def _outdated(runs: list[Run], on_test: bool) -> list[str]:
    """One warning for each run that was trained on after its test."""
    if not on_test:
        return []
    trained = [(run, run.measures(on_test)["steps"]) for run in runs]
    return [
        f"{run.name} was tested at step {run.test['step']} and trained to step {steps:.0f}: test it again"
        for run, steps in trained
        if steps is not None and "step" in run.test and run.test["step"] < steps
    ]


def _other_weights(runs: list[Run], on_test: bool) -> list[str]:
    """One warning for each task that was evaluated on other weights than the test set."""
    return [
        f"{run.name} was tested at step {run.test['step']} and evaluated on {task} at step {result['step']}"
        for run in runs
        for task, result in run.tasks.items()
        if on_test and "step" in run.test and result.get("step", run.test["step"]) != run.test["step"]
    ]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(path, f"is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(path, "is not a JSON object")
    return content
