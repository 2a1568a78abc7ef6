"""``memlm import``: a run directory of a Hugging Face folder."""

import argparse
from pathlib import Path

from memlm.verb_parser import VerbParser

_DESCRIPTION = """\
Make a run directory of a folder that memlm export has written, or of a Llama, Mistral, Qwen2 or Mixtral of
Hugging Face: config.yaml, the tokenizer and checkpoints/last.ckpt, at step 0 and without optimizer state.

All verbs but compare, which is of runs that have trained, then take it. memlm fit goes on with a fresh
optimizer and schedule."""


def main(arguments: list[str]) -> int:
    """Runs ``memlm import``."""
    options = _parser().parse_args(arguments)
    # Seconds of imports, which --help need not wait for.
    from memlm.huggingface.importing import import_model, summary
    from memlm.run_directory import RunConfig, RunFiles

    run = RunFiles.of_run(RunConfig(options.name, options.root), [])
    model = import_model(
        options.folder,
        run,
        tokenizer=options.tokenizer,
        paths=options.paths,
        command=["import", *arguments],
    )
    print(summary(model, run, options.paths))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = VerbParser("memlm import", _DESCRIPTION)
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="folder with config.json and safetensors")
    add("name", metavar="NAME", help="name of the run to make")
    add("--root", default="runs", metavar="FOLDER", help="folder that holds the run directories [runs]")
    add("--tokenizer", metavar="NAME", help="bytes or a tokenizer's file [the folder's]")
    add(
        "--paths",
        nargs="+",
        default=[],
        metavar="FILE",
        help="text files for the config's data section; they can also be given later, as --data.paths",
    )
    return parser
