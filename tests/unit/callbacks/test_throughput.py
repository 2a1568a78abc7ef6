from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.profilers import SimpleProfiler
from torch.utils.data import DataLoader, IterableDataset

from callbacks import throughput
from callbacks.peak_flops import peak_flops
from callbacks.throughput import Throughput
from memlm.errors import ConfigError
from memlm.run_metrics import read_metrics

SPEEDS = ("train/tokens_per_second", "train/value_bytes_per_second", "train/data_wait_share")


class Clock:
    """Time that passes only when somebody spends it."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(throughput, "perf_counter", lambda: self.now)


class SlowData(IterableDataset):
    """Batches of 2 x 4 tokens, each of which takes half a second to prepare."""

    def __init__(self, clock, batches):
        self.clock, self.batches = clock, batches

    def __iter__(self):
        for _ in range(self.batches):
            self.clock.now += 0.5
            yield {"tokens": torch.zeros(2, 4, dtype=torch.long)}


class SlowModel(pl.LightningModule):
    """A step takes two seconds, the first ten more; a validation batch takes a hundred."""

    def __init__(self, clock, value_bytes=7):
        super().__init__()
        self.clock, self.value_bytes, self.tokens_seen = clock, value_bytes, 0
        self.weight = torch.nn.Parameter(torch.ones(()))

    def counts(self, sequence_length):
        assert sequence_length == 4
        return SimpleNamespace(
            flops_per_token=10, backward_flops_per_token=18, bytes_read_per_token=self.value_bytes
        )

    def training_step(self, batch, batch_idx):
        self.clock.now += 12 if self.tokens_seen == 0 else 2
        self.tokens_seen += batch["tokens"].numel()
        self.log("train/tokens", float(self.tokens_seen))
        return self.weight * 1.0

    def validation_step(self, batch, batch_idx):
        self.clock.now += 100
        self.log("val/loss", 1.0)

    def on_validation_epoch_end(self):
        self.log("train/tokens", float(self.tokens_seen))

    def on_train_batch_end(self, *args):
        self.clock.now += 0.25  # what follows the callbacks is no waiting for data

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture
def fit(clock, trainer, tmp_path):
    """Runs a fit and returns the rows of metrics.csv, those of training and those of validation."""

    def run(callback, model=None, validation=True, ckpt_path=None, **options):
        loader = DataLoader(SlowData(clock, 10**6), batch_size=None)
        validation_loader = DataLoader(SlowData(clock, 3), batch_size=None)
        options = {"val_check_interval": 4 if validation else 10**6, "log_every_n_steps": 2} | options
        run.trainer = trainer(callback, **options)
        run.trainer.fit(model or SlowModel(clock), loader, validation_loader, ckpt_path=ckpt_path)
        rows = read_metrics(tmp_path / "metrics.csv")
        assert all("train/tokens" in row and "train/seconds" in row for row in rows)
        return [row for row in rows if "val/loss" not in row], [row for row in rows if "val/loss" in row]

    return run


def speeds(rows):
    return {int(row["step"]): tuple(row[key] for key in SPEEDS) for row in rows if SPEEDS[0] in row}


def test_windows_by_hand(fit):
    # From the end of step 1 on, a step takes 2 s + 0.25 s + 0.5 s to fetch, for 8 tokens.
    rows, _ = fit(Throughput(every_n_steps=4), validation=False, max_steps=11)
    measured = speeds(rows)
    assert list(measured) == [4, 8, 11]
    assert [int(row["step"]) for row in rows] == [2, 4, 6, 8, 10, 11]
    for step in (4, 8):
        assert measured[step] == pytest.approx((8 / 2.75, 7 * 8 / 2.75, 0.5 / 2.75))
    # The last step has no row of its own accord: it is measured at the very end, 0.25 s later.
    assert measured[11] == pytest.approx((24 / 8.5, 7 * 24 / 8.5, 1.5 / 8.5))
    # The clock starts with the first batch in hand; the row of step n comes before the rest of that step.
    assert [row["train/seconds"] for row in rows[:5]] == pytest.approx(
        [12 + 2.75 * (n - 1) for n in (2, 4, 6, 8, 10)]
    )
    assert [row["train/tokens"] for row in rows] == [16, 32, 48, 64, 80, 88]
    assert not any("flops" in key for row in rows for key in row)  # a CPU has no known peak


def test_validation_and_what_follows_it_take_no_training_time(fit):
    rows, validations = fit(Throughput(every_n_steps=2), max_steps=8)
    # Lightning fetches the first validation batch (0.5 s) before it says that validation begins.
    at_4 = 12 + 3 * 2.75 + 0.25 + 0.5
    # The clock goes on when step 5 has its batch.
    steps_5_to_8 = 4 * 2.25 + 3 * 0.5
    assert [row["train/seconds"] for row in validations] == pytest.approx([at_4, at_4 + steps_5_to_8 + 0.5])
    assert rows[2]["train/seconds"] == pytest.approx(at_4 + 2 * 2.25 + 0.5 - 0.25)
    assert speeds(rows)[6] == pytest.approx((16 / 5.5, 7 * 16 / 5.5, 0.5 / 5.5))


def test_a_speed_appears_in_one_row_only(fit):
    rows, _ = fit(Throughput(every_n_steps=3), validation=False, log_every_n_steps=1, max_steps=7)
    assert list(speeds(rows)) == [3, 6, 7]


def test_the_row_that_follows_the_multiple_is_taken(fit):
    rows, _ = fit(Throughput(every_n_steps=3), validation=False, log_every_n_steps=2, max_steps=12)
    assert list(speeds(rows)) == [4, 6, 10, 12]


def test_accumulated_micro_batches_are_one_step(fit):
    rows, _ = fit(
        Throughput(every_n_steps=2),
        validation=False,
        accumulate_grad_batches=2,
        max_steps=4,
        log_every_n_steps=1,
    )
    assert list(speeds(rows)) == [2, 4]
    for values in speeds(rows).values():
        assert values == pytest.approx((8 / 2.75, 7 * 8 / 2.75, 0.5 / 2.75))


def test_a_run_of_one_step_has_no_speed(fit):
    rows, _ = fit(Throughput(), validation=False, max_steps=1, log_every_n_steps=1)
    assert [row["train/seconds"] for row in rows] == [12]
    assert not speeds(rows)


def test_without_memory_no_bytes_of_values(fit, clock):
    rows, _ = fit(Throughput(2), SlowModel(clock, value_bytes=0), validation=False, max_steps=4)
    assert "train/tokens_per_second" in rows[-1]
    assert "train/value_bytes_per_second" not in rows[-1]


def test_utilisation_counts_three_forward_passes(fit, monkeypatch):
    monkeypatch.setattr(throughput, "peak_flops", lambda device, precision: 1000.0)
    rows, _ = fit(Throughput(4), validation=False, max_steps=4)
    assert rows[-1]["train/model_flops_utilisation"] == pytest.approx(28 * (8 / 2.75) / 1000)


def test_seconds_continue_over_a_resume(fit, clock, tmp_path):
    first = Throughput(2)
    fit(first, validation=False, max_steps=3)
    assert first.seconds == pytest.approx(12 + 2 * 2.75 + 0.25)
    fit.trainer.save_checkpoint(tmp_path / "last.ckpt")
    clock.now += 5000
    second, model = Throughput(2), SlowModel(clock)
    model.tokens_seen = 24
    rows, _ = fit(second, model, validation=False, max_steps=6, ckpt_path=tmp_path / "last.ckpt")
    # Three more steps of 2.25 s with two fetches between them.
    assert second.seconds == pytest.approx(first.seconds + 3 * 2.25 + 2 * 0.5)
    assert speeds(rows)[6] == pytest.approx((8 / 2.75, 7 * 8 / 2.75, 0.5 / 2.75))


def test_the_profiler_of_the_user_keeps_working(fit):
    profiler = SimpleProfiler()
    fit(Throughput(), profiler=profiler)
    assert fit.trainer.profiler is profiler
    assert len(profiler.recorded_durations["[_TrainingEpochLoop].train_dataloader_next"]) >= 6
    assert not profiler.current_actions


def test_the_report_of_the_profiler_is_complete(fit, tmp_path):
    # A profiler closes its file when it is collected; the one that stands in for it must not do so.
    callback = Throughput()
    fit(callback, profiler=SimpleProfiler(dirpath=tmp_path, filename="profile"))
    callback._fetches = None
    assert "train_dataloader_next" in (tmp_path / "fit-profile.txt").read_text()


def test_a_failed_run_gives_the_profiler_back_and_stops_the_clock(fit, clock):
    class Breaks(SlowModel):
        def validation_step(self, batch, batch_idx):
            raise RuntimeError("broken")

    profiler, callback = SimpleProfiler(), Throughput()
    with pytest.raises(RuntimeError, match="broken"):
        fit(callback, Breaks(clock), profiler=profiler)
    assert fit.trainer.profiler is profiler
    seconds = callback.seconds
    clock.now += 50
    assert callback.seconds == seconds


def test_a_real_memory_model(facts, model, trainer, tmp_path):
    callback = Throughput(2)
    trainer(callback, max_steps=5).fit(model, datamodule=facts)
    rows = read_metrics(tmp_path / "metrics.csv")
    measured = {int(row["step"]): row for row in rows if "train/tokens_per_second" in row}
    assert list(measured) == [2, 4, 5]
    bytes_a_token = 3 * 2 * 3 * 16 * 4  # layers x heads x reads x value dim x bytes of fp32
    for row in measured.values():
        assert row["train/value_bytes_per_second"] == pytest.approx(
            bytes_a_token * row["train/tokens_per_second"], rel=1e-5
        )
        assert 0 <= row["train/data_wait_share"] < 1
    (validation,) = (row for row in rows if "val/loss" in row)
    assert 0 < validation["train/seconds"] < callback.seconds


@pytest.mark.parametrize(
    ("name", "precision", "matmul", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", "highest", 989.4e12),
        ("NVIDIA H100 80GB HBM3", "32-true", "high", 494.7e12),
        ("NVIDIA H100 80GB HBM3", "32-true", "highest", 66.9e12),
        ("NVIDIA H100 PCIe", "bf16-true", "highest", 756e12),
        ("NVIDIA H200", "16-mixed", "highest", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", "bf16-mixed", "highest", 312e12),
        ("NVIDIA A100 80GB PCIe", "bf16-mixed", "highest", 312e12),
        ("NVIDIA A10", "bf16-mixed", "highest", 125e12),
        ("NVIDIA A10G", "bf16-mixed", "highest", 70e12),
        ("NVIDIA L40S", "bf16-mixed", "highest", 362e12),
        ("NVIDIA L4", "bf16-mixed", "highest", 121e12),
        ("NVIDIA GeForce RTX 4090", "bf16-mixed", "highest", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16-mixed", "highest", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16-mixed", "highest", None),
        ("NVIDIA H100 80GB HBM3", "64-true", "highest", None),
        ("Something else", "bf16-mixed", "highest", None),
    ],
)
def test_peaks(monkeypatch, name, precision, matmul, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: matmul)
    assert peak_flops(torch.device("cuda", 0), precision) == peak


def test_a_cpu_has_no_known_peak():
    assert peak_flops(torch.device("cpu"), "bf16-mixed") is None


def test_an_interval_below_one_is_refused():
    with pytest.raises(
        ConfigError, match=r"trainer.callbacks: Throughput.every_n_steps: is 0, must be at least 1"
    ):
        Throughput(every_n_steps=0)
