"""What the model writes: continuations of fixed prompts after every validation."""

import re
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn

from callbacks.run_folder import run_folder
from memlm.errors import ConfigError, DataError
from memlm.generation.decoding import Sampling, generate
from memlm.run_directory import write_text
from memlm.tokenizers import Tokenizer


class Samples(Callback):
    """Prints sampled continuations, appends them to ``samples.txt`` and shows them in TensorBoard.

    They are sampled while a fit validates, always from the same seed, and without touching the random state
    of training. A resumed run first drops the samples of steps that it is about to repeat.

    Args:
        prompts: Beginnings of documents, which the model continues; an empty one makes it write a document
            from its start.
        max_new_tokens: Most tokens of a continuation; a document may end earlier.
        temperature: Divides the logits: below 1 likelier tokens are preferred, 0 always takes the likeliest.
        top_k: Sample among that many likeliest tokens only; null: among all.
        seed: Of the sampling.
    """

    def __init__(
        self,
        prompts: list[str],
        max_new_tokens: int = 32,
        temperature: float = 0.8,
        top_k: int | None = None,
        seed: int = 0,
    ) -> None:
        if not prompts:
            raise ConfigError(
                "trainer.callbacks: Samples.prompts", 'is empty; expected at least one prompt ("" is one)'
            )
        for key, value, least in (
            ("max_new_tokens", max_new_tokens, 1),
            ("temperature", temperature, 0),
            ("top_k", top_k, 1),
            ("seed", seed, 0),
        ):
            if value is not None and value < least:
                raise ConfigError(
                    f"trainer.callbacks: Samples.{key}", f"is {value}, must be at least {least}"
                )
        self.prompts = prompts
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_k = top_k
        self.seed = seed
        self._tokenizer: Tokenizer | None = None
        self._prompt_ids: list[list[int]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._tokenizer = tokenizer = trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        # A document begins with the end of the one before it.
        self._prompt_ids = [[tokenizer.eos_id, *_encode(tokenizer, prompt)] for prompt in self.prompts]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = run_folder(trainer)
        if folder is not None and (folder / "samples.txt").exists():
            _drop_later(folder / "samples.txt", trainer.global_step)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        assert self._tokenizer is not None
        # On every rank: a sharded model needs all of them, though sums that round differently on another
        # kind of device may end a rank's texts earlier.
        with pl_module.ranks_apart(), trainer.precision_plugin.forward_context():
            continuations = generate(
                pl_module.transformer,
                self._prompt_ids,
                self.max_new_tokens,
                Sampling(self.temperature, self.top_k, seed=self.seed),
                eos_id=self._tokenizer.eos_id,
            )
        if not trainer.is_global_zero:
            return
        decode = self._tokenizer.decode
        texts = [f"[{prompt}] {decode(ids)}" for prompt, ids in zip(self.prompts, continuations, strict=True)]
        section = _section(trainer.global_step, texts)
        bar = trainer.progress_bar_callback
        (print if bar is None else bar.print)(section)
        folder = run_folder(trainer)
        if folder is not None:
            with (folder / "samples.txt").open("a", encoding="utf-8") as file:
                file.write(section + "\n")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                indented = "\n\n".join(
                    _indented(text) for text in texts
                )  # Markdown for: exactly as it stands
                logger.experiment.add_text("samples", indented, trainer.global_step)


def _encode(tokenizer: Tokenizer, prompt: str) -> list[int]:
    try:
        return tokenizer.encode(prompt)
    except DataError:
        unknown = [word for word in prompt.split() if not _knows(tokenizer, word)]
        raise ConfigError(
            "trainer.callbacks: Samples.prompts",
            f"{prompt!r} has words that the tokenizer does not know: {', '.join(unknown)}",
        ) from None


def _knows(tokenizer: Tokenizer, word: str) -> bool:
    try:
        tokenizer.encode(word)
    except DataError:
        return False
    return True


def _section(step: int, texts: list[str]) -> str:
    """The samples of one validation: only the first line is not indented, whatever the model has written."""
    return "\n".join([f"step {step}", *(_indented(text) for text in texts)])


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def _drop_later(path: Path, step: int) -> None:
    """Ends the file before its first section of a later step."""
    kept = ""
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        section = re.match(r"step (\d+)", line)
        if section and int(section[1]) > step:
            break
        kept += line
    write_text(path, kept)
