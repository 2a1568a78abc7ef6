"""Defaults of the decoder's options, and errors that name the key at fault."""

import pytest

from memlm.errors import ConfigError
from memlm.transformer.config import RopeScaling, TransformerConfig


@pytest.mark.parametrize(
    "dim,width", [(768, 2048), (1024, 2816), (1536, 4096), (2048, 5632), (32, 256), (96, 256), (97, 512)]
)
def test_default_feed_forward_width_is_eight_thirds_rounded_up(dim, width):
    assert TransformerConfig(dim=dim).resolved_feed_forward_dim == width


def test_defaults_follow_heads():
    config = TransformerConfig(dim=48, heads=6)
    assert (config.resolved_head_dim, config.resolved_kv_heads) == (8, 6)
    assert TransformerConfig(dim=48, heads=6, head_dim=10).resolved_head_dim == 10
    assert TransformerConfig(dim=48, heads=6, kv_heads=3).resolved_kv_heads == 3


@pytest.mark.parametrize(
    "options,key,parts",
    [
        ({"dim": 0}, "dim", ["0"]),
        ({"layers": 0}, "layers", ["0"]),
        ({"heads": 0}, "heads", ["0"]),
        ({"kv_heads": 0}, "kv_heads", ["0"]),
        ({"feed_forward_dim": -5}, "feed_forward_dim", ["-5"]),
        ({"dim": 50, "heads": 4}, "heads", ["4", "50"]),
        ({"dim": 12, "heads": 4}, "heads", ["4", "12", "even", "head_dim"]),
        ({"head_dim": 7}, "head_dim", ["7", "even"]),
        ({"head_dim": 0}, "head_dim", ["0"]),
        ({"vocab_size": 0}, "vocab_size", ["0"]),
        ({"kv_heads": 3}, "kv_heads", ["3", "4"]),
        ({"rope_theta": 0.0}, "rope_theta", ["0.0"]),
        ({"norm_eps": -1e-5}, "norm_eps", ["-1e-05"]),
        ({"norm_eps": float("nan")}, "norm_eps", ["nan"]),
    ],
)
def test_errors_name_key_and_values(options, key, parts):
    config = TransformerConfig(**{"dim": 64, "heads": 4, **options})
    with pytest.raises(ConfigError) as error:
        config.validate()
    assert error.value.key == f"model.transformer.{key}"
    assert all(part in str(error.value) for part in parts), str(error.value)


@pytest.mark.parametrize(
    "scaling,key,parts",
    [
        (("linear", 0.5), "factor", ["0.5", "at least 1"]),
        (("linear", float("nan")), "factor", ["nan"]),
        (("linear", 2.0, 64), "original_length", ["64", "linear"]),
        (("linear", 2.0, None, 1.0), "slow_turns", ["1.0", "linear"]),
        (("linear", 2.0, None, None, 4.0), "fast_turns", ["4.0", "linear"]),
        (("llama3", 2.0), "original_length", ["None", "llama3"]),
        (("yarn", 2.0, 0), "original_length", ["0", "yarn"]),
        (("yarn", 2.0, 64, 0.0), "slow_turns", ["0.0", "above 0"]),
        (("llama3", 2.0, 64, 4.0), "fast_turns", ["4.0", "slow_turns (4.0)"]),
        (("yarn", 2.0, 64, 3.0, 2.0), "fast_turns", ["2.0", "slow_turns (3.0)"]),
    ],
)
def test_errors_of_rope_scaling_name_key_and_values(scaling, key, parts):
    config = TransformerConfig(dim=64, heads=4, rope_scaling=RopeScaling(*scaling))
    with pytest.raises(ConfigError) as error:
        config.validate()
    assert error.value.key == f"model.transformer.rope_scaling.{key}"
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_good_values_pass():
    for scaling in (("linear", 2.0), ("llama3", 8, 64), ("llama3", 1.0, 64, 0.5, 0.6), ("yarn", 4.0, 32)):
        TransformerConfig(dim=63, heads=5, head_dim=4, rope_scaling=RopeScaling(*scaling)).validate()
    assert RopeScaling("llama3", 8.0, 64).resolved_turns == (1.0, 4.0)
    assert RopeScaling("yarn", 8.0, 64).resolved_turns == (1.0, 32.0)
    assert RopeScaling("yarn", 8.0, 64, 2.0, 3.0).resolved_turns == (2.0, 3.0)
