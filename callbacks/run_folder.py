"""Where a callback's own files go."""

from pathlib import Path

from lightning.pytorch import Trainer

from callbacks.run_directory import RunDirectory


def run_folder(trainer: Trainer) -> Path | None:
    """The run directory, or None in a process that must not write: a further rank, or a fast_dev_run.

    Without a `RunDirectory` callback (a Trainer made by hand) it is ``trainer.default_root_dir``.
    """
    if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, RunDirectory):
            return callback.files.directory
    return Path(trainer.default_root_dir)
