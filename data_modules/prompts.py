"""A file of prompts, which ``memlm predict`` continues in the place of a data module's questions."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from data_modules.base import Batch, BatchSource, Cursor
from memlm.errors import ConfigError
from memlm.generation.continuations import GenerationOptions, PromptBatch
from memlm.generation.decoding import Sampling
from memlm.generation.prompts import read_prompts
from memlm.generation.sampling_options import NEED_TEMPERATURE, OPTIONS
from memlm.tokenizers import Tokenizer


@dataclass
class PromptsConfig:
    """Prompts to continue, and how. Without a file the data's own questions are answered."""

    file: str | None = None
    """JSON lines ({"prompt": ...}; .jsonl, .ndjson, .json), else one prompt in each line."""

    max_new_tokens: int = 128
    """Most tokens of a continuation."""

    temperature: float = 0.0
    """Divides the logits: 1 draws from the model's distribution, less prefers likelier tokens, 0 always takes
    the likeliest."""

    top_k: int | None = None
    """Draw among that many likeliest tokens only."""

    top_p: float | None = None
    """Draw among the fewest tokens whose probabilities sum to this at least."""

    min_p: float | None = None
    """Draw among tokens of at least this share of the likeliest one's probability only."""

    seed: int | None = None
    """Of the sampling. By default 0."""

    stop: list[str] = field(default_factory=list)
    """Texts that end a continuation, and are no part of it."""

    samples: int = 1
    """Continuations of each prompt."""

    batch_size: int = 16
    """Continuations that are written together on each device."""

    long_context: bool = False
    """Whether prompts may be longer than data.sequence_length."""

    def options(self) -> GenerationOptions:
        """The same, checked.

        Raises:
            ConfigError: An option is out of range, or would do nothing.
        """
        for option in OPTIONS:
            value = getattr(self, option.name)
            if value is None:
                continue
            try:
                option.parse(str(value))
            except argparse.ArgumentTypeError as error:
                raise ConfigError(f"prompts.{option.name}", str(error)) from None
            if option.name in NEED_TEMPERATURE and self.temperature == 0:
                raise ConfigError(
                    f"prompts.{option.name}",
                    f"is {value}, which does nothing with prompts.temperature 0; set that above 0",
                )
        for key in ("samples", "batch_size"):
            if getattr(self, key) < 1:
                raise ConfigError(f"prompts.{key}", f"is {getattr(self, key)}, must be at least 1")
        if self.samples > 1 and self.temperature == 0:
            raise ConfigError(
                "prompts.samples",
                f"is {self.samples}, which are all the same with prompts.temperature 0; set that above 0",
            )
        if "" in self.stop:
            raise ConfigError("prompts.stop", "holds an empty text, which every text ends with")
        # Not drawn: several processes would draw several.
        sampling = Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.seed or 0)
        return GenerationOptions(
            self.max_new_tokens, sampling, tuple(self.stop), self.samples, self.batch_size
        )


class PromptSource(BatchSource):
    """The prompts of a file, in batches, each rank its share of them.

    A batch is a dict with a `PromptBatch` under ``prompts``. The batches of all ranks, in turn, are in the
    order of the file; the last ranks may have one fewer.

    Args:
        config: The file and the options.
        tokenizer: The model's.
        context: Tokens of the longest prompt that is allowed.

    Raises:
        ConfigError: An option is out of range, or there is no file.
        DataError: The file is missing or malformed, or a prompt is too long or not for this tokenizer.
    """

    def __init__(self, config: PromptsConfig, tokenizer: Tokenizer, context: int) -> None:
        if config.file is None:
            raise ConfigError("prompts.file", "is needed with the other options of prompts")
        self.options = config.options()
        self.prompts = read_prompts(config.file)
        longest = None if config.long_context else context
        self.ids = [prompt.encode(tokenizer, longest) for prompt in self.prompts]
        most = max(map(len, self.ids)) + config.max_new_tokens
        if most > context:
            rank_zero_info(
                f"{config.file}: the longest prompt and prompts.max_new_tokens make {most:,} tokens, more "
                f"than the {context:,} of data.sequence_length"
            )

    def batches(
        self, cursor: Cursor, world: int, rank: int, worker: int = 0, workers: int = 1
    ) -> Iterator[Batch]:
        size = max(1, self.options.batch_size // self.options.samples)
        for start in range(rank * size, len(self.prompts), world * size):
            part = slice(start, start + size)
            yield {"prompts": PromptBatch(self.prompts[part], self.ids[part], self.options, start)}
