"""Several verbs of the command line in one process start, which is what takes long.

    torchrun --nproc_per_node 2 tests/distributed/several_runs.py '[["fit", "--config", "C.yaml", ...], ...]'

With a first word of ``!fit`` a verb must fail; what it said is printed.
"""

import json
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from memlm.cli import run

if __name__ == "__main__":
    torch.set_num_threads(1)
    for verb, *words in json.loads(sys.argv[1]):
        try:
            run(verb.removeprefix("!"), words)
        except Exception:
            print(verb, *words, file=sys.stderr)
            traceback.print_exc()
            if not verb.startswith("!"):
                raise
