"""The options of ``memlm generate``; the standard library alone."""

import argparse
import sys
from pathlib import Path

from memlm.generation.sampling_options import NEED_TEMPERATURE, OPTIONS, integer
from memlm.usage_errors import UsageError
from memlm.verb_parser import VerbParser

_DESCRIPTION = """\
Continue texts with a trained model.

A single --prompt is continued on the terminal, as it comes. Several prompts or samples, a --file and lines
of the standard input are answered by JSON lines. With no prompt, a terminal becomes a prompt line."""


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of the words after ``memlm generate``.

    Raises:
        UsageError: An option is unknown, out of range, contradicts another, or would do nothing.
    """
    options = _parser().parse_args(arguments)
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    if options.prompt and options.file is not None:
        raise UsageError("--file: does not go with --prompt")
    if "" in options.stop:
        raise UsageError("--stop: is empty, which every text ends with")
    if options.temperature == 0:
        idle = next((name for name in NEED_TEMPERATURE if getattr(options, name) is not None), None)
        idle = "samples" if idle is None and options.samples > 1 else idle
        # On the prompt line the temperature can be raised later.
        if idle is not None and (options.prompt or options.file is not None or not sys.stdin.isatty()):
            raise UsageError(
                f"--{idle}: does nothing with --temperature 0, which always takes the likeliest token; "
                "set a temperature, such as 1"
            )


def _parser() -> argparse.ArgumentParser:
    parser = VerbParser("memlm generate", _DESCRIPTION)
    add = parser.add_argument
    add("model", metavar="MODEL", help="a run directory, a .ckpt file or an exported folder")
    add("--prompt", action="append", default=[], metavar="TEXT", help='a text to continue; "" begins one')
    add(
        "--file",
        type=Path,
        metavar="PATH",
        help='prompts: JSON lines ({"prompt": ...}, .jsonl), else one in each line',
    )
    add("--output", type=Path, metavar="PATH", help="write JSON lines here; must not exist")
    for option in OPTIONS:
        shown = "" if option.default is None else f" [{option.default}]"
        add(
            f"--{option.name}",
            type=option.parse,
            default=option.default,
            metavar=option.metavar,
            help=option.help + shown,
        )
    add("--samples", type=integer(1), default=1, metavar="N", help="answers to each prompt [1]")
    add("--stop", action="append", default=[], metavar="TEXT", help="ends an answer, and is no part of it")
    add("--batch_size", type=integer(1), default=16, metavar="B", help="answers written together [16]")
    add("--device", metavar="NAME", help="such as cpu or cuda [a GPU if there is one]")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of all parameters but the memory's values [as saved]",
    )
    add("--tokenizer", metavar="NAME", help="'bytes' or a tokenizer's file [that of the run or folder]")
    add(
        "--values_memory",
        type=integer(0),
        metavar="MB",
        help="RAM for the memory's values (10^6 bytes); the largest tables are read from their file, row by "
        "row, until the others fit [no limit]",
    )
    add("--long_context", action="store_true", help="allow prompts longer than the model was trained with")
    add("--no_stream", action="store_true", help="print an answer only when it is whole")
    return parser
