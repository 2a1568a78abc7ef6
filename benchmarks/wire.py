"""What bf16 on the wire does to losses, beside the same training with fp32 on it.

    python benchmarks/wire.py --json benchmarks/results/wire.json

trains tiny fp32 models for 20 steps (learning rate 0.01) on gloo processes of this machine, with
``wire_dtype: bfloat16`` and without, and prints the largest and the mean relative difference of the losses.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

STEPS = Path(__file__).resolve().parent.parent / "tests" / "distributed" / "steps.py"
SMALL = {"half_keys": 9, "heads": 2, "reads": 4, "key_dim": 8, "layers": [1]}
MODELS: dict[str, dict[str, Any]] = {
    "Memory+, one layer": {},
    "two layers": {"memory": SMALL | {"layers": [0, 2]}},
    "1,600 slots, few of them read": {"memory": SMALL | {"half_keys": 40}},
    "value expansion": {"memory": SMALL | {"half_keys": 8, "value_expansion": 4}},
    "PEER": {"kind": "peer", "memory": SMALL | {"layers": [1, 2]}},
    "Engram": {"kind": "engram", "memory": {"slots": 300, "heads": 2, "layers": [1], "value_dim": 8}},
    "Memory+, bf16 values": {"memory": SMALL | {"values_dtype": "bfloat16"}},
}
MESHES = ((2, 1), (2, 2), (4, 2))
COUNT = 20


def losses(ranks: int, group: int) -> dict[str, list[float]]:
    """Of every model, with either on the wire, by ``NAME`` and ``NAME, bf16``."""
    cases = {name: case | {"steps": COUNT} for name, case in MODELS.items()}
    cases |= {f"{name}, bf16": case | {"wire": True} for name, case in cases.items()}
    words = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", str(STEPS)]
    done = subprocess.run(
        [sys.executable, *words, json.dumps({"group": group, "cases": cases})],
        env=os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found: dict[str, list[float]] = json.loads(done.stdout.strip().splitlines()[-1])
    return {name: values[:COUNT] for name, values in found.items()}


def main() -> int:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    rows = []
    for ranks, group in MESHES:
        found = losses(ranks, group)
        for name in MODELS:
            pairs = zip(found[name], found[f"{name}, bf16"], strict=True)
            apart = [abs(narrow / wide - 1) for wide, narrow in pairs]
            rows.append(
                {"model": name, "ranks": ranks, "group": group, "largest": max(apart), "mean": mean(apart)}
            )
    head = " | ".join(f"{ranks} ranks, G = {group}: largest | mean" for ranks, group in MESHES)
    print(f"| model | {head} |\n|---{'|---' * 2 * len(MESHES)}|")
    for name in MODELS:
        cells = " | ".join(
            f"{row['largest']:.1e} | {row['mean']:.1e}" for row in rows if row["model"] == name
        )
        print(f"| {name} | {cells} |".replace("e-0", "e-"))
    if options.json is not None:
        command = "python benchmarks/wire.py " + " ".join(sys.argv[1:])
        options.json.write_text(json.dumps({"command": command, "rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
