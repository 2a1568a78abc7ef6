"""Answers to prompts: continuations as text, how each ended, and the records that files hold of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from memlm.generation.decoding import Sampling, generate
from memlm.generation.prompts import Prompt
from memlm.generation.streamed_text import StreamedText
from memlm.tokenizers import Tokenizer
from memlm.transformer import Transformer

_BATCHES_AT_ONCE = 8
"""Batches of prompts that are sorted by length together."""


@dataclass(frozen=True)
class GenerationOptions:
    """How prompts are answered.

    Attributes:
        max_new_tokens: Most tokens of an answer.
        sampling: How tokens are chosen.
        stops: Strings that end an answer; they are not part of it.
        samples: Answers to each prompt.
        batch_size: Answers that are written together.
    """

    max_new_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    stops: tuple[str, ...] = ()
    samples: int = 1
    batch_size: int = 16


def continue_prompts(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    ids: Sequence[list[int]],
    options: GenerationOptions,
    first: int = 0,
    on_text: Callable[[str], object] | None = None,
) -> list[dict[str, Any]]:
    """Continue prompts.

    Args:
        model: Any decoder.
        tokenizer: The model's.
        prompts: The prompts.
        ids: Tokens of each.
        options: How.
        first: Number of the first prompt, where these are a part of many: what is drawn depends on the seed,
            the number of the prompt, that of the sample and how many there are, but not on the batch size.
        on_text: Called with the text of the answers as it comes; makes sense for a single one.

    Returns:
        A record for each sample of each prompt, in order: the prompt and its fields, ``text``, ``tokens``
        (how many the model wrote, those of a stop string or the end of the document included), ``finish``
        (``stop``: a stop string, ``eos``: the document ended, ``length``: ``max_new_tokens``), ``seed``
        where one was used, and ``sample``, from 0, where there are several.
    """
    rows = [row for row in ids for _ in range(options.samples)]
    streams = [StreamedText(tokenizer, options.stops, row) for row in rows]

    def take(number: int, token: int) -> bool:
        text = streams[number].push(token)
        if on_text is not None and text:
            on_text(text)
        return streams[number].stopped

    new = generate(
        model,
        rows,
        options.max_new_tokens,
        options.sampling,
        eos_id=tokenizer.eos_id,
        on_token=take,
        batch_size=options.batch_size,
        first=first * options.samples,
    )
    records = []
    for number, (stream, written) in enumerate(zip(streams, new, strict=True)):
        rest = stream.finish()
        if on_text is not None and rest:
            on_text(rest)
        prompt = prompts[number // options.samples]
        ended = written[-1:] == [tokenizer.eos_id]
        record = {
            "prompt": prompt.text,
            **prompt.fields,
            "text": stream.text,
            "tokens": len(written),
            "finish": "stop" if stream.stopped else "eos" if ended else "length",
        }
        if options.sampling.temperature > 0:
            record["seed"] = options.sampling.seed
        if options.samples > 1:
            record["sample"] = number % options.samples
        records.append(record)
    return records


def continue_all(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    ids: Sequence[list[int]],
    options: GenerationOptions,
) -> Iterator[tuple[slice, list[dict[str, Any]]]]:
    """Continue many prompts, some batches at a time.

    Returns:
        Which prompts, and their records as of :func:`continue_prompts`; in order.
    """
    many = max(1, _BATCHES_AT_ONCE * options.batch_size // options.samples)
    for start in range(0, len(prompts), many):
        part = slice(start, start + many)
        yield part, continue_prompts(model, tokenizer, prompts[part], ids[part], options, first=start)


def beyond(context: int, ids: Sequence[list[int]], records: Sequence[dict[str, Any]]) -> int:
    """How many continuations, of prompts with these tokens, end beyond a context of so many tokens."""
    samples = len(records) // len(ids)
    lengths = (len(row) for row in ids for _ in range(samples))
    return sum(length + record["tokens"] > context for length, record in zip(lengths, records, strict=True))


class PromptBatch:
    """Prompts on their way to a model; what a Trainer moves to a device leaves it as it is.

    Args:
        prompts: The prompts.
        ids: Tokens of each.
        options: How they are continued.
        first: Number of the first prompt in its file.
    """

    def __init__(
        self, prompts: Sequence[Prompt], ids: Sequence[list[int]], options: GenerationOptions, first: int
    ) -> None:
        self.prompts, self.ids, self.options, self.first = prompts, ids, options, first

    def records(self, model: Transformer, tokenizer: Tokenizer) -> list[dict[str, Any]]:
        """What :func:`continue_prompts` gives for them."""
        return continue_prompts(model, tokenizer, self.prompts, self.ids, self.options, self.first)
