"""Defaults of the decoder's options, and errors that name the key at fault."""

import pytest

from memlm.errors import ConfigError
from memlm.transformer import Transformer, TransformerConfig


@pytest.mark.parametrize(
    "dim,width", [(768, 2048), (1024, 2816), (1536, 4096), (2048, 5632), (32, 256), (96, 256), (97, 512)]
)
def test_default_feed_forward_width_is_eight_thirds_rounded_up(dim, width):
    assert TransformerConfig(dim=dim).resolved_feed_forward_dim == width


def test_defaults_follow_heads():
    config = TransformerConfig(dim=48, heads=6)
    assert (config.head_dim, config.resolved_kv_heads) == (8, 6)
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
        ({"dim": 12, "heads": 4}, "heads", ["4", "12", "even"]),
        ({"kv_heads": 3}, "kv_heads", ["3", "4"]),
        ({"rope_theta": 0.0}, "rope_theta", ["0.0"]),
        ({"norm_eps": -1e-5}, "norm_eps", ["-1e-05"]),
        ({"norm_eps": float("nan")}, "norm_eps", ["nan"]),
    ],
)
def test_errors_name_key_and_values(options, key, parts):
    config = TransformerConfig(**{"dim": 64, "heads": 4, **options})
    with pytest.raises(ConfigError) as error:
        Transformer(10, config)
    assert error.value.key == f"model.transformer.{key}"
    assert all(part in str(error.value) for part in parts), str(error.value)
