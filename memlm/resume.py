"""Which checkpoint a command means, and what of it beats defaults: the architecture, nothing else."""

import pickle
import re
from pathlib import Path
from typing import Any

import torch

from memlm.errors import CheckpointError, ConfigError
from memlm.parallel.checkpoint_folder import META
from memlm.parallel.folder_swap import recover
from memlm.run_directory import RunFiles

_NEEDED_KEYS = ("state_dict", "global_step", "architecture")


def resolve_checkpoint(ckpt_path: str, run: RunFiles, weights_only: bool = True) -> Path:
    """The file that ``--ckpt_path`` means.

    Args:
        ckpt_path: ``last`` (the run's newest checkpoint), ``best`` (the one of lowest validation loss) or a
            path.
        run: The run that ``last`` and ``best`` refer to.
        weights_only: See :func:`read_checkpoint`; ``last`` reads the steps of all checkpoints.

    Raises:
        CheckpointError: if there is no such checkpoint.
    """
    for own in (run.best, run.last):
        recover(own)
    if ckpt_path == "best":
        if not run.best.exists():
            raise CheckpointError(run.best, f"does not exist: run {run.directory} has no best checkpoint")
        return run.best
    if ckpt_path == "last":
        found = sorted(run.checkpoints.glob("*.ckpt")) if run.checkpoints.is_dir() else []
        if not found:
            raise CheckpointError(
                run.checkpoints, f"holds no checkpoint: run {run.directory} has none to continue"
            )
        # Checkpoints that a callback of the user's has added can be newer than last.ckpt; best.ckpt cannot.
        found = [path for path in found if path != run.best] or found
        return max(
            found, key=lambda path: (read_checkpoint(path, weights_only)["global_step"], path == run.last)
        )
    path = Path(ckpt_path)
    recover(path)
    if not path.exists():
        hint = "" if path.suffix else "; expected last, best or the path of a .ckpt file"
        raise CheckpointError(path, f"does not exist{hint}")
    return path


def read_checkpoint(path: Path, weights_only: bool = True) -> dict[str, Any]:
    """Reads a checkpoint's structure without copying its tensors into memory.

    Args:
        path: The file, or the folder of a sharded checkpoint, whose ``meta.pt`` is read.
        weights_only: False unpickles arbitrary objects, which can run any code: only for files that you
            trust.

    Raises:
        CheckpointError: if the file is truncated, is not a checkpoint, or was not written by memlm.
    """
    file = path / META if path.is_dir() else path
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=weights_only, mmap=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError(
            path,
            f"is damaged, or holds more than tensors ({found[1] if found else 'pickled objects'}); "
            "such a file can run code: if you trust its author, pass --weights_only false",
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        detail = str(error).split("\n")[0]
        if "torch.save" in detail:  # advice to whoever saved it
            detail = "no archive of torch"
        raise CheckpointError(path, f"is truncated, or is not a checkpoint at all: {detail}") from error
    needed = _NEEDED_KEYS if not path.is_dir() else _NEEDED_KEYS[1:]
    missing = [key for key in needed if not isinstance(checkpoint, dict) or key not in checkpoint]
    if missing:
        raise CheckpointError(path, f"is not a checkpoint of memlm: it lacks {', '.join(missing)}")
    return checkpoint


def architecture_overrides(
    architecture: dict[str, Any], model: dict[str, Any], explicit: dict[str, Any], path: Path
) -> dict[str, Any]:
    """The architecture settings that a checkpoint supplies: all those that the user did not set.

    Args:
        architecture: ``checkpoint["architecture"]``: ``class_path``, ``vocab_size`` and groups such as
            ``transformer``.
        model: The parsed ``model`` section: ``class_path`` and ``init_args``.
        explicit: The same section with only what a config file or a flag has set.
        path: The checkpoint, for messages.

    Returns:
        ``init_args`` to merge over the parsed ones.

    Raises:
        ConfigError: if an explicit setting contradicts the checkpoint; names the key, the file and both
            values.
    """
    if _class_name(model["class_path"]) != _class_name(architecture["class_path"]):
        raise _conflict("model.class_path", model["class_path"], architecture["class_path"], path)
    groups = {key: value for key, value in architecture.items() if key not in ("class_path", "vocab_size")}
    return _unset(groups, explicit.get("init_args") or {}, "model", path)


def check_architecture(built: dict[str, Any], stored: dict[str, Any], path: Path) -> None:
    """Compares the architecture of the model that was built with the checkpoint's.

    Args:
        built: ``model.architecture()``.
        stored: ``checkpoint["architecture"]``.
        path: The checkpoint, for messages.

    Raises:
        ConfigError: at the first difference, e.g. a tokenizer whose vocabulary does not fit.
    """
    ours, theirs = flatten(built), flatten(stored)
    for key in sorted(ours.keys() | theirs.keys()):
        ours_value, theirs_value = ours.get(key), theirs.get(key)
        if key == "class_path":
            ours_value, theirs_value = _class_name(str(ours_value)), _class_name(str(theirs_value))
        if plain(ours_value) != plain(theirs_value):
            name = "data (its tokenizer sets model.vocab_size)" if key == "vocab_size" else f"model.{key}"
            raise _conflict(name, ours_value, theirs_value, path)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of a nested dict; empty dicts are dropped."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _unset(stored: dict[str, Any], explicit: dict[str, Any], prefix: str, path: Path) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in stored.items():
        if key not in explicit:
            result[key] = value
        elif isinstance(value, dict) and isinstance(explicit[key], dict):
            result[key] = _unset(value, explicit[key], f"{prefix}.{key}", path)
        # An explicit null means "work it out", which the stored, worked-out value cannot contradict here:
        # check_architecture compares the results.
        elif explicit[key] is not None and plain(explicit[key]) != plain(value):
            raise _conflict(f"{prefix}.{key}", explicit[key], value, path)
    return result


def _conflict(key: str, ours: Any, theirs: Any, path: Path) -> ConfigError:
    return ConfigError(
        key,
        f"is set to {ours!r}, but checkpoint {path} was trained with {theirs!r}; "
        "the architecture of a checkpoint is fixed: remove the setting or use another checkpoint",
    )


def plain(value: Any) -> Any:
    """A value with its tuples as lists, as YAML has them: the two do not differ."""
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value


def _class_name(class_path: str) -> str:
    # memlm.MemoryLM and memlm.language_models.MemoryLM are one class.
    return class_path.rsplit(".", 1)[-1]
