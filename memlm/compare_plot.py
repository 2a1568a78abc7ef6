"""The picture of ``memlm compare``."""

from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from memlm.compare import Run


def draw(runs: list["Run"], path: Path) -> None:
    """Recall and loss against training tokens, and recall against seconds of training.

    Dotted: recall of facts that were never trained. Bits per byte take the place of recall when no run has
    measured it.

    Args:
        runs: The runs, each a curve.
        path: The PNG; its folder is made.
    """
    recalls = any(run.series("val/recall", "step").y for run in runs)
    quality = "val/recall" if recalls else "val/bits_per_byte"
    label = "recall, held-out phrasing" if recalls else "bits per byte"
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    axes = figure.subplots(1, 3)
    _panel(axes[0], runs, quality, label, "train/tokens", "training tokens")
    _panel(axes[1], runs, "val/loss", "validation loss (nats per token)", "train/tokens", "training tokens")
    _panel(axes[2], runs, quality, label, "train/seconds", "seconds of training")
    axes[0].legend(loc="best", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _panel(axes: Axes, runs: list["Run"], metric: str, label: str, against: str, against_label: str) -> None:
    missing = []
    for index, run in enumerate(runs):
        curve = run.series(metric, against)
        if not curve.y:
            missing.append(run.name)
        axes.plot(curve.x, curve.y, marker=".", color=f"C{index}", label=str(run.files.directory))
        if metric == "val/recall":
            control = run.series("val/recall_control", against)
            axes.plot(control.x, control.y, linestyle=":", color=f"C{index}")
    if missing:
        axes.set_title(f"no {metric} against {against}: {', '.join(missing)}", fontsize="x-small")
    if metric == "val/recall":
        axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel(against_label)
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
