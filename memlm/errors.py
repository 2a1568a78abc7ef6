"""Errors that a user can mend: the command line prints them as one line, without a traceback."""

from pathlib import Path
from typing import Any


class UserError(Exception):
    """Base of all errors caused by a config, a data set, a checkpoint or a command line."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Not by calling the class with the finished message alone, as exceptions are otherwise unpickled:
        # these come out of worker processes.
        return _restored, (type(self), self.args, self.__dict__)


def _restored(cls: type[UserError], arguments: tuple[Any, ...], attributes: dict[str, Any]) -> UserError:
    error = cls.__new__(cls, *arguments)
    error.__dict__.update(attributes)
    return error


class ConfigError(UserError):
    """A value in the configuration is out of range or contradicts another one.

    Args:
        key: The YAML key at fault, dotted, e.g. ``model.memory.reads``.
        message: What was found and what was expected, with both values.
    """

    def __init__(self, key: str, message: str) -> None:
        self.key = key
        super().__init__(f"{key}: {message}")


class DataError(UserError):
    """A file is missing, unreadable or malformed.

    Args:
        path: The file at fault.
        message: What was found and what was expected.
        line: The 1-based line of the file, where there is one.
    """

    def __init__(self, path: str | Path, message: str, line: int | None = None) -> None:
        self.path = str(path)
        self.message = message
        self.line = line
        super().__init__(f"{path}:{line}: {message}" if line is not None else f"{path}: {message}")

    def with_hint(self, hint: str) -> "DataError":
        """The same error with more to its message: what the user can do about it."""
        return DataError(self.path, f"{self.message}; {hint}", self.line)


class CheckpointError(UserError):
    """A checkpoint is missing, unreadable, or does not fit the model or the data.

    Args:
        path: The checkpoint file at fault.
        message: What was found and what was expected.
    """

    def __init__(self, path: str | Path, message: str) -> None:
        self.path = str(path)
        super().__init__(f"{path}: {message}")


def is_users(error: BaseException) -> bool:
    """Whether a user can mend this error: it is shown as one line, and ends a command with code 2."""
    if isinstance(error, OSError):  # a file that cannot be read or written
        return error.filename is not None
    # Lightning's own complaint about contradicting Trainer arguments; by name, for it may not be imported.
    return isinstance(error, UserError) or type(error).__name__ == "MisconfigurationException"


def line_of(error: BaseException) -> str:
    """What is said of an error that a user can mend."""
    message = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
    return f"memlm: error: {' '.join(message.split())}"
