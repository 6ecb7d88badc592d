"""Studies that take hours: their rows are appended one by one, and what is there is not made again."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pandas as pd


def done(path: Path, key: Sequence[str]) -> set[tuple[object, ...]]:
    """The cases whose rows a file has, by its columns `key`; none where there is no file."""
    return set(pd.read_csv(path)[list(key)].itertuples(index=False, name=None)) if path.exists() else set()


@contextmanager
def appending(path: Path, columns: Sequence[str]) -> Iterator[Callable[[Mapping[str, object]], None]]:
    """Gives what writes a row, at once, behind those that are there; a new file gets its header first."""
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if not file.tell():
            writer.writeheader()

        def write(row: Mapping[str, object]) -> None:
            writer.writerow(row)
            file.flush()

        yield write
