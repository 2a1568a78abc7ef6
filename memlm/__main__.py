"""The ``memlm`` command: a table of verbs, answered by the standard library alone until a verb is chosen."""

import importlib
import os
import sys
from typing import NamedTuple

from memlm import __version__
from memlm.errors import is_users, line_of


class Verb(NamedTuple):
    """One word after ``memlm``.

    Attributes:
        name: The word.
        help: One line for ``memlm --help``.
        target: ``module:function``; imported only when the verb is used, called with the remaining arguments.
    """

    name: str
    help: str
    target: str


VERBS = (
    Verb("fit", "train a model: memlm fit --config configs/quickstart.yaml", "memlm.cli:fit"),
    Verb("validate", "run the validation set of a config on a checkpoint", "memlm.cli:validate"),
    Verb("test", "measure a checkpoint on the test set and the tasks of a config", "memlm.cli:test"),
    Verb("predict", "answer the data's questions, or prompts, in predictions.jsonl", "memlm.cli:predict"),
    Verb(
        "generate",
        "continue prompts: memlm generate runs/x --prompt Y",
        "memlm.generation.verb:main",
    ),
    Verb("lm-eval", "run tasks of lm-evaluation-harness", "memlm.evaluation.lm_eval_verb:main"),
    Verb("inspect", "show what a prompt reads, and what a slot answers to", "memlm.inspection.verb:main"),
    Verb("export", "write a model as a Hugging Face folder", "memlm.export_verb:main"),
    Verb("import", "make a run of an exported or a Hugging Face folder", "memlm.import_verb:main"),
    Verb("consolidate", "make one file of a sharded checkpoint", "memlm.consolidate_verb:main"),
    Verb("compare", "print one table of several runs and draw their curves", "memlm.compare:main"),
    Verb(
        "params",
        "count parameters, FLOPs and bytes: memlm params --config X.yaml",
        "memlm.parameters:main",
    ),
    Verb(
        "tokenizer",
        "train a byte-level BPE tokenizer on text files, or show a tokenizer",
        "data_modules.tokenizer_training:main",
    ),
    Verb("prepare", "turn text files into shards of tokens", "data_modules.prepared.verb:prepare_main"),
    Verb("verify", "check the shards of a prepared folder", "data_modules.prepared.verb:verify_main"),
    Verb(
        "completion",
        'print a bash completion script: eval "$(memlm completion)"',
        "memlm.__main__:completion",
    ),
)

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


def usage() -> str:
    """The text of ``memlm --help``."""
    width = max(len(verb.name) for verb in VERBS)
    verbs = "\n".join(f"  {verb.name:<{width}}  {verb.help}" for verb in VERBS)
    return (
        "usage: memlm VERB [options]\n\n"
        f"Train and study memory-layer language models (memlm {__version__}).\n\n"
        f"verbs:\n{verbs}\n\n"
        "Every verb has its own help: memlm VERB --help.\n"
        "Options of a class: memlm fit --model.help memlm.MemoryLM, memlm fit --data.help SyntheticFacts.\n"
        "Errors are printed as one line; MEMLM_TRACEBACK=1 shows where they come from.\n"
    )


def completion(arguments: list[str]) -> int:
    """Prints a bash completion script: verbs first, then the common options, files otherwise."""
    if arguments:
        return _fail(f"memlm completion takes no arguments, got {' '.join(arguments)}")
    verbs = " ".join(verb.name for verb in VERBS)
    options = (
        "--config --ckpt_path --print_config --help --run.name --trainer.max_steps --model.help --data.help"
    )
    print(
        "_memlm() {\n"
        '  local word="${COMP_WORDS[COMP_CWORD]}"\n'
        f'  local verbs="{verbs} --help --version"\n'
        '  if [ "$COMP_CWORD" -eq 1 ]; then COMPREPLY=($(compgen -W "$verbs" -- "$word"))\n'
        f'  elif [[ "$word" == -* ]]; then COMPREPLY=($(compgen -W "{options}" -- "$word")); fi\n'
        "}\n"
        "complete -o default -F _memlm memlm"
    )
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs one verb.

    Args:
        argv: The words after ``memlm``; those of the process by default.

    Returns:
        The exit code: 0; 2 after an error that the user can mend, which is printed as one line; 130 after
        Ctrl-C; 141 if nobody reads the output any more.

    Raises:
        Exception: Any error that is not the user's, with its traceback.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"memlm {__version__}")
        return 0
    verb = next((verb for verb in VERBS if verb.name == argv[0]), None)
    if verb is None:
        return _fail(f"unknown verb {argv[0]!r}; the verbs are {', '.join(verb.name for verb in VERBS)}")
    _share_cores()
    try:
        module, function = verb.target.split(":")
        code = getattr(importlib.import_module(module), function)(argv[1:]) or 0
        sys.stdout.flush()  # here, where a broken pipe is an error to be caught
        return code
    except KeyboardInterrupt:
        print("memlm: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read the text has gone, as head does; Python would complain of it again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except Exception as error:
        if os.environ.get("MEMLM_TRACEBACK") == "1":
            raise
        # Where several processes run together, the one that is at fault has said so.
        if (code := getattr(error, "exit_code", None)) is not None:
            return int(code)
        if not is_users(error):
            raise
        line = line_of(error)
        if not _said_before(line):
            print(line, file=sys.stderr)
        return EXIT_USER_ERROR


def _share_cores() -> None:
    """Let threads that wait for each other sleep sooner, before torch is imported.

    GNU OpenMP spins for milliseconds at the end of every parallel loop. With one other busy process on two
    cores that made training 15 times slower; this many rounds cost nothing on a quiet machine (docs/log.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")


def _said_before(line: str) -> bool:
    """Whether another of the processes that torchrun has started has said the same."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    from memlm.parallel.agreement import said_before

    return said_before(line)


def _fail(message: str) -> int:
    print(f"memlm: error: {' '.join(message.split())}", file=sys.stderr)
    return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
