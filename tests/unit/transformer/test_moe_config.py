"""Defaults, placement, and errors that name the key at fault."""

import pytest

from memlm.errors import ConfigError
from memlm.transformer.moe_config import MoEConfig

TOKENS = {"routing": "token_choice"}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"z_loss": 0.001, "score": "sigmoid", "layers": [0, 11], "shared_experts": 1},
        {**TOKENS, "top_k": 2, "normalise_weights": True, "auxiliary_loss": 0.01, "balance_rate": 0.001},
        {**TOKENS, "experts": 4, "top_k": 4, "normalise_weights": True},
        {**TOKENS, "auxiliary_loss": 0.01, "expert_dim": 8},
    ],
)
def test_valid_options(options):
    MoEConfig(**options).validate(dim=64, depth=12, feed_forward_dim=256)


def test_defaults_follow_the_model():
    config = MoEConfig()
    assert config.placement(3) == [0, 1, 2]
    assert config.resolved_expert_dim(256) == 256
    given = MoEConfig(layers=[1], expert_dim=64)
    assert (given.placement(3), given.resolved_expert_dim(256)) == ([1], 64)


@pytest.mark.parametrize(
    "options,key,parts",
    [
        ({"routing": "tokens"}, "routing", ["tokens", "expert_choice or token_choice"]),
        ({"score": "relu"}, "score", ["relu", "softmax or sigmoid"]),
        ({"experts": 1}, "experts", ["1", "at least 2", "DenseLM"]),
        ({"top_k": 0}, "top_k", ["0", "at least 1"]),
        ({"experts": 8, "top_k": 9}, "top_k", ["9", "experts (8)"]),
        ({"shared_experts": -1}, "shared_experts", ["-1", "negative"]),
        ({**TOKENS, "auxiliary_loss": -0.1}, "auxiliary_loss", ["-0.1", "negative"]),
        ({"z_loss": float("nan")}, "z_loss", ["nan"]),
        ({**TOKENS, "balance_rate": -1.0}, "balance_rate", ["-1.0", "negative"]),
        ({"expert_dim": 100}, "expert_dim", ["100", "multiple of 8", "16 bytes"]),
        ({"expert_dim": 0}, "expert_dim", ["0", "positive"]),
        ({"auxiliary_loss": 0.01}, "auxiliary_loss", ["0.01", "expert_choice", "even load"]),
        ({"balance_rate": 0.001}, "balance_rate", ["0.001", "expert_choice", "even load"]),
        ({"top_k": 2, "normalise_weights": True}, "normalise_weights", ["True", "expert_choice"]),
        ({**TOKENS, "top_k": 8, "auxiliary_loss": 0.01}, "auxiliary_loss", ["0.01", "both 8"]),
        ({**TOKENS, "top_k": 8, "balance_rate": 0.1}, "balance_rate", ["0.1", "both 8"]),
        ({**TOKENS, "normalise_weights": True}, "normalise_weights", ["True", "top_k is 1"]),
        ({"layers": []}, "layers", ["empty", "DenseLM"]),
        ({"layers": [2, 1]}, "layers", ["[2, 1]", "ascending"]),
        ({"layers": [1, 1]}, "layers", ["repeats"]),
        ({"layers": [3, 12]}, "layers", ["[3, 12]", "is 12", "0 to 11"]),
        ({"layers": [-1]}, "layers", ["-1", "0 to 11"]),
    ],
)
def test_errors_name_key_and_values(options, key, parts):
    with pytest.raises(ConfigError) as error:
        MoEConfig(**options).validate(dim=64, depth=12, feed_forward_dim=256)
    assert error.value.key == f"model.moe.{key}"
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_dims_of_the_model_that_do_not_fit():
    with pytest.raises(ConfigError, match=r"model\.transformer\.dim: is 60, must be a multiple of 8"):
        MoEConfig().validate(dim=60, depth=1, feed_forward_dim=256)
    message = r"model\.moe\.expert_dim: is 100 \(model\.transformer\.feed_forward_dim\), must be"
    with pytest.raises(ConfigError, match=message):
        MoEConfig().validate(dim=64, depth=1, feed_forward_dim=100)
