"""Training on the user's own text files, read as a stream that any position can be resumed in."""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from data_modules.base import BatchSource, Cursor, LanguageDataModule
from data_modules.mixture import checked_weights
from data_modules.packing import Packing, Position
from data_modules.streaming.documents import COUNTED, ENCODED_AT_ONCE, Documents, Skip, counts
from data_modules.streaming.lanes import LaneCursor, joined, lanes_of_rank
from data_modules.streaming.text_rows import EvaluationText, RowFormat, TextRows
from data_modules.streaming.text_sources import TextSource, text_sources
from memlm.errors import CheckpointError, ConfigError
from memlm.tokenizers import load_tokenizer


class TextStream(LanguageDataModule):
    """Text files: JSON lines (.jsonl, .ndjson, .json), Parquet (.parquet) or plain text (anything else).

    JSON lines and plain text may be compressed (.gz, .zst, .zstd). Files are read in the order of their
    sorted paths, or in a random one, again and again; documents are not shuffled. Blank lines of JSON files
    are passed over. What validation reads is kept in memory (4 bytes a token);
    ``trainer.limit_val_batches`` bounds it.

    With ``lanes`` the documents are dealt to so many streams of their own, record after record, and row k of
    the run comes from lane k mod lanes. A lane goes through its own documents again and again. Every rank
    tokenizes only the lanes whose rows it takes, and its ``num_workers`` processes share those, so lanes
    should be a multiple of ranks x workers. (Each lane reads past all other documents, which costs little
    beside tokenizing as long as lanes are tens.) Lanes belong to the data: a run can be resumed on any number
    of ranks and workers, but not with other lanes.

    Args:
        paths: Files to train on: paths, patterns such as 'my/*.jsonl.zst' ('**' for any directories), or
            directories, as a list or as a list for each of several named sources. Without weights the
            sources' files follow each other.
        tokenizer: 'bytes', or the path of a Hugging Face tokenizer.json, SentencePiece or tiktoken file.
        text_key: Key of the text in a JSON object, or the column of a Parquet file; or one for each source.
        document_separator: What stands between the documents of a plain text file, such as '<|endoftext|>'
            or a blank line. By default a file is one document.
        sequence_length: Tokens in a row.
        batch_size: Sequences per step on each device.
        packing: 'concatenate' cuts the stream of all documents into rows; 'documents' gives each document
            rows of its own, with padding after its end.
        confine_attention: Whether attention is confined to the documents of a row.
        weights: Share of the rows that come from each named source, in any unit. Each source then repeats at
            a pace of its own.
        lanes: Streams that can be tokenized in parallel.
        shuffle_files: Whether the files are read in another random order in every epoch.
        validation_paths: Files to validate and test on, as a list, or as one for each of several named sets,
            whose losses are then also given by name. By default a share of the documents of each source.
        validation_fraction: Share of the documents that are held out for validation and test if there are no
            validation_paths; 0 for no validation. Choose validation_paths for large data: finding the
            documents held out means reading all files once.
        skip_malformed: Whether to skip records that are not valid UTF-8 or JSON or lack the text. They are
            counted and reported. By default they are errors.
        skip_empty: Whether to drop and count documents of nothing but white space. By default they are
            errors.
        skip_unreadable: Whether to go on with the next file after one that ends too early, has vanished or
            cannot be read. Its documents before the fault are kept. By default it is an error.
        num_workers: Processes that prepare training batches ahead; 0 prepares them between steps.
        seed: Chooses the documents that validation_fraction holds out, and all random orders.

    Raises:
        ConfigError: A number is out of range, or names do not match.
        DataError: A file is missing, unreadable or malformed, or there is too little text. (Later, when
            the files are read, but for the tokenizer's.)
    """

    def __init__(
        self,
        paths: list[str] | dict[str, list[str]],
        tokenizer: str = "bytes",
        text_key: str | dict[str, str] = "text",
        document_separator: str | None = None,
        sequence_length: int = 256,
        batch_size: int = 16,
        packing: Packing = "concatenate",
        confine_attention: bool = False,
        weights: dict[str, float] | None = None,
        lanes: int = 1,
        shuffle_files: bool = False,
        validation_paths: list[str] | dict[str, list[str]] | None = None,
        validation_fraction: float = 0.01,
        skip_malformed: bool = False,
        skip_empty: bool = False,
        skip_unreadable: bool = False,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        if not 0 <= validation_fraction < 1:
            raise ConfigError("data.validation_fraction", f"is {validation_fraction}; expected 0 <= it < 1")
        if document_separator == "":
            raise ConfigError("data.document_separator", "is empty; leave it out for one document a file")
        if lanes < 1:
            raise ConfigError("data.lanes", f"is {lanes}; expected at least 1")
        self.sources = text_sources(paths, text_key, "data.paths")
        if weights is not None and not isinstance(paths, dict):
            raise ConfigError(
                "data.weights", "needs named sources, as in data.paths: {web: [web/], books: [books/]}"
            )
        names = [source.name for source in self.sources]
        self.weights = None if weights is None else checked_weights(weights, names, "data.paths")
        self.document_separator, self.validation_paths = document_separator, validation_paths
        self.held_out = float(validation_fraction) if validation_paths is None else 0.0
        self.text_key, self.packing, self.confine_attention = text_key, packing, confine_attention
        self.lanes, self.shuffle_files, self.seed = lanes, shuffle_files, seed
        self.skip = Skip(skip_malformed, skip_empty, skip_unreadable)
        self._evaluation: dict[str, BatchSource] | None = None
        super().__init__(load_tokenizer(tokenizer), sequence_length, batch_size, num_workers)

    def start(self) -> LaneCursor:
        streams = 1 if self.weights is None else len(self.sources)
        return {"row": 0, "lanes": [[Documents.start()] * streams] * self.lanes}

    @cached_property
    def _fingerprint(self) -> str:
        files: Any = {
            source.name: [(path.name, _size(path)) for path, _ in source.files] for source in self.sources
        }
        # Not their directories: a run may be resumed where the same files lie elsewhere.
        meaning = [
            files,
            self.text_key,
            self.document_separator,
            self.held_out,
            self.seed,
            self.weights,
            self.lanes,
            self.shuffle_files,
        ]
        return hashlib.sha256(json.dumps(meaning).encode()).hexdigest()

    def fingerprint(self) -> str:
        return self._fingerprint

    def setup(self, stage: str) -> None:
        """Read a first batch, so that missing, empty or broken files are known before anything is trained."""
        if stage == "fit":
            self._check_lanes()
            files = [path for source in self.sources for path, _ in source.files]
            size = sum(map(_size, files)) / 1e6
            rank_zero_info(f"TextStream: {len(files):,} files to train on, {size:,.1f} MB")
            source = self.training_source()
            source.check(*self.world)
            next(source.batches(self.start(), *self.world))
        for evaluation in self.evaluation_sources(test=stage != "fit").values():
            next(evaluation.batches(self.start(), *self.world))  # kept for the validation that reads it

    def _check_lanes(self) -> None:
        world, _ = self.world
        each = lanes_of_rank(self.lanes, world)
        if self.num_workers > each:
            raise ConfigError(
                "data.num_workers",
                f"is {self.num_workers}, but each of {world} ranks has {each} of data.lanes {self.lanes} to "
                f"share among them; set data.lanes to a multiple of {world * self.num_workers} (ranks x "
                "workers)",
            )
        if self.lanes % world:
            rank_zero_warn(
                f"data.lanes {self.lanes} is no multiple of the {world} ranks: each of them tokenizes {each} "
                "lanes, some of them the same as others do"
            )

    def train_dataloader(self) -> DataLoader:
        loader = super().train_dataloader()
        if self.num_workers:
            # Documents are tokenized many at a time: one process must be able to do so while the others'
            # batches last. About four bytes are a token.
            tokens = ENCODED_AT_ONCE // 4
            batches = tokens * self.num_workers // (self.batch_size * self.sequence_length)
            loader.prefetch_factor = 2 + min(batches, 64)
        return loader

    def state_dict(self) -> dict[str, Any]:
        """The state of all ranks, which all call this at the same step, as `Trainer.save_checkpoint` does."""
        state = super().state_dict()
        if self.lanes > 1 and self.world[0] > 1 and dist.is_initialized():
            cursors: list[Any] = [None] * self.world[0]
            dist.all_gather_object(cursors, self.cursor)
            state["cursor"] = joined(cursors)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a checkpoint's position, if it is a position in this data.

        Raises:
            CheckpointError: The checkpoint was trained with another tokenizer, or lacks positions of lanes.
        """
        super().load_state_dict(state_dict)
        assert isinstance(self.cursor, dict)
        if lacking := [lane for lane, at in enumerate(self.cursor["lanes"]) if at is None]:
            path = (self.trainer.ckpt_path if self.trainer else None) or "checkpoint"
            raise CheckpointError(path, f"lacks the positions of lanes {lacking}: one rank alone saved it")

    def advance(self, cursor: Cursor) -> None:
        before = _known(self.cursor)
        super().advance(cursor)
        after = _known(cursor)
        for number in range(len(after[0])):
            epochs, earlier = [max(p[number]["epoch"] for p in positions) for positions in (after, before)]
            # After 1, 2, 4, 8, ... epochs: a line for each would drown the rest where the files are small.
            if epochs.bit_length() > earlier.bit_length():
                total = {name: sum(positions[number][name] for positions in after) for name in COUNTED}
                of = "" if self.weights is None else f" of {self.sources[number].name!r}"
                rank_zero_info(f"TextStream: {epochs} epochs{of} read; {counts(total)} so far")

    def teardown(self, stage: str) -> None:
        """Say at the end of a run what it passed over (this rank, in the lanes that it reads)."""
        total = {name: sum(at[name] for lane in _known(self.cursor) for at in lane) for name in COUNTED}
        if stage == "fit" and any(total.values()):
            rank_zero_info(f"TextStream: {counts(total)} in all")

    def training_source(self) -> TextRows:
        if self.weights is None:
            name = ", ".join(pattern for source in self.sources for pattern in source.patterns)
            streams = [self._documents(name, self.sources, only_held_out=False)]
        else:
            streams = [
                self._documents(", ".join(source.patterns), [source], only_held_out=False)
                for source in self.sources
            ]
        return TextRows(streams, self.weights, self.lanes, self._format, self.seed)

    def evaluation_sources(self, test: bool) -> dict[str, BatchSource]:
        if self._evaluation is None:
            if self.validation_paths is not None:
                sources = text_sources(self.validation_paths, self.text_key, "data.validation_paths")
            else:
                sources = self.sources if self.held_out else []
            self._evaluation = {
                source.name: EvaluationText(
                    self._documents(", ".join(source.patterns), [source], only_held_out=self.held_out > 0),
                    self._format,
                )
                for source in sources
            }
        if test and not self._evaluation:
            raise ConfigError(
                "data.validation_paths", "is not set and data.validation_fraction is 0: no test"
            )
        return self._evaluation

    @property
    def _format(self) -> RowFormat:
        eos = self.tokenizer.eos_id
        return RowFormat(self.sequence_length, self.batch_size, self.packing, self.confine_attention, eos)

    def _documents(self, name: str, sources: list[TextSource], only_held_out: bool) -> Documents:
        return Documents(
            [file for source in sources for file in source.files],
            name,
            self.document_separator,
            self.tokenizer,
            self.skip,
            self.held_out,
            only_held_out,
            self.seed,
            self.shuffle_files and not only_held_out,
        )


def _known(cursor: Cursor) -> list[list[Position]]:
    """The positions of the lanes that are known."""
    assert isinstance(cursor, dict)
    return [positions for positions in cursor["lanes"] if positions is not None]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0  # reading it will say what is wrong with it
