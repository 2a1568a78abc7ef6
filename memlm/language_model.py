"""The LightningModule that every architecture is: training, evaluation, optimisation, checkpoints."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from memlm.errors import CheckpointError, ConfigError
from memlm.flops import Counts, count
from memlm.huggingface import load_pretrained
from memlm.kernels.backend import select
from memlm.memory import MemoryPlan, MemoryPool
from memlm.memory.pool import values_without_memory
from memlm.metrics import IGNORED, RECALL_GROUPS, FactRecall, TokenLoss, summed_loss
from memlm.optim import MemoryAdamW, OptimizerConfig, ValuesOptimizerConfig, clip_gradients, configure
from memlm.parallel.in_step import in_step
from memlm.parallel.memory_strategy import GROUP_KEY, MemoryStrategy
from memlm.parallel.placing import check_pools
from memlm.pretrained import PretrainedConfig, is_memory
from memlm.resume import flatten, plain
from memlm.transformer import MoEConfig, Transformer, TransformerConfig

Batch = dict[str, Any]

_NO_ARCHITECTURE = ("kernels", "start_at_zero", "auxiliary_loss", "z_loss", "activation_checkpointing")
"""Options that a checkpoint does not fix: other kernels may read it, or training go on under other losses."""


class LanguageModel(pl.LightningModule):
    """Next-token training, evaluation and optimisation, for any transformer.

    Args:
        vocab_size: Entries of the tokenizer.
        transformer: The decoder's options.
        optimizer: The dense parameters' optimiser.
        compile: Whether to run the transformer under ``torch.compile``.
        memory_plan: The memory's options, None for none.
        row_optimizer: The value rows' optimiser; goes with ``memory_plan``.
        experts: Options of the mixtures of experts, None for none.
        pretrained: Weights to start from, None for initial ones.
    """

    def __init__(
        self,
        vocab_size: int,
        transformer: TransformerConfig,
        optimizer: OptimizerConfig,
        compile: bool,
        *,
        # Not under the names that subclasses have: the command line takes a base's default for theirs.
        memory_plan: MemoryPlan | None = None,
        row_optimizer: ValuesOptimizerConfig | None = None,
        experts: MoEConfig | None = None,
        pretrained: PretrainedConfig | None = None,
    ) -> None:
        super().__init__()
        sections = {"transformer": transformer, "memory": memory_plan, "moe": experts}
        self.sections: dict[str, Any] = {name: config for name, config in sections.items() if config}
        self.dense_options, self.values_options = optimizer, row_optimizer
        optimizer.validate("model.optimizer")
        if row_optimizer is not None:
            row_optimizer.validate("model.values_optimizer")
        if pretrained is not None:
            pretrained.validate(memory_plan, experts)
        self._pretrained = pretrained
        self._restored = False
        self._compile = compile
        self.vocab_size = vocab_size
        self.transformer = Transformer(vocab_size, transformer, memory_plan, experts)
        self._placed = False
        if pretrained is not None and pretrained.train == "memory":
            for name, parameter in self.transformer.named_parameters():
                parameter.requires_grad_(is_memory(name))
        self.tokens_seen = 0
        """Positions trained on so far, over all ranks, padding included."""
        self.losses: dict[str, TokenLoss] = {}
        self.recalls: dict[str, FactRecall] = {}

    # -- what it is

    @property
    def pools(self) -> dict[str, MemoryPool]:
        """The model's pools by name; empty for a dense model."""
        return {name: cast(MemoryPool, pool) for name, pool in self.transformer.pools.items()}

    @property
    def trained(self) -> str:
        """What has gradients: everything, or the memory."""
        return "everything" if self._pretrained is None else self._pretrained.train

    def architecture(self) -> dict[str, Any]:
        """Everything that decides the parameters' names, shapes and types, as plain values."""
        sections = {name: asdict(config) for name, config in self.sections.items()}
        for section in sections.values():
            for name in _NO_ARCHITECTURE:
                section.pop(name, None)
            if section.get("tucker") is not None:
                section["tucker"] = {"rank": section["tucker"]["rank"]}
        return {"class_path": f"memlm.{type(self).__name__}", "vocab_size": self.vocab_size, **sections}

    def counts(self, sequence_length: int) -> Counts:
        """Parameters, and FLOPs and bytes a token, at ``sequence_length`` tokens."""
        model = self.transformer
        if not all(parameter.numel() for parameter in model.parameters()):
            model = self._outline()  # ZeRO 3 keeps parameters elsewhere
        return count(model, sequence_length)

    def _outline(self) -> Transformer:
        """The transformer on the meta device."""
        with torch.device("meta"), values_without_memory():
            model = Transformer(
                self.vocab_size,
                self.sections["transformer"],
                self.sections.get("memory"),
                self.sections.get("moe"),
            )
        for name, pool in self.pools.items():
            model.pools[name].to(pool.values.dtype)
        return model

    # -- training

    def configure_model(self) -> None:
        """Give each rank its part of the model, where the strategy splits it."""
        strategy = self.trainer.strategy
        if self._placed or not isinstance(strategy, MemoryStrategy):
            return
        check_pools(self.transformer, strategy.memory_mesh.group_size, GROUP_KEY)
        strategy.place(self.transformer)
        self._placed = True

    def setup(self, stage: str) -> None:
        """Check what only the Trainer knows; prepare the metrics."""
        if stage == "fit":
            self._check_trainer()
        data = getattr(self.trainer, "datamodule", None)
        token_bytes = data.tokenizer.token_bytes if data is not None else None
        # The module itself is moved to the device only after this hook.
        device = self.trainer.strategy.root_device
        for pool in self.pools.values():
            select(device, pool.gradient.kernels)  # raises now, not in the first step
        evaluated = {"fit": "val", "validate": "val", "test": "test"}.get(stage)
        if evaluated is not None:
            sets = list(data.evaluation_sources(evaluated == "test")) if data is not None else ["all"]
            self.losses[evaluated] = TokenLoss(token_bytes, sets).to(device)
            exposures = data.exposure_levels if data is not None else ()
            self.recalls[evaluated] = FactRecall(exposures).to(device)
        if self._compile:
            self.transformer.compile()

    def on_fit_start(self) -> None:
        """Load the pretrained weights, unless a checkpoint has been loaded: only now is that known."""
        if not self.trainer.strategy.restore_checkpoint_after_setup:
            self.take_pretrained()

    def on_train_start(self) -> None:
        """The same where ranks read their parts of a checkpoint, which is later."""
        self.take_pretrained()

    def take_pretrained(self) -> None:
        """Load the pretrained weights, if there are any, once, and over no checkpoint."""
        if self._pretrained is not None and not self._restored:
            load_pretrained(self.transformer, self._pretrained.folder, self._pretrained.allow_pickle)
            self._restored = True

    def check_strategy(self, trainer: pl.Trainer) -> None:
        """Refuse to train memory pools on several processes whose strategy does not exchange their rows.

        Args:
            trainer: That is to train the model; its processes need not have started.

        Raises:
            ConfigError: The strategy is none of memlm's.
        """
        if self.pools and trainer.world_size > 1 and not isinstance(trainer.strategy, MemoryStrategy):
            raise ConfigError(
                "trainer.strategy",
                f"is {type(trainer.strategy).__name__} with {trainer.world_size} processes; the rows of a "
                "memory pool are exchanged between processes by memory_parallel, memory_ddp and "
                "memory_deepspeed alone (configs/parallel/)",
            )

    def _check_trainer(self) -> None:
        if self.trainer.gradient_clip_algorithm not in (None, "norm"):
            raise ConfigError("trainer.gradient_clip_algorithm", "must be norm, the only one there is")
        if getattr(self.values_options, "clip", None) == "global" and not self.trainer.gradient_clip_val:
            raise ConfigError(
                "trainer.gradient_clip_val",
                f"is {self.trainer.gradient_clip_val}, must be positive: model.values_optimizer.clip "
                "is global, which clips the values together with the dense gradients",
            )
        if not self.pools:
            return
        self.check_strategy(self.trainer)
        if str(self.trainer.precision).startswith("16"):
            raise ConfigError(
                "trainer.precision",
                f"is {self.trainer.precision}; fp16 needs a loss scale, which does not reach the row "
                "gradients. Use 32-true or bf16-mixed",
            )
        if self.trainer.precision == "bf16-true":
            rank_zero_warn(
                "trainer.precision is bf16-true: updates of a dense parameter below 1/256 of it are rounded "
                "away (of the values: see model.values_optimizer.rounding); "
                "bf16-mixed keeps the values in fp32, and all else"
            )

    def forward(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """Logits ``[B, T, vocab]`` of tokens ``[B, T]``."""
        return self.transformer(tokens, documents)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean next-token loss of the batch's counted targets (nats); 0 if it has none."""
        logits = self(batch["tokens"], batch.get("documents"))
        # A mean over no target would be NaN, and one such batch the end of the run.
        counted = self._mean_over_ranks((batch["targets"] != IGNORED).sum())
        counted = counted.clamp(min=1 / self.trainer.world_size)
        loss = summed_loss(logits, batch["targets"]) / counted
        self.tokens_seen += batch["tokens"].numel() * self.trainer.world_size
        self.log("train/loss", loss.detach(), prog_bar=True, sync_dist=self.trainer.world_size > 1)
        self.log("train/tokens", float(self.tokens_seen))
        for name, extra in self._layer_losses().items():
            self.log(f"train/loss_{name}", extra.detach(), sync_dist=self.trainer.world_size > 1)
            loss = loss + extra
        return loss

    def _mean_over_ranks(self, count: Tensor) -> Tensor:
        """The mean of a count: gradients are means over ranks, and every target shall weigh the same."""
        if self.trainer.world_size == 1:
            return count
        return cast(Tensor, self.trainer.strategy.reduce(count.float(), reduce_op="mean"))

    def _layer_losses(self) -> dict[str, Tensor]:
        """Weighted losses that layers ask for (experts, Tucker's core), means over those that do."""
        found: dict[str, list[Tensor]] = {}
        for module in self.transformer.modules():
            if hasattr(module, "take_losses"):
                for name, loss in cast(Any, module).take_losses().items():
                    found.setdefault(name, []).append(loss)
        return {name: torch.stack(losses).mean() for name, losses in found.items()}

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Even out the load of the experts, where they are balanced without a loss."""
        for layer in self.transformer.experts.values():
            layer.balance(partial(self.trainer.strategy.reduce, reduce_op="sum"))

    def configure_optimizers(self) -> Any:
        """One MemoryAdamW over all groups, its schedule stepped every optimizer step."""
        # Not trainer.estimated_stepping_batches: it builds the loaders, and stateful ones then miss
        # their restored state (Lightning #20550).
        if self.trainer.max_steps < 1:
            raise ConfigError("trainer.max_steps", "must be given: training streams have no end")
        strategy = self.trainer.strategy
        optimizer, schedule = configure(
            self.transformer.named_parameters(),
            {pool.values: pool.gradient for pool in self.pools.values()},
            self.dense_options,
            self.values_options,
            self.trainer.max_steps,
            strategy.optimizer_class if isinstance(strategy, MemoryStrategy) else MemoryAdamW,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip dense gradients and row gradients; log their norms before clipping."""
        inner = getattr(optimizer, "optimizer", optimizer)
        for name, norm in clip_gradients(inner, gradient_clip_val).items():
            self.log(f"train/gradient_norm_{name}", norm)

    # -- evaluation

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to the validation metrics."""
        self._evaluate(batch, "val", dataloader_idx)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to the test metrics."""
        self._evaluate(batch, "test", dataloader_idx)

    def _evaluate(self, batch: Batch, stage: str, index: int) -> None:
        logits = self(batch["tokens"], batch.get("documents"))
        self.losses[stage].update(logits, batch["targets"], index)
        if "answers" in batch:
            self.recalls[stage].update(logits, batch["answers"], batch["group"], batch.get("exposures"))

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log the test metrics."""
        self._log_metrics("test")

    def _log_metrics(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        if data is not None and self.recalls[stage].update_called:
            for name, value in data.baselines(stage == "test").items():
                self.log(f"{stage}/{name}", value)
        for metric in (self.losses[stage], self.recalls[stage]):
            if not metric.update_called:  # no facts in this data
                continue
            for name, value in metric.compute().items():
                # The metric has reduced over ranks already.
                self.log(f"{stage}/{name}", value, prog_bar=name in ("loss", "recall"))
            metric.reset()
        if stage == "val":
            self.log("train/tokens", float(self.tokens_seen))

    @contextmanager
    def ranks_apart(self) -> Iterator[None]:
        """Within it each rank may run the model on inputs of its own, as often as it likes, without gradient.

        All ranks must enter it. Outside it a model that is split needs equally many tokens on all ranks.
        """
        strategy = self.trainer.strategy
        if not isinstance(strategy, MemoryStrategy) or not strategy.needs_all_ranks:
            yield
            return
        context = self.trainer.precision_plugin.forward_context
        with strategy.whole_between_passes(), in_step(self.transformer, context):
            yield

    def on_predict_epoch_start(self) -> None:
        """Let ranks differ: prompts are of any lengths, and the last ranks may have a batch fewer."""
        self._predicting = ExitStack()
        self._predicting.enter_context(self.ranks_apart())

    def on_predict_epoch_end(self) -> None:
        """Wait for the other ranks' passes."""
        self._predicting.close()

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """A record of every continuation of a batch of prompts, or of every question of an evaluation batch:
        the prompt, the right answer and the greedy one.
        """
        tokenizer = self.trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        if "prompts" in batch:
            return batch["prompts"].records(self.transformer, tokenizer)
        if "answers" not in batch:
            raise ConfigError(
                "data",
                "has no questions to predict answers for; memlm predict needs facts, or prompts: "
                "--prompts.file prompts.txt",
            )
        best = self(batch["tokens"], batch.get("documents")).argmax(-1)
        decode = tokenizer.decode
        records = []
        for tokens, answers, predicted, group in zip(
            batch["tokens"], batch["answers"], best, batch["group"], strict=True
        ):
            asked = answers != IGNORED
            if not asked.any():  # a row that only pads the batch
                continue
            first = int(asked.nonzero()[0])
            records.append(
                {
                    "prompt": decode(tokens[: first + 1].tolist()),
                    "answer": decode(answers[asked].tolist()),
                    "predicted": decode(predicted[asked].tolist()),
                    "recalled": bool((predicted == answers)[asked].all()),
                    "group": RECALL_GROUPS[group],
                }
            )
        return records

    # -- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the architecture and the tokens seen."""
        checkpoint["architecture"] = self.architecture()
        checkpoint["tokens_seen"] = self.tokens_seen
        checkpoint["trained"] = self.trained

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another architecture or vocabulary; restore the tokens seen."""
        where = str(getattr(self.trainer, "ckpt_path", None) or "checkpoint")
        saved = checkpoint.get("architecture")
        if saved is None:
            raise CheckpointError(where, "holds no architecture: it was not written by memlm")
        theirs, ours = flatten(saved), flatten(self.architecture())
        for key in dict.fromkeys([*theirs, *ours]):
            if plain(theirs.get(key)) != plain(ours.get(key)):
                raise CheckpointError(
                    where,
                    f"does not fit the model: {key} is {theirs.get(key)} in the checkpoint and "
                    f"{ours.get(key)} in the model",
                )
        trained = checkpoint.get("trained", "everything")
        if self.trainer.state.fn == TrainerFn.FITTING and trained != self.trained:
            raise CheckpointError(
                where,
                f"was written with model.pretrained.train: {trained}, which is {self.trained} now; its "
                "optimizer state is of other parameters. Set it back",
            )
        self.tokens_seen = checkpoint["tokens_seen"]
        self._restored = True
