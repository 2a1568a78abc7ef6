"""The run directory ``runs/<name>/``: its files, who may write into it, what it tells of the machine."""

import json
import os
import platform
import shlex
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import memlm
from memlm.errors import ConfigError


@dataclass
class RunConfig:
    """Where the files of a run go."""

    name: str | None = None
    """Name of the run: the folder under run.root. Default: the first --config file's, without suffix."""

    root: str = "runs"
    """Folder that holds the run directories."""


class RunFiles:
    """The files of one run.

    Args:
        directory: The run directory; need not exist.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.config = self.directory / "config.yaml"
        self.environment = self.directory / "environment.json"
        self.model = self.directory / "model.json"
        self.metrics = self.directory / "metrics.csv"
        self.saves = self.directory / "checkpoints.csv"
        self.test = self.directory / "test.json"
        self.tasks = self.directory / "tasks.json"
        self.predictions = self.directory / "predictions.jsonl"
        self.checkpoints = self.directory / "checkpoints"
        self.last = self.checkpoints / "last.ckpt"
        self.best = self.checkpoints / "best.ckpt"

    @classmethod
    def of_run(cls, run: RunConfig, config_files: list[str]) -> "RunFiles":
        """The run directory of a configuration.

        Raises:
            ConfigError: if ``run.name`` is missing, empty or leads out of ``run.root``.
        """
        name = run.name
        if name is None:
            if not config_files:
                raise ConfigError("run.name", "is needed, as there is no --config file to take a name from")
            name = Path(config_files[0]).stem
        if (
            not name.strip()
            or Path(name).is_absolute()
            or ".." in Path(name).parts
            or Path(name) == Path(".")
        ):
            raise ConfigError("run.name", f"{name!r} is not the name of a folder under run.root {run.root!r}")
        return cls(Path(run.root) / name)

    @classmethod
    def of_checkpoint(cls, checkpoint: Path) -> "RunFiles":
        """The run of a checkpoint: the folder above ``checkpoints/``, else the checkpoint's own folder."""
        folder = checkpoint.resolve().parent
        folder = folder.parent if folder.name == "checkpoints" else folder
        # Shown to the user and stored in files: short and relative where it can be.
        return cls(os.path.relpath(folder) if folder.is_relative_to(Path.cwd()) else folder)

    def owns(self, checkpoint: Path) -> bool:
        """Whether a checkpoint lies in this run's directory."""
        return checkpoint.resolve().is_relative_to(self.directory.resolve())

    def check_free(self) -> None:
        """Refuses a directory that holds anything: a fresh run never overwrites another one.

        Raises:
            ConfigError: naming ``run.name``, what the directory holds, and the two ways out.
        """
        if not self.directory.exists():
            return
        if not self.directory.is_dir():
            raise ConfigError("run.name", f"{self.directory} exists and is not a folder")
        held = sorted(path.name for path in self.directory.iterdir())
        if not held:
            return
        shown = ", ".join(held[:6]) + (f" and {len(held) - 6} more" if len(held) > 6 else "")
        raise ConfigError(
            "run.name",
            f"{self.directory} already holds {shown}. To start a new run pass another --run.name; "
            + (
                "to continue this one pass --ckpt_path last"
                if self.last.exists()
                else "there is no checkpoint to continue from, so you may also remove it"
            ),
        )

    def claim(self, fresh: bool) -> None:
        """Makes the directory; a fresh run must be the first to do so.

        Raises:
            ConfigError: if another process has claimed it since :meth:`check_free`.
        """
        if fresh:
            self.check_free()
        self.checkpoints.mkdir(parents=True, exist_ok=not fresh)


def write_text(path: Path, text: str) -> None:
    """Writes a file so that a reader, or a crash, finds the old content or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:  # with the name that the user knows
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file atomically, one key a line."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def describe_environment(arguments: list[str]) -> dict[str, Any]:
    """What a number depends on besides the config: versions, source, machine, command; no host name.

    Args:
        arguments: The words after ``memlm``.
    """
    import torch

    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "command": shlex.join(["memlm", *arguments]),
        "started": now(),
        "memlm": memlm.__version__,
        **_git_state(Path(memlm.__file__).parent),
        "python": platform.python_version(),
        **{package: _version(package) for package in _PACKAGES},
        "system": f"{platform.system()} {platform.release()}",
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "gpus": [f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in devices],
    }


_PACKAGES = (
    "torch",
    "triton",
    "lightning",
    "torchmetrics",
    "jsonargparse",
    "numpy",
    "tokenizers",
    "zstandard",
)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_state(source: Path) -> dict[str, Any]:
    """Commit of the source tree, and whether it was changed since; both None outside a clone."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(source), *words], capture_output=True, text=True, timeout=20
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed copy may lie inside somebody else's repository: only a tree that tracks this package
    # counts.
    if not git("ls-files", "__init__.py"):
        return {"git_commit": None, "git_dirty": None}
    return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": bool(git("status", "--porcelain", "-uno"))}


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None
