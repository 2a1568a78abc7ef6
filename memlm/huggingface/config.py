"""``config.json`` of Hugging Face checkpoints to our options and back; what we cannot compute is refused."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from memlm.errors import CheckpointError, ConfigError
from memlm.transformer.config import RopeScaling, TransformerConfig
from memlm.transformer.moe_config import MoEConfig

_REFUSED = {
    "qwen3": "normalises queries and keys",
    "qwen3_moe": "normalises queries and keys",
}
"""Relatives that are often met, and what keeps them out; all other types are refused as unknown."""


@dataclass(frozen=True)
class _Family:
    """What a model type implies without saying it in its config.json."""

    attention_bias: bool = False
    rope_theta: float = 10_000.0
    window: int | None = None
    """Sliding window if the key is absent."""
    kv_heads_default: bool = False
    """Whether an absent ``num_key_value_heads`` means ``num_attention_heads``."""


_FAMILIES = {
    "llama": _Family(kv_heads_default=True),
    "mistral": _Family(window=4096),
    "mixtral": _Family(rope_theta=1_000_000.0),
    "qwen2": _Family(attention_bias=True, window=4096),
}

_ROPE_KEYS = {
    "default": set[str](),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor", "beta_fast", "beta_slow", "attention_factor", "truncate"},
}
"""Keys of each type of scaling beside those that all may have."""

_ROPE_KEYS_OF_ALL = {
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "original_max_position_embeddings",
}


class _Given:
    """Values of a config.json with their types checked; errors name file, key and value."""

    def __init__(self, values: Mapping[str, Any], where: str | Path, prefix: str = "") -> None:
        self.values, self.where, self.prefix = values, where, prefix

    def refuse(self, key: str, expected: str) -> NoReturn:
        found = f"is {_shown(self.values[key])}" if key in self.values else "is missing"
        raise CheckpointError(self.where, f"{self.prefix}{key} {found}; expected {expected}")

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number; absent and null are the default, if there is one."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool):
            self.refuse(key, "a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number; absent and null are the default, if there is one."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool):
            self.refuse(key, "a number")
        return float(value)

    def flag(self, key: str) -> bool:
        """True or false; absent and null are false."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            self.refuse(key, "true or false")
        return bool(value)

    def only(self, key: str, allowed: Any, why: str = "") -> None:
        """Refuse every value but this one; absent and null are as good as it."""
        value = self.values.get(key)
        if value is not None and value != allowed:
            self.refuse(key, _shown(allowed) + (f" ({why})" if why else ""))


def transformer_config(config_json: Mapping[str, Any], where: str | Path) -> TransformerConfig:
    """The decoder that a ``config.json`` describes; for Mixtral, see :func:`moe_options` too.

    Args:
        config_json: The file's content, as written by ``transformers`` 4 or 5.
        where: The file, for messages.

    Raises:
        CheckpointError: A model type or a setting is not supported; names file, key, value and what is
            expected.
    """
    given = _Given(config_json, where)
    family = _family(given)
    given.only("hidden_act", "silu")
    given.only("mlp_bias", False, "feed-forward networks have no biases")
    if not family.attention_bias:
        given.only("attention_bias", False, "it puts a bias on the attention's output map too")
    given.only("quantization_config", None, "quantised weights are not read")
    _refuse_window(given, family)
    dim, heads = given.integer("hidden_size"), given.integer("num_attention_heads")
    if given.values.get("head_dim") is None and (heads < 1 or dim % heads):
        given.refuse("num_attention_heads", f"a divisor of hidden_size ({dim}), or head_dim")
    kv_default = heads if family.kv_heads_default or "num_key_value_heads" in given.values else None
    theta, scaling = _rope(given, family)
    config = TransformerConfig(
        dim=dim,
        layers=given.integer("num_hidden_layers"),
        heads=heads,
        kv_heads=given.integer("num_key_value_heads", default=kv_default),
        feed_forward_dim=given.integer("intermediate_size"),
        tie_embeddings=given.flag("tie_word_embeddings"),
        rope_theta=theta,
        norm_eps=given.number("rms_norm_eps"),
        head_dim=given.integer("head_dim", default=dim // max(heads, 1)),
        attention_bias=family.attention_bias,
        rope_scaling=scaling,
        vocab_size=given.integer("vocab_size"),
    )
    try:
        config.validate()
    except ConfigError as error:
        raise CheckpointError(where, f"describes no possible model: {error}") from error
    return config


def moe_options(config_json: Mapping[str, Any], where: str | Path) -> dict[str, Any] | None:
    """Arguments of :class:`MoEConfig` for a Mixtral, None for a dense model.

    They are those that decide what the model computes; losses and the like are the user's.

    Raises:
        CheckpointError: As :func:`transformer_config`.
    """
    given = _Given(config_json, where)
    _family(given)
    if config_json["model_type"] != "mixtral":
        return None
    return {
        "experts": given.integer("num_local_experts"),
        "routing": "token_choice",
        "top_k": given.integer("num_experts_per_tok"),
        "normalise_weights": True,
        "score": "softmax",
    }


def config_json(
    config: TransformerConfig,
    vocab_size: int,
    context: int,
    moe: MoEConfig | None = None,
    dtype: str = "float32",
    eos_id: int | None = None,
) -> dict[str, Any]:
    """A ``config.json`` that ``transformers`` 4 and 5 read.

    Of a Llama; with attention biases of a Qwen2, with mixtures of experts of a Mixtral, and with a model dim
    that is no multiple of the heads, which Llama forbids, of a Mistral.

    Args:
        config: The decoder.
        vocab_size: Rows of the embedding.
        context: Longest sequence in tokens that the model is made for.
        moe: The mixtures of experts, None for none.
        dtype: Of the tensors beside it: ``float32``, ``bfloat16`` or ``float16``.
        eos_id: End-of-document token.

    Raises:
        ConfigError: None of these families can express the model; names the key at fault.
    """
    family = "mistral" if config.dim % config.heads else "llama"
    if config.attention_bias:
        family = "qwen2"
    if moe is not None:
        family = "mixtral"
        _check_mixtral(config, moe)
    names = {"qwen2": "Qwen2"}
    result: dict[str, Any] = {
        "architectures": [f"{names.get(family, family.capitalize())}ForCausalLM"],
        "model_type": family,
        "vocab_size": vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.resolved_feed_forward_dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.resolved_kv_heads,
        "head_dim": config.resolved_head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else _rope_json(config.rope_scaling),
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": None,
        "eos_token_id": eos_id,
        "torch_dtype": dtype,
    }
    if family in ("mistral", "mixtral"):
        result["sliding_window"] = None
    if family == "qwen2":
        result["use_sliding_window"] = False
    if family == "llama":
        result |= {"attention_bias": False, "mlp_bias": False}
    if moe is not None:
        result["intermediate_size"] = moe.resolved_expert_dim(config.resolved_feed_forward_dim)
        result |= {"num_local_experts": moe.experts, "num_experts_per_tok": moe.top_k}
    return result


def _family(given: _Given) -> _Family:
    kind = given.values.get("model_type")
    if not isinstance(kind, str) or kind not in _FAMILIES:
        why = f" ({kind} {_REFUSED[str(kind)]})" if str(kind) in _REFUSED else ""
        given.refuse("model_type", f"one of {', '.join(sorted(_FAMILIES))}{why}")
    return _FAMILIES[kind]


def _refuse_window(given: _Given, family: _Family) -> None:
    """Refuse attention over a window, unless no layer has it or no sequence is longer than it."""
    window = _window(given, family)
    context = given.values.get("max_position_embeddings")
    if window is None or (isinstance(context, int) and window >= context):
        return
    raise CheckpointError(
        given.where,
        f"sliding_window is {window}; expected null, or at least max_position_embeddings ({context}): "
        f"attention over a window is not supported. For sequences of at most {window} tokens the model is "
        "the same without: then set it to null in the file",
    )


def _window(given: _Given, family: _Family) -> int | None:
    kinds = given.values.get("layer_types") or []
    if not isinstance(kinds, list) or not {"full_attention", "sliding_attention"}.issuperset(map(str, kinds)):
        given.refuse("layer_types", '"full_attention" for every layer')
    if given.values["model_type"] == "llama":  # ignores the key
        return None
    if given.values["model_type"] == "qwen2":
        first = given.integer("max_window_layers", default=28)
        windowed = "sliding_attention" in kinds if kinds else first < given.integer("num_hidden_layers")
        if not given.flag("use_sliding_window") or not windowed:
            return None
    if "sliding_window" not in given.values:
        return family.window
    return None if given.values["sliding_window"] is None else given.integer("sliding_window")


def _rope(given: _Given, family: _Family) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary positions, as ``transformers`` 4 or 5 writes them."""
    name = "rope_scaling" if given.values.get("rope_scaling") else "rope_parameters"
    values = given.values.get(name) or {}
    if not isinstance(values, Mapping):
        given.refuse(name, "an object or null")
    rope = _Given(values, given.where, f"{name}.")
    for place in (given, rope):
        place.only("partial_rotary_factor", 1, "all of a head is turned")
    theta = rope.number("rope_theta", default=given.number("rope_theta", default=family.rope_theta))
    key = "rope_type" if "rope_type" in values else "type"
    kind = values.get(key, "default")
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        rope.refuse(key, f"one of {', '.join(_ROPE_KEYS)}")
    for other in values.keys() - _ROPE_KEYS[kind] - _ROPE_KEYS_OF_ALL:
        rope.only(other, None, f"there is no such setting for {kind}")
    if kind == "default":
        return theta, None
    factor = rope.number("factor")
    if kind == "linear":
        return theta, RopeScaling("linear", factor)
    length_key = "original_max_position_embeddings"
    length = given.integer(length_key, default=0) or rope.integer(length_key, default=0)
    length = length or given.integer("max_position_embeddings")
    if kind == "llama3":
        turns = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        return theta, RopeScaling("llama3", factor, length, *turns)
    rope.only("truncate", True)
    size = 0.1 * math.log(max(factor, 1.0)) + 1
    if not math.isclose(rope.number("attention_factor", default=size), size, rel_tol=1e-6):
        rope.refuse("attention_factor", f"null, or 0.1 ln(factor) + 1, {size:.6g}")
    turns = rope.number("beta_slow", default=1.0), rope.number("beta_fast", default=32.0)
    return theta, RopeScaling("yarn", factor, length, *turns)


def _rope_json(scaling: RopeScaling) -> dict[str, Any]:
    result: dict[str, Any] = {"rope_type": scaling.kind, "factor": float(scaling.factor)}
    if scaling.kind != "linear":
        slow, fast = scaling.resolved_turns
        names = (
            ("low_freq_factor", "high_freq_factor")
            if scaling.kind == "llama3"
            else ("beta_slow", "beta_fast")
        )
        result |= {names[0]: float(slow), names[1]: float(fast)}
        result["original_max_position_embeddings"] = scaling.original_length
    return result


def _check_mixtral(config: TransformerConfig, moe: MoEConfig) -> None:
    if config.attention_bias:
        raise ConfigError("model.transformer.attention_bias", "is True; Mixtral has none")
    needed = {"routing": "token_choice", "normalise_weights": True, "score": "softmax", "shared_experts": 0}
    for name, value in needed.items():
        if getattr(moe, name) != value:
            raise ConfigError(f"model.moe.{name}", f"is {getattr(moe, name)}; Mixtral's is {value}")
    if moe.placement(config.layers) != list(range(config.layers)):
        raise ConfigError("model.moe.layers", f"is {moe.layers}; Mixtral has experts in all blocks")
    if moe.balance_rate:
        raise ConfigError(
            "model.moe.balance_rate", f"is {moe.balance_rate}; Mixtral has no bias that chooses experts"
        )


def _shown(value: Any) -> str:
    """As JSON has it, cut to a line."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 100 else text[:97] + "..."
