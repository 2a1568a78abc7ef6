"""``memlm consolidate``: one file of a checkpoint that several processes have written."""

import argparse
import time
from pathlib import Path

from memlm.verb_parser import VerbParser

_DESCRIPTION = """\
Write the folder of a sharded checkpoint, to which each process of a memory-parallel run writes its part, as
one .ckpt file. All verbs take it: memlm fit --ckpt_path goes on in one process, memlm generate, export, ...
read it. Parameters, optimizer state, schedule, place in the data: all is kept, bit for bit.

Takes the memory of some rows at a time, however large the tables."""


def main(arguments: list[str]) -> int:
    """Runs ``memlm consolidate``."""
    options = _parser().parse_args(arguments)
    # Seconds of imports, which --help need not wait for.
    from memlm.parallel.consolidate import consolidate

    start = time.perf_counter()
    content = consolidate(options.folder, options.file)
    seconds = time.perf_counter() - start
    size = options.file.stat().st_size
    print(
        f"{options.file}: step {content['global_step']}, {len(content['state_dict'])} tensors of the model, "
        f"{size:,} bytes in {seconds:.1f} s"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = VerbParser("memlm consolidate", _DESCRIPTION)
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="such as runs/NAME/checkpoints/last.ckpt")
    add("file", type=Path, metavar="FILE", help="file to make, such as whole.ckpt; must not exist")
    return parser
