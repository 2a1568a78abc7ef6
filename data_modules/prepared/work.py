"""What worker processes do with a unit: hash its documents, or make shards of their tokens."""

import ctypes
import hashlib
import json
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_modules.prepared.compression import compress_file
from data_modules.prepared.duplicates import duplicates_of, save_hashes
from data_modules.prepared.files import checksum, write_whole
from data_modules.prepared.manifest import SPLITS, Counts, ShardInfo, compressed_path
from data_modules.prepared.plan import Plan
from data_modules.prepared.read_ahead import ReadAhead
from data_modules.prepared.reading import Faults, UnitReader
from data_modules.prepared.shard import ShardWriter, smallest_dtype
from data_modules.readers import is_held_out
from memlm.errors import DataError
from memlm.tokenizers import Tokenizer

BATCH_CHARACTERS = 1 << 20
"""Text that is tokenized at once, or a single document that is longer."""
LONG_CHARACTERS = 1 << 24
"""A document that leaves much to be freed."""
STATE = ".preparing"
"""Folder in the output folder with what an interrupted preparation knows."""


@dataclass(frozen=True)
class Job:
    """What all workers know.

    Attributes:
        plan: The whole work.
        folder: The output folder.
        tokenizer: Makes tokens of the text.
        faults: Say what is skipped.
        threads: That tokenize in each process.
    """

    plan: Plan
    folder: Path
    tokenizer: Tokenizer
    faults: Faults
    threads: int

    @property
    def state(self) -> Path:
        """The folder of what is known of finished work."""
        return self.folder / STATE

    def record_path(self, unit: int) -> Path:
        """The file whose presence means that the unit's shards are whole."""
        return self.state / f"unit-{unit:05d}.json"

    def shard_path(self, split: str, unit: int) -> Path:
        """The (expanded) shard of a unit."""
        return self.folder / f"{split}-{unit:05d}.tokens"

    def reader(self, unit: int, progress: Callable[[int], object]) -> UnitReader:
        """Reads a unit once."""
        plan = self.plan
        return UnitReader(plan.units[unit].pieces, plan.files, plan.options, self.faults, progress)


@dataclass(frozen=True)
class Record:
    """What became of a unit.

    Attributes:
        shards: By split; none where the unit has no document for it.
        counts: Of its documents.
        unreadable: Files that could not be read to their end.
        notes: The first few skipped records.
    """

    shards: dict[str, ShardInfo]
    counts: Counts
    unreadable: list[dict[str, str]]
    notes: list[str]

    @classmethod
    def load(cls, path: Path) -> "Record":
        """Read a record."""
        content = json.loads(path.read_bytes())
        shards = {split: ShardInfo(**shard) for split, shard in content["shards"].items()}
        return cls(shards, Counts(**content["counts"]), content["unreadable"], content["notes"])

    def save(self, path: Path) -> None:
        """Write the record, whole or not at all."""
        write_whole(path, json.dumps(asdict(self)).encode())


def hash_unit(job: Job, unit: int, progress: Callable[[int], object]) -> None:
    """Write the hashes of a unit's documents.

    Raises:
        DataError: A record or file is at fault, or the hashes cannot be written.
    """
    digests = bytearray()
    for text in job.reader(unit, progress).texts():
        digests += hashlib.blake2b(text.encode(), digest_size=16).digest()
    save_hashes(job.state, unit, digests)


def tokenize_unit(job: Job, unit: int, progress: Callable[[int], object]) -> None:
    """Write the shards of a unit, and then its record.

    Raises:
        DataError: A record or file is at fault, or a shard cannot be written.
    """
    reader = job.reader(unit, progress)
    batches = _Batches(job, unit, reader)
    dtype, eos = smallest_dtype(job.tokenizer.vocab_size), job.tokenizer.eos_id
    writers: dict[str, ShardWriter] = {}
    text_bytes: Counter[str] = Counter()
    try:
        with ReadAhead(
            iter(batches), lambda batch: batch.characters, (job.threads + 3) * BATCH_CHARACTERS
        ) as ahead:
            for batch, documents in _encoded(ahead, job):
                parts: defaultdict[str, list[NDArray[Any]]] = defaultdict(list)
                for split, size, tokens in zip(batch.splits, batch.sizes, documents, strict=True):
                    parts[split].append(tokens)
                    text_bytes[split] += size
                for split, some in parts.items():
                    if split not in writers:
                        path = job.shard_path(split, unit)
                        writers[split] = ShardWriter(path, dtype, job.tokenizer.hash)
                    writers[split].add_all(some, eos)
        shards = {
            split: _finished(writers[split], text_bytes[split], job.plan.options.compress)
            for split in SPLITS
            if split in writers
        }
    finally:
        for writer in writers.values():
            writer.abort()
    counts = Counts(
        documents=sum(shard.documents for shard in shards.values()),
        tokens=sum(shard.tokens for shard in shards.values()),
        text_bytes=text_bytes.total(),
        empty=reader.skipped["empty"],
        malformed=reader.skipped["malformed"],
        duplicates=batches.duplicates,
    )
    Record(shards, counts, reader.unreadable, reader.notes).save(job.record_path(unit))


def utf8_bytes(text: str) -> int:
    """Bytes of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


@dataclass
class _Batch:
    """Some documents' texts (until they are tokenized), splits and UTF-8 bytes."""

    texts: list[str] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    characters: int = 0

    def tokenized(self, tokenizer: Tokenizer) -> list[NDArray[np.int32]]:
        """The documents' tokens. Their text is let go: it may be long."""
        texts, self.texts = self.texts, []
        tokens = tokenizer.encode_batch(texts)
        if self.characters >= LONG_CHARACTERS:
            del texts
            _return_freed_memory()
        return tokens


class _Batches:
    """The documents of a unit that are kept, in batches, each with its split."""

    def __init__(self, job: Job, unit: int, reader: UnitReader) -> None:
        self._reader, self._folder = reader, job.folder
        self._options = job.plan.options
        self._copies = duplicates_of(job.state, unit) if self._options.deduplicate else None
        self.duplicates = 0

    def __iter__(self) -> Iterator[_Batch]:
        batch, number = _Batch(), -1
        for text in self._reader.texts():  # no enumerate, which would hold the text
            number += 1
            if self._copies is not None:
                self._check_hashed(number < len(self._copies))
                if self._copies[number]:
                    self.duplicates += 1
                    continue
            held_out = is_held_out(text, self._options.validation_fraction, self._options.seed)
            batch.texts.append(text)
            batch.splits.append("validation" if held_out else "train")
            batch.sizes.append(utf8_bytes(text))
            batch.characters += len(text)
            del text  # held by the batch alone
            if batch.characters >= LONG_CHARACTERS:
                _return_freed_memory()
            if batch.characters >= BATCH_CHARACTERS:
                yield batch
                batch = _Batch()
        if self._copies is not None:
            self._check_hashed(number + 1 == len(self._copies))
        if batch.texts:
            yield batch

    def _check_hashed(self, same: bool) -> None:
        """The marks of duplicates go by the documents' numbers: both passes must have read the same ones."""
        if not same:
            raise DataError(
                self._reader.pieces[0].path,
                "or a file after it gave other documents than when they were hashed, as a file that could be "
                f"read only once of twice does; remove {self._folder} to start over",
            )


def _encoded(ahead: ReadAhead[_Batch], job: Job) -> Iterator[tuple[_Batch, list[Any]]]:
    """Batches with their documents' tokens, in order, tokenized by several threads."""
    waiting: deque[tuple[_Batch, Future[list[Any]]]] = deque()
    with ThreadPoolExecutor(job.threads, "tokenize") as threads:
        while True:
            # A reader that waits for a release must not be waited for.
            batch = ahead.take(wait=not waiting)
            if batch is not None:
                waiting.append((batch, threads.submit(batch.tokenized, job.tokenizer)))
                if len(waiting) <= job.threads:
                    continue
            elif not waiting:
                return
            batch, tokens = waiting.popleft()
            yield batch, tokens.result()
            ahead.release(batch)


def _return_freed_memory() -> None:
    """glibc keeps what was allocated in small parts, hundreds of megabytes after reading a long document."""
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _finished(writer: ShardWriter, text_bytes: int, compress: bool) -> ShardInfo:
    documents, tokens = writer.finish()
    sha256 = checksum(writer.path)
    if compress:
        compress_file(writer.path, compressed_path(writer.path))
        writer.path.unlink()
    return ShardInfo(writer.path.name, documents, tokens, text_bytes, sha256)
