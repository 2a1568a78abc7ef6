"""What every language data module does: an endless training stream with one position, and its resumption."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data_modules.child_process import end_with_parent
from memlm.errors import CheckpointError, ConfigError, UserError
from memlm.tokenizers import Tokenizer

Cursor = int | dict[str, Any]
"""A position in the data: plain integers and strings, nested as need be, which a checkpoint can hold."""
Batch = dict[str, Any]


class BatchSource(ABC):
    """Makes batches; a plain object without ties to a trainer, so that a worker process can hold it."""

    @abstractmethod
    def batches(
        self, cursor: Cursor, world: int, rank: int, worker: int = 0, workers: int = 1
    ) -> Iterator[Batch]:
        """Batches of one rank, from a position in the data on.

        Args:
            cursor: The position.
            world: Number of ranks.
            rank: Which of them this is.
            worker: Which of this rank's loader processes this is.
            workers: Their number. Each gives its share of the rank's batches, in the form that `join` takes.
        """

    def join(self, items: Iterator[Batch], workers: int) -> Iterator[Batch]:
        """The rank's batches, of what its workers give in turn (worker 0, 1, ..., 0, 1, ...).

        By default these are the batches themselves: worker w gives the batches w, w + workers, and so on.
        """
        return items


@dataclass
class _Failure:
    """An error on its way out of a worker process, where raising it would wrap it into a traceback."""

    error: UserError


class _Stream(IterableDataset):
    def __init__(self, source: BatchSource, cursor: Cursor, world: int, rank: int) -> None:
        self.source, self.cursor, self.world, self.rank = source, cursor, world, rank
        self.process = os.getpid()

    def __iter__(self) -> Iterator[Batch | _Failure]:
        try:
            info = get_worker_info()
            worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
            if info is not None:
                # Left alone, it would wait for ever to hand its batches to a process that was killed.
                end_with_parent(self.process)
            yield from self.source.batches(self.cursor, self.world, self.rank, worker, workers)
        except UserError as error:
            yield _Failure(error)


class _Loader(DataLoader):
    def __iter__(self) -> Any:
        stream = self.dataset
        assert isinstance(stream, _Stream)
        return stream.source.join(_checked(super().__iter__()), max(self.num_workers, 1))


def _checked(items: Iterator[Batch | _Failure]) -> Iterator[Batch]:
    try:
        for item in items:
            if isinstance(item, _Failure):
                raise item.error
            yield item
    except RuntimeError as error:  # torch's message begins like this, and has the signal's name
        if not str(error).startswith("DataLoader worker"):
            raise
        raise ConfigError(
            "data.num_workers",
            f"a loader process was killed, perhaps for want of memory ({error}); fewer of them need less",
        ) from error


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
    - ``exposures`` int64 [B], with ``answers`` where facts are trained unequally often: index into
      ``exposure_levels`` of how often the fact is trained, -1 for the control and for padding;
    - ``cursor``, training only: the position in the data after this batch of all ranks, in plain integers.

    The training stream never ends (``trainer.max_steps`` bounds a run) and depends on nothing but the data,
    the options and the cursor: a global batch of ``batch_size`` x ranks rows is cut from one stream, of which
    each rank takes every ``world_size``-th row. So a run resumes exactly, also on another number of ranks.
    Evaluation streams end; every rank gets equally many rows, by rows of padding at the end if need be.

    Subclasses implement `start`, `fingerprint`, `training_source` and `evaluation_sources`.

    Args:
        tokenizer: The tokenizer of all texts.
        sequence_length: Tokens in a training row (T).
        batch_size: Sequences per step on each device (B).
        num_workers: Processes that prepare training batches ahead; 0 prepares them between steps.
    """

    def __init__(
        self, tokenizer: Tokenizer, sequence_length: int, batch_size: int, num_workers: int = 0
    ) -> None:
        super().__init__()
        least = {"sequence_length": (sequence_length, 1), "batch_size": (batch_size, 1)}
        for key, (value, low) in (least | {"num_workers": (num_workers, 0)}).items():
            if value < low:
                raise ConfigError(f"data.{key}", f"is {value}; expected at least {low}")
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.cursor: Cursor = self.start()
        self.prompts: BatchSource | None = None
        """What is predicted in the place of the evaluation data; None for nothing else."""
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
    def evaluation_sources(self, test: bool) -> dict[str, BatchSource]:
        """One pass over each set of evaluation data (cursor ignored), by name; empty where there is none.

        The loss is measured over all sets, and if there are several, also of each by its name. A set that
        needs no name is called ``all``.
        """

    def baselines(self, test: bool) -> dict[str, float]:
        """What guessing gets, by metric (``recall_...``): logged beside what the model gets."""
        return {}

    @property
    def exposure_levels(self) -> tuple[int, ...]:
        """The different numbers of times that facts are trained in an epoch; recall is measured by each."""
        return ()

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

    def _evaluation_dataloaders(self, test: bool) -> list[DataLoader]:
        return self._loaders(list(self.evaluation_sources(test).values()))

    def _loaders(self, sources: list[BatchSource]) -> list[DataLoader]:
        streams = [_Stream(source, self.start(), *self.world) for source in sources]
        return [_Loader(stream, batch_size=None, collate_fn=_as_is) for stream in streams]

    def val_dataloader(self) -> list[DataLoader]:
        return self._evaluation_dataloaders(test=False)

    def test_dataloader(self) -> list[DataLoader]:
        return self._evaluation_dataloaders(test=True)

    def predict_dataloader(self) -> list[DataLoader]:
        if self.prompts is not None:
            return self._loaders([self.prompts])
        return self._evaluation_dataloaders(test=True)

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
