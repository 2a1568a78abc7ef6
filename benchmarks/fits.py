"""Whole runs of `memlm fit` for the benchmarks that compare what models learn."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
METRICS = ("val/recall", "val/recall_seen_phrasing", "val/recall_control", "val/loss")


def fit(root: Path, name: str, config: str, seed: int, *flags: str) -> dict[str, Any]:
    """One run: its last validation, its training seconds and steps.

    Args:
        root: Folder of the run directories.
        name: Of the run.
        config: Path below ``configs/``, without suffix.
        seed: Of initial values, facts and order.
        flags: More options of ``memlm fit``.

    Raises:
        SystemExit: It failed; with the end of what it said.
    """
    command = [sys.executable, "-m", "memlm", "fit", "--config", f"configs/{config}.yaml"]
    command += [f"--run.root={root}", f"--run.name={name}", f"--seed_everything={seed}"]
    command += [f"--data.seed={seed}", "--trainer.enable_progress_bar=false", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    header, *rows = [line.split(",") for line in (root / name / "metrics.csv").read_text().split()]
    table = [dict(zip(header, row, strict=True)) for row in rows]
    last = [row for row in table if row.get("val/recall")][-1]
    environment = environment_of(root, name)
    result: dict[str, Any] = {metric: float(last[metric]) for metric in METRICS}
    result |= {"seed": seed, "steps": int(last["step"]), "train_seconds": environment["train_seconds"]}
    result |= {
        "tokens": environment["tokens"],
        "tokens_per_second": environment["tokens"] / environment["train_seconds"],
    }
    print(f"  {name}: recall {result['val/recall']:.3f}, {result['train_seconds']:.0f} s", flush=True)
    return result


def environment_of(root: Path, name: str) -> dict[str, Any]:
    """What a run noted of its machine and versions."""
    return json.loads((root / name / "environment.json").read_text())


def write(path: Path, content: dict[str, Any]) -> None:
    """Writes results, with the command that made them."""
    command = " ".join(["python", *sys.argv])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"command": command, **content}, indent=1) + "\n")
