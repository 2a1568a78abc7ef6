"""What every language data module does: an endless training stream with one position, and its resumption."""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, IterableDataset

from memlm.errors import CheckpointError, ConfigError, DataError
from memlm.tokenizers import Tokenizer

Cursor = int | dict[str, int]
Batch = dict[str, Any]


class BatchSource(Protocol):
    """Makes batches; a plain object without ties to a trainer, so that a worker process can hold it."""

    def batches(self, cursor: Cursor, world: int, rank: int) -> Iterator[Batch]:
        """Batches of one rank, from a position in the data on."""


@dataclass
class _Failure:
    """A DataError on its way out of a worker process, which would otherwise wrap it into a traceback."""

    path: str
    message: str
    line: int | None


class _Stream(IterableDataset):
    def __init__(self, source: BatchSource, cursor: Cursor, world: int, rank: int) -> None:
        self.source, self.cursor, self.world, self.rank = source, cursor, world, rank

    def __iter__(self) -> Iterator[Batch | _Failure]:
        try:
            yield from self.source.batches(self.cursor, self.world, self.rank)
        except DataError as error:
            place = f"{error.path}:{error.line}: " if error.line is not None else f"{error.path}: "
            yield _Failure(error.path, str(error).removeprefix(place), error.line)


class _Loader(DataLoader):
    def __iter__(self) -> Any:
        for batch in super().__iter__():
            if isinstance(batch, _Failure):
                raise DataError(batch.path, batch.message, batch.line)
            yield batch


def _as_is(batch: Any) -> Any:
    return batch


class LanguageDataModule(LightningDataModule):
    """Base of the data modules: gives batches of token ids, and remembers how far training has read.

    A batch is a dict:

    - ``tokens`` int64 [B, T]: inputs;
    - ``targets`` int64 [B, T]: the next tokens, -100 where no loss is counted;
    - ``documents`` int64 [B, T], only with ``confine_attention``: number of the document within its row;
    - ``answers`` int64 [B, T], evaluation of facts only: the right token at answer positions, else -100;
    - ``group`` int64 [B], with ``answers``: 0 held-out phrasing, 1 phrasing seen in training, 2 control,
      -1 a row that only pads the batch (all its targets and answers are -100);
    - ``cursor``, training only: the position in the data after this batch of all ranks, in plain integers.

    The training stream never ends (``trainer.max_steps`` bounds a run) and depends on nothing but the data,
    the options and the cursor: a global batch of ``batch_size`` x ranks rows is cut from one stream, of which
    each rank takes every ``world_size``-th row. So a run resumes exactly, also on another number of ranks.
    Evaluation streams end; every rank gets equally many rows, by rows of padding at the end if need be.

    Subclasses implement `start`, `fingerprint`, `training_source` and `evaluation_source`.

    Args:
        tokenizer: The tokenizer of all texts.
        sequence_length: Tokens in a training row (T).
        batch_size: Sequences per step on each device (B).
        num_workers: Processes that prepare training batches ahead: 0 (prepare between steps) or 1.
    """

    def __init__(
        self, tokenizer: Tokenizer, sequence_length: int, batch_size: int, num_workers: int = 0
    ) -> None:
        super().__init__()
        for key, value in {"sequence_length": sequence_length, "batch_size": batch_size}.items():
            if value < 1:
                raise ConfigError(f"data.{key}", f"is {value}; expected at least 1")
        if num_workers not in (0, 1):
            # A second worker would read the same files again only to throw half of the rows away.
            raise ConfigError("data.num_workers", f"is {num_workers}; expected 0 or 1")
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.cursor: Cursor = self.start()
        self._training_stream: _Stream | None = None

    @abstractmethod
    def start(self) -> Cursor:
        """The position before the first row."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Names the data and the options that give a cursor its meaning."""

    @abstractmethod
    def training_source(self) -> BatchSource:
        """The source of endless training batches."""

    @abstractmethod
    def evaluation_source(self, test: bool) -> BatchSource | None:
        """The source of one pass over the evaluation data (cursor ignored), or None where there is none."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.tokenizer.vocab_size

    @property
    def world(self) -> tuple[int, int]:
        """Number of ranks and this process's rank; (1, 0) without a trainer."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def train_dataloader(self) -> DataLoader:
        self._training_stream = _Stream(self.training_source(), self.cursor, *self.world)
        return _Loader(
            self._training_stream, batch_size=None, num_workers=self.num_workers, collate_fn=_as_is
        )

    def _evaluation_dataloader(self, test: bool) -> DataLoader | list:
        source = self.evaluation_source(test)
        if source is None:
            return []
        return _Loader(_Stream(source, self.start(), *self.world), batch_size=None, collate_fn=_as_is)

    def val_dataloader(self) -> DataLoader | list:
        return self._evaluation_dataloader(test=False)

    def test_dataloader(self) -> DataLoader | list:
        return self._evaluation_dataloader(test=True)

    def predict_dataloader(self) -> DataLoader | list:
        return self._evaluation_dataloader(test=True)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Move the cursor past a batch that is about to be trained, whatever else was prepared ahead."""
        if "cursor" in batch:
            self.advance(batch["cursor"])
        return batch

    def advance(self, cursor: Cursor) -> None:
        """Set the position after the batch that is about to be trained."""
        self.cursor = cursor
        if self._training_stream is not None:
            self._training_stream.cursor = cursor  # a loader that is iterated again goes on from here

    def state_dict(self) -> dict[str, Any]:
        return {
            "cursor": self.cursor,
            "tokenizer_hash": self.tokenizer.hash,
            "class": type(self).__qualname__,
            "fingerprint": self.fingerprint(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a checkpoint's position, if it is a position in this data.

        Raises:
            CheckpointError: The checkpoint was trained with another tokenizer.
        """
        if state_dict["tokenizer_hash"] != self.tokenizer.hash:
            path = (self.trainer.ckpt_path if self.trainer else None) or "checkpoint"
            raise CheckpointError(
                path,
                f"was trained with another tokenizer (hash {state_dict['tokenizer_hash']}) than that of the "
                f"data (hash {self.tokenizer.hash}); set data.tokenizer to the one it was trained with",
            )
        if (state_dict["class"], state_dict["fingerprint"]) == (type(self).__qualname__, self.fingerprint()):
            self.advance(state_dict["cursor"])
        elif self.trainer is None or self.trainer.state.fn == TrainerFn.FITTING:
            rank_zero_warn(
                "the checkpoint was trained on other data or with other data options: training starts at the "
                "beginning of the data given now"
            )
