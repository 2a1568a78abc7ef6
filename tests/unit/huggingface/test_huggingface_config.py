"""config.json to options and back, in the forms of transformers 4 and 5, and everything that is refused."""

import math

import pytest

from memlm.errors import CheckpointError, ConfigError
from memlm.huggingface import config_json, moe_options, transformer_config
from memlm.transformer.config import RopeScaling, TransformerConfig
from memlm.transformer.moe_config import MoEConfig

WHERE = "some/folder/config.json"

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}


def read(**changes) -> TransformerConfig:
    values = {**LLAMA, **changes}
    return transformer_config({k: v for k, v in values.items() if v != "absent"}, WHERE)


def test_a_llama():
    assert read() == TransformerConfig(
        dim=64,
        layers=3,
        heads=8,
        kv_heads=2,
        feed_forward_dim=96,
        tie_embeddings=False,
        rope_theta=10_000.0,
        norm_eps=1e-6,
        head_dim=8,
        attention_bias=False,
        rope_scaling=None,
        vocab_size=100,
    )
    assert read(tie_word_embeddings=True).tie_embeddings
    assert moe_options(LLAMA, WHERE) is None


@pytest.mark.parametrize(
    "changes,name,value",
    [
        ({"num_key_value_heads": "absent"}, "kv_heads", 8),
        ({"num_key_value_heads": None}, "kv_heads", 8),
        ({"model_type": "qwen2", "num_key_value_heads": None}, "kv_heads", 8),
        ({"head_dim": 10}, "head_dim", 10),
        ({"head_dim": None}, "head_dim", 8),
        ({"hidden_size": 60, "num_attention_heads": 8, "head_dim": 8}, "dim", 60),
        ({"model_type": "qwen2", "sliding_window": None}, "attention_bias", True),
        ({"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 16}, "attention_bias", True),
        ({"model_type": "mistral", "sliding_window": None}, "attention_bias", False),
        ({"model_type": "mixtral"}, "rope_theta", 1_000_000.0),
        ({"rope_theta": 500000}, "rope_theta", 500_000.0),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, "rope_theta", 7.0),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 8.0}, "rope_theta", 8.0),
        ({"rope_scaling": {"type": "default", "mscale": None}}, "rope_scaling", None),
        ({"sliding_window": 16}, "rope_scaling", None),  # which Llama ignores
    ],
)
def test_what_a_key_or_its_absence_means(changes, name, value):
    assert getattr(read(**changes), name) == value


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    "scaling,expected",
    [
        ({"type": "linear", "factor": 2}, RopeScaling("linear", 2.0)),
        ({"rope_type": "linear", "factor": 2.5}, RopeScaling("linear", 2.5)),
        (
            {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 512},
            RopeScaling("llama3", 8.0, 512, 1.0, 4.0),
        ),
        ({"rope_type": "llama3", **LLAMA3}, RopeScaling("llama3", 8.0, 2048, 1.0, 4.0)),
        ({"type": "yarn", "factor": 4.0}, RopeScaling("yarn", 4.0, 2048, 1.0, 32.0)),
        (
            {
                "type": "yarn",
                "factor": 4.0,
                "beta_fast": 16,
                "beta_slow": 2,
                "truncate": True,
                "attention_factor": 0.1 * math.log(4) + 1,
                "original_max_position_embeddings": 64,
            },
            RopeScaling("yarn", 4.0, 64, 2.0, 16.0),
        ),
    ],
)
def test_rope_scaling_as_transformers_4_and_5_write_it(scaling, expected):
    old = read(rope_scaling=scaling, rope_theta=50.0)
    assert (old.rope_scaling, old.rope_theta) == (expected, 50.0)
    new = read(rope_parameters={**scaling, "rope_theta": 50.0})
    assert (new.rope_scaling, new.rope_theta) == (expected, 50.0)


def test_the_original_length_may_stand_outside_of_the_scaling():
    scaling = {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 512}
    assert read(rope_scaling=scaling, original_max_position_embeddings=256).rope_scaling == RopeScaling(
        "llama3", 8.0, 256, 1.0, 4.0
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mistral", "sliding_window": 2048},
        {"model_type": "mistral"},  # 4096
        {"model_type": "mixtral"},  # none
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4096},
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3},
        {
            "model_type": "qwen2",
            "use_sliding_window": True,
            "sliding_window": 16,
            "max_window_layers": 0,
            "layer_types": ["full_attention"] * 3,
        },
    ],
)
def test_a_window_that_hides_nothing_is_no_obstacle(changes):
    assert read(**changes).dim == 64


@pytest.mark.parametrize(
    "changes,parts",
    [
        ({"model_type": "gpt2"}, ['model_type is "gpt2"', "llama, mistral, mixtral, qwen2"]),
        ({"model_type": "qwen3"}, ['"qwen3"', "normalises queries and keys"]),
        ({"model_type": "absent"}, ["model_type is missing", "llama"]),
        ({"model_type": ["llama"]}, ['model_type is ["llama"]']),
        ({"hidden_act": "gelu"}, ['hidden_act is "gelu"', 'expected "silu"']),
        ({"mlp_bias": True}, ["mlp_bias is true", "expected false"]),
        ({"attention_bias": True}, ["attention_bias is true", "expected false", "output"]),
        ({"quantization_config": {"bits": 4}}, ['quantization_config is {"bits": 4}', "quantised"]),
        ({"hidden_size": "absent"}, ["hidden_size is missing", "a whole number"]),
        ({"hidden_size": "64"}, ['hidden_size is "64"', "a whole number"]),
        ({"num_hidden_layers": True}, ["num_hidden_layers is true", "a whole number"]),
        ({"vocab_size": None}, ["vocab_size is null", "a whole number"]),
        ({"rms_norm_eps": "absent"}, ["rms_norm_eps is missing", "a number"]),
        ({"tie_word_embeddings": "no"}, ['tie_word_embeddings is "no"', "true or false"]),
        ({"model_type": "mistral", "num_key_value_heads": "absent"}, ["num_key_value_heads is missing"]),
        ({"num_attention_heads": 7}, ["num_attention_heads is 7", "divisor of hidden_size (64)"]),
        ({"num_attention_heads": 0}, ["num_attention_heads is 0"]),
        ({"num_key_value_heads": 3}, ["no possible model", "kv_heads", "3"]),
        ({"head_dim": 9}, ["no possible model", "head_dim", "9"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor is 0.5", "expected 1"]),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
            ["rope_parameters.partial_rotary_factor is 0.25"],
        ),
        ({"rope_theta": "big"}, ['rope_theta is "big"', "a number"]),
        ({"rope_scaling": "linear"}, ['rope_scaling is "linear"', "an object or null"]),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            ['rope_scaling.type is "dynamic"', "default, linear, llama3, yarn"],
        ),
        ({"rope_parameters": {"rope_type": "longrope"}}, ['rope_parameters.rope_type is "longrope"']),
        ({"rope_scaling": {"rope_type": "linear"}}, ["rope_scaling.factor is missing", "a number"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, ["no possible model", "factor", "0.5"]),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}},
            ["rope_scaling.low_freq_factor is missing"],
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "max_position_embeddings": "absent"},
            ["max_position_embeddings is missing"],
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0, "mrope_section": [1]}},
            ["rope_scaling.mrope_section is [1]", "expected null", "linear"],
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 0.7}}, ["rope_scaling.mscale is 0.7"]),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}}, ["truncate is false", "true"]),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "attention_factor": 1.0}},
            ["rope_scaling.attention_factor is 1.0", "1.13863"],
        ),
        (
            {"model_type": "mistral", "max_position_embeddings": 32768},
            ["sliding_window is 4096", "(32768)", "at most 4096 tokens"],
        ),
        ({"model_type": "mixtral", "sliding_window": 16}, ["sliding_window is 16", "(2048)"]),
        ({"model_type": "mistral", "sliding_window": "w"}, ['sliding_window is "w"', "a whole number"]),
        (
            {"model_type": "mistral", "sliding_window": 16, "max_position_embeddings": "absent"},
            ["sliding_window is 16", "null"],
        ),
        (
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "sliding_window": 16,
                "max_window_layers": 2,
            },
            ["sliding_window is 16"],
        ),
        (
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "sliding_window": 16,
                "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            },
            ["sliding_window is 16"],
        ),
        ({"layer_types": ["chunked_attention"]}, ['layer_types is ["chunked_attention"]', "full_attention"]),
        ({"layer_types": "full_attention"}, ['layer_types is "full_attention"']),
    ],
)
def test_refusals_name_file_key_value_and_what_is_expected(changes, parts):
    with pytest.raises(CheckpointError) as error:
        read(**changes)
    message = str(error.value)
    assert message.startswith(f"{WHERE}: ")
    assert "\n" not in message
    assert all(part in message for part in parts), message


def test_long_values_are_cut():
    with pytest.raises(CheckpointError) as error:
        read(quantization_config={"names": ["x" * 50] * 50})
    assert len(str(error.value)) < 250


def test_mixtral():
    options = moe_options(MIXTRAL, WHERE)
    moe = MoEConfig(**options)
    assert (moe.experts, moe.top_k, moe.routing, moe.normalise_weights) == (4, 2, "token_choice", True)
    moe.validate(64, 3, 96)
    assert transformer_config(MIXTRAL, WHERE).feed_forward_dim == 96
    with pytest.raises(CheckpointError, match=r"num_local_experts is missing"):
        moe_options({key: value for key, value in MIXTRAL.items() if key != "num_local_experts"}, WHERE)
    with pytest.raises(CheckpointError, match=r"model_type"):
        moe_options({"model_type": "gpt2"}, WHERE)


@pytest.mark.parametrize(
    "family,options",
    [
        ("llama", {}),
        ("llama", {"kv_heads": 2, "tie_embeddings": True, "norm_eps": 1e-6, "rope_theta": 5e5}),
        ("llama", {"head_dim": 10, "rope_scaling": RopeScaling("linear", 2.0)}),
        ("llama", {"rope_scaling": RopeScaling("llama3", 8.0, 256, 1.5, 3.0)}),
        ("mistral", {"dim": 60, "head_dim": 8, "rope_scaling": RopeScaling("yarn", 4.0, 256, 2.0, 16.0)}),
        ("qwen2", {"attention_bias": True, "feed_forward_dim": 100}),
    ],
)
def test_written_and_read_is_the_same(family, options):
    config = TransformerConfig(**{"dim": 64, "layers": 2, "heads": 8, **options})
    written = config_json(config, 77, context=1024, eos_id=3)
    assert written["model_type"] == family
    assert (written["eos_token_id"], written["max_position_embeddings"]) == (3, 1024)
    read = transformer_config(written, WHERE)
    names = ("dim", "layers", "heads", "tie_embeddings", "rope_theta", "norm_eps", "attention_bias")
    names += ("rope_scaling", "resolved_head_dim", "resolved_kv_heads", "resolved_feed_forward_dim")
    assert [getattr(read, name) for name in names] == [getattr(config, name) for name in names]
    assert read.vocab_size == 77
    assert moe_options(written, WHERE) is None


def test_mixtral_written_and_read_is_the_same():
    moe = MoEConfig(4, "token_choice", 2, expert_dim=40, normalise_weights=True, auxiliary_loss=0.01)
    written = config_json(TransformerConfig(dim=64), 77, 1024, moe, dtype="bfloat16")
    assert written["model_type"] == "mixtral"
    assert written["torch_dtype"] == "bfloat16"
    assert written["intermediate_size"] == 40
    options = moe_options(written, WHERE)
    assert {name: getattr(moe, name) for name in options} == options
    assert transformer_config(written, WHERE).feed_forward_dim == 40


@pytest.mark.parametrize(
    "transformer,moe,key",
    [
        ({"attention_bias": True}, {}, "transformer.attention_bias"),
        ({}, {"routing": "expert_choice"}, "moe.routing"),
        ({}, {"normalise_weights": False}, "moe.normalise_weights"),
        ({}, {"score": "sigmoid"}, "moe.score"),
        ({}, {"shared_experts": 1}, "moe.shared_experts"),
        ({}, {"layers": [0]}, "moe.layers"),
        ({}, {"balance_rate": 0.1}, "moe.balance_rate"),
    ],
)
def test_what_mixtral_cannot_express_is_not_written(transformer, moe, key):
    options = {"routing": "token_choice", "top_k": 2, "normalise_weights": True, **moe}
    with pytest.raises(ConfigError) as error:
        config_json(TransformerConfig(**transformer), 77, 1024, MoEConfig(**options))
    assert error.value.key == f"model.{key}"
    assert "Mixtral" in str(error.value)
