"""The model that ``memlm fit`` would train, without its data and without memory for its parameters."""

from functools import cached_property
from typing import Any

import torch
from lightning.pytorch.cli import LightningArgumentParser

import callbacks
import data_modules
from data_modules.base import LanguageDataModule
from memlm.cli import CommandLine, Parser
from memlm.discovery import import_all
from memlm.errors import ConfigError, UserError
from memlm.language_models import LanguageModel
from memlm.trainer_rules import quiet


def parse(arguments: list[str]) -> "MetaModel":
    """What ``memlm fit`` would make of these words."""
    quiet()
    import_all(data_modules)
    import_all(callbacks)
    return MetaModel(arguments)


class MetaModel(CommandLine):
    """Parses the words that follow ``memlm fit``, and builds nothing but the model, on the meta device.

    The ``data`` section may be missing, and is made only where it must tell what nothing else does.

    Args:
        arguments: The words.

    Raises:
        UserError: The same errors as in a fit.
    """

    def __init__(self, arguments: list[str]) -> None:
        super().__init__("fit", arguments)
        self.options = self.config["fit"]

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        self.datamodule_class = None  # by which Lightning means: may be missing
        super().add_core_arguments_to_parser(parser)

    def _set_seed(self) -> None:
        """Nothing is random."""

    def _parse_ckpt_path(self) -> None:
        if self.config["fit"].ckpt_path is not None:
            raise ConfigError("ckpt_path", "is of no use here; to count a run, give its config.yaml")
        self._take_pretrained_architecture()

    def before_instantiate_classes(self) -> None:
        """The Trainer's settings do not matter."""

    def instantiate_classes(self) -> None:
        """See :attr:`model`."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing runs."""

    @cached_property
    def model(self) -> LanguageModel:
        """The model on the meta device."""
        section = self.options.model.as_dict()
        init_args = section.get("init_args", {}) | {"vocab_size": self.vocab_size}
        with torch.device("meta"):
            return instantiate(LanguageModel, section | {"init_args": init_args})

    @cached_property
    def vocab_size(self) -> int:
        """``model.transformer.vocab_size``, else that of the data."""
        rows = self.options.model.init_args.get("transformer.vocab_size")
        return self._of_data("vocab_size", "model.transformer.vocab_size") if rows is None else rows

    @cached_property
    def sequence_length(self) -> int:
        """Of the data, in tokens."""
        length = self._data_option("sequence_length")
        return self._of_data("sequence_length", "data.sequence_length") if length is None else length

    def tokens_per_step(self, sequence_length: int) -> int | None:
        """Tokens of one rank in an optimizer step; None where the data has no batch size."""
        batch_size = self._data_option("batch_size")
        if batch_size is None:
            return None
        return batch_size * sequence_length * self.options.trainer.accumulate_grad_batches

    def _data_option(self, name: str) -> Any:
        data = self.options.get("data")
        return None if data is None else data.get("init_args", {}).get(name)

    def _of_data(self, name: str, key: str) -> int:
        option = f"--{name}"
        if self.options.get("data") is None:
            raise ConfigError(key, f"is needed, since there is no data section; or give {option}")
        try:
            return getattr(self._data, name)
        except UserError as error:
            message = f"is not set, and the data cannot tell it ({error}); or give {option}"
            raise ConfigError(key, message) from error

    @cached_property
    def _data(self) -> LanguageDataModule:
        return instantiate(LanguageDataModule, self.options.data.as_dict())


def instantiate(base: type, section: dict[str, Any]) -> Any:
    """An object of a ``class_path`` and ``init_args``, as the command line would make it.

    Args:
        base: Class that it must be of.
        section: Of a config.
    """
    parser = Parser()
    # Not add_subclass_arguments: there null is a value too, and errors of constructors become ones of types.
    parser.add_argument("--it", type=base, required=True)
    return parser.instantiate(parser.parse_object({"it": section})).it
