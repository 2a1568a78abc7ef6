"""The worked examples of docs/scaling.md: what a rank holds and sends, and how long that takes, by mesh.

    python benchmarks/scaling.py

prints the tables of that page. The bytes are those of ``memlm params``; nothing is measured. Seconds follow
from the speeds below, with nothing overlapped.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from memlm.parameters import main as params

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = {
    "1.3b, Memory+, 64M values (138.7B parameters)": "1.3b_memory_plus_64m",
    "8b, Memory+, 16M values (76.5B parameters)": "8b_memory_plus",
}
GROUPS = {64: (8, 16, 32, 64), 256: (8, 16, 32, 64, 128, 256)}
CHOSEN = 64
"""The group that the page recommends, of which the second table says what bf16 on the wire saves."""
TOKENS = 32_768
"""Of a rank in a step, in one micro-batch."""

FLOPS = 400e12
"""Of a GPU, a second."""
IN_NODE, BETWEEN_NODES = 450e9, 50e9
"""Bytes that a GPU sends a second, by NVLink and by InfiniBand."""
NODE = 8
"""GPUs of a node."""


@dataclass(frozen=True)
class Example:
    """One model on one mesh; bytes and seconds of one rank in a step."""

    ranks: int
    group: int
    held: dict[str, int]
    sent: dict[str, int]
    calculation: float
    """Seconds."""

    @property
    def reads(self) -> int:
        """Bytes sent within the memory group, forward and backward."""
        return self.sent["reads_forward"] + self.sent["reads_backward"]

    @property
    def rows(self) -> int:
        """Bytes of row gradients, their squares and updated rows."""
        return self.sent["row_gradients"] + self.sent["rows"]

    @property
    def dense(self) -> int:
        """Bytes of the other parameters and their gradients."""
        return self.sent["dense_weights"] + self.sent["dense_gradients"]

    @property
    def seconds(self) -> dict[str, float]:
        """Of each of the four."""
        reads = self.reads / (IN_NODE if self.group <= NODE else BETWEEN_NODES)
        others = {"rows": self.rows / BETWEEN_NODES, "dense": self.dense / BETWEEN_NODES}
        return {"reads": reads, **others, "calculation": self.calculation}

    @property
    def share(self) -> float:
        """Of the step's time, that memory sends."""
        seconds = self.seconds
        return (seconds["reads"] + seconds["rows"]) / sum(seconds.values())


def calculate(name: str, ranks: int, group: int, wire: str | None = None) -> Example:
    """What ``memlm params`` says of a config of the paper's.

    Args:
        name: Of the file, without its ending.
        ranks: ``W``.
        group: ``G``.
        wire: ``--wire_dtype``.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        file = Path(folder, "params.json")
        words = ["--config", str(ROOT / "configs" / "paper" / f"{name}.yaml"), "--json", str(file)]
        words += ["--mesh", f"{ranks}x{group}", "--shard_dense", "true", "--tokens_per_rank", str(TOKENS)]
        params([*words, *(() if wire is None else ("--wire_dtype", wire))])
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    rank = found["rank"]
    flops = (found["flops_per_token"] + found["backward_flops_per_token"]) * TOKENS
    return Example(ranks, group, rank["bytes"], rank["sent"], flops / FLOPS)


def meshes(examples: Iterable[Example]) -> str:
    """A line for each mesh: GB held, GB sent, seconds."""
    head = "ranks | G | dense GB | values GB | row gradients GB | state GB | all GB"
    head += " | reads sent GB | rows sent GB | dense sent GB | seconds: reads | rows | dense | calculation"
    lines = [f"| {head} |", "|---" * (head.count("|") + 1) + "|"]
    for example in examples:
        held = example.held
        dense = held["dense_weights"] + held["dense_gradients"] + held["dense_state"]
        size = [dense, held["values"], held["row_gradients"], held["values_state"], held["total"]]
        size += [example.reads, example.rows, example.dense]
        cells = [f"{number / 1e9:.1f}" for number in size]
        cells += [f"{number:.2f}" for number in example.seconds.values()]
        lines.append("| " + " | ".join([str(example.ranks), str(example.group), *cells]) + " |")
    return "\n".join(lines)


def wires(models: Iterable[str] = tuple(EXAMPLES)) -> str:
    """What the chosen group sends, and its share of the step's time, by what it is sent as."""
    lines = [
        "| model | ranks | on the wire | reads sent GB | rows sent GB | seconds: both | share of the step |"
    ]
    lines.append("|---" * 7 + "|")
    for model in models:
        for ranks in GROUPS:
            for wire in (None, "bfloat16"):
                example = calculate(EXAMPLES[model], ranks, CHOSEN, wire)
                seconds = example.seconds["reads"] + example.seconds["rows"]
                cells = [model.split(",")[0], str(ranks), "bf16" if wire else "fp32"]
                cells += [f"{example.reads / 1e9:.1f}", f"{example.rows / 1e9:.1f}"]
                lines.append("| " + " | ".join([*cells, f"{seconds:.2f}", f"{example.share:.0%}"]) + " |")
    return "\n".join(lines)


def tables() -> str:
    """All that the page has of them."""
    found = []
    for model, name in EXAMPLES.items():
        examples = [calculate(name, ranks, group) for ranks, groups in GROUPS.items() for group in groups]
        found.append(f"### {model}\n\n{meshes(examples)}")
    return "\n\n".join([*found, f"### G = {CHOSEN}, by what is on the wire\n\n{wires()}"])


def main() -> None:
    """Prints the tables."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    print(tables())


if __name__ == "__main__":
    main()
