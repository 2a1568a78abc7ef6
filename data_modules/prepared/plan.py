"""What is to be done to prepare a folder: which part of the input becomes which shard.

A plan depends on the input files and the options that decide the output, and on nothing else: not on the
number of workers, nor on what was done before an interruption.
"""

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_modules.readers import Piece, split_file
from memlm.errors import ConfigError, DataError, UserError
from memlm.tokenizers import Tokenizer

PIECES_PER_UNIT = 4
"""Files are cut finer than units, so that units come out about equally large."""

State = tuple[int, int]
"""A file's size in bytes and the time of its last change in nanoseconds; -1, -1 if it cannot be asked."""


@dataclass(frozen=True)
class Options:
    """The options that decide what the shards hold, see `data_modules.prepared.verb.prepare`."""

    text_key: str
    document_separator: str | None
    validation_fraction: float
    seed: int
    deduplicate: bool
    compress: bool
    shard_megabytes: float

    def __post_init__(self) -> None:
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError(
                "validation_fraction", f"is {self.validation_fraction}; expected 0 <= validation_fraction < 1"
            )
        if not 0 < self.shard_megabytes < math.inf:
            raise ConfigError("shard_megabytes", f"is {self.shard_megabytes}; expected a positive number")
        if self.document_separator == "":
            raise ConfigError("document_separator", "is empty; leave it out for one document a file")


@dataclass(frozen=True)
class Unit:
    """What becomes one shard of each split.

    Attributes:
        pieces: Of files, in order.
        bytes: What they cover of the files as they lie on the disk, for parquet files about.
    """

    pieces: list[Piece]
    bytes: int


@dataclass(frozen=True)
class Plan:
    """The whole work.

    Attributes:
        options: The options that decide the output.
        tokenizer_hash: SHA-256 (hex) of the tokenizer.
        files: The input files by name, in order, each with its state.
        units: All pieces of all files, in order.
    """

    options: Options
    tokenizer_hash: str
    files: dict[Path, State]
    units: list[Unit]

    @classmethod
    def of(
        cls, files: Sequence[Path], options: Options, tokenizer: Tokenizer, skip_unreadable: bool
    ) -> "Plan":
        """Look at the input files.

        Raises:
            DataError: One cannot be read, and ``skip_unreadable`` does not leave that to the worker.
        """
        states = {path: file_state(path) for path in files}
        total = sum(max(size, 0) for size, _ in states.values())
        wanted = options.shard_megabytes * 1e6
        size = total / max(math.ceil(total / wanted), 1)
        # A piece belongs to the unit in which its middle lies.
        units: dict[int, list[tuple[Piece, float]]] = {}
        before = 0.0
        for path, (file_size, _) in states.items():
            try:
                pieces = split_file(path, max(math.ceil(size / PIECES_PER_UNIT), 1))
            except DataError:
                if not skip_unreadable:
                    raise
                pieces = [Piece(path)]
            for piece, share in zip(pieces, _shares(pieces), strict=True):
                covered = max(file_size, 0) * share
                units.setdefault(int((before + covered / 2) / max(size, 1)), []).append((piece, covered))
                before += covered
        return cls(options, tokenizer.hash, states, [_unit(units[key]) for key in sorted(units)])

    def describe(self) -> dict[str, Any]:
        """What an interrupted preparation remembers of its plan, as JSON."""
        units = [[[str(p.path), p.start, p.stop] for p in unit.pieces] for unit in self.units]
        return {
            "options": asdict(self.options),
            "tokenizer_hash": self.tokenizer_hash,
            "files": {str(path): list(state) for path, state in self.files.items()},
            "units": hashlib.sha256(repr(units).encode()).hexdigest(),
        }


def file_state(path: Path) -> State:
    """The file's size and time of change."""
    try:
        found = os.stat(path)
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


def difference(folder: Path, made: dict[str, Any], wanted: dict[str, Any]) -> UserError | None:
    """The error for a folder that another command makes or has made.

    Args:
        folder: The output folder.
        made: `Plan.describe` of what the folder is made of; its files may lack the time of change.
        wanted: `Plan.describe` of this command.
    """
    ending = f"; give what {folder} was begun with, or remove that folder to start over"
    for key, value in wanted["options"].items():
        if made["options"].get(key) != value:
            return ConfigError(key, f"is {value!r}; it was {made['options'].get(key)!r}{ending}")
    if made["tokenizer_hash"] != wanted["tokenizer_hash"]:
        hashes = f"has the hash {wanted['tokenizer_hash']}; it was one with {made['tokenizer_hash']}"
        return ConfigError("tokenizer", hashes + ending)
    before, now = made["files"], wanted["files"]
    for name in [*now, *(name for name in before if name not in now)]:
        if name not in before:
            return DataError(name, f"is new among the inputs (paths){ending}")
        if name not in now:
            return DataError(name, f"is no longer among the inputs (paths){ending}")
        if before[name][0] != now[name][0]:
            return DataError(name, f"has {now[name][0]:,} bytes; it had {before[name][0]:,}{ending}")
        if len(before[name]) > 1 and before[name] != now[name]:
            return DataError(name, f"was changed since the preparation began{ending}")
    if made.get("units", wanted["units"]) != wanted["units"]:
        return DataError(folder, "was begun by another version of memlm; remove it to start over")
    return None


def _shares(pieces: list[Piece]) -> list[float]:
    """The pieces' shares of their file: exact for ranges of bytes; row groups count as equally large."""
    lengths = [piece.stop - piece.start for piece in pieces if piece.stop is not None]
    if len(lengths) < len(pieces) or sum(lengths) == 0:
        return [1 / len(pieces)] * len(pieces)
    return [length / sum(lengths) for length in lengths]


def _unit(pieces: list[tuple[Piece, float]]) -> Unit:
    return Unit([piece for piece, _ in pieces], round(sum(covered for _, covered in pieces)))
