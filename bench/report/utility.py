"""What defenses cost: records of their own kind in a run folder's `utility.jsonl`, a line a measurement."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.errors import UserError

SCHEMA = 1
"""Raised when columns change their meaning."""

FILE = "utility.jsonl"


@dataclass(frozen=True)
class Utility:
    """One network, trained with a defense in every step.

    Attributes:
        key: of what was measured: a hash of all that it follows from.
        dataset: what it was trained on.
        model: its canonical spec.
        weight_seed: of its first weights.
        defense: canonical.
        defense_revision: of its code.
        steps: of the optimizer, each with one client's update.
        batch_size: of a client, before the defense.
        accuracy: on the held-out examples, after the last step.
        seconds: of one update on one core, the defense's own work in it; the median.
        bytes: of one update, compressed without loss (zlib).
        epsilon: of the whole training, where the defense proves one.
        delta: that ε goes with.
        sample_rate: the share of all training examples in a batch, which ε rests on.
        torch: the version that measured.
        schema: of these columns.
    """

    key: str
    dataset: str
    model: str
    weight_seed: int
    defense: str
    defense_revision: str
    steps: int
    batch_size: int
    accuracy: float
    seconds: float
    bytes: int
    epsilon: float | None
    delta: float
    sample_rate: float
    torch: str
    schema: int = SCHEMA


COLUMNS = tuple(column.name for column in dataclasses.fields(Utility))


def read(folder: Path) -> tuple[dict[str, Any], ...]:
    """The rows in a run's folder, one a key; a torn last line is left out.

    Raises:
        UserError: a whole line that is no such record.
    """
    path = folder / FILE
    if not path.is_file():
        return ()
    text = path.read_text(encoding="utf-8", errors="replace")
    rows = {}
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), start=1):
        try:
            entry = json.loads(line)
            if entry["schema"] != SCHEMA:
                raise ValueError(f"schema {entry['schema']}")
            rows[entry["key"]] = {column: entry[column] for column in COLUMNS}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}, line {number} is no measurement of schema {SCHEMA} "
                f"({type(error).__name__}: {error}); a line that is deleted is made again"
            ) from None
    return tuple(rows.values())


def append(folder: Path, row: Utility) -> None:
    """Adds a row; on return it is on the disk. A torn last line is cut off first."""
    path = folder / FILE
    with path.open("ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write((json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())
