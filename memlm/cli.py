"""The verbs fit, validate, test and predict: LightningCLI with run directories and a resume policy."""

import signal
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import set_parsing_settings
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

import callbacks
import data_modules
import memlm.parallel.strategy  # noqa: F401  registers the strategies by name
from callbacks.checkpoints import AtomicCheckpointIO, Checkpoints
from callbacks.random_state import RandomState
from callbacks.run_directory import RunDirectory
from data_modules.base import LanguageDataModule
from data_modules.prompts import PromptsConfig, PromptSource
from memlm.discovery import import_all
from memlm.errors import ConfigError
from memlm.huggingface import read_architecture
from memlm.language_models import LanguageModel
from memlm.loggers import run_loggers
from memlm.memory.pool import values_without_memory
from memlm.parallel.expert_split import EXPERT_KEY, check_experts
from memlm.parallel.memory_strategy import GROUP_KEY, MemoryStrategy, splits_memory
from memlm.parallel.placing import check_pools
from memlm.resume import (
    architecture_overrides,
    check_architecture,
    flatten,
    read_checkpoint,
    resolve_checkpoint,
)
from memlm.run_directory import RunConfig, RunFiles
from memlm.trainer_rules import TRAINER_DEFAULTS, check_fit, quiet
from memlm.usage_errors import UsageError, config_files_of, usage_error

# Help of an option is the docstring below its attribute.
set_parsing_settings(docstring_parse_attribute_docstrings=True)


class Parser(LightningArgumentParser):
    """Argument parser that raises an error of one line instead of printing a page of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        raise UsageError(message) from ex


class CommandLine(LightningCLI):
    """Parses, instantiates and runs one verb.

    Args:
        verb: fit, validate, test or predict.
        arguments: The words after the verb.
    """

    def __init__(self, verb: str, arguments: list[str]) -> None:
        self.verb = verb
        self.arguments = arguments
        self.checkpoint: Path | None = None
        self.checkpoint_content: dict[str, Any] = {}
        super().__init__(
            LanguageModel,
            LanguageDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,  # RunDirectory writes it: it knows when the directory is ours
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_class=Parser,
            parser_kwargs={"prog": "memlm"},
            args=[verb, *arguments],
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # no hyper_parameters: the checkpoint holds its architecture
        )

    # -- parsing

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Only the verb at hand: a parser takes a tenth of a second to build."""
        return {self.verb: LightningCLI.subcommands()[self.verb]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(RunConfig, "run")
        if self.verb == "predict":
            parser.add_class_arguments(PromptsConfig, "prompts")
        parser.link_arguments("data.vocab_size", "model.init_args.vocab_size", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            self.config = parser.parse_args(args)
        except UsageError as error:
            raise usage_error(str(error), config_files_of(self.arguments)) from error
        # Without defaults: what a config file or a flag has set.
        self.explicit = parser.parse_args(args, defaults=False)[self.verb]

    def _parse_ckpt_path(self) -> None:
        """Resolves the run and its checkpoint. Lightning's own would let hyper-parameters beat the flags."""
        config = self.config[self.verb]
        config_files = [str(path) for path in config.config or []]
        self.run = RunFiles.of_run(config.run, config_files)
        config.run.name = str(self.run.directory.relative_to(config.run.root))
        self.files = self.run
        if config.weights_only is None:
            config.weights_only = True
        if config.ckpt_path is None:
            if self.verb != "fit":
                raise ConfigError(
                    "ckpt_path", f"is needed: memlm {self.verb} --ckpt_path last (or best, or a .ckpt file)"
                )
            self._take_pretrained_architecture()
            return
        self.checkpoint = resolve_checkpoint(str(config.ckpt_path), self.run, config.weights_only)
        self.checkpoint_content = read_checkpoint(self.checkpoint, config.weights_only)
        config.ckpt_path = str(self.checkpoint)
        if self.verb != "fit":
            self.files = RunFiles.of_checkpoint(self.checkpoint)
        self._take_architecture(self.checkpoint_content["architecture"], self.checkpoint)

    def _take_pretrained_architecture(self) -> None:
        """Where a fit starts from a pretrained model, the resolved config holds that model's shape."""
        model = self.config[self.verb].model
        pretrained = model.init_args.get("pretrained")
        if pretrained is not None:
            folder = Path(pretrained.folder)
            architecture = read_architecture(folder)
            if "moe" in architecture and "moe" not in model.init_args:
                name = model.class_path.rsplit(".", 1)[-1]
                raise ConfigError(
                    "model.class_path",
                    f"is {name}, but {folder} is a mixture of experts; MoELM and the memory models take one",
                )
            self._take_architecture({"class_path": model.class_path, **architecture}, folder)

    def _take_architecture(self, architecture: dict[str, Any], path: Path) -> None:
        """Puts the architecture of a checkpoint into the config, where the user has not set it."""
        model = self.config[self.verb].model
        overrides = architecture_overrides(
            architecture,
            model.as_dict(),
            self.explicit.model.as_dict() if "model" in self.explicit else {},
            path,
        )
        changed = {"class_path": model.class_path, "init_args": overrides}
        self.config = self.parser.parse_object({self.verb: {"model": changed}}, self.config)

    # -- building

    @property
    def fresh(self) -> bool:
        """Whether this fit starts a run, rather than continuing the one in its directory."""
        return self.checkpoint is None or not self.run.owns(self.checkpoint)

    def before_instantiate_classes(self) -> None:
        config = self.config[self.verb]
        if self.verb == "fit":
            check_fit(config.trainer, self.checkpoint, self.checkpoint_content.get("global_step", 0))
            # Only the main process asks: others start when it has claimed the directory already.
            if self.fresh and not config.trainer.fast_dev_run and _is_main_process():
                self.run.check_free()

    def instantiate_classes(self) -> None:
        # Where a key may be null, the parser turns whatever a constructor raises into a ValueError on types.
        raised: list[Exception] = []

        # A value table that is split is never whole on any rank: each makes its own part later.
        split = splits_memory(self.config[self.verb].trainer.strategy)

        def construct(cls: type, *args: Any, **kwargs: Any) -> Any:
            try:
                with values_without_memory() if split else nullcontext():
                    return cls(*args, **kwargs)
            except Exception as error:
                raised.append(error)
                raise

        try:
            self.config_init = self.parser.instantiate(self.config, instantiators=[(construct, object, True)])
        except Exception:
            if raised:
                raise raised[-1] from None
            raise
        self.datamodule = self.config_init[self.verb].data
        self.model = self.config_init[self.verb].model
        if self.verb == "predict" and (prompts := self.config_init.predict.prompts) != PromptsConfig():
            tokenizer, context = self.datamodule.tokenizer, self.datamodule.sequence_length
            self.datamodule.prompts = PromptSource(prompts, tokenizer, context)
        self.trainer = self.instantiate_trainer()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        if self.checkpoint is not None:
            check_architecture(
                self.model.architecture(), self.checkpoint_content["architecture"], self.checkpoint
            )
        config = self.config_init[self.verb].trainer
        command = [self.verb, *self.arguments]
        resolved = self.resolved_config()
        permanent: list[Callback] = [
            RunDirectory(self.files, resolved, command, self.fresh, self.source()),
            RandomState(),
        ]
        if config.enable_checkpointing is not False:
            permanent.append(Checkpoints(self.files.checkpoints, report=self.files.saves))
        optional = config.callbacks or []
        optional = optional if isinstance(optional, list) else [optional]
        if config.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in optional):
            # Steps of a small model take milliseconds: every tenth is often enough to draw.
            permanent.append(TQDMProgressBar(refresh_rate=10))
        kwargs["callbacks"] = permanent + optional
        # Evaluation does not log: its rows would land at step 0 of the run's files.
        resumed_step = None if self.fresh else self.checkpoint_content["global_step"]
        kwargs["logger"] = self.verb == "fit" and run_loggers(config.logger, self.run, resumed_step)
        if config.default_root_dir is None:
            kwargs["default_root_dir"] = str(self.run.directory)
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (TypeError, ValueError) as error:  # such as an unknown strategy
            raise ConfigError("trainer", str(error)) from error
        except RuntimeError as error:
            if "SLURM" not in str(error):
                raise
            raise ConfigError("trainer", str(error)) from error  # variables that contradict each other
        if isinstance(trainer.strategy, MemoryStrategy):
            # Before other processes start: this one says it once, where they would all say it.
            strategy = trainer.strategy
            check_pools(self.model.transformer, strategy.group_size, GROUP_KEY)
            check_experts(self.model.transformer, strategy.ranks, strategy.expert_group_size, EXPERT_KEY)
            checkpoint = None if self.checkpoint is None else str(self.checkpoint)
            strategy.run_config = flatten(yaml.safe_load(resolved)) | {"ckpt_path": checkpoint}
        elif self.verb == "fit":
            self.model.check_strategy(trainer)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer

    def resolved_config(self) -> str:
        """The configuration as YAML that reproduces it, without the checkpoint it happened to start from."""
        config = self.config[self.verb].clone()
        for key in ("config", "ckpt_path", "weights_only"):
            config.pop(key, None)
        return self._parser(self.verb).dump(config, skip_unset=False, skip_validation=True)

    def source(self) -> dict[str, Any]:
        """Where the weights come from; empty for initial ones."""
        if self.checkpoint is None:
            return {}
        return {
            "checkpoint": str(self.checkpoint),
            "step": self.checkpoint_content["global_step"],
            "tokens": self.checkpoint_content.get("tokens_seen"),
        }

    # -- running

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand == "predict":
            kwargs["return_predictions"] = False  # they go to a file
        return kwargs

    def _run_subcommand(self, subcommand: str) -> None:
        self.checkpoint_content = {}  # release the file
        try:
            super()._run_subcommand(subcommand)
        except SIGTERMException:
            raise SystemExit(128 + signal.SIGTERM) from None  # Lightning's own code would be 0, success
        except SystemExit:
            if not self.trainer.interrupted:
                raise
            # Lightning turns Ctrl-C into exit(1), and leaves further ones ignored.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt from None

    @rank_zero_only
    def after_fit(self) -> None:
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        directory = self.run.directory
        config = f"--config {self.run.config}"
        print(
            f"\nRun files: {directory}/ (config.yaml, metrics.csv, model.json, environment.json,"
            " checkpoints/)\n"
            f"  measure it:        memlm test {config} --ckpt_path last\n"
            f"  continue it:       memlm fit {config} --ckpt_path last --trainer.max_steps N\n"
            f"  beside other runs: memlm compare {directory} OTHER_RUN\n"
            f"  curves:            tensorboard --logdir {directory.parent}"
        )

    @rank_zero_only
    def after_test(self) -> None:
        print(f"Written to {self.files.test}")

    @rank_zero_only
    def after_predict(self) -> None:
        print(f"Written to {self.files.predictions}")


def run(verb: str, arguments: list[str]) -> None:
    """Runs a verb of the Trainer.

    Args:
        verb: fit, validate, test or predict.
        arguments: The words after the verb.
    """
    quiet()
    import_all(data_modules)
    import_all(callbacks)
    CommandLine(verb, arguments)


fit = partial(run, "fit")
validate = partial(run, "validate")
test = partial(run, "test")
predict = partial(run, "predict")


def _is_main_process() -> bool:
    return rank_zero_only.rank == 0  # type: ignore[attr-defined]
