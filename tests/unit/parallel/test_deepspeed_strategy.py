"""What the DeepSpeed strategy takes and refuses before anything starts."""

import importlib.util
import json
import subprocess
import sys

import pytest

from memlm.errors import ConfigError
from memlm.parallel.deepspeed_strategy import MemoryDeepSpeedStrategy, named_options
from memlm.parallel.memory_strategy import splits_memory


def test_is_known_by_name_without_importing_deepspeed():
    words = "import memlm.cli, sys; print('deepspeed' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert splits_memory("memory_deepspeed")
    assert not splits_memory("deepspeed")


def test_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^trainer\.strategy: needs deepspeed, .*memlm\[deepspeed\]"):
        MemoryDeepSpeedStrategy()


@pytest.fixture
def deepspeed():
    pytest.importorskip("deepspeed")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": 0}, "trainer.strategy.init_args.stage: is 0, must be 1, 2 or 3"),
        (
            {"config": {"optimizer": {"type": "Adam"}}},
            "trainer.strategy.init_args.config.optimizer: must not be set: it is model.optimizer",
        ),
        (
            {"config": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}},
            "trainer.strategy.init_args.config.zero_optimization.offload_optimizer: must not be set: "
            "it is not supported here",
        ),
        (
            {"config": {"train_batch_size": 8}},
            "trainer.strategy.init_args.config.train_batch_size: must not be set: "
            "it follows from data.init_args.batch_size",
        ),
        (
            {"config": {"gradient_clipping": 1.0}},
            "trainer.strategy.init_args.config.gradient_clipping: must not be set: "
            "it is trainer.gradient_clip_val",
        ),
        (
            {"stage": 1, "config": {"data_types": {"grad_accum_dtype": "fp32"}}},
            "trainer.strategy.init_args.config.data_types.grad_accum_dtype: must not be set with "
            "init_args.stage 1, under which another optimizer may replace ZeRO",
        ),
        (
            {"stage": 1, "config": {"zero_optimization": {"stage": 3}}},
            "trainer.strategy.init_args.config.zero_optimization.stage: is 3, but init_args.stage is 1",
        ),
    ],
)
def test_refuses(deepspeed, options, message):
    with pytest.raises(ConfigError) as caught:
        MemoryDeepSpeedStrategy(**options)
    assert str(caught.value) == message


def test_options_of_a_file_go_over_the_defaults(deepspeed, tmp_path):
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 7}, "steps_per_print": 3}))
    config = MemoryDeepSpeedStrategy(stage=1, config=str(path)).config
    assert config["zero_optimization"]["reduce_bucket_size"] == 7
    assert config["zero_optimization"]["stage"] == 1
    assert config["steps_per_print"] == 3
    path.write_text("[")
    with pytest.raises(
        ConfigError, match=r"^trainer\.strategy\.init_args\.config: is .*deepspeed\.json, which cannot"
    ):
        MemoryDeepSpeedStrategy(config=str(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        MemoryDeepSpeedStrategy(config=str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("stage3_param_persistance_threshold", 0, "is 0, which DeepSpeed refuses: Extra inputs"),
        ("reduce_bucket_size", "large", "is 'large', which DeepSpeed refuses: "),
    ],
)
def test_names_an_option_that_deepspeed_refuses(deepspeed, option, value, message):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    key = f"trainer.strategy.init_args.config.zero_optimization.{option}"
    with pytest.raises(ConfigError, match=f"^{key}: {message}"), named_options():
        DeepSpeedZeroConfig(**{option: value})
