"""Runs commands of memlm one after the other on each rank, which may have words, and files, of its own.

    torchrun --nproc_per_node 2 tests/distributed/unlike.py \\
        '{"folder": "/tmp/x", "cases": {"one": {"all": ["fit"]}}}'

Each rank works in its own folder ``folder/RANK``, and writes there ``results.json``: of each case the exit
code, the lines on standard error, and the seconds that it took.
"""

import contextlib
import io
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import memlm
import memlm.cli  # before the clock runs
from memlm.__main__ import main


def run(name: str, case: dict[str, Any], rank: str) -> dict[str, Any]:
    """One command."""
    memlm.__version__ = case.get("versions", {}).get(rank, "0.1.0")
    errors, start = io.StringIO(), time.monotonic()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = main([*case["all"], *case.get("words", {}).get(rank, [])])
    lines, seconds = errors.getvalue().splitlines(), time.monotonic() - start
    print(f"rank {rank}: {name}: code {code}, {seconds:.1f} s", *lines, sep="\n  ", flush=True)
    return {"code": code, "lines": lines, "seconds": seconds}


if __name__ == "__main__":
    options, rank = json.loads(sys.argv[1]), os.environ["RANK"]
    own = Path(options["folder"]) / rank
    own.mkdir(exist_ok=True)
    os.chdir(own)
    results = {name: run(name, case, rank) for name, case in options["cases"].items()}
    Path("results.json").write_text(json.dumps(results))
