"""What pages of results rest on: committed boards, figures of studies, what papers say of themselves.

A page is written from committed files alone, so that it comes out the same anywhere. What isn't there is said
to be not run, with the command that runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from bench import registry
from bench.cases import models
from bench.report.statistics import wilson

STUDIES = {
    "labels/paper_labels.csv": ("python -m bench.studies.paper_labels --small … --training … --large …"),
    "labels/ilrg_batches.csv": "python -m bench.studies.ilrg_batches",
    "labels/order.csv": "python -m bench.studies.label_order",
    "solver/identifiable_cases.csv.gz": "python -m bench.studies.identifiable_cases",
    "solver/noise.csv": "python -m bench.studies.noise",
    "solver/losses.csv": "python -m bench.studies.losses",
    "solver/batch_map.csv": "python -m bench.studies.batch_map",
    "solver/ratios_10.csv": "python -m bench.speed.ratios",
    "images/after_lambda.csv": "python -m bench.studies.after_lambda",
    "images/feature_weight.csv": "python -m bench.studies.feature_weight",
    "images/speed.csv": "python -m bench.speed.images",
    "defenses/noise_curve.csv": "python -m bench.studies.noise_curve",
}
"""A study's figures, under results/ -> the command that makes them."""

KINDS = {
    "hard": "none",
    "smoothed": "label_smoothing(epsilon=(0.1, 0.5))",
    "mixed": "mixup(low=0.1, high=0.9)",
}
"""Of labels, as grids have them: what the client does to its batch."""

_RATES = ("accuracy", "within", "existence", "counts", "rate")
"""Words in the names of metrics that are shares."""


class MissingError(Exception):
    """What a figure rests on isn't committed; `command` would make it."""

    def __init__(self, command: str) -> None:
        super().__init__(f"not run: `{command}`")


@dataclass(frozen=True, eq=False)
class Evidence:
    """The committed files under `results`, each read once.

    `commands`: what would make again the figures read since it was last cleared.
    """

    results: Path
    commands: list[str] = field(default_factory=list)
    _tables: dict[Path, pd.DataFrame] = field(default_factory=dict)

    def study(self, name: str, **columns: Any) -> pd.DataFrame:
        """The rows of a study's file that have these values; a list means any of its values.

        Raises:
            MissingError: there are none.
        """
        return self._rows(name, STUDIES[name], columns)

    def board(self, name: str, **columns: Any) -> pd.DataFrame:
        """The rows of a published board that have these values and trials that count.

        Raises:
            MissingError: there are none.
        """
        grid = name.rpartition("-")[0]
        for column, kind in (("attack", registry.attacks), ("defense", registry.defenses)):
            if column in columns:
                columns[column] = kind.canonical(columns[column])
        if "model" in columns:
            columns["model"] = models.canonical(columns["model"])
        return self._rows(f"leaderboards/{name}.csv", f"leakbench run {grid}", columns)

    def _rows(self, name: str, command: str, columns: dict[str, Any]) -> pd.DataFrame:
        path = self.results / name
        if path not in self._tables:
            self._tables[path] = pd.read_csv(path) if path.exists() else pd.DataFrame()
        rows = self._tables[path]
        for column, value in columns.items():
            if column not in rows:
                raise MissingError(command)
            rows = rows[rows[column].isin(value if isinstance(value, list) else [value])]
        if "expected" in rows:  # of a board: cells that have begun, and how many examples of each network
            rows = rows[rows["n"] > 0]
            seeds = rows["weight_seed"].astype(str).str.count(",") + 1
            command += "".join(f" --samples {n}" for n in sorted(set(rows["expected"] // seeds))[-1:])
        if rows.empty:
            raise MissingError(command)
        if command not in self.commands:
            self.commands.append(command)
        return rows

    def reported(self, attack: str, metric: str, setting: str = "", dataset: str = "") -> str:
        """What papers report of it: every row of reported.csv whose metric and so on begin like this."""
        rows = self._rows_reported()
        for column, start in (("metric", metric), ("setting", setting), ("dataset", dataset)):
            rows = rows[rows[column].str.startswith(start)]
        rows = rows[rows["attack"] == attack]
        if rows.empty:
            raise ValueError(f"results/reported.csv has no {metric!r} of {attack}: {setting} {dataset}")
        return ". ".join(
            f"{_reported_value(row.metric, row.relation, row.value)}; {row.dataset}; {row.setting} "
            f"([{row.read_in}]({row.paper}))"
            for row in each(rows)
        )

    def _rows_reported(self) -> pd.DataFrame:
        path = self.results / "reported.csv"
        if path not in self._tables:
            self._tables[path] = pd.read_csv(path)
        return self._tables[path]


def _reported_value(metric: str, relation: str, value: float) -> str:
    sign = "" if relation == "=" else f"{relation} "
    if any(word in metric for word in _RATES):
        return f"{metric}: {sign}{100 * value:.3g} %"
    return f"{metric}: {sign}{value:g}"


def rate(successes: float, n: int) -> str:
    """A share with its Wilson interval, in per cent.

    >>> rate(20, 20)
    '100 % [83.9, 100]'
    """
    low, high = wilson(successes, n)
    return f"{100 * successes / n:.3g} % [{100 * low:.3g}, {100 * high:.3g}]"


def share(right: pd.Series) -> str:
    """Of a column of yes and no, with how many there are."""
    return f"{rate(int(right.sum()), len(right))}, n = {len(right)}"


def each(rows: pd.DataFrame) -> Iterator[Any]:
    """Row by row, its columns as attributes."""
    return rows.itertuples()


def groups(rows: pd.DataFrame, by: str | list[str]) -> Iterator[tuple[Any, pd.DataFrame]]:
    """What they share, and the rows, sorted by it."""
    yield from rows.groupby(by)


def one(rows: pd.DataFrame) -> Any:
    """The only row, its columns as attributes or keys.

    Raises:
        ValueError: there are more.
    """
    if len(rows) != 1:
        raise ValueError(f"{len(rows)} rows where one was meant: {rows.iloc[:, :12].to_dict('records')[:3]}")
    return rows.iloc[0]


def scored(row: Any, metric: str) -> str:
    """A board's row's metric with its interval, without n."""
    if metric == "psnr":
        return f"{row.psnr:.1f} dB [{row.psnr_low:.1f}, {row.psnr_high:.1f}]"
    refused = int(row.failed) if metric == "success" and "failed" in row else 0
    return rate(round(row[metric] * row.n), int(row.n)) + (
        f", {refused} refused or failed" if refused else ""
    )


def by_kind(evidence: Evidence, board: str, metric: str, kinds: Iterable[str] = KINDS, **columns: Any) -> str:
    """A metric for each kind of label, and how many trials each rests on."""
    rows = {kind: one(evidence.board(board, defense=KINDS[kind], **columns)) for kind in kinds}
    counts = {int(row.n) for row in rows.values()}
    each = f"; n = {counts.pop()} each" if len(counts) == 1 else ""
    return (
        ", ".join(
            f"{kind} {scored(row, metric)}{'' if each else f' (n = {int(row.n)})'}"
            for kind, row in rows.items()
        )
        + each
    )


Figures = Callable[[Evidence], str]
"""What a cell of figures is made by."""


@dataclass(frozen=True)
class Claim:
    """One row of a page.

    Attributes:
        text: what is claimed or asked.
        reported: what is reported of it; a reason where nothing is.
        ours: our figures, as text.
        why: where the two differ, why; else what there is to know.
    """

    text: str
    reported: Figures | str
    ours: Figures
    why: str

    def cells(self, evidence: Evidence) -> tuple[str, str, str, str, str]:
        """Claim, reported, ours, the commands that make ours again, why they differ."""
        said = self.reported if isinstance(self.reported, str) else self.reported(evidence)
        evidence.commands.clear()
        try:
            measured = self.ours(evidence)
        except MissingError as missing:
            return self.text, said, str(missing), "the same", self.why
        commands = ", ".join(f"`{command}`" for command in evidence.commands)
        return self.text, said, measured, commands or "none: nothing is measured", self.why


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table.

    Raises:
        ValueError: a cell is empty: it needs at least a reason.
    """
    lines = [list(heads), ["---"] * len(heads)]
    for row in rows:
        if len(row) != len(heads) or not all(cell.strip() for cell in row):
            raise ValueError(f"an empty cell, which needs a reason: {row}")
        lines.append([cell.replace("|", "\\|").replace("\n", " ") for cell in row])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
