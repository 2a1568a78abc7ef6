"""A trained model, as generation and evaluation take it: weights, tokenizer, what it was trained with."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from memlm.errors import CheckpointError, DataError, UserError
from memlm.run_directory import RunFiles
from memlm.tokenizers import Tokenizer, load_tokenizer
from memlm.transformer import Transformer
from memlm.usage_errors import explain


@dataclass
class TrainedModel:
    """A model ready to be read from: in evaluation mode, without gradients."""

    model: Transformer
    tokenizer: Tokenizer
    architecture: dict[str, Any]
    """As a checkpoint holds it: ``class_path``, ``vocab_size``, ``transformer``, ``memory`` or ``moe``."""
    context: int
    """Longest sequence that it was trained with, tokens."""
    source: Path
    """The file, or the exported folder."""
    step: int | None = None
    """Optimizer steps of training, where known."""
    tokens: int | None = None
    """Tokens of training, where known."""
    run: RunFiles | None = None
    """The run directory; None for an exported folder."""


def load_trained(
    path: str | Path,
    *,
    tokenizer: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> TrainedModel:
    """Load a model from where training or an export has left it.

    Parameters are mapped from a file and not copied: a table of values larger than memory takes none before
    its rows are read, unless it is moved to another device. A checkpoint that is a folder, of several ranks,
    is read into memory, once.

    Args:
        path: A run directory, whose last checkpoint is taken; a ``.ckpt`` file; or a folder of ``memlm
            export`` or of Hugging Face, with a ``config.json``.
        tokenizer: Name of the tokenizer, see :func:`load_tokenizer`. Default: that of the run's config, or of
            the folder.
        dtype: Of all parameters but the pools', which keep theirs. Default: as they were saved.
        device: Where to.

    Raises:
        CheckpointError: There is no such checkpoint, or it is damaged or none of memlm's.
        DataError: The tokenizer cannot be made, or is not that of training.
    """
    path = Path(path)
    if (path / "config.json").exists():
        trained = _from_export(path, tokenizer)
    else:
        trained = _from_checkpoint(path, tokenizer)
    model = trained.model.eval().requires_grad_(False)
    if dtype is not None:
        for name, child in model.named_children():
            if name != "pools":
                child.to(dtype)
    model.to(device)
    return trained


def build(architecture: Mapping[str, Any]) -> Transformer:
    """A transformer of that architecture, on the meta device: without memory for its parameters.

    Raises:
        UserError: There is no such class, or an option is not one of its.
    """
    # Seconds of imports.
    from memlm.language_models import LanguageModel
    from memlm.meta_model import instantiate

    sections = {key: value for key, value in architecture.items() if key not in ("class_path", "vocab_size")}
    init_args = {"vocab_size": architecture["vocab_size"], **sections}
    with torch.device("meta"):
        model = instantiate(LanguageModel, {"class_path": architecture["class_path"], "init_args": init_args})
    return model.transformer


def assign(model: Transformer, state: Mapping[str, Tensor], where: Path) -> None:
    """Let a model on the meta device take tensors for its parameters and buffers, without a copy.

    Args:
        model: From :func:`build`.
        state: By its names.
        where: They come from, for messages.

    Raises:
        CheckpointError: A name is missing or left over, or a shape differs.
    """
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        detail = "; ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise CheckpointError(where, f"does not fit its own architecture: {detail}") from error
    if model.config.tie_embeddings:
        model.output.weight = model.embedding.weight
    for module in model.modules():  # counters that no checkpoint holds
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.zeros_like(buffer, device="cpu"))


def _from_checkpoint(path: Path, tokenizer: str | None) -> TrainedModel:
    from memlm.parallel.checkpoint_folder import is_checkpoint_folder, read_whole
    from memlm.resume import read_checkpoint, resolve_checkpoint

    if path.is_dir() and not is_checkpoint_folder(path):
        if not (path / "checkpoints").is_dir():
            raise CheckpointError(
                path, "is neither a run directory (no checkpoints/) nor an exported folder (no config.json)"
            )
        path = resolve_checkpoint("last", RunFiles(path))
    elif not path.exists():
        raise CheckpointError(path, "does not exist; expected a run directory, a .ckpt file or a folder")
    checkpoint = read_whole(path, optimizer=False) if path.is_dir() else read_checkpoint(path)
    architecture = checkpoint["architecture"]
    model = _built(architecture, path)
    prefix = "transformer."
    state = checkpoint["state_dict"]
    assign(model, {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}, path)
    run = RunFiles.of_checkpoint(path)
    made, context = _of_data(run, tokenizer)
    _check_tokenizer(made, architecture, checkpoint, path)
    return TrainedModel(
        model,
        made,
        architecture,
        context=context,
        source=path,
        step=checkpoint["global_step"],
        tokens=checkpoint.get("tokens_seen"),
        run=run,
    )


def _from_export(folder: Path, tokenizer: str | None) -> TrainedModel:
    from memlm.huggingface.loading import load_exported, use_quantised

    exported = load_exported(folder)
    model = _built(exported.architecture, folder)
    if exported.values_format in ("int8", "fp8"):
        use_quantised(model, exported.values_format)
    assign(model, exported.state, folder)
    name = exported.tokenizer if tokenizer is None else tokenizer
    if name is None:
        raise DataError(folder, "holds no tokenizer; name one with --tokenizer")
    made = load_tokenizer(name)
    _check_tokenizer(made, exported.architecture, {}, folder)
    return TrainedModel(
        model,
        made,
        exported.architecture,
        context=exported.context,
        source=folder,
        step=exported.step,
        tokens=exported.tokens,
    )


def _built(architecture: Mapping[str, Any], where: Path) -> Transformer:
    try:
        return build(architecture)
    except UserError as error:
        raise CheckpointError(where, f"describes no possible model: {explain(str(error))}") from error


def _data_section(run: RunFiles) -> dict[str, Any]:
    """The ``data`` section of a run's config; empty where there is none."""
    try:
        content = yaml.safe_load(run.config.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(run.config, f"cannot be read: {error}") from error
    data = content.get("data") if isinstance(content, dict) else None
    return data if isinstance(data, dict) else {}


def _of_data(run: RunFiles, name: str | None) -> tuple[Tokenizer, int]:
    """Tokenizer and sequence length of a run's data, which is made only where its config does not tell."""
    section = _data_section(run)
    if not section:
        raise DataError(
            run.config,
            "has no data section (or does not exist); expected one, for tokenizer and sequence length "
            "of training",
        )
    init_args = section.get("init_args") or {}
    name = init_args.get("tokenizer") if name is None else name
    length = init_args.get("sequence_length")
    if isinstance(name, str) and isinstance(length, int):
        return load_tokenizer(name), length
    # Seconds of imports.
    from data_modules.base import LanguageDataModule
    from memlm.meta_model import instantiate

    try:
        data = instantiate(LanguageDataModule, section)
    except UserError as error:
        raise DataError(run.config, f"describes data that cannot be made: {error}") from error
    return (load_tokenizer(name) if isinstance(name, str) else data.tokenizer), data.sequence_length


def _check_tokenizer(
    tokenizer: Tokenizer, architecture: Mapping[str, Any], checkpoint: Mapping[str, Any], where: Path
) -> None:
    """The tokenizer is that of training, as far as can be told."""
    states = (value for value in checkpoint.values() if isinstance(value, dict) and "tokenizer_hash" in value)
    for state in states:
        if state["tokenizer_hash"] != tokenizer.hash:
            raise DataError(
                where,
                f"was trained with another tokenizer (hash {state['tokenizer_hash']}) than this one (hash "
                f"{tokenizer.hash})",
            )
    if tokenizer.vocab_size > architecture["vocab_size"]:
        raise DataError(
            where,
            f"has a vocabulary of {architecture['vocab_size']} tokens, but the tokenizer has "
            f"{tokenizer.vocab_size}",
        )
