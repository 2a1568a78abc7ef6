"""Evaluates tasks as one of several processes: a script of its own.

Arguments: rank, number of processes, folder of the tasks' files. Writes ``RANK.pt``.
"""

import sys
from pathlib import Path

import torch
from byte_model import evaluator

from memlm.evaluation.multiple_choice import MMLU
from memlm.evaluation.question_answering import NQOpen
from memlm.evaluation.results import as_dict
from memlm.evaluation.text_likelihood import TextPerplexity

if __name__ == "__main__":
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    if world > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world
        )
    ask = evaluator(70, rank=rank, world=world)
    results = [
        NQOpen(str(folder / "nq.jsonl"), shots=2, max_new_tokens=6).run(ask, records=True),
        MMLU(str(folder / "mmlu.jsonl")).run(ask, records=True),
        TextPerplexity(str(folder / "one.txt")).run(ask, records=True),
    ]
    shown = [as_dict(result) | {"seconds": 0, "records": result.records} for result in results]
    torch.save(shown, folder / f"{world}-{rank}.pt")
