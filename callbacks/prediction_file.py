"""``predictions.jsonl``, of records that several ranks make."""

import json
import os
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

from memlm.generation.json_lines_file import json_line


class PredictionFile:
    """A file of JSON lines that has its name only when the records of all ranks are in it.

    Each rank writes a part of its own beside the file, on a file system that they share. The first rank joins
    the parts: a batch of each rank in turn.

    Args:
        path: The file to make; an earlier one of that name stays until then.
        rank: Which rank this is.
        world: Number of ranks.
    """

    def __init__(self, path: Path, rank: int, world: int) -> None:
        self.path = path
        self.rank = rank
        self._parts = [path.with_name(f".{path.name}.{number}.tmp") for number in range(world)]
        self._file = self._parts[rank].open("w", encoding="utf-8")

    def write(self, records: list[dict[str, Any]]) -> None:
        """Add the records of one batch."""
        self._file.write(json_line(records) + "\n")
        self._file.flush()

    def finish(self, barrier: Callable[[], object]) -> None:
        """Join the parts, on the first rank.

        Args:
            barrier: Waits for all ranks.
        """
        self._file.close()
        barrier()
        if self.rank == 0:
            self._join()
        barrier()
        self._parts[self.rank].unlink()

    def abandon(self) -> None:
        """Remove this rank's part."""
        self._file.close()
        self._parts[self.rank].unlink(missing_ok=True)

    def _join(self) -> None:
        whole = self.path.with_name(f".{self.path.name}.tmp")
        parts = [part.open(encoding="utf-8") for part in self._parts]
        try:
            with whole.open("w", encoding="utf-8") as file:
                for batches in zip_longest(*parts, fillvalue="[]"):
                    for batch in batches:
                        file.writelines(json_line(record) + "\n" for record in json.loads(batch))
                file.flush()
                os.fsync(file.fileno())
        finally:
            for part in parts:
                part.close()
        os.replace(whole, self.path)
