"""Reading and writing the files of tokenizers."""

import os
from pathlib import Path

from memlm.errors import DataError


def read_file(path: str | Path) -> bytes:
    """The content of a tokenizer's file.

    Raises:
        DataError: There is none, or it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except IsADirectoryError:
        raise DataError(path, "is a directory; give the path of its tokenizer.json") from None
    except FileNotFoundError:
        raise DataError(
            path,
            "no such file; a tokenizer is 'bytes' or the path of a tokenizer.json, of a SentencePiece model "
            "or of tiktoken ranks (data.tokenizer)",
        ) from None
    except OSError as error:
        raise DataError(path, f"cannot be read ({error.strerror or error})") from None


def save_file(folder: Path, name: str, content: bytes) -> str:
    """Write a tokenizer's file unless it is there already.

    Returns:
        ``name``.

    Raises:
        DataError: It cannot be written, or a file of that name holds something else.
    """
    path = folder / name
    if not path.exists():
        write_whole(path, content)
    elif read_file(path) != content:
        raise DataError(path, "exists already and holds another tokenizer; choose another folder")
    return name


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a crash leaves all of it or nothing under its name.

    Raises:
        DataError: It cannot be written.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(unfinished, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        raise DataError(path, f"cannot be written ({error.strerror or error})") from None
    finally:
        unfinished.unlink(missing_ok=True)
