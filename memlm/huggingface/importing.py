"""A run directory of a Hugging Face folder: ``memlm test``, ``fit`` and all else go on from there."""

import mmap
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from memlm.errors import CheckpointError, DataError, UserError
from memlm.huggingface.loading import Exported, load_exported
from memlm.language_models import LanguageModel
from memlm.memory.quantised import dequantise, row_chunks
from memlm.meta_model import instantiate
from memlm.resume import plain
from memlm.run_directory import RunFiles, describe_environment, write_json, write_text
from memlm.tokenizers import Tokenizer, load_tokenizer

_PREFIX = "transformer."


def import_model(
    folder: str | Path,
    run: RunFiles,
    *,
    tokenizer: str | None = None,
    paths: Sequence[str] = (),
    command: Sequence[str] = (),
) -> LanguageModel:
    """Make a run directory of an exported folder, or of one of Hugging Face.

    It holds config.yaml, with the architecture and a data section of text files; the tokenizer; and
    checkpoints/last.ckpt, without optimizer state and at step 0. Parameters are stored in fp32, values in the
    type that the architecture says, whatever the folder has. The directory appears when it is whole.

    Args:
        folder: See :func:`memlm.huggingface.loading.load_exported`.
        run: The directory to make; must be missing or empty.
        tokenizer: See :func:`memlm.tokenizers.load_tokenizer`. Default: the folder's.
        paths: Text files of the data section.
        command: The words after ``memlm``, for environment.json.

    Returns:
        The model, on the meta device.

    Raises:
        CheckpointError: The folder cannot be read, or its tensors are not those of its architecture.
        DataError: The tokenizer is missing or has more entries than the model, or the directory is taken.
    """
    folder, directory = Path(folder), run.directory
    _check_free(directory)
    exported = load_exported(folder)
    name = exported.tokenizer if tokenizer is None else tokenizer
    if name is None:
        raise DataError(folder, "holds no tokenizer; name one with --tokenizer")
    used = load_tokenizer(name)
    model = _model(exported, used, folder)
    _check_state(exported, model, folder)
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    try:
        (temporary / "checkpoints").mkdir(parents=True)
        _write_checkpoint(temporary / "checkpoints" / run.last.name, exported, model)
        saved = used.save(temporary)
        name = saved if saved == "bytes" else str(directory / saved)
        write_text(temporary / run.config.name, _config(run, exported, model, name, list(paths)))
        environment = describe_environment(list(command)) | {"imported_from": str(folder)}
        write_json(temporary / run.environment.name, environment)
        os.replace(temporary, directory)
    except OSError as error:
        raise DataError(directory, f"cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return model


def _check_free(directory: Path) -> None:
    if directory.is_dir() and not any(directory.iterdir()):
        return
    if directory.exists():
        raise DataError(directory, "exists already, and an import overwrites nothing; choose another name")


def _model(exported: Exported, tokenizer: Tokenizer, folder: Path) -> LanguageModel:
    """The model on the meta device; ``vocab_size`` is that of the tokenizer."""
    rows = exported.architecture["vocab_size"]
    if tokenizer.vocab_size > rows or (exported.ours and tokenizer.vocab_size < rows):
        expected = f"{rows}" if exported.ours else f"at most {rows}"
        raise DataError(
            folder, f"needs a tokenizer of {expected} entries; this one has {tokenizer.vocab_size}"
        )
    init_args = {"vocab_size": tokenizer.vocab_size, **_sections(exported.architecture)}
    try:
        with torch.device("meta"):
            return instantiate(
                LanguageModel, {"class_path": exported.architecture["class_path"], "init_args": init_args}
            )
    except UserError as error:
        raise CheckpointError(folder, f"describes no possible model: {error}") from error


def _sections(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of an architecture, which are options of the model's class."""
    return {key: value for key, value in architecture.items() if key not in ("class_path", "vocab_size")}


def _check_state(exported: Exported, model: LanguageModel, folder: Path) -> None:
    expected = model.transformer.state_dict()
    scales = {f"pools.{name}.scales" for name in model.pools} if _is_quantised(exported) else set()
    missing = sorted((expected.keys() | scales) - exported.state.keys())
    left_over = sorted(exported.state.keys() - expected.keys() - scales)
    for names, what in ((missing, "lacks the tensor"), (left_over, "has no place for the tensor")):
        if names:
            raise CheckpointError(folder, f"{what} {names[0]} of its architecture ({len(names)} such)")
    for name, own in expected.items():
        if exported.state[name].shape != own.shape:
            found = list(exported.state[name].shape)
            raise CheckpointError(folder, f"tensor {name} has shape {found}; expected {list(own.shape)}")


def _is_quantised(exported: Exported) -> bool:
    return exported.values_format in ("int8", "fp8")


def _config(run: RunFiles, exported: Exported, model: LanguageModel, tokenizer: str, paths: list[str]) -> str:
    architecture = model.architecture()
    root = run.directory.parent
    content = {
        "run": {"name": run.directory.name, "root": str(root)},
        "model": {"class_path": architecture["class_path"], "init_args": plain(_sections(architecture))},
        "data": {
            "class_path": "TextStream",
            "init_args": {
                "paths": paths,
                "tokenizer": tokenizer,
                "sequence_length": exported.context,
            },
        },
    }
    return yaml.safe_dump(content, sort_keys=False)


def _write_checkpoint(path: Path, exported: Exported, model: LanguageModel) -> None:
    """Write a checkpoint of Lightning's without ever holding a table of values in memory.

    First all but the numbers is written, with room for them; then the file is mapped, and filled.
    """
    own = model.transformer.state_dict()
    with FakeTensorMode():
        state = {
            f"{_PREFIX}{name}": torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            for name, tensor in own.items()
        }
        if model.transformer.config.tie_embeddings:
            state[f"{_PREFIX}output.weight"] = state[f"{_PREFIX}embedding.weight"]
        content = {
            "pytorch-lightning_version": lightning.__version__,
            "epoch": 0,
            "global_step": 0,
            "state_dict": state,
            # Lists of no states: training starts with a fresh optimizer and schedule.
            "optimizer_states": [],
            "lr_schedulers": [],
            "architecture": model.architecture(),
            "tokens_seen": exported.tokens or 0,
            "trained": model.trained,
        }
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(content, path)
    with open(path, "r+b") as file:
        if hasattr(os, "posix_fallocate"):
            # Or a full disk would end the process where the mapped file is written.
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        with _written_through():
            stored = torch.load(path, mmap=True, weights_only=True)["state_dict"]
        for name in own:
            _fill(stored[f"{_PREFIX}{name}"], name, exported)
        del stored
        os.fsync(file.fileno())


@contextmanager
def _written_through() -> Iterator[None]:
    """What is loaded inside is the file: to change a tensor is to change the file."""
    before = torch.serialization.get_default_mmap_options()
    assert before is not None, "only Windows has none"
    torch.serialization.set_default_mmap_options(mmap.MAP_SHARED)
    try:
        yield
    finally:
        torch.serialization.set_default_mmap_options(before)


def _fill(target: Tensor, name: str, exported: Exported) -> None:
    source: Tensor = exported.state[name]
    if name.startswith("pools.") and _is_quantised(exported):
        dequantise(source, exported.state[f"{name.removesuffix('values')}scales"], target)
    elif target.dim() == 2:
        for part in row_chunks(target):
            target[part] = source[part]
    else:
        target.copy_(source)


def summary(model: LanguageModel, run: RunFiles, paths: Sequence[str]) -> str:
    """What was imported, and what can be done with it."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    config = f"--config {run.config}"
    given = "" if paths else " --data.paths='[\"my/*.txt\"]'"
    fit = f"memlm fit {config} --ckpt_path {run.last} --run.name NEW --trainer.max_steps N{given}"
    return (
        f"{run.directory}: {type(model).__name__} of {parameters:,} parameters\n"
        f"  measure it:  memlm test {config} --ckpt_path last{given}\n"
        f"  train it on: {fit}\n"
        f"  use it:      memlm generate {run.directory}"
    )
