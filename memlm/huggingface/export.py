"""A trained model as a Hugging Face folder that ``transformers`` loads."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from memlm.errors import CheckpointError, ConfigError
from memlm.huggingface.config import config_json
from memlm.huggingface.exported_tokenizer import save_tokenizer
from memlm.huggingface.model_card import model_card
from memlm.huggingface.shards import Entry, entry, write_shards
from memlm.huggingface.tensors import to_hf
from memlm.memory.engram import EngramLayer
from memlm.memory.quantised import FORMATS, QUANTISED, quantise, row_chunks
from memlm.trained import TrainedModel
from memlm.transformer import Block, Transformer

DTYPES = ("float32", "bfloat16", "float16")
MODELING = "modeling_memlm.py"
_FORMAT_OF = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    **{dtype: name for name, dtype in QUANTISED.items()},
}


def export(
    trained: TrainedModel,
    folder: str | Path,
    *,
    dtype: str | None = None,
    values: str | None = None,
    shard_bytes: int = 5 * 10**9,
    losses: Mapping[str, float] | None = None,
) -> Path:
    """Write a folder with config, weights, tokenizer, generation config and model card, whole or not at all.

    A dense model becomes a Llama (Mistral, Qwen2), a mixture of experts a Mixtral if that computes the same,
    and every other model a ``MemlmForCausalLM``, whose code is put beside it.

    The value tables are those that the checkpoint holds and every evaluation reads. Weight decay that rows
    owe (:class:`memlm.optim.MemoryAdamW`) is not part of them: it falls due when a row is next trained.

    Args:
        trained: The model.
        folder: Must be missing or empty. One that is there gets its config.json last.
        dtype: One of :data:`DTYPES`, of all parameters but the value tables. Default: as they were saved.
        values: One of :data:`memlm.memory.quantised.FORMATS`, of the value tables. Default: as they are.
        shard_bytes: Most bytes of tensors in a file.
        losses: Validation loss (nats a token) by format of the values, for the model card.

    Returns:
        The folder.

    Raises:
        CheckpointError: The folder is not empty or cannot be written, or the values cannot have that format.
        ConfigError: There is no such dtype or format.
    """
    folder = Path(folder)
    check_free(folder)
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError("--dtype", f"is {dtype}, must be one of {', '.join(DTYPES)}")
    values = _values_format(trained, values)
    dtype = str(trained.model.embedding.weight.dtype).removeprefix("torch.") if dtype is None else dtype
    # A folder that is there stays: it may be a mount, or the shell's own. It is filled from within.
    given = folder.is_dir()
    temporary = (folder / "export" if given else folder).with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        _fill(temporary, trained, dtype, values, shard_bytes, losses or {}, title=folder.resolve().name)
        if given:
            _move(temporary, folder)
        else:
            os.replace(temporary, folder)
    except OSError as error:
        raise CheckpointError(folder, f"cannot be written ({error.strerror or error})") from error
    except ValueError as error:
        raise CheckpointError(trained.source, str(error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def check_free(folder: Path) -> None:
    """Refuse a folder that holds anything: an export overwrites nothing.

    Raises:
        CheckpointError: Names the folder and what it holds.
    """
    if folder.is_dir():
        held = sorted(path.name for path in folder.iterdir())
        if held:
            rest = f" and {len(held) - 3} more" if len(held) > 3 else ""
            raise CheckpointError(
                folder, f"already holds {', '.join(held[:3])}{rest}; expected a folder that is new or empty"
            )
    elif folder.exists() or folder.is_symlink():
        raise CheckpointError(folder, "exists and is no folder; expected a folder that is new or empty")


def _move(source: Path, target: Path) -> None:
    """All files, the config last: without it nothing takes the folder for an exported one.

    Raises:
        CheckpointError: Something else has come into the target meanwhile.
    """
    if any(path != source for path in target.iterdir()):
        raise CheckpointError(target, "was empty, and something else writes to it; expected an empty folder")
    for path in sorted(source.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, target / path.name)


def values_format(model: Transformer) -> str | None:
    """How a model's pools hold their values; None for a model without pools."""
    for pool in model.pools.values():
        values = pool.values
        assert isinstance(values, Tensor)
        return _FORMAT_OF[values.dtype]
    return None


def _values_format(trained: TrainedModel, wanted: str | None) -> str | None:
    own = values_format(trained.model)
    if own is None:
        if wanted is not None:
            raise CheckpointError(trained.source, f"has no value tables that could be {wanted} (--values)")
        return None
    if wanted is not None and wanted not in FORMATS:
        raise ConfigError("--values", f"is {wanted}, must be one of {', '.join(FORMATS)}")
    if own in QUANTISED and wanted not in (None, own):
        raise CheckpointError(
            trained.source,
            f"holds {own} values, which {wanted} would round again; export the run that they come from",
        )
    return own if wanted is None else wanted


def _fill(
    folder: Path,
    trained: TrainedModel,
    dtype: str,
    values: str | None,
    shard_bytes: int,
    losses: Mapping[str, float],
    title: str,
) -> None:
    config, entries = _standard(trained, dtype) or _own(trained, dtype, values)
    if config["model_type"] == "memlm":
        source = Path(__file__).with_name(MODELING)
        (folder / MODELING).write_bytes(source.read_bytes())
    write_shards(folder, entries, shard_bytes)
    config["memlm_tokenizer"] = save_tokenizer(trained.tokenizer, folder, trained.context)
    config |= {"memlm_step": trained.step, "memlm_tokens": trained.tokens}
    _write_json(folder / "config.json", config)
    eos = trained.tokenizer.eos_id
    # A document begins with the end of the one before it.
    _write_json(
        folder / "generation_config.json", {"bos_token_id": eos, "eos_token_id": eos, "pad_token_id": eos}
    )
    (folder / "README.md").write_text(model_card(trained, config, losses, title), encoding="utf-8")


def _standard(trained: TrainedModel, dtype: str) -> tuple[dict[str, Any], list[Entry]] | None:
    """Config and tensors of a model that a class of ``transformers`` computes; None if there is none."""
    model = trained.model
    experts = [layer.config for layer in model.experts.values()]
    if model.pools:
        return None
    try:
        config = config_json(
            model.config,
            len(model.embedding.weight),
            trained.context,
            experts[0] if experts else None,
            dtype,
            trained.tokenizer.eos_id,
        )
    except ConfigError:
        return None
    tensors = to_hf(model.state_dict(), model.config, trained.source)
    return config, [entry(name, tensor, getattr(torch, dtype)) for name, tensor in tensors.items()]


def _own(trained: TrainedModel, dtype: str, values: str | None) -> tuple[dict[str, Any], list[Entry]]:
    model = trained.model
    config: dict[str, Any] = {
        "architectures": ["MemlmForCausalLM"],
        "model_type": "memlm",
        "auto_map": {
            "AutoConfig": f"{MODELING.removesuffix('.py')}.MemlmConfig",
            "AutoModelForCausalLM": f"{MODELING.removesuffix('.py')}.MemlmForCausalLM",
        },
        "memlm": _with_every_option(trained.architecture),
        "vocab_size": len(model.embedding.weight),
        "hidden_size": model.config.dim,
        "num_hidden_layers": model.config.layers,
        "num_attention_heads": model.config.heads,
        "num_key_value_heads": model.config.resolved_kv_heads,
        "head_dim": model.config.resolved_head_dim,
        "intermediate_size": model.config.resolved_feed_forward_dim,
        "max_position_embeddings": trained.context,
        "tie_word_embeddings": model.config.tie_embeddings,
        "values_format": values or "float32",
        "bos_token_id": None,
        "eos_token_id": trained.tokenizer.eos_id,
        "torch_dtype": dtype,
    }
    if hashes := _hashes(model):
        config["engram_hashes"] = hashes
    entries: list[Entry] = []
    for name, tensor in model.state_dict().items():
        if name == "output.weight" and model.config.tie_embeddings:
            continue
        if name.startswith("pools."):
            entries += _table(f"model.{name}", tensor, values)
        elif not tensor.is_floating_point() or name.endswith(".balance_bias"):
            entries.append(entry(f"model.{name}", tensor))
        else:
            entries.append(entry(f"model.{name}", tensor, getattr(torch, dtype)))
    return config, entries


def _with_every_option(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """An architecture with the defaults of options that it does not name, which the exported code has not."""
    # Seconds of imports.
    from memlm.language_models import LanguageModel
    from memlm.meta_model import instantiate

    init_args = {key: value for key, value in architecture.items() if key != "class_path"}
    with torch.device("meta"):
        module = instantiate(
            LanguageModel, {"class_path": architecture["class_path"], "init_args": init_args}
        )
    return module.architecture()


def _table(name: str, tensor: Tensor, values: str | None) -> list[Entry]:
    """The entries of a tensor of a pool."""
    if name.endswith(".scales") or tensor.dtype in QUANTISED.values():
        return [entry(name, tensor)]
    if values not in QUANTISED:
        return [entry(name, tensor, getattr(torch, str(values)))]
    scales = torch.empty(len(tensor), dtype=torch.float32)  # filled as the codes are made

    def codes() -> Iterator[Tensor]:
        for part in row_chunks(tensor):
            try:
                quantised, scale = quantise(tensor[part], str(values))
            except ValueError as error:
                raise ValueError(f"{name}, of rows from {part.start} on: {error}") from error
            assert scale is not None
            scales[part] = scale
            yield quantised

    return [
        Entry(name, QUANTISED[str(values)], tuple(tensor.shape), codes),
        entry(f"{name.removesuffix('values')}scales", scales),
    ]


def _hashes(model: Transformer) -> dict[str, Any]:
    """For each pool that Engram layers read, the constants of its hash functions."""
    found = {}
    for block in cast(Iterable[Block], model.blocks):
        layer: Any = block.memory
        if isinstance(layer, EngramLayer):
            hashes, (name,) = layer.hashes, block.pool_names
            found[name] = {
                "sizes": list(hashes.sizes),
                "multipliers": [list(row) for row in hashes.multipliers],
            }
    return found


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
