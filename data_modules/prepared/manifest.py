"""What a prepared folder holds: ``manifest.json``, written last, so that its presence means completeness."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from data_modules.file_bytes import Progress
from data_modules.prepared.compression import COMPRESSED_SUFFIX, expand_file, expanded_checksum, stored_size
from data_modules.prepared.files import checksum, write_whole
from data_modules.prepared.shard import Header, read_header
from memlm.errors import DataError
from memlm.tokenizers import Tokenizer, load_tokenizer

NAME = "manifest.json"
FORMAT = "memlm prepared tokens, version 1"
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class ShardInfo:
    """One shard.

    Attributes:
        file: Its name in the folder; of a compressed one, the name that it has when it is expanded.
        documents: Their number.
        tokens: Their number, one end-of-document token for each document among them.
        text_bytes: UTF-8 bytes of the documents' text.
        sha256: Of the (expanded) file.
    """

    file: str
    documents: int
    tokens: int
    text_bytes: int
    sha256: str


@dataclass(frozen=True)
class Counts:
    """What became of the records of all sources.

    Attributes:
        documents: Kept, of both splits.
        tokens: Of those, one end-of-document token for each among them.
        text_bytes: UTF-8 bytes of their text.
        empty: Documents skipped because they hold nothing but white space.
        malformed: Records skipped because they hold no text.
        duplicates: Documents dropped because an earlier one has the same text.
    """

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    empty: int = 0
    malformed: int = 0
    duplicates: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Manifest:
    """The manifest of a prepared folder.

    Attributes:
        folder: Where it is.
        tokenizer: Name of the tokenizer's file in the folder, or ``bytes``.
        tokenizer_hash: SHA-256 (hex) of the tokenizer.
        vocab_size: Number of token ids.
        eos_id: The token that begins every document.
        dtype: Of the tokens, ``uint16`` or ``uint32``.
        compressed: Whether shards are stored compressed by zstandard; `expand` makes them readable.
        splits: Shards of ``train`` and ``validation``, in order.
        counts: What became of the sources' records.
        unreadable: Files that could not be read to their end, each with ``file`` and ``message``.
        sources: The files that were read, each with ``file`` and ``bytes``.
        options: The options of the preparation that decide what the shards hold.
    """

    folder: Path
    tokenizer: str
    tokenizer_hash: str
    vocab_size: int
    eos_id: int
    dtype: str
    compressed: bool
    splits: dict[str, list[ShardInfo]]
    counts: Counts
    unreadable: list[dict[str, str]] = field(default_factory=list)
    sources: list[dict[str, Any]] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: str | Path) -> "Manifest":
        """Read the manifest of a folder.

        Raises:
            DataError: The folder or its manifest is missing or broken.
        """
        folder = Path(folder)
        path = folder / NAME
        try:
            content = json.loads(path.read_bytes())
            if content.pop("format") != FORMAT:
                raise DataError(path, f"has another format; expected {FORMAT!r}")
            listed = content.pop("splits")
            splits = {name: [ShardInfo(**shard) for shard in listed[name]] for name in SPLITS}
            if content["dtype"] not in ("uint16", "uint32"):
                raise DataError(path, f"has tokens of {content['dtype']!r}; expected uint16 or uint32")
            return cls(folder=folder, splits=splits, counts=Counts(**content.pop("counts")), **content)
        except FileNotFoundError:
            if not folder.is_dir():
                raise DataError(folder, "no such folder; expected one made by memlm prepare") from None
            raise DataError(
                folder,
                f"holds no {NAME}; it is not a prepared folder, or its preparation was interrupted: run the "
                "same memlm prepare again",
            ) from None
        except OSError as error:
            raise DataError(path, f"cannot be read ({error.strerror or error})") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(path, f"is not a manifest ({type(error).__name__}: {error})") from None

    def save(self) -> None:
        """Write the manifest into its folder, whole or not at all.

        Raises:
            DataError: It cannot be written.
        """
        content = {"format": FORMAT} | {key: value for key, value in asdict(self).items() if key != "folder"}
        write_whole(self.folder / NAME, (json.dumps(content, indent=1) + "\n").encode())

    def shards(self, split: str) -> list[ShardInfo]:
        """The shards of ``train`` or ``validation``, in order."""
        return self.splits[split]

    def path(self, info: ShardInfo) -> Path:
        """Where a shard lies, or will lie when it is expanded."""
        return self.folder / info.file

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer of the folder.

        Raises:
            DataError: It is missing, broken, or not the one that made the tokens.
        """
        name = self.tokenizer if self.tokenizer == "bytes" else str(self.folder / self.tokenizer)
        tokenizer = load_tokenizer(name)
        if tokenizer.hash != self.tokenizer_hash:
            raise DataError(
                self.folder / self.tokenizer,
                f"is another tokenizer ({tokenizer.hash}) than that of {NAME} ({self.tokenizer_hash})",
            )
        return tokenizer

    def header(self, info: ShardInfo) -> Header:
        """What the header of a shard must say."""
        return Header(
            np.dtype(self.dtype).newbyteorder("<"), info.documents, info.tokens, self.tokenizer_hash
        )

    def check(self) -> None:
        """Check that every shard exists, has its size and the right header, without reading its content.

        Raises:
            DataError: One does not.
        """
        for info in self._all_shards():
            path = self.path(info)
            if not self.compressed or path.exists():
                self._check_header(info)
                continue
            size = stored_size(compressed_path(path))
            if size != self.header(info).file_bytes:
                raise DataError(
                    compressed_path(path),
                    f"is altered: it expands to {size:,} bytes; {NAME} says {self.header(info).file_bytes:,}",
                )

    def verify(self) -> None:
        """Check the content of every shard by its checksum.

        Raises:
            DataError: One is missing, truncated or altered.
        """
        for fault in self.faults():
            raise fault

    def faults(self, progress: Progress | None = None) -> Iterator[DataError]:
        """What is wrong with the shards, by their checksums: each missing, truncated or altered file."""
        for info in self._all_shards():
            path = self.path(info)
            try:
                if self.compressed:
                    self._compare(compressed_path(path), info, expanded_checksum, progress)
                if not self.compressed or path.exists():
                    self._check_header(info)
                    self._compare(path, info, checksum, progress)
            except DataError as error:
                yield error

    def stored_bytes(self) -> int:
        """Bytes that `faults` reads, those of compressed files when expanded."""
        shards = list(self._all_shards())
        expanded = [info for info in shards if self.path(info).exists()] if self.compressed else []
        return sum(self.header(info).file_bytes for info in [*shards, *expanded])

    def _all_shards(self) -> Iterator[ShardInfo]:
        for shards in self.splits.values():
            yield from shards

    def _check_header(self, info: ShardInfo) -> None:
        found = read_header(self.path(info), self.tokenizer_hash)
        if found != self.header(info):
            raise DataError(
                self.path(info),
                f"is altered: it holds {found.documents:,} documents of {found.tokens:,} {found.dtype.name} "
                f"tokens; {NAME} says {info.documents:,} of {info.tokens:,} {self.dtype}",
            )

    def _compare(self, path: Path, info: ShardInfo, checksum_of: Any, progress: Progress | None) -> None:
        found = checksum_of(path, progress)
        if found != info.sha256:
            raise DataError(
                path, f"is altered: its content has the SHA-256 {found}; {NAME} says {info.sha256}"
            )


def compressed_path(path: Path) -> Path:
    """Where the compressed form of a shard lies."""
    return path.with_name(path.name + COMPRESSED_SUFFIX)


def expand(folder: str | Path) -> None:
    """Expand the compressed shards of a folder that are not expanded yet, beside themselves.

    Several processes may do so at once: each file is expanded by one of them while the others wait.

    Args:
        folder: A prepared folder. One without compressed shards is left alone.

    Raises:
        DataError: A shard is missing, altered, or cannot be written.
    """
    manifest = Manifest.load(folder)
    if not manifest.compressed:
        return
    for info in manifest._all_shards():
        path = manifest.path(info)
        if not path.exists():
            expand_file(compressed_path(path), path, info.sha256)
