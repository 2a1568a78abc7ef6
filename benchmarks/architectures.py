"""Every architecture of configs/small/ on the same facts, tokens and FLOPs, over several seeds.

    python benchmarks/architectures.py --json benchmarks/results/architectures.json --docs docs/comparison.md

Runs `memlm fit` on each config, one run after another (give it the machine alone), prints one row for each
as a Markdown table, and writes the table into a page, between its two marks. A seed changes facts, order and
initial values. `--rates` first tries learning rates of the dense parameters on seed 0, and takes the best.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import mean, median
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.fits import ROOT, environment_of, fit, write

NAMES = (
    "dense",
    "moe_expert_choice",
    "moe",
    "engram",
    "peer",
    "memory",
    "memory_plus",
    "memory_beside",
    "ultramem_v2",
    "ultramem",
)
START, END = "<!-- table -->", "<!-- end of table -->"


def measure(root: Path, name: str, seeds: int, rates: list[float], flags: list[str]) -> dict[str, Any]:
    """All runs of one config.

    Args:
        root: Folder of the run directories.
        name: Of the config.
        seeds: How many.
        rates: Learning rates to choose from by seed 0; empty: the config's own.
        flags: More options of ``memlm fit``.
    """
    config = f"small/{name}"
    content = yaml.safe_load((ROOT / f"configs/{config}.yaml").read_text())
    rate = content["model"]["init_args"]["optimizer"]["learning_rate"]
    tried = {}
    for candidate in rates:
        flag = f"--model.optimizer.learning_rate={candidate}"
        tried[candidate] = fit(root, f"{name}_{candidate:g}", config, 0, flag, *flags)
    if tried:
        rate = max(tried, key=lambda candidate: tried[candidate]["val/recall"])
    runs = [tried[rate]] if tried else []
    for seed in range(len(runs), seeds):
        runs.append(
            fit(root, f"{name}_seed{seed}", config, seed, f"--model.optimizer.learning_rate={rate}", *flags)
        )
    model = json.loads((root / (f"{name}_{rate:g}" if tried else f"{name}_seed0") / "model.json").read_text())
    return {
        "learning_rate": rate,
        "tried": {f"{candidate:g}": run["val/recall"] for candidate, run in tried.items()},
        "model": model,
        "runs": runs,
        "config": content,
    }


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    dense = (
        median(run["tokens_per_second"] for run in results["dense"]["runs"]) if "dense" in results else None
    )
    lines = [
        "| model | parameters | active | FLOPs | recall by seed | mean | loss | tokens/s | of dense |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        recalls = [run["val/recall"] for run in result["runs"]]
        speed = median(run["tokens_per_second"] for run in result["runs"])
        model = result["model"]
        cells = [
            name,
            f"{model['total'] / 1e6:.3f}M",
            f"{model['active'] / 1e6:.3f}M",
            f"{model['flops_per_token']:,}",
            ", ".join(f"{recall:.3f}" for recall in recalls),
            f"{mean(recalls):.3f}",
            f"{mean(run['val/loss'] for run in result['runs']):.3f}",
            f"{speed:,.0f}",
            f"{speed / dense:.2f}" if dense else "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def into_page(page: str, text: str) -> str:
    """A page with its table replaced.

    Raises:
        SystemExit: It has no place for one.
    """
    if START not in page or END not in page:
        raise SystemExit(f"the page has no {START} and {END}")
    return page[: page.index(START) + len(START)] + f"\n{text}\n" + page[page.index(END) :]


def main() -> None:
    """Run everything, print the table, write JSON and page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=NAMES, metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=[])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--docs", type=Path)
    parser.add_argument("--flag", action="append", default=[], help="another option of memlm fit")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in arguments.only:
            results[name] = measure(root, name, arguments.seeds, arguments.rates, arguments.flag)
        environment = environment_of(root, next(path.name for path in root.iterdir()))
    text = table(results)
    print(text)
    if arguments.json:
        write(arguments.json, {"environment": environment, "results": results})
    if arguments.docs:
        arguments.docs.write_text(into_page(arguments.docs.read_text(), text))


if __name__ == "__main__":
    main()
