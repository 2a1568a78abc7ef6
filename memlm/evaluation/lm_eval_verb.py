"""``memlm lm-eval``: tasks of lm-evaluation-harness on a model, without the network."""

import argparse
import difflib
import fnmatch
import importlib.util
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memlm.errors import DataError
from memlm.generation.sampling_options import integer
from memlm.run_directory import write_text
from memlm.usage_errors import UsageError
from memlm.verb_parser import VerbParser

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

_DESCRIPTION = """\
Run tasks of lm-evaluation-harness on a model and print the harness's table.

MODEL is a run directory, a checkpoint file or an exported folder. Nothing is fetched: a task's data must be
files of yours (dataset_path: json and data_files in its YAML) or lie in the cache of the package datasets.
HF_HUB_OFFLINE=0 and HF_DATASETS_OFFLINE=0 in the environment allow the network.

  memlm lm-eval runs/text --tasks my_questions --include_path my_tasks --output results.json"""


def main(arguments: list[str]) -> int:
    """Runs ``memlm lm-eval``."""
    options = _parser().parse_args(arguments)
    _check(options)
    # Before the packages that look at them are imported.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    # Seconds of imports, which --help need not wait for.
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table, simple_parse_args_string

    from memlm.evaluation.lm_eval_adapter import MemlmLM
    from memlm.evaluation.lm_eval_generation import GenerationOptions

    # What the user can mend is found before the minutes of an evaluation.
    GenerationOptions.of(simple_parse_args_string(options.gen_kwargs), max_new_tokens=1, seed=0)
    manager = TaskManager(include_path=[str(path) for path in options.include_path])
    tasks = _load(manager, _named(manager, options.tasks))
    model = MemlmLM.of(
        options.model,
        tokenizer=options.tokenizer,
        dtype=options.dtype,
        device=options.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        add_bos_token=options.add_bos_token == "true",
        max_length=options.max_length,
        batch_tokens=options.batch_tokens,
        batch_size=options.batch_size,
    )
    results: Any = simple_evaluate(
        model=model,
        tasks=tasks,
        task_manager=manager,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        gen_kwargs=options.gen_kwargs,
        bootstrap_iters=options.bootstrap_iters,
        log_samples=options.log_samples,
        **{} if options.seed is None else dict.fromkeys(_SEEDS, options.seed),
    )
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    if options.output:
        _write(options.output, results, options.log_samples)
    return 0


_SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")


def _parser() -> argparse.ArgumentParser:
    parser = VerbParser("memlm lm-eval", _DESCRIPTION)
    add = parser.add_argument
    add("model", metavar="MODEL", help="a run directory, a .ckpt file or an exported folder")
    add(
        "--tasks",
        action="append",
        default=[],
        metavar="A,B",
        help="names of tasks, groups and tags, patterns such as 'mmlu_*', or YAML files",
    )
    add(
        "--include_path",
        action="append",
        default=[],
        type=Path,
        metavar="DIR",
        help="a folder of task YAMLs beside the harness's own; may be repeated",
    )
    add("--num_fewshot", type=integer(0), metavar="N", help="solved examples in a prompt [the task's]")
    add("--limit", type=_limit, metavar="N", help="first N examples of a task; below 1: that share of them")
    add(
        "--gen_kwargs",
        metavar="K=V,...",
        help="options of generations over the tasks' own: do_sample, temperature, top_k, top_p, min_p, "
        "max_gen_toks, seed",
    )
    add(
        "--add_bos_token",
        choices=("true", "false"),
        default="true",
        help="whether prompts begin with the end-of-document token, as documents did in training [true]",
    )
    add("--max_length", type=integer(2), metavar="T", help="tokens the model looks at [as in training]")
    add(
        "--batch_tokens",
        type=integer(1),
        default=4096,
        metavar="N",
        help="tokens of a likelihood batch [4096]",
    )
    add("--batch_size", type=integer(1), default=16, metavar="N", help="prompts continued at once [16]")
    add("--bootstrap_iters", type=integer(0), default=1000, metavar="N", help="resamples for errors [1000]")
    add("--seed", type=integer(0), metavar="N", help="of few-shot examples and samples [0 and 1234]")
    add("--device", metavar="NAME", help="such as cpu or cuda [a GPU if there is one]")
    add("--dtype", choices=("float32", "bfloat16"), help="of the computation [the file's]")
    add("--tokenizer", metavar="FILE", help="the model's tokenizer, where the model does not say")
    add("--output", type=Path, metavar="FILE.json", help="write the results here")
    add(
        "--log_samples",
        action="store_true",
        help="also write every example, one a line, to FILE.samples.jsonl",
    )
    return parser


def _limit(text: str) -> int | float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    # The harness takes a share of 1 or more for a number of examples.
    if not (0 < value < 1 or (value >= 1 and value.is_integer())):
        raise argparse.ArgumentTypeError(f"is {text}, must be a number of examples, or a share below 1")
    return value if value < 1 else int(value)


def _check(options: argparse.Namespace) -> None:
    """Refuse what can be known to be wrong before anything is imported."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError("memlm lm-eval needs the package lm_eval: pip install 'memlm[lm-eval]'")
    options.tasks = [name.strip() for part in options.tasks for name in part.split(",") if name.strip()]
    if not options.tasks:
        raise UsageError("--tasks: needed, but not set; expected names of tasks, separated by commas")
    for folder in options.include_path:
        if not folder.is_dir():
            raise DataError(folder, "is not a folder; expected one of task YAMLs (--include_path)")
    if options.gen_kwargs is not None and not all(
        "=" in part for part in options.gen_kwargs.split(",") if part
    ):
        raise UsageError(f"--gen_kwargs: is {options.gen_kwargs!r}; expected KEY=VALUE,KEY=VALUE")
    if options.log_samples and options.output is None:
        raise UsageError("--log_samples: needs --output FILE.json, beside which the samples are written")
    if options.output is not None:
        files = [options.output, _samples_file(options.output)] if options.log_samples else [options.output]
        for file in files:
            if file.exists():
                raise DataError(file, "exists already; choose another --output or remove it")
        if not options.output.parent.is_dir():
            raise DataError(options.output, f"cannot be written: there is no folder {options.output.parent}")


def _named(manager: "TaskManager", names: list[str]) -> list[str]:
    """The tasks, groups, tags and files that are meant.

    Raises:
        UsageError: There is none of that name.
        DataError: There is no such file.
    """
    known = manager.all_tasks
    found: list[str] = []
    for name in names:
        if name.endswith((".yaml", ".yml")):
            if not Path(name).is_file():
                raise DataError(name, "is missing; expected the YAML of a task")
            found.append(name)
            continue
        matches = fnmatch.filter(known, name)
        if not matches:
            close = difflib.get_close_matches(name, known, n=4, cutoff=0.7)
            hint = (
                f"did you mean {' or '.join(close)}?" if close else "--include_path DIR adds tasks of yours"
            )
            raise UsageError(f"--tasks: no task, group or tag {name!r} is known; {hint}")
        found += matches
    return list(dict.fromkeys(found))


def _load(manager: "TaskManager", names: list[str]) -> list[Any]:
    """The tasks and groups of those names, with their data.

    Raises:
        DataError: A task is malformed or its data are not on this machine.
        UsageError: A task cannot be run, or is asked for twice.
    """
    loaded: list[Any] = []
    for name in names:
        try:
            found = manager.load([name])
        except Exception as error:  # whatever a task's YAML, code or data may raise
            raise _load_error(name, error) from error
        for task_name, task in found["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise UsageError(
                    f"--tasks: {task_name} runs code that the model writes, which is not done here"
                )
            if getattr(task, "MULTIMODAL", False):
                raise UsageError(
                    f"--tasks: {task_name} shows images or sounds, which the model cannot take in"
                )
        inside = {child for children in found.get("group_map", {}).values() for child in children}
        members = {**found.get("groups", {}), **found["tasks"]}
        loaded += [member for key, member in members.items() if key not in inside]
    try:
        manager.load(loaded)
    except ValueError as error:  # the same task twice, alone and in a group, say
        raise UsageError(f"--tasks: {error}") from error
    return loaded


def _load_error(name: str, error: Exception) -> DataError:
    said = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, OSError | ImportError):
        return DataError(
            f"task {name}",
            f"needs what is not on this machine: {said}. Data of yours: dataset_path: json, and "
            "dataset_kwargs: {data_files: {test: FILE.jsonl}} in its YAML",
        )
    return DataError(f"task {name}", f"cannot be loaded: {type(error).__name__}: {said}")


def _samples_file(output: Path) -> Path:
    return output.with_suffix(".samples.jsonl")


def _write(output: Path, results: dict[str, Any], with_samples: bool) -> None:
    from lm_eval.utils import handle_non_serializable

    def text(content: Any, indent: int | None = None) -> str:
        return json.dumps(content, indent=indent, default=handle_non_serializable, ensure_ascii=False) + "\n"

    if with_samples:
        samples = results.pop("samples")
        lines = [text({"task": task, **record}) for task, records in samples.items() for record in records]
        write_text(_samples_file(output), "".join(lines))
        print(f"Samples: {_samples_file(output)}")
    write_text(output, text(results, indent=2))
    print(f"Results: {output}")
