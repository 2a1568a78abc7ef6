import math
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch

from callbacks.expert_load import ExpertLoad, block_of, evenness, idle, max_load
from memlm.errors import ConfigError
from memlm.language_models import MoELM
from memlm.run_metrics import read_metrics
from memlm.transformer import MoEConfig, TransformerConfig


def build(facts, **options) -> MoELM:
    """Blocks 1 and 2 of three have 12 experts."""
    pl.seed_everything(1, verbose=False)
    moe = MoEConfig(experts=12, expert_dim=8, layers=[1, 2], **options)
    return MoELM(facts.vocab_size, TransformerConfig(16, 3, 2, feed_forward_dim=16), moe)


@pytest.fixture
def tokens(facts) -> MoELM:
    return build(facts, routing="token_choice", top_k=2)


class ByHand(pl.Callback):
    """Counts the choices of the routers again, from the inputs of the layers."""

    def __init__(self, model, sample_every):
        self.sample_every = sample_every
        self.loads = None
        self.training, self.evaluation, self.evaluations = {}, {}, []
        for block, layer in model.transformer.experts.items():
            layer.register_forward_pre_hook(
                lambda layer, inputs, block=block: self.add(block, layer, *inputs)
            )

    def add(self, block, layer, hidden):
        if self.loads is not None:
            scores = hidden.detach().flatten(0, 1) @ layer.router.weight.detach().T
            loads = self.loads.setdefault(block, [0] * 12)
            for row in scores.tolist():
                for expert in sorted(range(12), key=lambda e: -row[e])[:2]:
                    loads[expert] += 1

    def on_train_batch_start(self, trainer, *args):
        self.loads = self.training if trainer.global_step % self.sample_every == 0 else None

    def on_validation_batch_start(self, *args):
        self.loads = self.evaluation

    def on_train_batch_end(self, *args):
        self.loads = None

    def on_validation_end(self, *args):
        self.evaluations.append((self.training, self.evaluation))
        self.training, self.evaluation = {}, {}

    on_validation_batch_end = on_test_batch_end = on_train_batch_end
    on_test_batch_start = on_validation_batch_start
    on_test_end = on_validation_end


def by_formula(loads: list[int]) -> dict[str, float]:
    shares = [load / sum(loads) for load in loads]
    return {
        "max_load": pytest.approx(max(shares) * len(loads)),
        "idle": pytest.approx(loads.count(0) / len(loads)),
        "evenness": pytest.approx(-sum(s * math.log(s) for s in shares if s) / math.log(len(loads))),
    }


def test_formulas_by_hand():
    loads = torch.tensor([3, 1, 0, 0])
    assert max_load(loads) == 3
    assert idle(loads) == 0.5
    # Shares 3/4 and 1/4: entropy 3/4 log 4/3 + 1/4 log 4.
    assert evenness(loads).item() == pytest.approx((2 * math.log(2) - 0.75 * math.log(3)) / math.log(4))
    assert evenness(torch.tensor([5, 5, 5])).item() == pytest.approx(1)
    assert evenness(torch.tensor([0, 9, 0])) == 0
    assert by_formula(loads.tolist()) == {
        name: formula(loads).item()
        for name, formula in (("max_load", max_load), ("idle", idle), ("evenness", evenness))
    }


@pytest.mark.parametrize(
    "name,block",
    [
        ("blocks.3.feed_forward", "3"),
        ("_orig_mod.blocks.12._wrapped.feed_forward", "12"),
        ("experts", "experts"),
    ],
)
def test_the_block_in_a_module_s_name(name, block):
    assert block_of(name) == block


def test_a_fit_and_a_test_against_loops(facts, tokens, trainer, tmp_path):
    by_hand = ByHand(tokens, sample_every=2)
    run = trainer(ExpertLoad(every_n_steps=2), by_hand)
    run.fit(tokens, datamodule=facts)
    rows = [row for row in read_metrics(tmp_path / "metrics.csv") if "val/loss" in row]
    assert len(rows) == len(by_hand.evaluations) == 2
    for row, (training, evaluation) in zip(rows, by_hand.evaluations, strict=True):
        for block in (1, 2):
            assert min(sum(training[block]), sum(evaluation[block])) > 0
            for loads, suffix in ((evaluation, ""), (training, "_in_training")):
                logged = {
                    name: row[f"experts/{block}/{name}{suffix}"] for name in ("max_load", "idle", "evenness")
                }
                assert logged == by_formula(loads[block])
    assert not any("experts/0/" in key or "unchosen" in key for row in rows for key in row)

    (results,) = run.test(tokens, facts, verbose=False)
    (_, tested) = by_hand.evaluations[-1]
    assert results["test/experts/2/max_load"] == by_formula(tested[2])["max_load"]
    assert not any("training" in name for name in results)


def test_expert_choice_in_training_logs_the_tokens_that_no_expert_chose(facts, trainer, tmp_path):
    model = build(facts)
    shares = []

    class Unchosen(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):  # before the model's own hook
            shares.append(
                {block: layer.unchosen().item() for block, layer in model.transformer.experts.items()}
            )

    trainer(ExpertLoad(every_n_steps=2), Unchosen(), max_steps=3).fit(model, datamodule=facts)
    (row,) = [row for row in read_metrics(tmp_path / "metrics.csv") if "val/loss" in row]
    for block in (1, 2):
        expected = (shares[0][block] + shares[2][block]) / 2  # of steps 0 and 2
        assert 0 < expected < 1
        assert row[f"experts/{block}/unchosen_in_training"] == pytest.approx(expected)
        assert f"experts/{block}/max_load_in_training" not in row
        assert row[f"experts/{block}/max_load"] >= 1  # of the choice that evaluation makes


def test_observing_changes_nothing(facts, tokens, trainer):
    trainer(ExpertLoad(every_n_steps=1)).fit(tokens, datamodule=facts)
    again = build(facts, routing="token_choice", top_k=2)
    facts.advance(facts.start())
    trainer().fit(again, datamodule=facts)
    observed = tokens.state_dict()
    assert all(torch.equal(value, observed[name]) for name, value in again.state_dict().items())


def test_passes_outside_of_batches_do_not_count(facts, tokens, trainer):
    class Passes(pl.Callback):
        def on_validation_start(self, trainer, pl_module):
            pl_module.transformer(torch.zeros(3, 5, dtype=torch.long))

        on_validation_epoch_start = on_validation_start

    by_hand = ByHand(tokens, sample_every=10)
    run = trainer(ExpertLoad(), Passes(), by_hand, max_steps=3)
    run.fit(tokens, datamodule=facts)
    ((_, evaluation),) = by_hand.evaluations
    logged = run.callback_metrics["experts/1/max_load"].item()
    assert logged == by_formula(evaluation[1])["max_load"]


def test_observers_are_removed(facts, tokens, trainer):
    run = trainer(ExpertLoad(), max_steps=3)
    run.fit(tokens, datamodule=facts)
    run.test(tokens, facts, verbose=False)
    assert [layer.observers for layer in tokens.transformer.experts.values()] == [[], []]


def test_observers_are_removed_after_a_failure(facts, tokens, trainer):
    class Breaks(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, *args):
            assert all(len(layer.observers) == 2 for layer in pl_module.transformer.experts.values())
            raise RuntimeError("broken")

    layers = tokens.transformer.experts.values()
    for layer in layers:
        layer.observers.append(print)  # somebody else's
    with pytest.raises(RuntimeError, match="broken"):
        trainer(ExpertLoad(), Breaks()).fit(tokens, datamodule=facts)
    assert [layer.observers for layer in layers] == [[print], [print]]


@pytest.mark.parametrize("options", [{}, {"routing": "token_choice"}])
def test_training_loads_continue_over_a_resume(facts, options):
    model = build(facts, **options)
    state = SimpleNamespace(global_step=0)
    first = ExpertLoad()
    first.setup(state, model, "fit")
    batch = next(iter(facts.train_dataloader()))
    first.on_train_batch_start(state, model, batch, 0)
    model.transformer(batch["tokens"])
    first.on_train_batch_end(state, model)
    second = ExpertLoad()
    second.load_state_dict(first.state_dict())
    second.on_train_start(state, model)
    kept = (second._training, second._unchosen)
    for ours, theirs in zip(kept, (first._training, first._unchosen), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[block], theirs[block]) for block in ours)
    assert {len(sums) for sums in kept} == {0, 2}


def test_a_dense_model_is_told_once(facts, dense, trainer, caplog, tmp_path):
    run = trainer(ExpertLoad(), max_steps=3)
    with caplog.at_level("INFO"):
        run.fit(dense, datamodule=facts)
        run.test(dense, facts, verbose=False)
    said = [message for message in caplog.messages if "ExpertLoad" in message]
    assert said == ["ExpertLoad does nothing: the model has no experts."]
    assert not any("experts/" in key for row in read_metrics(tmp_path / "metrics.csv") for key in row)


def test_options_out_of_range():
    message = "trainer.callbacks: ExpertLoad.every_n_steps: is 0, must be at least 1 step"
    with pytest.raises(ConfigError, match=message):
        ExpertLoad(every_n_steps=0)
