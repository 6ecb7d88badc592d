"""Rendered leaderboards from committed records, the same bytes every time: `python -m bench.publish`.

`results/records/GRID/ATTACK/rN.jsonl` (as `leakbench submit` writes it) is sorted and gzipped beside its
manifest, and `results/leaderboards/GRID-TRACK.md` and `.csv` are written from all that is there; then the
pages of `bench.reference`, which quote the boards. What papers say of themselves is in
`results/reported.csv`, and never on a board.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bench import reference
from bench.errors import UserError
from bench.registry import ROOT
from bench.report import Results, defenses, load, record, tables, utility
from bench.report import leaderboard as boards
from bench.report.record import Run


def publish(results: Path) -> list[Path]:
    """Writes all boards; returns their files. Boards of records that are gone go, too.

    Raises:
        UserError: a file holds no records.
    """
    for path in sorted((results / "records").glob("*/*/r*.jsonl")):
        pack(path)
    folder = results / "leaderboards"
    folder.mkdir(parents=True, exist_ok=True)
    written, index = [], _INDEX
    for grid in sorted(path for path in (results / "records").glob("*") if path.is_dir()):
        results_of_grid = dataclasses.replace(load(grid), costs=utility.read(results / "defenses"))
        boards_of_grid = dict(_boards(results_of_grid))
        index += _entry(grid.name, results_of_grid.runs, list(boards_of_grid))
        for track, rendered in boards_of_grid.items():
            question = _DEFENDED if track == "defense" else boards.track_named(track).question
            head = _head(grid.name, track, question, results_of_grid.runs)
            for suffix, content in ((".md", head + rendered("md")), (".csv", rendered("csv"))):
                path = folder / f"{grid.name}-{track}{suffix}"
                path.write_text(content, encoding="utf-8")
                written.append(path)
    written.append(folder / "README.md")
    written[-1].write_text(index, encoding="utf-8")
    for path in {*folder.glob("*.md"), *folder.glob("*.csv")} - set(written):
        path.unlink()
    return written


_DEFENDED = "what the strongest attacker gets of the private batch, told the defense or not, and its cost"


def _boards(results: Results) -> Iterator[tuple[str, Callable[[str], str]]]:
    """Each track that has anything to show, and what renders it in a format."""
    for track in results.tracks:
        yield track, functools.partial(tables.render, results.leaderboard(track), track)
    if (
        len({axes["defense"] for run in results.runs for h in run.headers for axes in h.scenarios.values()})
        > 1
    ):
        yield "defense", functools.partial(defenses.render, results.leaderboard("defense"))


def pack(path: Path) -> Path:
    """Replaces plain records by a gzip file of the same lines, headers first, rows by scenario and sample."""
    ran = record.read(path)
    if ran.damaged:
        raise UserError(
            f"{path}, line {ran.damaged[0]} is not as it was written: `leakbench verify` says more"
        )
    heads: list[bytes] = []
    rows: list[tuple[tuple[int, int], bytes]] = []
    places = {scenario: at for header in ran.headers for at, scenario in enumerate(header.scenarios)}
    for line in path.read_bytes().splitlines(keepends=True):
        entry = json.loads(line)
        if "cells" in entry:
            heads.append(line)
        else:
            rows.append(((places[entry["scenario"]], entry["sample"]), line))
    packed = path.with_name(f"{path.name}.gz")
    content = b"".join([*heads, *(line for _, line in sorted(rows))])
    packed.write_bytes(gzip.compress(content, compresslevel=9, mtime=0))
    path.unlink()
    return packed


def _head(grid: str, track: str, question: str, runs: Sequence[Run]) -> str:
    """What all rows share, and how they were made."""
    rows = [row for run in runs for row in run.rows]
    title = _title(runs)

    def values(column: str) -> str:
        return ", ".join(sorted({str(row[column]) for row in rows}))

    hashes = ", ".join(sorted({header.grid_hash[:12] for run in runs for header in run.headers}))
    sentences = [
        f"Shown: {question}.",
        "Ranks are within a scenario: 1 + how many attacks do significantly better there on the same",
        "observations (paired tests, Holm-corrected). What an attack is told beyond update and model stands",
        "beside its name; a skipped one is shown with its reason and counted nowhere.",
    ]
    provenance = [
        f"Grid {grid} ({hashes}), protocol {values('protocol_version')}, torch {values('torch')}, on",
        f"{values('device')}. The CSV file of the same name has every column; any trial again:",
        f"`leakbench rerun results/records/{grid}/ATTACK/rN.jsonl.gz TRIAL`.",
    ]
    parts = [f"# {grid}: {track} leaderboard", title, _shortfall(runs), " ".join(sentences)]
    parts.append(" ".join(provenance))
    return "".join(f"{part}\n\n" for part in parts if part)


_INDEX = """# Published boards

| grid | what it asks | trials | boards |
| --- | --- | --- | --- |
"""


def _entry(grid: str, runs: Sequence[Run], tracks: Sequence[str]) -> str:
    """A grid's line in the index."""
    links = ", ".join(f"[{track}]({grid}-{track}.md) ([CSV]({grid}-{track}.csv))" for track in tracks)
    asked = " ".join(filter(None, (_title(runs), _shortfall(runs))))
    return f"| {grid} | {asked} | {sum(len(run.rows) for run in runs):,} | {links} |\n"


def _title(runs: Sequence[Run]) -> str:
    return next((header.title for run in runs for header in run.headers if header.title), "")


def _shortfall(runs: Sequence[Run]) -> str:
    """What is said of records that are a part of their grid; nothing where all are whole."""
    short = [run.headers[-1] for run in runs if run.headers[-1].shortfall]
    if not short:
        return ""
    most, whole = max(max(one.cells.values()) for one in short), max(one.whole for one in short)
    return f"**A part of {short[0].grid}: at most {most} samples a cell, where the grid has up to {whole}.**"


def main() -> None:
    """Says what was written."""
    try:
        results = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "results"
        written = publish(results)
        if len(sys.argv) == 1:
            written += reference.write(results, ROOT / "docs")
        for path in written:
            print(path)
    except UserError as error:
        print(f"publish: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
