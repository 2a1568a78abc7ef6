"""Training on token shards that ``memlm prepare`` has made: any mixture, any order, any position at once."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from data_modules.base import BatchSource, LanguageDataModule
from data_modules.mixture import checked_weights
from data_modules.packed.packed_rows import EvaluationRows, RowShape, SourceRows, TrainingRows
from data_modules.packed.row_layouts import Consecutive, PreparedPacking, lay_out
from data_modules.packed.row_order import RowOrder
from data_modules.packed.sharded_tokens import OpenShards, ShardedTokens
from data_modules.prepared.manifest import Manifest, expand
from memlm.errors import ConfigError, DataError
from memlm.tokenizers import Tokenizer, load_tokenizer

MOST_EPOCHS = 4
"""Up to here repeated data are about as good as new ones (Muennighoff et al.: Scaling Data-Constrained
Language Models, 2023, arXiv 2305.16264)."""


@dataclass
class _Source:
    name: str
    manifest: Manifest
    weight: float | None

    @property
    def content(self) -> str:
        """Names the tokens by their checksums, wherever they lie."""
        checksums = [shard.sha256 for shard in self.manifest.shards("train")]
        return hashlib.sha256(json.dumps(checksums).encode()).hexdigest()


class PackedTokens(LanguageDataModule):
    """Folders of tokens written by ``memlm prepare``, mixed by weights.

    Rows come in a random order that is a function of their number, so that every row is read once before any
    is read again, and a run goes on at any position at once, on any number of ranks and workers. The position
    is one integer, the number of rows that all ranks have been given; ``batch_size`` may change on the way.
    Memory does not grow with the data, but for 8 (``documents``) or 12 to 16 (``best_fit``) bytes in every
    rank for each document, and for each further T tokens of a long one.

    Args:
        folders: A prepared folder, or several by name. A single one is called by the folder's name.
        weights: Share of the rows that comes from each folder, by name; only their ratios count. Each folder
            is then repeated at its own pace. By default all rows of all folders are read once before any is
            read again.
        validation_folders: Prepared folders to validate and test on: their held-out documents, or all of a
            folder that holds none out. By default the held-out documents of ``folders``. The loss is
            reported of each by its name.
        tokenizer: Must be the tokenizer that the folders were prepared with: 'bytes' or a file. By default
            the one stored in them.
        sequence_length: Tokens in a row (T).
        batch_size: Sequences per step on each device.
        packing: 'concatenate' cuts the sequence of all documents into rows; 'best_fit' keeps documents of up
            to T tokens whole and fits them together, with little padding; 'documents' gives each document
            rows of its own, with padding after its end.
        confine_attention: Whether attention is confined to the documents of a row.
        num_workers: Processes that prepare training batches ahead; 0 prepares them between steps.
        verify: Whether to compare the checksums of all shards before training, which reads them all.
        seed: Chooses the order.

    Raises:
        ConfigError: An option is out of range or contradicts another, or folders have different tokenizers.
        DataError: A folder is missing, or its preparation was interrupted. (Later: a shard is missing,
            truncated or altered.)
    """

    def __init__(
        self,
        folders: str | dict[str, str],
        weights: dict[str, float] | None = None,
        validation_folders: str | dict[str, str] | None = None,
        tokenizer: str | None = None,
        sequence_length: int = 1024,
        batch_size: int = 16,
        packing: PreparedPacking = "concatenate",
        confine_attention: bool = False,
        num_workers: int = 0,
        verify: bool = False,
        seed: int = 0,
    ) -> None:
        manifests = _manifests(folders, "data.folders")
        shares: list[float] | list[None] = [None] * len(manifests)
        if weights is not None:
            shares = checked_weights(weights, list(manifests), "data.folders")
        sources = [
            _Source(name, manifest, share)
            for (name, manifest), share in zip(manifests.items(), shares, strict=True)
        ]
        # Neither their names nor the order they are given in decides which rows a run gets.
        self._sources = sorted(sources, key=lambda source: (source.content, source.weight))
        self._validation = (
            None if validation_folders is None else _manifests(validation_folders, "data.validation_folders")
        )
        self._manifests = [*manifests.values(), *(self._validation or {}).values()]
        first = self._manifests[0]
        _check_tokenizers(first, manifests, "data.folders")
        _check_tokenizers(first, self._validation or {}, "data.validation_folders")
        self.packing, self.confine_attention = packing, confine_attention
        self.verify, self.seed = verify, seed
        self._shards, self._checked = OpenShards(), False
        super().__init__(_tokenizer(first, tokenizer), sequence_length, batch_size, num_workers)

    def start(self) -> int:
        return 0

    def fingerprint(self) -> str:
        sources = [[source.content, source.weight] for source in self._sources]
        meaning = [sources, self.packing, self.sequence_length, self.seed]
        return hashlib.sha256(json.dumps(meaning).encode()).hexdigest()

    def prepare_data(self) -> None:
        """Expand compressed shards, and compare checksums if they are to be compared."""
        for manifest in self._manifests:
            expand(manifest.folder)
            if self.verify:
                rank_zero_info(f"PackedTokens: comparing the checksums of {manifest.folder}")
                manifest.verify()

    def setup(self, stage: str) -> None:
        """Check all shards but for their content, and say what there is to read."""
        if not self._checked:
            for manifest in self._manifests:
                manifest.check()
            self._checked = True
        if stage == "fit":
            self._report()

    @cached_property
    def _rows(self) -> list[SourceRows]:
        rows = []
        for source in self._sources:
            tokens = ShardedTokens(source.manifest, "train", self._shards)
            if not tokens.tokens:
                raise DataError(source.manifest.folder, "holds no document to train on")
            rows.append(SourceRows(tokens, lay_out(tokens, self.packing, self.sequence_length)))
        return rows

    @cached_property
    def _order(self) -> RowOrder:
        weights = [source.weight for source in self._sources if source.weight is not None]
        return RowOrder([rows.layout.rows for rows in self._rows], weights or None, self.seed)

    def _report(self) -> None:
        steps = self.trainer.max_steps if self.trainer else -1
        batches = steps * self.trainer.accumulate_grad_batches if self.trainer else 0
        epochs = self._order.epochs(max(0, batches) * self.world[0] * self.batch_size)
        for source, rows, times in zip(self._sources, self._rows, epochs, strict=True):
            tokens, count = rows.tokens, rows.layout.rows
            padding = 1 - tokens.tokens / (count * self.sequence_length)
            message = (
                f"PackedTokens: {source.name}: {tokens.documents:,} documents, {tokens.tokens:,} tokens in "
                f"{count:,} rows of {self.sequence_length:,} ({padding:.2%} padding)"
            )
            if source.weight is not None:
                message += f"; weight {source.weight:g}"
            if steps > 0:
                message += f"; {times:.2f} epochs by step {steps:,}"
            rank_zero_info(message)
            if steps > 0 and times > MOST_EPOCHS:
                rank_zero_warn(
                    f"{source.name} will be read {times:.1f} times: beyond {MOST_EPOCHS} epochs repeated "
                    "data teach less and less (arXiv 2305.16264, Scaling Data-Constrained Language Models)"
                )

    def _shape(self) -> RowShape:
        return RowShape(self.sequence_length, self.batch_size, self.tokenizer.eos_id, self.confine_attention)

    def training_source(self) -> TrainingRows:
        return TrainingRows(self._rows, self._order, self._shape())

    def evaluation_sources(self, test: bool) -> dict[str, BatchSource]:
        found: dict[str, BatchSource] = {}
        given = self._validation or {source.name: source.manifest for source in self._sources}
        for name, manifest in given.items():
            tokens = ShardedTokens(manifest, "validation", self._shards)
            if self._validation and not tokens.tokens:
                tokens = ShardedTokens(manifest, "train", self._shards)
                if not tokens.tokens:
                    raise DataError(manifest.folder, "holds no document to validate on")
            if tokens.tokens:
                layout = Consecutive(tokens.tokens, self.sequence_length)
                found[name] = EvaluationRows(SourceRows(tokens, layout), self._shape())
        if test and not found:
            raise ConfigError(
                "data.validation_folders", "is not set and data.folders hold no documents out: no test"
            )
        return found


def _manifests(folders: str | dict[str, str], key: str) -> dict[str, Manifest]:
    if isinstance(folders, str):
        folders = {Path(folders).resolve().name: folders}
    if not folders:
        raise ConfigError(key, "is empty; expected a prepared folder")
    return {name: Manifest.load(folder) for name, folder in folders.items()}


def _check_tokenizers(first: Manifest, manifests: dict[str, Manifest], key: str) -> None:
    for other in manifests.values():
        if other.tokenizer_hash != first.tokenizer_hash:
            raise ConfigError(
                key,
                f"{first.folder} was prepared with the tokenizer {first.tokenizer_hash}, {other.folder} with "
                f"{other.tokenizer_hash}; expected one tokenizer for all",
            )


def _tokenizer(first: Manifest, given: str | None) -> Tokenizer:
    if given is None:
        return first.load_tokenizer()
    tokenizer = load_tokenizer(given)
    if tokenizer.hash != first.tokenizer_hash:
        raise ConfigError(
            "data.tokenizer",
            f"is {given} with the hash {tokenizer.hash}; expected the tokenizer that {first.folder} was "
            f"prepared with, {first.tokenizer_hash} (leave data.tokenizer out to take it)",
        )
    return tokenizer
