"""``memlm generate``: what a trained model writes, to the terminal or into a file."""

import argparse
import contextlib
import importlib
import secrets
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from memlm.generation.options import parse
from memlm.generation.sampling_options import OPTIONS
from memlm.usage_errors import UsageError

if TYPE_CHECKING:
    from memlm.generation.continuations import GenerationOptions
    from memlm.generation.json_lines_file import JsonLinesFile
    from memlm.generation.prompts import Prompt
    from memlm.memory.pool import MemoryPool
    from memlm.memory.quantised import QuantisedPool
    from memlm.trained import TrainedModel

_SEED_BITS = 32


def main(arguments: list[str]) -> int:
    """Runs ``memlm generate``."""
    options = parse(arguments)
    # Seconds of imports, which --help and mistakes need not wait for.
    from memlm.generation.json_lines_file import JsonLinesFile
    from memlm.generation.prompts import command_line_prompts, read_prompts

    command_line_prompts(options.stop)  # raises for half characters
    prompts = command_line_prompts(options.prompt)
    if options.file is not None:
        prompts = read_prompts(options.file)
    elif not prompts and not sys.stdin.isatty():
        prompts = _standard_input()
    elif not prompts and options.output is not None:
        raise UsageError("--output: needs --prompt or --file")
    file = None if options.output is None else JsonLinesFile(options.output)
    try:
        _run(options, prompts, file)
    except BaseException:
        if file is not None:
            file.abandon()
        raise
    return 0


def _run(options: argparse.Namespace, prompts: "list[Prompt]", file: "JsonLinesFile | None") -> None:
    trained = _load(options)
    longest = None if options.long_context else trained.context
    if not prompts:
        _prompt_line(trained, options, longest)
        return
    settings = vars(options)
    if options.seed is None and options.temperature > 0:
        settings = settings | {"seed": secrets.randbits(_SEED_BITS)}
    ids = [prompt.encode(trained.tokenizer, longest) for prompt in prompts]
    how = _generation_options(settings)
    if file is None and len(options.prompt) == 1 and options.samples == 1:
        _continue_one(trained, prompts[0], ids[0], how, stream=not options.no_stream)
    else:
        _continue_many(trained, prompts, ids, how, file)


def _continue_one(
    trained: "TrainedModel", prompt: "Prompt", ids: list[int], how: "GenerationOptions", stream: bool
) -> None:
    """Print the answer alone to the standard output, and what there is to say of it to the other one."""
    from memlm.generation.continuations import continue_prompts

    started = time.perf_counter()
    show = _terminal_writer()
    on_text = show if stream else None
    [record] = continue_prompts(trained.model, trained.tokenizer, [prompt], [ids], how, on_text=on_text)
    if not stream:
        show(record["text"])
    print(flush=True)
    notes = [f"{record['tokens']:,} tokens in {time.perf_counter() - started:.1f} s", record["finish"]]
    if "seed" in record:
        notes.append(f"seed {record['seed']}")
    if len(ids) + record["tokens"] > trained.context:
        notes.append(f"beyond the context of {trained.context:,} tokens that the model was trained with")
    print(f"memlm: {', '.join(notes)}", file=sys.stderr)


def _continue_many(
    trained: "TrainedModel",
    prompts: "list[Prompt]",
    ids: list[list[int]],
    how: "GenerationOptions",
    file: "JsonLinesFile | None",
) -> None:
    from tqdm import tqdm

    from memlm.generation.continuations import beyond, continue_all
    from memlm.generation.json_lines_file import json_line

    started, tokens, longer = time.perf_counter(), 0, 0
    with tqdm(total=len(prompts) * how.samples, unit="answers", disable=None if file else True) as bar:
        for part, records in continue_all(trained.model, trained.tokenizer, prompts, ids, how):
            tokens += sum(record["tokens"] for record in records)
            longer += beyond(trained.context, ids[part], records)
            if file is None:
                for record in records:
                    print(json_line(record), flush=True)
            else:
                file.write(records)
            bar.update(len(records))
    if longer:
        print(
            f"memlm: warning: {longer:,} answers go beyond the context of {trained.context:,} tokens that "
            "the model was trained with",
            file=sys.stderr,
        )
    if file is not None:
        file.finish()
        seconds = time.perf_counter() - started
        print(
            f"Written to {file.path}: {file.lines:,} answers, {tokens:,} tokens in {seconds:.1f} s "
            f"({tokens / max(seconds, 1e-9):,.0f} tokens/s)"
        )


def _prompt_line(trained: "TrainedModel", options: argparse.Namespace, longest: int | None) -> None:
    from memlm.generation.prompts import command_line_prompts
    from memlm.generation.repl import Repl

    with contextlib.suppress(ImportError):  # where there is one, input() edits lines and recalls them
        importlib.import_module("readline")

    def respond(text: str, settings: Mapping[str, Any]) -> None:
        [prompt] = command_line_prompts([text])
        ids = prompt.encode(trained.tokenizer, longest)
        settings = dict(settings)
        if settings["seed"] is None and settings["temperature"] > 0:
            settings["seed"] = secrets.randbits(_SEED_BITS)
        _continue_one(trained, prompt, ids, _generation_options(settings), stream=not options.no_stream)

    names = [option.name for option in OPTIONS]
    print(f"{trained.source}: a line is the beginning of a document; :help, Ctrl-D ends", file=sys.stderr)
    Repl(respond, {name: getattr(options, name) for name in [*names, "stop"]}, input, print).run()


def _load(options: argparse.Namespace) -> "TrainedModel":
    import torch

    from memlm.trained import load_trained

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device: {device} cannot be used: {str(error).splitlines()[0]}") from None
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    trained = load_trained(options.model, tokenizer=options.tokenizer, dtype=dtype, device=device)
    if options.values_memory is not None:
        _bound_values(trained, options.values_memory)
    return trained


def _bound_values(trained: "TrainedModel", megabytes: int) -> None:
    from memlm.memory.mapped import bound_large

    if not trained.model.pools:
        raise UsageError("--values_memory: the model has no memory, whose values it would bound")
    pools = [cast("MemoryPool | QuantisedPool", pool) for pool in trained.model.pools.values()]
    left = bound_large(pools, megabytes * 1_000_000)
    if left > megabytes * 1_000_000:
        raise UsageError(
            f"--values_memory: is {megabytes} MB, but {left / 1e6:,.0f} MB of values were copied to "
            f"{trained.model.embedding.weight.device} and cannot be read from their file there"
        )


def _generation_options(settings: Mapping[str, Any]) -> "GenerationOptions":
    from memlm.generation.continuations import GenerationOptions
    from memlm.generation.decoding import Sampling

    names = ("temperature", "top_k", "top_p", "min_p", "seed")
    return GenerationOptions(
        settings["max_new_tokens"],
        Sampling(**{name: settings[name] for name in names}),
        tuple(settings["stop"]),
        settings.get("samples", 1),
        settings.get("batch_size", 1),
    )


def _terminal_writer() -> Any:
    """Prints text at once; on a terminal without the characters that would command it."""
    if not sys.stdout.isatty():
        return lambda text: print(text, end="", flush=True)
    pictures = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
    pictures |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
    return lambda text: print(text.translate(pictures), end="", flush=True)


def _standard_input() -> "list[Prompt]":
    from memlm.generation.prompts import parse_prompts

    return parse_prompts(sys.stdin.buffer.read(), "standard input", as_json=False)
