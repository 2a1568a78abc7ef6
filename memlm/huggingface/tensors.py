"""Names of tensors: those of Hugging Face's Llama, Mistral, Qwen2 and Mixtral to ours and back.

=================================================  =========================================================
checkpoint, after ``model.layers.I.``              ours, after ``blocks.I.``
=================================================  =========================================================
``input_layernorm.weight``                         ``attention_norm.weight``
``self_attn.{q,k,v,o}_proj.weight``                ``attention.{query,key,value,output}.weight``
``self_attn.{q,k,v}_proj.bias``                    ``attention.{query,key,value}.bias``
``post_attention_layernorm.weight``                ``feed_forward_norm.weight``
``mlp.{gate,up,down}_proj.weight``                 ``feed_forward.{gate,up,down}.weight``
``block_sparse_moe.gate.weight``                   ``feed_forward.router.weight``
``block_sparse_moe.experts.E.{w1,w3}.weight``      ``feed_forward.gate_up[E]``: rows of w1, then of w3
``block_sparse_moe.experts.E.w2.weight``           ``feed_forward.down[E]``
=================================================  =========================================================

Outside the blocks: ``model.embed_tokens.weight`` is ``embedding.weight``, ``model.norm.weight`` is
``norm.weight``, and ``lm_head.weight`` is ``output.weight`` (absent with tied embeddings). ``transformers`` 5
holds the experts in memory as we do, as ``mlp.experts.{gate_up,down}_proj``; that is read too.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from memlm.errors import CheckpointError
from memlm.transformer.config import TransformerConfig

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"

_IGNORED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
"""Buffers of older checkpoints that hold nothing learned."""

_EXPERT = re.compile(r"model\.layers\.(\d+)\.block_sparse_moe\.experts\.(\d+)\.")
_FUSED = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.gate_up_proj")
_ROUTER = re.compile(r"(blocks\.(\d+)\.feed_forward\.)router\.weight")

Place = tuple[int | slice, ...]
"""Where a tensor of the checkpoint lies in ours: ``ours[place] = theirs``; ``()`` is all of it."""


@dataclass(frozen=True)
class Parameter:
    """One of our parameters, and the tensors of a checkpoint that make it up."""

    shape: tuple[int, ...]
    parts: dict[str, Place]


@dataclass(frozen=True)
class Experts:
    """How a checkpoint holds the experts of a block."""

    number: int
    """E."""
    width: int
    """F."""
    fused: bool = False
    """Whether as one tensor for all experts, as ``transformers`` 5 does in memory."""


def from_hf(
    tensors: Mapping[str, Tensor], config: TransformerConfig, where: str | Path = "checkpoint"
) -> dict[str, Tensor]:
    """State of our transformer, from the tensors of a Hugging Face model.

    Args:
        tensors: By their names. They are not copied, but for experts, which are stacked.
        config: Of the decoder. Without ``vocab_size`` that of the tensors is taken.
        where: The checkpoint, for messages.

    Returns:
        Tensors by our names; no ``output.weight`` with tied embeddings.

    Raises:
        CheckpointError: Tensors are missing or left over, or one has a wrong shape or type; names them.
    """
    return {name: assemble(parameter, tensors) for name, parameter in plan(tensors, config, where).items()}


def to_hf(
    state: Mapping[str, Tensor], config: TransformerConfig, where: str | Path = "model"
) -> dict[str, Tensor]:
    """The inverse of :func:`from_hf`, with the experts apart as in Mixtral's files.

    Args:
        state: ``state_dict()`` of our transformer, which may hold the tied ``output.weight`` too.
        config: Of the decoder.
        where: What the state is of, for messages.

    Returns:
        Tensors by their names: views of ours.

    Raises:
        CheckpointError: As :func:`from_hf`; the state of a model with memory has no such names.
    """
    experts = {}
    for name in state:
        match = _ROUTER.fullmatch(name)
        down = state.get(f"{match[1]}down") if match else None
        if match and down is not None:
            experts[int(match[2])] = Experts(_rows(state[name]), down.shape[-1])
    parameters = parameters_of(config, _vocabulary(state.get("embedding.weight"), config), experts)
    held = _without_tied(state, config, "embedding.weight", "output.weight", where)
    _check_names(held, set(parameters), where)
    result = {}
    for name, parameter in parameters.items():
        _check_tensor(name, state[name], parameter.shape, name, where)
        for theirs, place in parameter.parts.items():
            result[theirs] = state[name][place]
    return result


def plan(tensors: Mapping[str, Tensor], config: TransformerConfig, where: str | Path) -> dict[str, Parameter]:
    """What each of our parameters is made of, all names, shapes and types checked before any is copied.

    Args:
        tensors: Of the checkpoint; only shapes and types are looked at (and the values of a ``lm_head`` that
            ought to be tied).
        config: Of the decoder.
        where: The checkpoint, for messages.

    Raises:
        CheckpointError: As :func:`from_hf`.
    """
    experts = _experts_in(tensors, config.resolved_feed_forward_dim)
    parameters = parameters_of(config, _vocabulary(tensors.get(EMBEDDING), config), experts)
    needed = {theirs for parameter in parameters.values() for theirs in parameter.parts}
    held = _without_tied(tensors, config, EMBEDDING, OUTPUT, where)
    _check_names([name for name in held if not _IGNORED.fullmatch(name)], needed, where)
    for name, parameter in parameters.items():
        whole = torch.empty(parameter.shape, device="meta")
        for theirs, place in parameter.parts.items():
            _check_tensor(theirs, tensors[theirs], tuple(whole[place].shape), name, where)
    return parameters


def assemble(parameter: Parameter, tensors: Mapping[str, Tensor], into: Tensor | None = None) -> Tensor:
    """Bring a parameter's parts together.

    Args:
        parameter: Of :func:`plan`.
        tensors: Of the checkpoint.
        into: Filled and returned if given, else the checkpoint's tensor itself or a new one.
    """
    if into is None:
        first = tensors[next(iter(parameter.parts))]
        if len(parameter.parts) == 1:
            return first
        into = torch.empty(parameter.shape, dtype=first.dtype, device=first.device)
    for theirs, place in parameter.parts.items():
        into[place].copy_(tensors[theirs])
    return into


def parameters_of(
    config: TransformerConfig, rows: int, experts: Mapping[int, Experts]
) -> dict[str, Parameter]:
    """Our parameters by name.

    Args:
        config: Of the decoder.
        rows: Of the embedding.
        experts: Of the blocks that have them.
    """
    dim, width = config.dim, config.resolved_head_dim
    own, kv = config.heads * width, config.resolved_kv_heads * width
    found = {"embedding.weight": Parameter((rows, dim), {EMBEDDING: ()})}

    def add(block: int, ours: str, theirs: str, *shape: int) -> None:
        found[f"blocks.{block}.{ours}"] = Parameter(shape, {f"model.layers.{block}.{theirs}": ()})

    for index in range(config.layers):
        add(index, "attention_norm.weight", "input_layernorm.weight", dim)
        for name, letter, size in (("query", "q", own), ("key", "k", kv), ("value", "v", kv)):
            add(index, f"attention.{name}.weight", f"self_attn.{letter}_proj.weight", size, dim)
            if config.attention_bias:
                add(index, f"attention.{name}.bias", f"self_attn.{letter}_proj.bias", size)
        add(index, "attention.output.weight", "self_attn.o_proj.weight", dim, own)
        add(index, "feed_forward_norm.weight", "post_attention_layernorm.weight", dim)
        if index in experts:
            found |= _expert_parameters(index, experts[index], dim)
        else:
            inner = config.resolved_feed_forward_dim
            add(index, "feed_forward.gate.weight", "mlp.gate_proj.weight", inner, dim)
            add(index, "feed_forward.up.weight", "mlp.up_proj.weight", inner, dim)
            add(index, "feed_forward.down.weight", "mlp.down_proj.weight", dim, inner)
    found["norm.weight"] = Parameter((dim,), {"model.norm.weight": ()})
    if not config.tie_embeddings:
        found["output.weight"] = Parameter((rows, dim), {OUTPUT: ()})
    return found


def _expert_parameters(block: int, experts: Experts, dim: int) -> dict[str, Parameter]:
    width, theirs = experts.width, f"model.layers.{block}."
    gate_up: dict[str, Place]
    down: dict[str, Place]
    if experts.fused:
        router = f"{theirs}mlp.gate.weight"
        gate_up = {f"{theirs}mlp.experts.gate_up_proj": ()}
        down = {f"{theirs}mlp.experts.down_proj": ()}
    else:
        router = f"{theirs}block_sparse_moe.gate.weight"
        gate_up, down = {}, {}
        for index in range(experts.number):
            expert = f"{theirs}block_sparse_moe.experts.{index}."
            gate_up[f"{expert}w1.weight"] = (index, slice(0, width))
            gate_up[f"{expert}w3.weight"] = (index, slice(width, 2 * width))
            down[f"{expert}w2.weight"] = (index,)
    ours = f"blocks.{block}.feed_forward."
    return {
        f"{ours}router.weight": Parameter((experts.number, dim), {router: ()}),
        f"{ours}gate_up": Parameter((experts.number, 2 * width, dim), gate_up),
        f"{ours}down": Parameter((experts.number, dim, width), down),
    }


def _experts_in(tensors: Mapping[str, Tensor], width: int) -> dict[int, Experts]:
    numbers: dict[int, set[int]] = {}
    fused = {}
    for name in tensors:
        if match := _EXPERT.match(name):
            numbers.setdefault(int(match[1]), set()).add(int(match[2]))
        elif match := _FUSED.fullmatch(name):
            fused[int(match[1])] = Experts(_rows(tensors[name]), width, fused=True)
    return {block: Experts(len(found), width) for block, found in numbers.items()} | fused


def _rows(tensor: Tensor) -> int:
    return tensor.shape[0] if tensor.dim() else 0


def _vocabulary(embedding: Tensor | None, config: TransformerConfig) -> int:
    if config.vocab_size is not None:
        return config.vocab_size
    return 0 if embedding is None else _rows(embedding)


def _without_tied(
    tensors: Mapping[str, Tensor], config: TransformerConfig, embedding: str, output: str, where: str | Path
) -> list[str]:
    """Names of the tensors, less an output layer that only repeats the embedding, as it may if tied."""
    if not config.tie_embeddings or output not in tensors:
        return list(tensors)
    if embedding in tensors and not torch.equal(tensors[output], tensors[embedding]):
        raise CheckpointError(
            where, f"tensor {output} differs from {embedding}, but the config ties the two embeddings"
        )
    return [name for name in tensors if name != output]


def _check_names(held: list[str], needed: set[str], where: str | Path) -> None:
    missing = sorted(needed - set(held))
    left_over = sorted(set(held) - needed)
    messages = []
    if missing:
        messages.append(f"lacks {_listed(missing)}")
    if left_over:
        verb = "has" if len(left_over) == 1 else "have"
        messages.append(f"holds {_listed(left_over)}, which {verb} no place in the model")
    if messages:
        raise CheckpointError(where, " and ".join(messages))


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ("the tensor " if len(names) == 1 else "the tensors ") + ", ".join(names[:3]) + rest


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], ours: str, where: str | Path) -> None:
    purpose = "" if name == ours else f" for {ours}"
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            where, f"tensor {name} has shape {list(tensor.shape)}; expected {list(shape)}{purpose}"
        )
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise CheckpointError(
            where,
            f"tensor {name} is of type {tensor.dtype}; expected floating-point numbers of 16 bits or more",
        )
