"""The pictures of ``memlm inspect``."""

import os
import warnings
from pathlib import Path

from matplotlib.figure import Figure

from memlm.inspection.ablation import AblationReport
from memlm.inspection.reads import LayerReads
from memlm.inspection.text import ablation_names

_LEGIBLE = 600
"""Cells up to which each names its slot."""


def draw_reads(layers: list[LayerReads], labels: list[str], path: Path) -> None:
    """A heat map of how concentrated reads are: a column a token, a row a head, and its heaviest slot.

    Colour is the largest weight of the head (of Engram: the gate); in each cell, if there are few enough of
    them, stands the row that has it.

    Args:
        layers: What the tokens read, the same tokens in each.
        labels: Of the tokens.
        path: The PNG; its folder is made.
    """
    names, colours, rows = [], [], []
    for layer in layers:
        best = layer.weights.argmax(-1, keepdim=True)
        concentration = layer.concentration.float().cpu()
        heaviest = layer.rows.gather(-1, best).squeeze(-1)
        for head, name in enumerate(layer.place.heads):
            names.append(f"block {layer.place.block} {name}")
            colours.append(concentration[:, head].tolist())
            rows.append(heaviest[:, head].tolist())
    width, height = 2.5 + 0.5 * len(labels), 1.8 + 0.28 * len(names)
    figure = Figure(figsize=(min(max(width, 6), 60), min(max(height, 3), 60)), layout="constrained")
    axes = figure.subplots()
    largest = max(map(max, colours))
    image = axes.imshow(colours, vmin=0, vmax=largest, cmap="viridis", aspect="auto", interpolation="nearest")
    # A "$" in a token is not the beginning of a formula.
    axes.set_xticks(
        range(len(labels)), labels, rotation=60, ha="right", rotation_mode="anchor", parse_math=False
    )
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(labelsize="small")
    if len(labels) * len(names) <= _LEGIBLE:
        for y, row in enumerate(rows):
            for x, slot in enumerate(row):
                colour = "black" if colours[y][x] > 0.6 * largest else "white"
                axes.text(x, y, str(slot), ha="center", va="center", fontsize=5.5, color=colour)
    figure.colorbar(image, label="largest weight of a head (Engram: gate)")
    _save(figure, path)


def draw_ablation(report: AblationReport, path: Path) -> None:
    """Bars of how the answer's log-likelihood changes, and a mark for the mean of each control.

    Args:
        report: What was removed.
        path: The PNG; its folder is made.
    """
    names = ablation_names(report)
    intact = report.intact.log_likelihood
    changes = [ablation.scored.log_likelihood - intact for ablation in report.ablations]
    figure = Figure(figsize=(8, min(max(1.5 + 0.24 * len(names), 3), 60)), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(names)), changes, color="C0", label="removed")
    for what, marker in (("random", "x"), ("also read", "o")):
        points = [
            (control.mean - intact, y)
            for y, ablation in enumerate(report.ablations)
            for control in ablation.controls
            if control.what == what
        ]
        if points:
            label = "control: random others" if what == "random" else "control: others that the prompt reads"
            axes.plot(
                *zip(*points, strict=True), marker, color="C1" if what == "random" else "C2", label=label
            )
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(labelsize="small")
    axes.set_ylim(len(names) - 0.5, -0.5)  # the first on top
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("change of the answer's log-likelihood (nats)")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="best", fontsize="small")
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    """Write a PNG, a whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with warnings.catch_warnings():
            # A token in a script that the font lacks is drawn as a box; the text output has it.
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            figure.savefig(temporary, dpi=130, format="png")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
