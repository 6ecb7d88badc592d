"""Records: one flat row a trial, in a run folder's `records.jsonl`.

The file is a sequence of JSON lines: headers (the grid as it was asked for, its scenarios) and rows, each
with its checksum. It is only ever appended to, a few chunks at a time, under a lock; a torn last line is
dropped on the next start.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import filelock
import numpy as np

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
    psnr_8bit: float | None = None
    ssim: float | None = None
    lpips: float | None = None
    identified: float | None = None
    private_top1: float | None = None
    private_mse: float | None = None
    private_ssim: float | None = None
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

_TYPES = tuple(
    (*(get_args(kind) or (kind,)), *((int,) if float in get_args(kind) else ()))  # JSON may write 1.0 as 1
    for kind in get_type_hints(Record).values()
)
"""Of what a column may hold."""

METRICS = (
    "success", "label_error", "label_l1", "top1", "class_existence", "class_counts", "class_counts_exact",
    "lam_error", "format_found", "feature_error", "feature_cosine", "mse", "psnr",
    "psnr_8bit", "ssim", "lpips", "identified", "private_top1", "private_mse", "private_ssim",
    "private_lpips",
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
        whole: how many samples the grid asks of a cell, at most; 0 where the run doesn't say.
    """

    grid: str
    grid_hash: str
    title: str
    cells: dict[str, int]
    scenarios: dict[str, dict[str, Any]]
    seed: int = 0
    whole: int = 0

    @property
    def shortfall(self) -> str:
        """What it says of a part of a grid; empty where it is the whole."""
        samples = max(self.cells.values(), default=0)
        if samples >= self.whole:
            return ""
        return (
            f"A part of {self.grid}: {samples} of {self.whole} samples a cell; publishing needs all of them."
        )


@dataclass(frozen=True, eq=False)  # told apart by identity: boards are kept for as long as a run is the same
class Run:
    """What a run folder holds: the headers, in order, and the rows.

    `damaged`: the numbers of lines whose checksum says that they are not as they were written.
    """

    headers: tuple[Header, ...]
    rows: tuple[dict[str, Any], ...]
    damaged: tuple[int, ...] = ()

    def header_of(self, row: dict[str, Any]) -> Header:
        """The newest header that names the row's scenario.

        Raises:
            UserError: none does.
        """
        for header in reversed(self.headers):
            if row["scenario"] in header.scenarios:
                return header
        raise UserError(f"trial {row['trial']}: no header names its scenario {row['scenario']}")

    @property
    def keys(self) -> frozenset[str]:
        """The trials that are done."""
        return frozenset(row["trial"] for row in self.rows)

    @property
    def expected(self) -> dict[tuple[str, str], int]:
        """(scenario, attack) -> how many samples were asked for, the largest of all headers."""
        return _expected(self.headers)


def _expected(headers: Iterable[Header]) -> dict[tuple[str, str], int]:
    cells: dict[tuple[str, str], int] = {}
    for header in headers:
        for cell, samples in header.cells.items():
            scenario, _, attack = cell.partition(" ")
            cells[scenario, attack] = max(samples, cells.get((scenario, attack), 0))
    return cells


# --- lines ------------------------------------------------------------------------------------------------

_SEAL = ', "crc32": "'
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


def line(entry: Header | Record) -> str:
    """One line of the file, without its end: JSON, whose last member is the CRC-32 of all before it."""
    try:
        text = _ENCODER.encode(vars(entry))[:-1]
    except ValueError:  # a number that is not finite
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in vars(entry).items()
        }
        text = _ENCODER.encode(finite)[:-1]
    return f'{text}{_SEAL}{zlib.crc32(text.encode()):08x}"}}'


def _sealed(raw: bytes) -> bool | None:
    """Whether the line is as it was written; None where it has no checksum."""
    text, seal, checksum = raw.rstrip(b"\r\n").rpartition(_SEAL.encode())
    return checksum == b'%08x"}' % zlib.crc32(text) if seal else None


def _parsed(raw: bytes) -> Header | dict[str, Any]:
    """A header, or a row's columns.

    Raises:
        ValueError: it is neither.
    """
    try:
        entry = json.loads(raw.decode("utf-8", errors="replace"))
        if "cells" in entry:
            known = dict(entry)
            known.pop("crc32", None)
            return Header(**(known | {"cells": dict(entry["cells"])}))
        if entry["schema"] != SCHEMA:
            raise ValueError(f"schema {entry['schema']}")
        hash(entry["trial"])
        row = {column: entry[column] for column in COLUMNS}
        if not all(map(isinstance, row.values(), _TYPES)):
            wrong = [
                name for name, kinds in zip(COLUMNS, _TYPES, strict=True) if not isinstance(row[name], kinds)
            ]
            raise ValueError(f"{wrong[0]} is {str(row[wrong[0]])[:40]!r}")
        return row
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The whole lines and their numbers, without those of NUL bytes that a lost disk leaves."""
    try:
        with _opened(path) as file:
            for number, raw in enumerate(file, start=1):
                if raw.endswith(b"\n") and raw.strip(b"\0 \r\n"):
                    yield number, raw
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} can't be read: {error}; fetch it again") from None


def _opened(path: Path) -> gzip.GzipFile | io.BufferedReader:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _no_record(path: Path, number: int, error: ValueError) -> UserError:
    return UserError(
        f"{path}, line {number} is no record of schema {SCHEMA} ({error}); "
        "a row that is deleted is computed again by the same `leakbench run`"
    )


def files(place: Path) -> list[Path]:
    """The records files of a run's folder, or of a folder of published ones, or the file itself.

    Raises:
        UserError: there are none.
    """
    if place.is_file() or (place / FILE).is_file() or not place.is_dir():
        return [_file(place)]
    published = sorted([*place.rglob("r*.jsonl"), *place.rglob("r*.jsonl.gz")])
    return published or [_file(place)]


def _file(folder: Path) -> Path:
    path = folder if folder.is_file() else folder / FILE
    if not path.is_file():
        raise UserError(f"{folder} holds no {FILE}; give the folder that `leakbench run --out` wrote")
    return path


def _entries(path: Path) -> Iterator[tuple[int, bytes, Header | dict[str, Any]]]:
    """Number, bytes and content of each line."""
    for number, raw in _lines(path):
        try:
            yield number, raw, _parsed(raw)
        except ValueError as error:
            raise _no_record(path, number, error) from None


@dataclass(frozen=True)
class Count:
    """How far a run got: `wanted` trials, and how those that are there ended."""

    grid: str
    wanted: int
    outcomes: Counter[str]


def counted(folder: Path) -> Count:
    """How far a run got; as `read`, but keeps no rows.

    Raises:
        UserError: nothing there, or a line that is no record.
    """
    headers: list[Header] = []
    outcomes: Counter[str] = Counter()
    path = _file(folder)
    for _, _, entry in _entries(path):
        if isinstance(entry, Header):
            headers.append(entry)
        else:
            outcomes[entry["outcome"]] += 1
    if not headers:
        raise UserError(f"{path} has no header line; run into a new folder with --out")
    return Count(headers[-1].grid, sum(_expected(headers).values()), outcomes)


def read(folder: Path) -> Run:
    """The run in a folder, or in a records file.

    Raises:
        UserError: nothing there, or a line (other than a torn last one) that is no record.
    """
    path = _file(folder)
    headers: list[Header] = []
    rows: dict[str, dict[str, Any]] = {}
    damaged: list[int] = []
    texts: dict[str, str] = {}  # rows share theirs
    for number, raw, entry in _entries(path):
        if _sealed(raw) is False:
            damaged.append(number)
        if isinstance(entry, Header):
            headers.append(entry)
        else:
            rows[entry["trial"]] = {
                name: texts.setdefault(value, value) if type(value) is str else value
                for name, value in entry.items()
            }
    if not headers:
        raise UserError(f"{path} has no header line; run into a new folder with --out")
    return Run(tuple(headers), tuple(rows.values()), tuple(damaged))


def faults(folder: Path) -> list[str]:
    """Why a run is not whole, one line each: what is torn, damaged, doubled, foreign or missing.

    Raises:
        UserError: nothing there.
    """
    path = _file(folder)
    found: list[str] = []
    headers: list[Header] = []
    cells: dict[tuple[str, str], set[int]] = {}
    firsts: dict[str, int] = {}
    whole = 0
    for number, raw in _lines(path):
        whole = number
        try:
            entry = _parsed(raw)
        except ValueError as error:
            found.append(f"line {number} is no record of schema {SCHEMA} ({error})")
            continue
        sealed = _sealed(raw)
        if not sealed:
            found.append(
                f"line {number} has no checksum"
                if sealed is None
                else f"line {number} is not as it was written: its checksum differs"
            )
        if isinstance(entry, Header):
            headers.append(entry)
            continue
        first = firsts.setdefault(entry["trial"], number)
        if first != number:
            found.append(f"line {number} repeats trial {entry['trial']} of line {first}")
        cells.setdefault((entry["scenario"], entry["attack"]), set()).add(entry["sample"])
    found += _at_the_end(path, whole)
    found += [] if headers else ["there is no header line"]
    expected = _expected(headers)
    for cell, samples in cells.items():
        beyond = samples - set(range(expected.get(cell, 0)))
        if beyond:
            found.append(f"{_named(cell, headers)}: nobody asked for {_ranges(beyond)}")
    for cell, wanted in expected.items():
        missing = set(range(wanted)) - cells.get(cell, set())
        if missing:
            found.append(f"{_named(cell, headers)}: {_ranges(missing)} of {wanted} missing")
    return found


def _at_the_end(path: Path, whole: int) -> list[str]:
    if path.suffix == ".gz":  # written at once, and checked by its own checksum
        return []
    with path.open("rb") as file:
        file.seek(-min(1, path.stat().st_size), os.SEEK_END)
        torn = file.read() not in (b"", b"\n")
    return [f"line {whole + 1} is torn: the same run drops it"] if torn else []


def _named(cell: tuple[str, str], headers: Sequence[Header]) -> str:
    """A cell in a person's words."""
    scenario, attack = cell
    axes = next((header.scenarios[scenario] for header in headers if scenario in header.scenarios), {})
    named = [str(axes[name]) for name in ("dataset", "model", "weights", "defense") if name in axes]
    return f"{attack} on {', '.join([*named, f'scenario {scenario}'])}"


def _ranges(samples: Iterable[int]) -> str:
    """`samples 0-3, 7`."""
    parts = []
    for _, group in itertools.groupby(enumerate(sorted(samples)), lambda pair: pair[1] - pair[0]):
        run = [sample for _, sample in group]
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return f"sample{'s' * (parts != [parts[0]] or '-' in parts[0])} {', '.join(parts)}"


# --- writing ----------------------------------------------------------------------------------------------


class Keys:
    """Which trials are done, in twelve bytes each: millions fit beside a driver."""

    def __init__(self, trials: Iterable[str] = ()) -> None:
        packed = bytearray()
        for trial in trials:
            packed += _packed(trial)
        self._sorted = np.unique(np.frombuffer(packed, dtype="S12"))

    def __len__(self) -> int:
        return len(self._sorted)

    def having(self, trials: Sequence[str]) -> list[bool]:
        """Which of these are among them."""
        if not len(self) or not trials:
            return [False] * len(trials)
        asked = np.frombuffer(b"".join(map(_packed, trials)), dtype="S12")
        places = np.minimum(np.searchsorted(self._sorted, asked), len(self) - 1)
        found: list[bool] = (self._sorted[places] == asked).tolist()
        return found


def _packed(trial: str) -> bytes:
    return hashlib.blake2b(trial.encode(), digest_size=12).digest()


class Writer:
    """The one process that appends to a run's records.

    Attributes:
        last_header: the newest header that was there.
        done: the trials that were there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.last_header: Header | None = None
        self.done = Keys(self._kept()) if path.exists() else Keys()

    def _kept(self) -> Iterator[str]:
        """The trials of a file's whole lines; headers are noted on the way.

        Raises:
            UserError: a line that is no record, or not as it was written.
        """
        for number, raw in _lines(self._path):
            sealed = _sealed(raw)
            if sealed is False:
                raise UserError(
                    f"{self._path}, line {number} is not as it was written: its checksum differs; "
                    "delete the line, and this command computes its trial again"
                )
            start, end = len(b'{"trial": "'), raw.find(b'"', len(b'{"trial": "'))
            if sealed and raw.startswith(b'{"trial": "') and b"\\" not in raw[start:end]:
                yield raw[start:end].decode()
                continue
            try:
                entry = _parsed(raw)
            except ValueError as error:
                raise _no_record(self._path, number, error) from None
            if isinstance(entry, Header):
                self.last_header = entry
            else:
                yield entry["trial"]

    def header(self, header: Header) -> None:
        """Appends a header, unless the last one says the same."""
        if header != self.last_header:
            self.lines([line(header)])
            self.last_header = header

    def rows(self, records: Iterable[Record]) -> None:
        """Appends rows; on return they are on the disk."""
        self.lines(map(line, records))

    def lines(self, lines: Iterable[str]) -> None:
        """Appends what `line` made; on return it is on the disk, or none of it is."""
        content = "".join(f"{one}\n" for one in lines).encode()
        with _unwritable_explained(self._path.parent), self._path.open("ab", buffering=0) as file:
            before = file.tell()
            try:
                written = 0
                while written < len(content):
                    written += file.write(content[written:])
                os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(before)
                raise


@contextmanager
def _unwritable_explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{folder} can't be written: {error.strerror}; choose another --out, "
            "or make room: the same command goes on"
        ) from error


@contextmanager
def writing(folder: Path) -> Iterator[Writer]:
    """A writer on a run folder, made if need be; a torn last line is cut off first.

    Raises:
        UserError: another run writes there, the folder can't be written, or a line in it is damaged.
    """
    path = folder / FILE
    lock = _lock(folder)
    with _unwritable_explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0.5)  # `status` holds it for a moment
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


def _lock(folder: Path) -> filelock.BaseFileLock:
    return filelock.FileLock(folder / f".{FILE}.lock", timeout=0)


def is_written(folder: Path) -> bool:
    """Whether a run is writing there now."""
    if not (folder / f".{FILE}.lock").exists():
        return False
    try:
        with _lock(folder):
            return False
    except filelock.Timeout:
        return True
    except OSError:  # somebody else's folder: nothing can be said
        return False


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - 2**20)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        file.truncate(end)
        os.fsync(file.fileno())
    if path.stat().st_size == 0:
        path.unlink()
