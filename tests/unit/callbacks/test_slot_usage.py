import json
import math
from collections import Counter
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch

from callbacks.slot_usage import SlotUsage, kl_from_uniform, slots_read
from memlm.errors import ConfigError
from memlm.run_metrics import read_metrics


class ByHand(pl.Callback):
    """Adds up the same read weights with Python loops."""

    def __init__(self, model, sample_every):
        self.sample_every = sample_every
        self.batch = None
        self.sums = {}
        self.training, self.evaluation, self.evaluations = {}, {}, []
        for name, pool in model.pools.items():
            pool.observers.append(lambda slots, weights, name=name: self.add(name, slots, weights))

    def add(self, name, slots, weights):
        if self.batch is None:
            return
        counter = self.sums.setdefault(name, Counter())
        targets = self.batch["targets"].tolist()
        answers = self.batch["answers"].tolist() if "answers" in self.batch else targets
        length = len(targets[0])
        for n, (row_slots, row_weights) in enumerate(zip(slots.tolist(), weights.tolist(), strict=True)):
            row, position = divmod(n, length)
            if any(value != -100 for value in targets[row][position:] + answers[row][position:]):
                for slot, weight in zip(row_slots, row_weights, strict=True):
                    counter[slot] += weight

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step % self.sample_every == 0:
            self.batch, self.sums = batch, self.training

    def on_validation_batch_start(self, trainer, pl_module, batch, *args):
        self.batch, self.sums = batch, self.evaluation

    def on_train_batch_end(self, *args):
        self.batch = None

    def on_validation_batch_end(self, *args):
        self.batch = None

    def on_validation_end(self, *args):
        self.evaluations.append((self.training, self.evaluation))
        self.training, self.evaluation = {}, {}

    on_test_batch_start = on_validation_batch_start
    on_test_batch_end = on_validation_batch_end
    on_test_end = on_validation_end


def share(counter, slots=256):
    return sum(weight > 0 for weight in counter.values()) / slots


def divergence(counter, slots=256):
    total = sum(counter.values())
    return math.log(slots) + sum(w / total * math.log(w / total) for w in counter.values() if w > 0)


def heaviest(counter, count):
    total = sum(counter.values())
    return [(slot, pytest.approx(weight / total)) for slot, weight in counter.most_common(count)]


def listed(pool):
    return [(entry["slot"], entry["share"]) for entry in pool["heaviest"]]


def test_formulas_by_hand():
    assert slots_read(torch.tensor([1.0, 1.0, 2.0, 0.0])) == 0.75
    # Shares 1/4, 1/4, 1/2, 0: log 4 - log(4) / 2 - log(2) / 2.
    assert kl_from_uniform(torch.tensor([1.0, 1.0, 2.0, 0.0])).item() == pytest.approx(math.log(2) / 2)
    assert kl_from_uniform(torch.full((8,), 3.0)).item() == pytest.approx(0, abs=1e-6)
    assert kl_from_uniform(torch.tensor([0.0, 5.0, 0.0, 0.0])).item() == pytest.approx(math.log(4))


def test_a_fit_and_a_test_against_loops(facts, model, trainer, tmp_path):
    by_hand = ByHand(model, sample_every=2)
    run = trainer(SlotUsage(every_n_steps=2, heaviest=4), by_hand)
    run.fit(model, datamodule=facts)
    rows = [row for row in read_metrics(tmp_path / "metrics.csv") if "val/loss" in row]
    assert len(rows) == len(by_hand.evaluations) == 2
    for row, (training, evaluation) in zip(rows, by_hand.evaluations, strict=True):
        for pool in ("a", "b"):
            assert 0 < share(evaluation[pool]) < 1
            assert row[f"memory/{pool}/slots_read"] == pytest.approx(share(evaluation[pool]))
            assert row[f"memory/{pool}/kl_from_uniform"] == pytest.approx(divergence(evaluation[pool]))
            assert row[f"memory/{pool}/slots_read_in_training"] == pytest.approx(share(training[pool]))
            assert "train/tokens" in row
    report = json.loads((tmp_path / "slot_usage.json").read_text())
    assert (report["val"]["step"], report["val"]["tokens"]) == (6, model.tokens_seen)
    assert report["val"]["pools"]["a"]["slots"] == 256
    assert listed(report["val"]["pools"]["b"]) == heaviest(by_hand.evaluations[-1][1]["b"], 4)

    (results,) = run.test(model, facts, verbose=False)
    (_, tested) = by_hand.evaluations[-1]
    assert results["test/memory/a/slots_read"] == pytest.approx(share(tested["a"]))
    assert results["test/memory/b/kl_from_uniform"] == pytest.approx(divergence(tested["b"]))
    assert not any("training" in name for name in results)
    after = json.loads((tmp_path / "slot_usage.json").read_text())
    assert after["val"] == report["val"]
    assert listed(after["test"]["pools"]["a"]) == heaviest(tested["a"], 4)


def test_observing_changes_nothing(facts, model, trainer):
    torch.manual_seed(0)
    trainer(SlotUsage(every_n_steps=1)).fit(model, datamodule=facts)
    observed = {name: value.clone() for name, value in model.state_dict().items()}
    pl.seed_everything(1, verbose=False)
    again = type(model)(facts.vocab_size, *model.sections.values())
    facts.advance(facts.start())
    trainer().fit(again, datamodule=facts)
    assert all(torch.equal(value, observed[name]) for name, value in again.state_dict().items())


def test_reads_outside_of_batches_do_not_count(facts, model, trainer):
    class Reads(pl.Callback):
        def on_validation_start(self, trainer, pl_module):
            self.read(pl_module)

        def on_validation_epoch_start(self, trainer, pl_module):
            self.read(pl_module)

        def read(self, pl_module):
            pl_module.transformer(torch.zeros(3, 5, dtype=torch.long))

    by_hand = ByHand(model, sample_every=10)
    run = trainer(SlotUsage(), Reads(), by_hand, max_steps=3)
    run.fit(model, datamodule=facts)
    ((_, evaluation),) = by_hand.evaluations
    logged = run.callback_metrics["memory/a/kl_from_uniform"].item()
    assert logged == pytest.approx(divergence(evaluation["a"]))


def test_one_number_a_slot_is_all_that_is_kept(facts, model, trainer):
    class Looks(pl.Callback):
        kept = None

        def on_validation_batch_end(self, *args):
            sums = [*usage._training.values(), *usage._evaluation.values()]
            self.kept = [(sum_.shape, sum_.dtype) for sum_ in sums]

    usage, looks = SlotUsage(), Looks()
    trainer(usage, looks, max_steps=3).fit(model, datamodule=facts)
    assert looks.kept == [((256,), torch.float64)] * 4  # two pools, training and validation
    assert not usage._training
    assert not usage._evaluation


def test_observers_are_removed(facts, model, trainer):
    usage = SlotUsage()
    run = trainer(usage, max_steps=3)
    run.fit(model, datamodule=facts)
    run.test(model, facts, verbose=False)
    assert [pool.observers for pool in model.pools.values()] == [[], []]


def test_observers_are_removed_after_a_failure(facts, model, trainer):
    class Breaks(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, *args):
            assert all(len(pool.observers) == 2 for pool in pl_module.pools.values())
            raise RuntimeError("broken")

    for pool in model.pools.values():
        pool.observers.append(print)  # somebody else's
    with pytest.raises(RuntimeError, match="broken"):
        trainer(SlotUsage(), Breaks()).fit(model, datamodule=facts)
    assert [pool.observers for pool in model.pools.values()] == [[print], [print]]


def test_two_models_in_one_process_are_kept_apart(facts, model, trainer):
    other = type(model)(facts.vocab_size, *model.sections.values())
    first, second = SlotUsage(every_n_steps=1), SlotUsage(every_n_steps=1)
    state = SimpleNamespace(global_step=0)
    first.setup(state, model, "fit")
    second.setup(state, other, "fit")
    batch = next(iter(facts.train_dataloader()))
    for usage in (first, second):
        usage.on_train_batch_start(state, None, batch, 0)
    model.transformer(batch["tokens"])
    assert first._training.keys() == {"a", "b"}
    assert not second._training


def test_training_reads_continue_over_a_resume(facts, model):
    state = SimpleNamespace(global_step=0)
    first = SlotUsage()
    first.setup(state, model, "fit")
    batch = next(iter(facts.train_dataloader()))
    first.on_train_batch_start(state, model, batch, 0)
    model.transformer(batch["tokens"])
    first.on_train_batch_end(state, model)
    second = SlotUsage()
    second.load_state_dict(first.state_dict())
    second.on_train_start(state, model)
    for name in ("a", "b"):
        assert slots_read(second._training[name]) == slots_read(first._training[name]) > 0


def test_padding_after_the_last_target_is_left_out():
    usage = SlotUsage(every_n_steps=1)
    pool = SimpleNamespace(slots=6, observers=[])
    state = SimpleNamespace(global_step=0)
    usage.setup(state, SimpleNamespace(pools={"main": pool}), "fit")
    batch = {
        "targets": torch.tensor([[-100, 7, -100], [-100, -100, -100]]),
        "answers": torch.tensor([[-100, -100, -100], [9, -100, -100]]),
    }
    usage.on_train_batch_start(state, None, batch, 0)
    slots = torch.tensor([[0], [1], [2], [3], [4], [5]])
    pool.observers[0](slots, torch.ones(6, 1))
    assert usage._training["main"].tolist() == [1, 1, 0, 1, 0, 0]


def test_a_dense_model_is_told_once(facts, dense, trainer, capsys, caplog, tmp_path):
    run = trainer(SlotUsage(), max_steps=3)
    with caplog.at_level("INFO"):
        run.fit(dense, datamodule=facts)
        run.test(dense, facts, verbose=False)
    said = [message for message in caplog.messages if "SlotUsage" in message]
    assert said == ["SlotUsage does nothing: the model has no memory."]
    assert not (tmp_path / "slot_usage.json").exists()
    assert not any("memory/" in key for row in read_metrics(tmp_path / "metrics.csv") for key in row)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, "trainer.callbacks: SlotUsage.every_n_steps: is 0, must be at least 1 step"),
        ({"heaviest": -1}, "trainer.callbacks: SlotUsage.heaviest: is -1, must not be negative"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ConfigError, match=message):
        SlotUsage(**options)
