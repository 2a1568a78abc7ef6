"""Placement of memory layers, defaults, and errors that name the key at fault."""

import pytest

from memlm.errors import ConfigError
from memlm.memory import MemoryConfig


@pytest.mark.parametrize(
    "count,stride,depth,expected",
    [
        (3, 8, 24, [4, 12, 20]),  # the paper's 373m
        (3, 4, 12, [2, 6, 10]),  # 134m
        (3, 8, 22, [3, 11, 19]),  # 1.3b
        (1, 4, 12, [6]),  # vanilla Memory: the middle block
        (1, 1, 1, [0]),
        (2, 1, 4, [1, 2]),
    ],
)
def test_placement_is_centred(count, stride, depth, expected):
    config = MemoryConfig(count=count, stride=stride)
    assert config.placement(depth) == expected
    config.validate(64, depth)


def test_a_list_of_layers_wins():
    config = MemoryConfig(layers=[1, 5], layer_pools=["a", "b"], count=7)
    assert config.placement(6) == [1, 5]
    assert config.pool_names(6) == {1: "a", 5: "b"}
    assert MemoryConfig(layers=[1, 5]).pool_names(6) == {1: "main", 5: "main"}


def test_defaults_follow_the_model():
    config = MemoryConfig()
    assert (config.resolved_key_dim(768), config.resolved_value_dim(768)) == (384, 768)
    assert config.slots == 1024**2
    vanilla = MemoryConfig(key_dim=256, value_dim=100)
    assert (vanilla.resolved_key_dim(768), vanilla.resolved_value_dim(768)) == (256, 100)


@pytest.mark.parametrize(
    "options,key,parts",
    [
        ({"half_keys": 0}, "half_keys", ["0", "at least 1"]),
        ({"heads": 0}, "heads", ["0"]),
        ({"reads": 0}, "reads", ["0"]),
        ({"count": 0}, "count", ["0"]),
        ({"stride": 0}, "stride", ["0"]),
        ({"half_keys": 8, "reads": 9}, "reads", ["9", "8"]),
        ({"key_dim": 7}, "key_dim", ["7", "even"]),
        ({"key_dim": 0}, "key_dim", ["0", "even"]),
        ({"value_dim": 0}, "value_dim", ["0"]),
        ({"value_dim": 32, "projection": False}, "value_dim", ["32", "64", "projection: true"]),
        ({"layers": []}, "layers", ["empty", "DenseLM"]),
        ({"layers": [2, 1]}, "layers", ["[2, 1]", "ascending"]),
        ({"layers": [1, 1]}, "layers", ["repeats"]),
        ({"layers": [12]}, "layers", ["[12]", "12", "0 to 11"]),
        ({"layers": [-1]}, "layers", ["-1", "0 to 11"]),
        ({"count": 5, "stride": 4}, "stride", ["-2", "0 to 11"]),
        ({"layer_pools": ["a"]}, "layer_pools", ["1 pools", "3 memory layers"]),
        ({"layer_pools": ["a", "b", "no name"]}, "layer_pools", ["'no name'"]),
        ({"layer_pools": ["a", "b", "values"]}, "layer_pools", ["'values'"]),
        ({"layer_pools": ["a", "b", "training"]}, "layer_pools", ["'training'"]),
    ],
)
def test_errors_name_key_and_values(options, key, parts):
    with pytest.raises(ConfigError) as error:
        MemoryConfig(**options).validate(dim=64, depth=12)
    assert error.value.key == f"model.memory.{key}"
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_odd_default_key_dim_is_an_error():
    with pytest.raises(ConfigError, match=r"model\.memory\.key_dim: is 3"):
        MemoryConfig().validate(dim=6, depth=12)
