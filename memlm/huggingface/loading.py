"""A folder of ``memlm export`` or of Hugging Face as an architecture and a state of ours."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from memlm.errors import CheckpointError
from memlm.huggingface.config import moe_options, transformer_config
from memlm.huggingface.folder import CONFIG, Checkpoint, read_config
from memlm.huggingface.tensors import assemble, plan
from memlm.memory.quantised import FORMATS, use_quantised
from memlm.transformer.moe_config import MoEConfig

__all__ = ["Exported", "load_exported", "use_quantised"]

_OURS = "memlm"
_PREFIX = "model."
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True)
class Exported:
    """What a folder holds."""

    architecture: dict[str, Any]
    """As a checkpoint holds it. Of a folder that is not ours, the vocabulary has as many entries as the
    embedding has rows."""
    state: Mapping[str, Tensor]
    """Tensors by our names, ``output.weight`` too where embeddings are tied; mapped from the files, but for
    the experts of a Mixtral, which are stacked."""
    values_format: str
    """Of the value tables, one of :data:`memlm.memory.quantised.FORMATS`; with int8 and fp8, ``state`` has
    ``pools.<name>.scales``. float32 for a model without tables."""
    context: int
    """Longest sequence that the model is made for, tokens."""
    tokenizer: str | None
    """For :func:`memlm.tokenizers.load_tokenizer`; None if the folder has none that we know."""
    step: int | None
    """Optimizer steps of training, where told."""
    tokens: int | None
    """Tokens of training, where told."""
    ours: bool
    """Whether ``memlm export`` wrote the folder, so that ``architecture`` tells the tokenizer's entries."""


def load_exported(folder: str | Path) -> Exported:
    """Read a folder's config and map its tensors.

    Args:
        folder: With ``config.json`` and safetensors: written by ``memlm export``, or any that
            :mod:`memlm.huggingface` reads (Llama, Mistral, Qwen2, Mixtral).

    Raises:
        CheckpointError: The folder or a file of it is missing or damaged, or is of no model that we can
            compute; names the file.
    """
    folder = Path(folder)
    config, where = read_config(folder), folder / CONFIG
    special = config.get("model_type") == _OURS
    architecture, state, values_format = (_special if special else _standard)(folder, config, where)
    if architecture["transformer"].get("tie_embeddings") and "embedding.weight" in state:
        state["output.weight"] = state["embedding.weight"]
    return Exported(
        architecture,
        state,
        values_format,
        _number(config, "max_position_embeddings", where),
        _tokenizer(folder, config, where),
        config.get("memlm_step"),
        config.get("memlm_tokens"),
        special,
    )


_Parts = tuple[dict[str, Any], dict[str, Tensor], str]
"""Architecture, state and format of the values."""


def _special(folder: Path, config: Mapping[str, Any], where: Path) -> _Parts:
    """A model that only our own code computes."""
    architecture, values_format = config.get(_OURS), config.get("values_format")
    if not isinstance(architecture, dict) or not isinstance(architecture.get("transformer"), dict):
        raise CheckpointError(where, f"has no architecture under {_OURS}; expected what memlm export writes")
    for key in ("class_path", "vocab_size"):
        if key not in architecture:
            raise CheckpointError(where, f"has no {_OURS}.{key}; expected what memlm export writes")
    if values_format not in FORMATS:
        raise CheckpointError(
            where, f"values_format is {values_format!r}; expected one of {', '.join(FORMATS)}"
        )
    state = {}
    checkpoint = Checkpoint(folder)
    for name in checkpoint:
        if not name.startswith(_PREFIX):
            raise CheckpointError(
                folder, f"holds the tensor {name}; expected names that begin with {_PREFIX!r}"
            )
        state[name.removeprefix(_PREFIX)] = checkpoint[name]
    return architecture, state, values_format


def _standard(folder: Path, config: Mapping[str, Any], where: Path) -> _Parts:
    """A model of a family that ``transformers`` knows."""
    transformer, options = transformer_config(config, where), moe_options(config, where)
    architecture: dict[str, Any] = {
        "class_path": "memlm.DenseLM" if options is None else "memlm.MoELM",
        "vocab_size": transformer.vocab_size,
        "transformer": asdict(transformer),
    }
    architecture["transformer"].pop("activation_checkpointing")  # no part of an architecture
    if options is not None:
        architecture["moe"] = asdict(MoEConfig(**options))
        for name in ("auxiliary_loss", "z_loss"):  # no part of an architecture
            architecture["moe"].pop(name)
    checkpoint = Checkpoint(folder)
    parameters = plan(checkpoint, transformer, folder)
    return architecture, {name: assemble(own, checkpoint) for name, own in parameters.items()}, "float32"


def _number(config: Mapping[str, Any], key: str, where: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(where, f"{key} is {value!r}; expected a number of tokens")
    return value


def _tokenizer(folder: Path, config: Mapping[str, Any], where: Path) -> str | None:
    name = config.get("memlm_tokenizer")
    if name == "bytes":
        return name
    if name is not None:
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise CheckpointError(
                where, f"memlm_tokenizer is {name!r}; expected 'bytes' or the name of a file beside it"
            )
        return str(folder / name)
    return next((str(folder / file) for file in _TOKENIZER_FILES if (folder / file).is_file()), None)
