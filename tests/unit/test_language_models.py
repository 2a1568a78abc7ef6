"""The LightningModules under a real Trainer on tiny made-up facts."""

import math
import warnings

import lightning.pytorch as pl
import pytest
import torch

from data_modules.synthetic_facts import SyntheticFacts
from memlm import PEERLM, DenseLM, EngramLM, MemoryLM, MoELM
from memlm.errors import CheckpointError, ConfigError
from memlm.memory import EngramConfig, MemoryConfig, PEERConfig
from memlm.optim import OptimizerConfig, ScheduleConfig, ValuesOptimizerConfig
from memlm.transformer import MoEConfig, TransformerConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*sync_dist=True.*"),
]


TINY = TransformerConfig(dim=16, layers=2, heads=2, feed_forward_dim=32)
FAST = OptimizerConfig(learning_rate=1e-2)


def facts(kind=SyntheticFacts, **options) -> SyntheticFacts:
    chosen = {"people": 12, "control": 2, "attributes": 2, "values": 5, "name_vocabulary": 6}
    return kind(**{**chosen, "batch_size": 8, "evaluation_facts": 20, **options})


def memory_config(**options) -> MemoryConfig:
    return MemoryConfig(**{"half_keys": 8, "heads": 2, "reads": 4, "layers": [1], **options})


def build(kind, data, **options):
    torch.manual_seed(0)
    options = {"transformer": TINY, "optimizer": FAST, **options}
    chosen = {
        MemoryLM: {"memory": memory_config()},
        MoELM: {"moe": MoEConfig(experts=4, routing="token_choice", auxiliary_loss=0.01, balance_rate=1e-3)},
        PEERLM: {"memory": PEERConfig(half_keys=8, heads=2, reads=4, key_dim=8)},
        EngramLM: {"memory": EngramConfig(slots=200, heads=2, layers=[1])},
    }
    options = {**chosen.get(kind, {}), **options}
    return kind(data.vocab_size, **options)


def trainer(**options) -> pl.Trainer:
    defaults = {
        "accelerator": "cpu",
        "max_steps": 2,
        "max_epochs": -1,
        "check_val_every_n_epoch": None,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(**{**defaults, **options})


class Losses(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []
        self.norms: dict[str, float] = {}

    def on_train_batch_end(self, trainer, module, outputs, *_) -> None:
        self.seen.append(outputs["loss"].item())
        self.norms = {
            name: float(v) for name, v in trainer.callback_metrics.items() if "gradient_norm" in name
        }


KINDS = [DenseLM, MoELM, MemoryLM, PEERLM, EngramLM]


@pytest.mark.parametrize("kind", KINDS)
def test_thirty_steps_lower_the_loss_and_move_every_parameter(kind):
    data, losses = facts(), Losses()
    model = build(kind, data)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer(max_steps=30, callbacks=[losses], gradient_clip_val=1.0).fit(model, datamodule=data)
    assert sum(losses.seen[-5:]) < 0.8 * sum(losses.seen[:5])
    assert all((parameter != before[name]).any() for name, parameter in model.named_parameters())
    has_memory = kind in (MemoryLM, PEERLM, EngramLM)
    names = {"decay", "no_decay", "values"} if has_memory else {"decay", "no_decay"}
    assert {group["name"] for group in model.trainer.optimizers[0].param_groups} == names
    norms = {"dense", "values"} if has_memory else {"dense"}
    assert losses.norms.keys() == {f"train/gradient_norm_{name}" for name in norms}
    assert all(norm > 0 for norm in losses.norms.values())
    assert model.tokens_seen == 30 * 8 * data.sequence_length


def test_accumulated_micro_batches_equal_one_large_batch():
    tables = []
    for batch_size, accumulate in ((8, 1), (4, 2)):
        data = facts(batch_size=batch_size, packing="concatenate", sequence_length=16)
        model = build(MemoryLM, data, memory=memory_config(query_norm="qk")).double()
        trainer(max_steps=3, accumulate_grad_batches=accumulate, precision="64-true").fit(
            model, datamodule=data
        )
        tables.append([parameter.detach() for parameter in model.parameters()])
    for large, small in zip(*tables, strict=True):
        torch.testing.assert_close(large, small, rtol=1e-6, atol=1e-8)


def test_bf16_mixed_precision_trains():
    data, losses = facts(), Losses()
    trainer(max_steps=30, precision="bf16-mixed", callbacks=[losses]).fit(
        build(MemoryLM, data), datamodule=data
    )
    assert sum(losses.seen[-5:]) < 0.8 * sum(losses.seen[:5])


@pytest.mark.parametrize("kind", KINDS)
def test_true_bf16_trains(kind):
    data, losses = facts(), Losses()
    trainer(max_steps=3, precision="bf16-true", callbacks=[losses]).fit(build(kind, data), datamodule=data)
    assert len(losses.seen) == 3 and all(math.isfinite(loss) for loss in losses.seen)


def test_optimizer_options_reach_the_groups():
    data = facts()
    model = build(
        MemoryLM,
        data,
        optimizer=OptimizerConfig(1e-3, (0.8, 0.9), 1e-7, 0.3, ScheduleConfig("constant")),
        values_optimizer=ValuesOptimizerConfig(2e-2, (0.5, 0.6), 1e-6, 0.2, 0.7, ScheduleConfig("linear", 4)),
    )
    trainer(max_steps=2).fit(model, datamodule=data)
    groups = {group["name"]: group for group in model.trainer.optimizers[0].param_groups}
    for name, decay in (("decay", 0.3), ("no_decay", 0.0)):
        group = groups[name]
        assert (group["kind"], group["lr"], group["betas"], group["eps"]) == ("dense", 1e-3, (0.8, 0.9), 1e-7)
        assert (group["weight_decay"], group["clip"]) == (decay, None)
    values = groups["values"]
    assert (values["kind"], values["betas"], values["eps"]) == ("memory", (0.5, 0.6), 1e-6)
    assert (values["weight_decay"], values["clip"]) == (0.2, 0.7)
    assert values["lr"] == pytest.approx(2e-2 * 3 / 4)  # two steps into a warm-up of four
    assert values["params"] == [model.pools["main"].values]


@pytest.mark.parametrize(
    "options,key",
    [
        ({"optimizer": OptimizerConfig(learning_rate=0.0)}, "optimizer.learning_rate"),
        ({"optimizer": OptimizerConfig(betas=(0.9, 1.0))}, "optimizer.betas"),
        ({"optimizer": OptimizerConfig(eps=-1.0)}, "optimizer.eps"),
        ({"values_optimizer": ValuesOptimizerConfig(weight_decay=-0.1)}, "values_optimizer.weight_decay"),
        ({"values_optimizer": ValuesOptimizerConfig(clip=-1.0)}, "values_optimizer.clip"),
        (
            {"optimizer": OptimizerConfig(schedule=ScheduleConfig(final_ratio=2))},
            "optimizer.schedule.final_ratio",
        ),
    ],
)
def test_optimizer_values_out_of_range(options, key):
    with pytest.raises(ConfigError) as error:
        build(MemoryLM, facts(), **options)
    assert error.value.key == f"model.{key}"


@pytest.mark.parametrize(
    "options,key",
    [
        ({"devices": 2, "strategy": "ddp"}, "trainer.strategy"),
        ({"precision": "16-true"}, "trainer.precision"),
        ({"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}, "trainer.gradient_clip_algorithm"),
    ],
)
def test_trainer_settings_that_row_gradients_cannot_have(options, key):
    data = facts()
    model = build(MemoryLM, data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fp16 on a CPU
        model.trainer = trainer(**options)
    with pytest.raises(ConfigError) as error:
        model.setup("fit")
    assert error.value.key == key
    dense = build(DenseLM, data)
    dense.trainer = model.trainer
    if key == "trainer.gradient_clip_algorithm":
        with pytest.raises(ConfigError, match=key):
            dense.setup("fit")
    else:
        dense.setup("fit")  # it does not concern a dense model


def test_values_in_bf16_get_a_warning():
    model = build(MemoryLM, facts())
    model.trainer = trainer(precision="bf16-true")
    with pytest.warns(UserWarning, match="bf16-mixed keeps the values in fp32"):
        model.setup("fit")


def test_training_without_max_steps_is_an_error():
    data = facts()
    with pytest.raises(ConfigError, match=r"trainer\.max_steps"):
        trainer(max_steps=-1).fit(build(DenseLM, data), datamodule=data)


def test_a_batch_without_targets_costs_nothing():
    data = facts()
    model = build(DenseLM, data)
    fit = trainer()
    fit.fit(model, datamodule=data)
    model.log = lambda *_, **__: None
    tokens = torch.randint(data.vocab_size, (2, 5))
    loss = model.training_step({"tokens": tokens, "targets": torch.full((2, 5), -100)}, 0)
    assert loss == 0
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


class WithPaddingRows(SyntheticFacts):
    """Evaluation batches end with rows of padding, as they do where ranks share them unevenly."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        if "answers" not in batch:
            return batch
        fill = {"tokens": 0, "targets": -100, "answers": -100, "group": -1}
        return {
            name: torch.cat([value, torch.full((2, *value.shape[1:]), fill[name])])
            for name, value in batch.items()
        }


@pytest.mark.parametrize("kind", [DenseLM, MemoryLM])
def test_validation_and_test_report_loss_bits_and_recall_and_ignore_padding(kind):
    data = facts()
    model = build(kind, data)
    trainer(max_steps=40).fit(model, datamodule=data)
    results = []
    for padded in (False, True):
        data = facts(kind=WithPaddingRows if padded else SyntheticFacts)
        runner = trainer(limit_val_batches=1.0)
        validated = runner.validate(model, datamodule=data, verbose=False)[0]
        results.append(validated | runner.test(model, datamodule=data, verbose=False)[0])
    metrics = ("loss", "perplexity", "bits_per_byte", "recall", "recall_seen_phrasing", "recall_control")
    metrics += ("recall_majority",)
    assert {f"{stage}/{name}" for name in metrics for stage in ("val", "test")} <= results[0].keys()
    assert results[1] == pytest.approx(results[0])
    assert results[0]["val/perplexity"] == pytest.approx(math.exp(results[0]["val/loss"]), rel=1e-4)
    assert results[0]["test/recall_majority"] == pytest.approx(data.majority_baseline)
    right = asked = 0
    for batch in facts().val_dataloader()[0]:
        best = model(batch["tokens"], batch.get("documents")).argmax(-1)
        for row in (batch["group"] == 0).nonzero().flatten():
            at = batch["answers"][row] != -100
            asked += 1
            right += bool((best[row] == batch["answers"][row])[at].all())
    assert 0 < results[0]["val/recall"] == pytest.approx(right / asked)


def test_predictions_leave_padding_out():
    data = facts(kind=WithPaddingRows)
    model = build(DenseLM, data)
    batches = trainer().predict(model, datamodule=data)
    records = [record for batch in batches for record in batch]
    prompts = sum(len(batch["group"]) for batch in facts().predict_dataloader()[0])
    assert len(records) == prompts > 0
    assert set(records[0]) == {"prompt", "answer", "predicted", "recalled", "group"}
    assert {record["group"] for record in records} == {"recall", "recall_seen_phrasing", "recall_control"}
    assert all(record["recalled"] == (record["answer"] == record["predicted"]) for record in records)


def checkpoint_of(model) -> dict:
    checkpoint: dict = {}
    model.on_save_checkpoint(checkpoint)
    return checkpoint


@pytest.mark.parametrize(
    "options,parts",
    [
        ({"memory": memory_config(half_keys=9)}, ["memory.half_keys", "is 8 in", "9 in the model"]),
        ({"transformer": TransformerConfig(16, 2, 4)}, ["transformer.heads", "is 2 in", "4 in the model"]),
    ],
)
def test_a_checkpoint_of_another_architecture_is_refused(options, parts):
    data = facts()
    checkpoint = checkpoint_of(build(MemoryLM, data))
    model = build(MemoryLM, data, **options)
    model.trainer = trainer()
    with pytest.raises(CheckpointError) as error:
        model.on_load_checkpoint(checkpoint)
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_a_checkpoint_of_another_class_or_vocabulary_or_program_is_refused():
    data = facts()
    model = build(MemoryLM, data)
    model.trainer = trainer()
    with pytest.raises(CheckpointError, match=r"class_path is memlm\.DenseLM"):
        model.on_load_checkpoint(checkpoint_of(build(DenseLM, data)))
    other = MemoryLM(data.vocab_size + 1, TINY, memory_config())
    with pytest.raises(CheckpointError, match=f"vocab_size is {data.vocab_size + 1} .* {data.vocab_size} in"):
        model.on_load_checkpoint(checkpoint_of(other))
    grid = build(MemoryLM, data, memory=memory_config(half_keys=(8, 9)))
    grid.trainer = trainer()
    grid.on_load_checkpoint(checkpoint_of(build(MemoryLM, data, memory=memory_config(half_keys=[8, 9]))))
    with pytest.raises(CheckpointError, match="no architecture"):
        model.on_load_checkpoint({"state_dict": {}})


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(kind, tmp_path):
    whole, data = build(kind, facts()), facts()
    trainer(max_steps=6).fit(whole, datamodule=data)
    first, data = build(kind, facts()), facts()
    interrupted = trainer(max_steps=6, callbacks=[StopAt(3)])
    interrupted.fit(first, datamodule=data)
    path = tmp_path / "state.ckpt"
    interrupted.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    assert saved["architecture"] == first.architecture()
    assert saved["tokens_seen"] == 3 * 8 * data.sequence_length

    resumed, data = build(kind, facts()), facts()
    trainer(max_steps=6).fit(resumed, datamodule=data, ckpt_path=str(path))
    assert resumed.tokens_seen == whole.tokens_seen == 6 * 8 * data.sequence_length
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name)), name


class StopAt(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *_) -> None:
        trainer.should_stop = trainer.global_step >= self.step


def test_architecture_and_counts_are_plain_values():
    data = facts()
    model = build(MemoryLM, data)
    architecture = model.architecture()
    assert architecture["class_path"] == "memlm.MemoryLM"
    assert architecture["memory"]["half_keys"] == 8
    assert "kernels" not in architecture["memory"]  # a checkpoint may be read by others
    assert "memory" not in build(DenseLM, data).architecture()
    counts = model.counts(10).as_dict()
    assert all(type(value) is int for value in counts.values())
    assert counts["memory"] == 64 * 16 == model.pools["main"].values.numel()
    assert build(DenseLM, data).pools == {}


def test_experts_in_the_feed_forward_networks_that_memory_leaves():
    data = facts()
    model = build(MemoryLM, data, moe=MoEConfig(experts=3))
    trainer(max_steps=3).fit(model, datamodule=data)
    assert list(model.transformer.experts) == [0]
    assert model.transformer.blocks[1].feed_forward is None
    assert {"memory", "moe"} <= model.architecture().keys()


class Logged(pl.Callback):
    def on_train_batch_end(self, trainer, *_) -> None:
        self.metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_the_experts_losses_are_logged_and_added_and_their_bias_moves_once_a_step():
    data, logged, losses = facts(), Logged(), Losses()
    moe = MoEConfig(experts=4, routing="token_choice", auxiliary_loss=0.5, z_loss=0.1, balance_rate=0.125)
    model = build(MoELM, data, moe=moe)
    trainer(max_steps=3, accumulate_grad_batches=2, callbacks=[logged, losses]).fit(model, datamodule=data)
    extra = logged.metrics["train/loss_auxiliary"] + logged.metrics["train/loss_z"]
    # The coefficient times a loss that is 1 when even. Outputs of the loop are divided by the micro-batches.
    assert 0.4 < logged.metrics["train/loss_auxiliary"] < 2
    assert losses.seen[-1] == pytest.approx((logged.metrics["train/loss"] + extra) / 2, rel=1e-4)
    for layer in model.transformer.experts.values():
        steps = layer.balance_bias / 0.125
        assert steps.abs().max() <= 3 and steps.abs().max() > 0
        torch.testing.assert_close(steps, steps.round())
        assert layer.counts.sum() == 0
    # The losses' coefficients may change when training goes on, what the model computes may not.
    architecture = model.architecture()["moe"]
    assert "auxiliary_loss" not in architecture and architecture["experts"] == 4


def test_evaluation_asks_for_no_expert_losses():
    data = facts()
    model = build(MoELM, data)
    trainer(limit_val_batches=1.0).validate(model, datamodule=data, verbose=False)
    assert all(layer.take_losses() == {} for layer in model.transformer.experts.values())


@pytest.mark.parametrize("experts", [MoEConfig(experts=3, layers=[1]), MoEConfig(experts=3)])
def test_experts_where_memory_has_replaced_the_networks(experts):
    memory = memory_config(layers=[1] if experts.layers else [0, 1])
    with pytest.raises(ConfigError, match=r"model\.moe\.layers"):
        build(MemoryLM, facts(), memory=memory, moe=experts)
    build(MemoryLM, facts(), memory=memory_config(layers=[0, 1], mode="beside"), moe=experts)
