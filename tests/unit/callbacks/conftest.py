"""A tiny real fit, for callbacks that watch one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from data_modules import SyntheticFacts
from memlm.language_models import DenseLM, MemoryLM
from memlm.loggers import MetricsLogger
from memlm.memory import MemoryConfig
from memlm.transformer import TransformerConfig


@pytest.fixture
def facts() -> SyntheticFacts:
    return SyntheticFacts(
        people=40, control=5, batch_size=4, name_vocabulary=20, values=5, attributes=2, evaluation_facts=10
    )


@pytest.fixture
def model(facts: SyntheticFacts) -> MemoryLM:
    """Two memory layers share the pool "a", a third reads "b"; 256 slots each."""
    pl.seed_everything(1, verbose=False)
    memory = MemoryConfig(
        half_keys=16, heads=2, reads=3, key_dim=8, layers=[0, 1, 2], layer_pools=["a", "a", "b"]
    )
    return MemoryLM(facts.vocab_size, TransformerConfig(16, 3, 2, feed_forward_dim=16), memory)


@pytest.fixture
def dense(facts: SyntheticFacts) -> DenseLM:
    pl.seed_everything(1, verbose=False)
    return DenseLM(facts.vocab_size, TransformerConfig(16, 1, 2, feed_forward_dim=16))


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., pl.Trainer]:
    """Makes a Trainer whose rows go to metrics.csv in tmp_path."""

    def make(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
        defaults = {
            "accelerator": "cpu",
            "max_steps": 6,
            "max_epochs": -1,
            "val_check_interval": 3,
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "logger": MetricsLogger(tmp_path / "metrics.csv"),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "default_root_dir": tmp_path,
        }
        return pl.Trainer(**(defaults | options), callbacks=list(callbacks))

    return make
