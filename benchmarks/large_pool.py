"""A value table of 8 GiB on processes that may not have half as much memory each.

    python benchmarks/large_pool.py --json benchmarks/results/large_pool.json

Four processes, each limited to 4 GB, draw the table, train 10 steps, save, and train four steps more; two
processes, limited to 6.15 GB (half of the table is 4.3 GB), read that checkpoint and train the same four
steps. The losses must be the same. Takes about 12 GB of memory and 18 GB of disk.

The limit is RLIMIT_DATA: all private memory that a process may write, whether it has touched it or not.
Unlike RLIMIT_AS it leaves out libraries, and files that are mapped. Beside it stands the peak of the resident
memory.

The row optimizer is ``adamw_rowwise`` without first moments, which adds one number a row: a quarter of the
table is 2.1 GB. AdamW adds two moments as large as the values: 6.4 GB on each of four processes, by
calculation, and 3.2 GB on each of eight.
"""

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from memlm.parallel.folder_swap import link

ROOT = Path(__file__).resolve().parent.parent
SLOTS, VALUE_DIM = (2048, 1024), 1024
STEPS_BEFORE, STEPS = 10, 14
HEADROOM = 4e9 - SLOTS[0] * SLOTS[1] * VALUE_DIM * 4 / 4
"""Bytes beside a rank's part of the values: what 4 GB leave to one of four ranks."""
_OVERLAY = ROOT / "configs" / "parallel" / "memory_parallel.yaml"
_CONSTANT = {"schedule": {"shape": "constant"}}


def config(scale: int) -> dict[str, Any]:
    """Of the runs; the table divided by a power of 2."""
    return {
        "trainer": {
            "accelerator": "cpu",
            "val_check_interval": STEPS_BEFORE,
            "limit_val_batches": 0,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
        },
        "model": {
            "class_path": "memlm.MemoryLM",
            "init_args": {
                "transformer": {"dim": 64, "layers": 2, "heads": 2},
                "memory": {
                    "half_keys": [SLOTS[0] // scale, SLOTS[1]],
                    "heads": 2,
                    "reads": 16,
                    "key_dim": 32,
                    "value_dim": VALUE_DIM,
                    "layers": [1],
                },
                "optimizer": {"learning_rate": 0.003} | _CONSTANT,
                "values_optimizer": {"learning_rate": 0.01, "method": "adamw_rowwise", "betas": [0.0, 0.95]}
                | _CONSTANT,
            },
        },
        "data": {"class_path": "SyntheticFacts", "init_args": {"people": 200, "batch_size": 4}},
    }


def rank(limit: str, folder: str, *words: str) -> int:
    """One process: ``memlm`` under a limit; leaves its peak of resident memory in a file."""
    resource.setrlimit(resource.RLIMIT_DATA, (int(limit), int(limit)))
    from memlm.__main__ import main as memlm

    try:
        return memlm(list(words))
    finally:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        Path(folder, f"{os.environ.get('LOCAL_RANK', '0')}.txt").write_text(str(peak))


def run(folder: Path, name: str, ranks: int, scale: int, *words: str, keep: str = "") -> dict[str, Any]:
    """A run of so many processes; what it took, and its losses by step.

    Args:
        folder: Of the runs.
        name: Of the run.
        ranks: How many.
        scale: See :func:`config`.
        words: Further options.
        keep: A second name for its first checkpoint, which the next replaces.
    """
    part = SLOTS[0] // scale * SLOTS[1] * VALUE_DIM * 4 // ranks
    limit = int(HEADROOM + part)
    peaks = folder / f"{name}_peaks"
    peaks.mkdir()
    command = [sys.executable, __file__, "rank", str(limit), str(peaks), "fit"]
    command += ["--config", str(folder / "config.yaml"), "--config", str(_OVERLAY), "--run.name", name]
    command += ["--trainer.devices", str(ranks), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MEMLM_KERNELS": "reference"}
    start = time.monotonic()
    errors, last = folder / f"{name}.txt", folder / name / "checkpoints" / "last.ckpt"
    with errors.open("w") as file:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file, cwd=ROOT, env=environment)
        while process.poll() is None:
            time.sleep(0.1)
            if keep and last.exists():
                link(last, folder / keep)
                keep = ""
    if process.returncode:
        raise SystemExit(f"{name} has failed:\n{errors.read_text()[-4000:]}")
    with (folder / name / "metrics.csv").open() as file:
        losses = {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file)}
    saves = folder / name / "checkpoints.csv"
    result = {
        "ranks": ranks,
        "limit_of_a_rank": limit,
        "values_of_a_rank": part,
        "peak_resident": [int(path.read_text()) for path in sorted(peaks.iterdir())],
        "seconds": round(time.monotonic() - start, 1),
        "saves": list(csv.DictReader(saves.open())) if saves.exists() else [],
        "losses": losses,
    }
    print(
        f"{name}: {ranks} ranks, values {part / 1e9:.2f} GB of each, limit {limit / 1e9:.2f} GB, peak "
        f"resident {max(result['peak_resident']) / 1e9:.2f} GB; {result['seconds']} s; {result['saves']}",
        flush=True,
    )
    return result


def main() -> int:
    """Both runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=int, default=1, help="divide the table by this power of 2")
    parser.add_argument(
        "--folder", type=Path, help="where there is room; default: the system's for such files"
    )
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    import yaml

    with tempfile.TemporaryDirectory(prefix="memlm_large_", dir=options.folder) as name:
        folder = Path(name)
        (folder / "config.yaml").write_text(
            yaml.safe_dump({"run": {"root": str(folder)}} | config(options.scale))
        )
        steps = ["--trainer.max_steps", str(STEPS)]
        four = run(folder, "four", 4, options.scale, *steps, keep="kept.ckpt")
        # As many sequences a step on half as many processes.
        other = ["--data.init_args.batch_size", "8", "--trainer.enable_checkpointing", "false"]
        other += ["--ckpt_path", str(folder / "kept.ckpt")]
        two = run(folder, "two", 2, options.scale, *steps, *other)
    furthest = max(abs(loss / four["losses"][step] - 1) for step, loss in two["losses"].items())
    good = list(two["losses"]) == list(range(STEPS_BEFORE + 1, STEPS + 1)) and furthest < 1e-5
    table = SLOTS[0] // options.scale * SLOTS[1] * VALUE_DIM * 4
    print(f"table {table:,} bytes; losses of the resumed steps differ by {furthest:.1e} at most")
    if options.json is not None:
        result = {
            "command": "python benchmarks/large_pool.py " + " ".join(sys.argv[1:]),
            "table_bytes": table,
            "difference_of_losses": furthest,
            "runs": {"four": four, "two": two},
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return int(not good)


if __name__ == "__main__":
    raise SystemExit(rank(*sys.argv[2:]) if sys.argv[1:2] == ["rank"] else main())
