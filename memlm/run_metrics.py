"""Reading metrics.csv: rows of numbers, and curves of one column against another."""

import csv
from dataclasses import dataclass
from pathlib import Path

from memlm.errors import DataError

Row = dict[str, float]


@dataclass
class Series:
    """A curve: ``y`` against ``x``, of equal length."""

    x: list[float]
    y: list[float]

    @classmethod
    def of(cls, rows: list[Row], metric: str, against: str) -> "Series":
        """The metric against a counter; a row without the counter takes that of the latest row before it."""
        x, y, counter = [], [], None
        for row in rows:
            counter = row.get(against, counter)
            if metric in row and counter is not None:
                x.append(counter)
                y.append(row[metric])
        return cls(x, y)


def complete_lines(path: Path) -> list[str]:
    """The lines of a metrics file, without one that is still being written or was torn by a kill."""
    return path.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()


def read_metrics(path: Path) -> list[Row]:
    """The rows of a metrics file; empty cells are left out of their row.

    Raises:
        DataError: naming the line, if the file is not a table of numbers with a ``step`` column.
    """
    rows = []
    reader = csv.DictReader(complete_lines(path))
    for record in reader:
        try:
            row = {key: float(value) for key, value in record.items() if value}
            row["step"]
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(path, "is not a row of numbers with a step", reader.line_num) from error
        rows.append(row)
    return rows
