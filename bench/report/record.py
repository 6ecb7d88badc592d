"""Records: one flat row a trial, in a run folder's `records.jsonl`.

The file is a sequence of JSON lines: headers (the grid as it was asked for, its scenarios) and rows. It
is only ever appended to, a chunk at a time, under a lock; a torn last line is dropped on the next start.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from bench.errors import UserError

SCHEMA = 1
"""Raised when columns change their meaning."""

FILE = "records.jsonl"


@dataclass(frozen=True)
class Record:
    """One trial: identity, outcome, metrics (None where they don't apply), cost, provenance."""

    trial: str
    grid: str
    scenario: str
    dataset: str
    model: str
    weights: str
    weight_seed: int
    batch_norm: str
    members: str
    batch_size: int
    classes: str
    protocol: str
    knowledge: str
    defense: str
    defense_revision: str
    attack: str
    attack_revision: str
    sample: int
    outcome: str
    reason: str
    success: bool | None = None
    label_error: float | None = None
    label_l1: float | None = None
    top1: float | None = None
    class_existence: float | None = None
    class_counts: float | None = None
    class_counts_exact: float | None = None
    lam_error: float | None = None
    format_found: bool | None = None
    feature_error: float | None = None
    feature_cosine: float | None = None
    mse: float | None = None
    psnr: float | None = None
    ssim: float | None = None
    lpips: float | None = None
    private_top1: float | None = None
    private_mse: float | None = None
    private_lpips: float | None = None
    seconds: float | None = None
    stack: int = 1
    threads: int = 1
    peak_bytes: int | None = None
    isolated: bool = False
    protocol_version: int = 1
    commit: str = ""
    torch: str = ""
    device: str = "cpu"
    data_sha256: str = ""
    weights_sha256: str = ""
    schema: int = SCHEMA


COLUMNS = tuple(column.name for column in dataclasses.fields(Record))

METRICS = (
    "success", "label_error", "label_l1", "top1", "class_existence", "class_counts", "class_counts_exact",
    "lam_error", "format_found", "feature_error", "feature_cosine", "mse", "psnr", "ssim", "lpips",
    "private_top1", "private_mse", "private_lpips",
)  # fmt: skip
"""The columns that say how well a trial did: what `rerun` compares."""

SCENARIO = (
    "dataset", "model", "weights", "weight_seed", "batch_norm", "members", "batch_size", "classes",
    "protocol", "defense",
)  # fmt: skip
"""The columns that say what was attacked."""


@dataclass(frozen=True)
class Header:
    """What a run was asked for.

    Attributes:
        grid: the grid's name.
        grid_hash: over the grid as its file has it; a folder holds one grid only.
        title: what the grid asks.
        cells: how many samples each (scenario, attack) is to have: "scenario attack" -> N.
        scenarios: scenario -> its axes.
        seed: the grid's, from which every batch's follows.
    """

    grid: str
    grid_hash: str
    title: str
    cells: dict[str, int]
    scenarios: dict[str, dict[str, Any]]
    seed: int = 0


@dataclass(frozen=True)
class Run:
    """What a run folder holds: the headers, in order, and the rows."""

    headers: tuple[Header, ...]
    rows: tuple[dict[str, Any], ...]

    @property
    def keys(self) -> frozenset[str]:
        """The trials that are done."""
        return frozenset(row["trial"] for row in self.rows)

    @property
    def expected(self) -> dict[tuple[str, str], int]:
        """(scenario, attack) -> how many samples were asked for, the largest of all headers."""
        cells: dict[tuple[str, str], int] = {}
        for header in self.headers:
            for cell, samples in header.cells.items():
                scenario, _, attack = cell.partition(" ")
                cells[scenario, attack] = max(samples, cells.get((scenario, attack), 0))
        return cells


def read(folder: Path) -> Run:
    """The run in a folder, or in a records file.

    Raises:
        UserError: nothing there, or a line (other than a torn last one) that is no record.
    """
    path = folder if folder.is_file() else folder / FILE
    if not path.is_file():
        raise UserError(f"{folder} holds no {FILE}; give the folder that `leakbench run --out` wrote")
    headers: list[Header] = []
    rows: dict[str, dict[str, Any]] = {}
    for number, line in _whole_lines(path):
        try:
            entry = json.loads(line)
            if "cells" in entry:
                headers.append(Header(**(entry | {"cells": dict(entry["cells"])})))
            elif entry["schema"] != SCHEMA:
                raise ValueError(f"schema {entry['schema']}")
            else:
                rows[entry["trial"]] = {column: entry[column] for column in COLUMNS}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"{path}, line {number} is no record of schema {SCHEMA} ({type(error).__name__}: {error}); "
                "a row that is deleted is computed again by the same `leakbench run`"
            ) from None
    if not headers:
        raise UserError(f"{path} has no header line; run into a new folder with --out")
    return Run(tuple(headers), tuple(rows.values()))


def _whole_lines(path: Path) -> list[tuple[int, str]]:
    """The whole lines and their numbers, without those of NUL bytes that a lost disk leaves."""
    text = path.read_bytes().decode("utf-8", errors="replace")
    lines = enumerate(text[: text.rfind("\n") + 1].split("\n")[:-1], start=1)
    return [(number, line) for number, line in lines if line.strip("\0 ")]


def _line(entry: Header | Record) -> str:
    values = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in dataclasses.asdict(entry).items()
    }
    return json.dumps(values, ensure_ascii=False, allow_nan=False)


class Writer:
    """The one process that appends to a run's records."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def header(self, header: Header) -> None:
        """Appends a header, unless the last one says the same."""
        if not self._path.exists() or header not in read(self._path).headers[-1:]:
            self._append([header])

    def rows(self, records: Iterable[Record]) -> None:
        """Appends a chunk's rows; on return they are on the disk."""
        self._append(records)

    def _append(self, entries: Iterable[Header | Record]) -> None:
        with _unwritable_explained(self._path.parent), self._path.open("ab") as file:
            file.write("".join(_line(entry) + "\n" for entry in entries).encode())
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def _unwritable_explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder} can't be written: {error.strerror}; choose another --out") from error


@contextmanager
def writing(folder: Path) -> Iterator[Writer]:
    """A writer on a run folder, made if need be; a torn last line is cut off first.

    Raises:
        UserError: another run writes there, or the folder can't be written.
    """
    path = folder / FILE
    lock = filelock.FileLock(folder / f".{FILE}.lock", timeout=0)
    with _unwritable_explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise UserError(
                f"another run is writing to {folder}; wait for it, or choose another --out"
            ) from None
    try:
        with _unwritable_explained(folder):
            _cut_torn_line(path)
        yield Writer(path)
    finally:
        lock.release()


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("r+b") as file:
        file.truncate(file.read().rfind(b"\n") + 1)
    if path.stat().st_size == 0:
        path.unlink()
