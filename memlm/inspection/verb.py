"""``memlm inspect``: what the memory of a model knows."""

import argparse
import json
import os
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from memlm.usage_errors import UsageError
from memlm.verb_parser import VerbParser, positive

_DESCRIPTION = """\
Look into the memory of a trained model. One of

  memlm inspect MODEL --prompt TEXT
      the slots that every token of a prompt reads, by memory layer and head, with weights
  memlm inspect MODEL --slot N [--slot M ...] --corpus FILE     (or --slots_of TEXT in the place of --slot)
      the tokens of a corpus that read a slot, and the next tokens that its value makes likelier
  memlm inspect MODEL --prompt TEXT --answer TEXT --ablate
      the answer's log-likelihood when the slots that the prompt reads are removed

MODEL is a run directory, a checkpoint (.ckpt) or an exported folder. It is only read."""

_WIDTH = 120
"""Columns where the output is no terminal."""


def main(arguments: list[str]) -> int:
    """Runs ``memlm inspect``."""
    options = _parser().parse_args(arguments)
    _check(options)
    # Seconds of imports, which --help need not wait for.
    from memlm.inspection.session import Session

    session = Session(options.model, options.tokenizer, options.device, _width())
    if options.ablate:
        text, content = session.ablation(
            options.prompt,
            options.answer,
            options.remove,
            options.last,
            options.renormalise,
            options.draws,
            options.seed,
            options.png,
        )
    elif options.prompt is not None:
        text, content = session.reads(options.prompt, options.top, options.last, options.png)
    else:
        text, content = session.slots(
            session.chosen(options.slot, options.slots_of, options.pool, options.top, options.last),
            _documents(options),
            options.top,
        )
    print(text)
    if options.png:
        print(f"\nPicture: {options.png}")
    if options.json:
        _write(options.json, content)
        print(f"\nValues: {options.json}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = VerbParser("memlm inspect", _DESCRIPTION)
    add = parser.add_argument
    add("model", metavar="MODEL", help="run directory, .ckpt file or exported folder")
    add("--prompt", metavar="TEXT", help="how a document begins")
    add("--answer", metavar="TEXT", help="what follows the prompt; a space is put between if there is none")
    add("--ablate", action="store_true", help="remove slots and measure the answer's log-likelihood")
    add("--remove", type=positive, metavar="N", help="how many of the heaviest slots are removed [8]")
    add(
        "--renormalise",
        action="store_true",
        help="let the remaining weights of a head sum to one again [they stay as they are]",
    )
    add("--draws", type=positive, metavar="N", help="random draws for each control [3]")
    add("--seed", type=int, metavar="N", help="of these draws [0]")
    add("--slot", type=_slot, action="append", metavar="N", help="a row of the pool; may be repeated")
    add("--slots_of", metavar="TEXT", help="the slots that this prompt gives the largest weights")
    add("--pool", metavar="NAME", help="the slots' pool [the only one; of --slots_of: all]")
    add("--corpus", action="append", metavar="FILE", help="text files, folders or patterns; may be repeated")
    add("--text_key", metavar="KEY", help="key of the text in JSON lines, or column of a parquet file [text]")
    add("--limit", type=positive, metavar="N", help="documents of the corpus that are read [1000]")
    add("--top", type=positive, metavar="N", help="slots shown of each head, or contexts of each slot [8]")
    add("--last", type=positive, metavar="N", help="only what so many last tokens of the prompt read [all]")
    add("--png", type=Path, metavar="FILE", help="also draw a picture")
    add("--json", type=Path, metavar="FILE", help="also write all values")
    add("--tokenizer", metavar="FILE", help="the model's tokenizer, if it has moved")
    add("--device", default="cpu", metavar="NAME", help="cpu, cuda, ... [cpu]")
    return parser


_USES: dict[str, tuple[str, ...]] = {
    "answer": ("ablate",),
    "ablate": ("ablate",),
    "remove": ("ablate",),
    "renormalise": ("ablate",),
    "draws": ("ablate",),
    "seed": ("ablate",),
    "pool": ("slots",),
    "corpus": ("slots",),
    "text_key": ("slots",),
    "limit": ("slots",),
    "top": ("reads", "slots"),
    "last": ("reads", "ablate", "slots_of"),
    "png": ("reads", "ablate"),
}
"""What each option is of use for; the others are for everything."""

_MODES = {
    "reads": "--prompt",
    "slots": "--slot or --slots_of",
    "slots_of": "--slots_of",
    "ablate": "--ablate",
}

_DEFAULTS = {"remove": 8, "draws": 3, "seed": 0, "text_key": "text", "limit": 1000, "top": 8}


def _check(options: argparse.Namespace) -> None:
    """Refuse what contradicts, and what would be without effect; fill in the defaults."""
    given = [name for name in ("prompt", "slot", "slots_of") if getattr(options, name) is not None]
    if len(given) != 1:
        found = " and ".join(f"--{name}" for name in given) or "none of them"
        raise UsageError(f"memlm inspect: expected one of --prompt, --slot and --slots_of, found {found}")
    modes = {"prompt": ("ablate",) if options.ablate else ("reads",), "slot": ("slots",)}
    mode = modes.get(given[0], ("slots", "slots_of"))
    if options.ablate and given[0] != "prompt":
        raise UsageError(f"--ablate: goes with --prompt and --answer, not with --{given[0]}")
    if options.ablate and options.answer is None:
        raise UsageError("--answer: is needed with --ablate: the text whose log-likelihood is measured")
    for name, uses in _USES.items():
        if getattr(options, name) not in (None, False) and not set(uses) & set(mode):
            raise UsageError(
                f"--{name}: would have no effect; it goes with {' or '.join(_MODES[use] for use in uses)}"
            )
    if "slots" in mode and options.corpus is None:
        raise UsageError(
            f"--corpus: is needed with --{given[0]}: the text files (JSON lines, parquet or plain text) "
            "that are looked through"
        )
    for name in ("prompt", "answer", "slots_of"):
        try:
            (getattr(options, name) or "").encode()
        except UnicodeEncodeError:  # bytes of the command line that are no text
            raise UsageError(f"--{name}: is not valid UTF-8 text") from None
    for name in ("png", "json"):
        path = getattr(options, name)
        if path is not None and path.is_dir():
            raise UsageError(f"--{name}: {path} is a folder; expected the name of a file")
    for name, default in _DEFAULTS.items():
        if getattr(options, name) is None:
            setattr(options, name, default)


def _documents(options: argparse.Namespace) -> Iterator[str]:
    # Readers of files are the data modules', which know the models' package; only a verb may look up there.
    from data_modules.readers import find_files, read_documents

    files = find_files(options.corpus, "--corpus")
    yield from islice(read_documents(files, options.text_key), options.limit)


def _width() -> int:
    return max(shutil.get_terminal_size((_WIDTH, 24)).columns, 60)


def _write(path: Path, content: dict[str, Any]) -> None:
    from memlm.run_directory import write_text

    path.parent.mkdir(parents=True, exist_ok=True)
    # On one line: a line for each of the many numbers would help nobody.
    write_text(path, json.dumps(content) + os.linesep)


def _slot(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"is {text}, must be the number of a row, from 0")
    return int(text)
