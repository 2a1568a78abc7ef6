"""Prepare a folder, or go on where an interrupted preparation stopped.

While it is prepared, the output folder holds a folder ``.preparing`` with the plan and, for each finished
unit, a record that is written after the unit's shards. The manifest is written after the last record; then
``.preparing`` is removed.
"""

import fcntl
import json
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm import tqdm

from data_modules.prepared.duplicates import are_found, find_duplicates, hashes_path
from data_modules.prepared.files import write_whole, writing
from data_modules.prepared.manifest import NAME, SPLITS, Counts, Manifest, compressed_path
from data_modules.prepared.plan import Plan, difference
from data_modules.prepared.processes import Task, run_units
from data_modules.prepared.progress import progress_bar
from data_modules.prepared.reading import Faults
from data_modules.prepared.shard import read_header, smallest_dtype
from data_modules.prepared.work import STATE, Job, Record, hash_unit, tokenize_unit
from memlm.errors import DataError
from memlm.tokenizers import Tokenizer

PLAN = "plan.json"
NOTES = 10
"""Skipped records that are named; the others are only counted."""
LOCK_SECONDS = 5
"""How long to wait for the workers of a killed preparation to end."""


@dataclass(frozen=True)
class Result:
    """What a preparation did.

    Attributes:
        manifest: Of the folder.
        new: Counts of the units that were done now.
        bytes: Of the input files, read for those.
        seconds: Spent.
    """

    manifest: Manifest
    new: Counts
    bytes: int
    seconds: float


@dataclass
class Preparation:
    """Makes a prepared folder.

    Args:
        plan: The work.
        folder: The output folder; made where it does not exist.
        tokenizer: Makes tokens of the text.
        faults: Say what is skipped.
        workers: Processes, or if there are fewer units, threads that tokenize.
    """

    plan: Plan
    folder: Path
    tokenizer: Tokenizer
    faults: Faults
    workers: int
    _notes: int = field(default=0, init=False)

    def run(self) -> Result | None:
        """Do what is left to do.

        Returns:
            What was done, or None if the folder was complete.

        Raises:
            DataError: A fault in the inputs, or a folder that holds something else or cannot be written.
            ConfigError: The folder is made, or begun, with other options.
        """
        if self._is_complete():
            return None
        began = time.monotonic()
        self._check_foreign()
        state = self.folder / STATE
        with writing(state):
            state.mkdir(parents=True, exist_ok=True)
        with _locked(state / "lock", self.folder):
            if self._is_complete():
                return None
            self._begin_or_go_on(state / PLAN)
            name = self._save_tokenizer(state)
            self._clean()
            if self.plan.options.deduplicate:
                self._mark_duplicates()
            done, read = self._tokenize()
            manifest = self._manifest(name)
            manifest.check()
            manifest.save()
            shutil.rmtree(state)
        return Result(manifest, done, read, time.monotonic() - began)

    def _is_complete(self) -> bool:
        if not (self.folder / NAME).exists():
            return False
        manifest = Manifest.load(self.folder)
        made = {
            "options": manifest.options,
            "tokenizer_hash": manifest.tokenizer_hash,
            "files": {source["file"]: [source["bytes"]] for source in manifest.sources},
        }
        if error := difference(self.folder, made, self.plan.describe()):
            raise error
        manifest.check()
        shutil.rmtree(self.folder / STATE, ignore_errors=True)  # the end may have come between the two
        return True

    def _check_foreign(self) -> None:
        if (self.folder / STATE / PLAN).exists() or not self.folder.exists():
            return
        if not self.folder.is_dir():
            raise DataError(self.folder, "is a file; expected a folder to make (output)")
        foreign = sorted(entry.name for entry in self.folder.iterdir() if entry.name != STATE)
        if foreign:
            names = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
            raise DataError(
                self.folder, f"holds other files ({names}); expected an empty or new folder (output)"
            )

    def _begin_or_go_on(self, path: Path) -> None:
        wanted = json.loads(json.dumps(self.plan.describe()))
        if not any(path.parent.glob("unit-*.json")) and not any(path.parent.glob("hashes-*")):
            # Nothing is done yet: a mistake in the first command must not bind the second.
            write_whole(path, json.dumps(wanted).encode())
        elif error := difference(self.folder, json.loads(path.read_bytes()), wanted):
            raise error

    def _save_tokenizer(self, state: Path) -> str:
        """By way of the state's folder, so that a half-written file does not stay in the output folder."""
        name = self.tokenizer.save(state)
        if name != "bytes":
            with writing(self.folder / name):
                (state / name).replace(self.folder / name)
        return name

    @property
    def _job(self) -> Job:
        return Job(self.plan, self.folder, self.tokenizer, self.faults, 1)

    def _clean(self) -> None:
        """Remove what belongs to no finished unit."""
        finished = {unit for unit in range(len(self.plan.units)) if self._is_finished(unit)}
        self._remove_partial()
        for path in [*self.folder.iterdir(), *(self.folder / STATE).iterdir()]:
            shard = re.fullmatch(rf"({'|'.join(SPLITS)})-(\d+)\.tokens(\.zst)?", path.name)
            record = re.fullmatch(r"unit-(\d+)\.json", path.name)
            unit = int(shard[2]) if shard else int(record[1]) if record else None
            if unit is not None and unit not in finished:
                path.unlink()

    def _remove_partial(self) -> None:
        for folder in (self.folder, self.folder / STATE):
            for path in folder.glob(".*.partial"):
                path.unlink()

    def _is_finished(self, unit: int) -> bool:
        """Whether a unit has its record and the shards that it tells of."""
        try:
            record = Record.load(self._job.record_path(unit))
        except FileNotFoundError:
            return False
        for shard in record.shards.values():
            path = self.folder / shard.file
            try:
                if self.plan.options.compress:
                    compressed_path(path).stat()
                elif (header := read_header(path)).tokens != shard.tokens:
                    raise DataError(path, f"holds {header.tokens:,} tokens; expected {shard.tokens:,}")
            except (OSError, DataError) as error:
                print(f"made again: {error}", file=sys.stderr)
                return False
        return True

    def _mark_duplicates(self) -> None:
        state, count = self.folder / STATE, len(self.plan.units)
        if are_found(state):
            return
        done = [unit for unit in range(count) if hashes_path(state, unit).exists()]
        for _ in self._run(hash_unit, done, "hashing"):
            pass
        with progress_bar(0, 0, "comparing", " documents") as bar:
            find_duplicates(state, count, bar.update)

    def _tokenize(self) -> tuple[Counts, int]:
        paths = [self._job.record_path(unit) for unit in range(len(self.plan.units))]
        done = [unit for unit, path in enumerate(paths) if path.exists()]
        new, read = Counts(), 0
        for unit in self._run(tokenize_unit, done, "tokenizing"):
            record = Record.load(paths[unit])
            new, read = new + record.counts, read + self.plan.units[unit].bytes
            for note in record.notes:
                self._notes += 1
                if self._notes <= NOTES:
                    tqdm.write(f"memlm prepare: {note}", file=sys.stderr)
        return new, read

    def _run(self, task: Task, done: list[int], name: str) -> Iterator[int]:
        """Do the units that are not done."""
        units = self.plan.units
        left = [unit for unit in range(len(units)) if unit not in set(done)]
        if not left:
            return
        processes = min(self.workers, len(left))
        job = Job(self.plan, self.folder, self.tokenizer, self.faults, max(self.workers // processes, 1))
        finished, total = sum(units[unit].bytes for unit in done), sum(unit.bytes for unit in units)
        with progress_bar(total, finished, name, "B") as bar:

            def show(read: int) -> None:
                bar.update(finished + read - bar.n)

            try:
                # Closed here and now when something goes wrong, which ends the workers.
                with closing(run_units(job, task, left, processes, show)) as units_done:
                    yield from units_done
            finally:
                self._remove_partial()

    def _manifest(self, tokenizer_name: str) -> Manifest:
        records = [Record.load(self._job.record_path(unit)) for unit in range(len(self.plan.units))]
        counts = sum((record.counts for record in records), Counts())
        if not counts.documents:
            skipped = f"{counts.empty:,} are empty, {counts.malformed:,} malformed"
            raise DataError(self.folder, f"no document is left of the inputs (paths): {skipped}")
        return Manifest(
            folder=self.folder,
            tokenizer=tokenizer_name,
            tokenizer_hash=self.tokenizer.hash,
            vocab_size=self.tokenizer.vocab_size,
            eos_id=self.tokenizer.eos_id,
            dtype=smallest_dtype(self.tokenizer.vocab_size).name,
            compressed=self.plan.options.compress,
            splits={
                split: [record.shards[split] for record in records if split in record.shards]
                for split in SPLITS
            },
            counts=counts,
            unreadable=[fault for record in records for fault in record.unreadable],
            sources=[{"file": str(path), "bytes": size} for path, (size, _) in self.plan.files.items()],
            options=asdict(self.plan.options),
        )


@contextmanager
def _locked(path: Path, folder: Path) -> Iterator[None]:
    """Keep a second preparation out. Workers hold the lock too: it is free when the last one has ended."""
    with writing(path):
        file = open(path, "wb")  # noqa: SIM115
    with file:
        for attempt in range(LOCK_SECONDS * 10, -1, -1):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not attempt:
                    raise DataError(folder, "is being prepared by another process (output)") from None
                time.sleep(0.1)
            except OSError as error:  # some file systems know no locks
                print(f"memlm prepare: {folder} cannot be locked ({error.strerror})", file=sys.stderr)
                break
        yield
