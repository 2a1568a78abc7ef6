"""A Hugging Face checkpoint's folder: config.json beside safetensors, sharded or not."""

import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from memlm.errors import CheckpointError, ConfigError
from memlm.huggingface.config import moe_options, transformer_config
from memlm.huggingface.tensors import assemble, plan
from memlm.parallel.checkpoint_folder import own_part
from memlm.pretrained import is_memory
from memlm.transformer.config import RopeScaling, TransformerConfig

if TYPE_CHECKING:
    from memlm.transformer import Transformer

CONFIG = "config.json"
_SAFE, _PICKLED = "model.safetensors", "pytorch_model.bin"


def read_config(folder: str | Path) -> dict[str, Any]:
    """Content of a checkpoint folder's ``config.json``.

    Raises:
        CheckpointError: There is no such folder or file, or the file is no JSON object.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            folder, "is a file; expected a folder" if folder.exists() else "does not exist; expected a folder"
        )
    return _read_json(folder / CONFIG, f"does not exist; expected a folder that holds {CONFIG} and {_SAFE}")


def read_architecture(folder: str | Path) -> dict[str, dict[str, Any]]:
    """Sections of our config that a checkpoint decides: ``transformer`` and, if it has experts, ``moe``.

    Raises:
        CheckpointError: There is no readable ``config.json``, or it is of no model that we can compute.
    """
    values, where = read_config(folder), Path(folder) / CONFIG
    sections = {"transformer": asdict(transformer_config(values, where))}
    sections["transformer"].pop("activation_checkpointing")  # no part of an architecture
    options = moe_options(values, where)
    return sections if options is None else sections | {"moe": options}


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a folder by name, each read from its file when it is asked for.

    Files are mapped into memory, so that a tensor takes none of its own before it is used.

    Args:
        folder: With ``model.safetensors``, or ``model.safetensors.index.json`` and the files that it names.
        allow_pickle: Whether ``pytorch_model.bin``, or its index, will do as well; of such files too only
            tensors are loaded (``weights_only``).

    Raises:
        CheckpointError: The files are missing, damaged, or pickles that are not allowed; names the file.
    """

    def __init__(self, folder: str | Path, allow_pickle: bool = False) -> None:
        self.folder = Path(folder)
        self._opened: dict[Path, Any] = {}
        self._file_of: dict[str, Path] = {}
        pickles = sorted(path.name for path in self.folder.glob("pytorch_model*.bin"))
        for name in (_SAFE, _PICKLED) if allow_pickle else (_SAFE,):
            single, index = self.folder / name, self.folder / f"{name}.index.json"
            if single.exists():
                self._file_of = dict.fromkeys(self._open(single).keys(), single)
                return
            if index.exists():
                self._file_of = self._of_index(index)
                return
        if pickles and not allow_pickle:
            raise CheckpointError(
                self.folder,
                f"holds no {_SAFE}, only pickles ({pickles[0]}), which can run code when they are read: set "
                "model.pretrained.allow_pickle to true to read nothing but tensors of them, or convert them",
            )
        raise CheckpointError(self.folder, f"holds no weights; expected {_SAFE} or {_SAFE}.index.json")

    def __getitem__(self, name: str) -> Tensor:
        file = self._file_of[name]
        opened = self._open(file)
        if isinstance(opened, dict):
            return opened[name]
        try:
            return opened.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(file, f"tensor {name} cannot be read: {_line(error)}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def _of_index(self, index: Path) -> dict[str, Path]:
        """File of each tensor; all files are there and hold what the index says."""
        names = _read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise CheckpointError(index, "has no weight_map from names of tensors to names of files")
        files: dict[str, list[str]] = {}
        for tensor, file in names.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise CheckpointError(
                    index, f"places tensor {tensor} in {file!r}, which is no name of a file"
                )
            files.setdefault(file, []).append(tensor)
        missing = sorted(file for file in files if not (self.folder / file).is_file())
        if missing:
            raise CheckpointError(
                self.folder / missing[0],
                f"does not exist, but {index.name} names it ({len(missing)} of {len(files)} are missing)",
            )
        for file, tensors in files.items():
            lacking = sorted(set(tensors) - set(self._open(self.folder / file).keys()))
            if lacking:
                raise CheckpointError(
                    self.folder / file, f"lacks tensor {lacking[0]}, which {index.name} places in it"
                )
        return {tensor: self.folder / file for tensor, file in names.items()}

    def _open(self, file: Path) -> Any:
        """Of safetensors the opened file, of a pickle its dict."""
        if file not in self._opened:
            is_pickle = file.suffix != ".safetensors"
            self._opened[file] = _load_pickle(file) if is_pickle else _open_safetensors(file)
        return self._opened[file]


@torch.no_grad()
def load_pretrained(model: "Transformer", folder: str | Path, allow_pickle: bool = False) -> None:
    """Copy a checkpoint's weights into a model's parameters, in their dtype; its memory stays as it is.

    Of parameters that are split over ranks each rank fills its part.

    All names, shapes and settings are compared before anything is copied.

    Args:
        model: With the checkpoint's config.
        folder: With ``config.json`` and the weights.
        allow_pickle: See :class:`Checkpoint`.

    Raises:
        CheckpointError: The folder cannot be read, or is of no model that we can compute.
        ConfigError: The model differs from the checkpoint's; names the key and both values.
    """
    folder = Path(folder)
    values, where = read_config(folder), folder / CONFIG
    config = transformer_config(values, where)
    _check_config(model, config, where)
    _check_experts(model, moe_options(values, where), where)
    checkpoint = Checkpoint(folder, allow_pickle)
    sources = plan(checkpoint, config, folder)
    parameters = {name: own for name, own in model.named_parameters() if not is_memory(name)}
    for name, own in parameters.items():
        if name not in sources:
            raise CheckpointError(folder, f"has nothing for {name} of the model")
        if own.shape != sources[name].shape:
            expected, found = list(own.shape), list(sources[name].shape)
            raise CheckpointError(folder, f"has {name} of shape {found}; the model's is {expected}")
    unused = sorted(sources.keys() - parameters.keys())
    if unused:
        raise CheckpointError(
            folder, f"has {unused[0]}, for which the model has no place ({len(unused)} such parameters)"
        )
    for name, own in parameters.items():
        part, offsets = own_part(own)
        if part is own:
            assemble(sources[name], checkpoint, into=own)
        else:  # of what is one tensor in the checkpoint, no more is read than this part
            part.copy_(assemble(sources[name], checkpoint)[_places(offsets, part.shape)])


def _places(offsets: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(offsets, shape, strict=True))


def _check_config(model: "Transformer", config: TransformerConfig, where: Path) -> None:
    own, rows = model.config, len(model.embedding.weight)
    if rows != config.vocab_size:
        raise ConfigError(
            "model.transformer.vocab_size",
            f"makes an embedding of {rows} rows, but {where} says {config.vocab_size}; set it to that",
        )
    for name in (
        "dim", "layers", "heads", "kv_heads", "head_dim", "feed_forward_dim", "tie_embeddings", "rope_theta",
        "norm_eps", "attention_bias",
    ):  # fmt: skip
        ours, theirs = (getattr(c, f"resolved_{name}", getattr(c, name)) for c in (own, config))
        if ours != theirs:
            raise ConfigError(f"model.transformer.{name}", f"is {ours}, but {where} says {theirs}")
    ours, theirs = (_plain_scaling(c.rope_scaling) for c in (own, config))
    if ours != theirs:
        raise ConfigError("model.transformer.rope_scaling", f"is {ours}, but {where} says {theirs}")


def _plain_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"kind": "linear", "factor": scaling.factor}
    slow, fast = scaling.resolved_turns
    return asdict(scaling) | {"slow_turns": slow, "fast_turns": fast}


def _check_experts(model: "Transformer", options: Mapping[str, Any] | None, where: Path) -> None:
    if options is None:
        if model.experts:
            raise ConfigError("model.moe", f"makes mixtures of experts, but {where} says that it has none")
        return
    for layer in model.experts.values():
        for name, theirs in options.items():
            ours = getattr(layer.config, name)
            if ours != theirs:
                raise ConfigError(f"model.moe.{name}", f"is {ours}, but {where} says {theirs}")


def _read_json(path: Path, if_missing: str = "does not exist") -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(path, if_missing) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(path, f"is not readable as JSON: {_line(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(path, f"holds a {type(content).__name__}; expected a JSON object")
    return content


def _open_safetensors(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            file, f"is truncated, or is not a safetensors file at all: {_line(error)}"
        ) from error


def _load_pickle(file: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(file, "is damaged, or holds more than tensors") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(
            file, f"is truncated, or is no file of torch.save at all: {_line(error)}"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(file, "holds something other than a dict of tensors")
    return content


def _line(error: Exception) -> str:
    return str(error).split("\n")[0]
