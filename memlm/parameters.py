"""``memlm params``: what models hold, what a token costs, and what a rank must store to train them."""

import argparse
import json
from pathlib import Path

import yaml

from memlm.usage_errors import UsageError
from memlm.verb_parser import VerbParser, positive

_DESCRIPTION = """\
Print the parameters of each config's model, the FLOPs and bytes of a token, and what one rank holds in
training and sends to others in a step. Nothing is allocated, and no text is read.

The mesh of ranks is --ranks by --memory_group; --mesh 64x8 says both: 64 ranks in groups of 8.

Further options are those of memlm fit, and hold for every config: --model.memory.half_keys 2048.
A config that names no model class lies over the one before it."""


def main(arguments: list[str]) -> int:
    """Runs ``memlm params``."""
    options, words = _parser().parse_known_args(arguments)
    if options.mesh is not None:
        if options.ranks is not None or options.memory_group is not None:
            raise UsageError("--mesh: says what --ranks and --memory_group say; give either")
        options.ranks, options.memory_group = options.mesh
    options.ranks = options.ranks or 1
    # Seconds of imports, which --help need not wait for.
    from memlm.model_costs import describe
    from memlm.parameters_table import baseline_text, table

    models = [describe(options, files, words) for files in columns(options.config)]
    if options.match and not any(model["memory"] for model in models):
        raise UsageError("--match: none of the models has a memory to match")
    print(table(models))
    for model in models:
        for baseline in model.get("baselines", []):
            print(f"\n{baseline_text(model['name'], baseline)}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        content = {**models[0], "models": models}
        options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        print(f"\nValues: {options.json}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = VerbParser("memlm params", _DESCRIPTION)
    add = parser.add_argument
    add("-c", "--config", action="append", default=[], metavar="YAML", help="a config; one column for each")
    add("--json", type=Path, metavar="PATH", help="also write all values here")
    add("--sequence_length", type=positive, metavar="T", help="tokens of a sequence [the data's]")
    add(
        "--vocab_size",
        type=positive,
        metavar="N",
        help="rows of the embedding [the config's, else the data's]",
    )
    add("--mesh", type=_mesh, metavar="WxG", help="--ranks W --memory_group G in one")
    add("--ranks", type=positive, metavar="W", help="processes that train, one a device [1]")
    add(
        "--memory_group",
        type=positive,
        metavar="G",
        help="ranks that share one copy of the values, split along the value dim [all]",
    )
    add(
        "--shard_dense",
        choices=("true", "false"),
        default="false",
        help="whether the other parameters are split over all ranks (FSDP) [false]",
    )
    add(
        "--expert_group",
        type=positive,
        default=1,
        metavar="G",
        help="ranks that share one copy of the experts, each with some; goes with --shard_dense true [1]",
    )
    add(
        "--whole_gradients",
        choices=("true", "false"),
        default="true",
        help="whether micro-batches add up whole dense gradients, sent once a step; see --shard_dense [true]",
    )
    add("--wire_dtype", choices=("bfloat16",), help="what memory's wider numbers are sent as [as they are]")
    add("--precision", metavar="P", help="32-true, bf16-mixed, bf16-true, ... [trainer.precision]")
    add(
        "--tokens_per_rank",
        type=positive,
        metavar="N",
        help="tokens of a rank in an optimizer step [batch size * T * accumulated batches]",
    )
    add("--match", action="store_true", help="also print the baselines matched to each memory model")
    return parser


def _mesh(text: str) -> tuple[int, int]:
    numbers = text.split("x")
    if len(numbers) != 2 or not all(number.isdecimal() and int(number) for number in numbers):
        raise argparse.ArgumentTypeError(f"is {text}, must be ranks x group, such as 64x8")
    return int(numbers[0]), int(numbers[1])


def columns(files: list[str]) -> list[list[str]]:
    """Which config files make which column: a file that names no model class lies over those before it."""
    found: list[list[str]] = []
    for file in files:
        if found and not _names_a_model(file):
            found[-1].append(file)
        else:
            found.append([file])
    return found or [[]]


def _names_a_model(file: str) -> bool:
    try:
        model = yaml.safe_load(Path(file).read_text(encoding="utf-8")).get("model")
    except (OSError, ValueError, yaml.YAMLError, AttributeError):
        return True  # the parser will say what is wrong with it
    return isinstance(model, str) or (isinstance(model, dict) and "class_path" in model)
