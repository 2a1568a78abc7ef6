"""The quickstart's comparison over several seeds: memory against dense, at equal tokens and at equal time.

    python benchmarks/quickstart.py --json benchmarks/results/quickstart.json

Runs `memlm fit` on the two quickstart configs, one run after another (give it the machine alone), and
prints one row for each setting: Memory+, the dense twin at each learning rate (same data, tokens and
FLOPs), the best of them over all seeds, and the dense twin trained for as many seconds as the memory
model took. A seed changes facts, order and initial values.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.fits import ROOT, environment_of, fit, write


def quickstart_steps() -> int:
    """Optimizer steps of the quickstart."""
    return yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text())["trainer"]["max_steps"]


def main() -> None:
    """Run everything, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dense_rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    seeds = range(arguments.seeds)
    settings: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        memory = [fit(root, f"memory_{seed}", "quickstart", seed) for seed in seeds]
        settings["Memory+"] = memory
        for rate in arguments.dense_rates:
            flag = f"--model.optimizer.learning_rate={rate}"
            name = f"dense, rate {rate:g}"
            settings[name] = [fit(root, f"dense_{rate:g}_0", "quickstart_dense", 0, flag)]
        best = max(arguments.dense_rates, key=lambda r: settings[f"dense, rate {r:g}"][0]["val/recall"])
        flag = f"--model.optimizer.learning_rate={best}"
        dense = settings[f"dense, rate {best:g}"]
        dense += [fit(root, f"dense_{best:g}_{seed}", "quickstart_dense", seed, flag) for seed in seeds[1:]]
        # Half the batch, twice the steps: the same tokens, more updates.
        half, interval = quickstart_steps() * 2, quickstart_steps() // 5
        smaller = [flag, "--data.batch_size=16", f"--trainer.max_steps={half}"]
        smaller += [f"--trainer.val_check_interval={interval}"]
        settings[f"dense, rate {best:g}, half the batch"] = [
            fit(root, f"dense_half_batch_{seed}", "quickstart_dense", seed, *smaller) for seed in seeds
        ]
        environment = environment_of(root, "memory_0")
        step_seconds = mean(run["train_seconds"] / run["steps"] for run in dense)
        steps = round(mean(run["train_seconds"] for run in memory) / step_seconds)
        settings[f"dense, rate {best:g}, as many seconds as Memory+"] = [
            fit(root, f"dense_long_{seed}", "quickstart_dense", seed, flag,
                f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}")
            for seed in seeds
        ]  # fmt: skip
    print(f"{'setting':44} {'steps':>6} {'seconds':>8}  recall of held-out phrasings, by seed")
    for name, runs in settings.items():
        recall = " ".join(f"{run['val/recall']:.3f}" for run in runs)
        seconds = mean(run["train_seconds"] for run in runs)
        print(f"{name:44} {runs[0]['steps']:6} {seconds:8.0f}  {recall}")
    if arguments.json:
        configs = ("quickstart", "quickstart_dense")
        content = {
            "environment": environment,
            "configs": {
                name: yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text()) for name in configs
            },
            "settings": settings,
        }
        write(arguments.json, content)


if __name__ == "__main__":
    main()
