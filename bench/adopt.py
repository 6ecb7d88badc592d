"""Records of the suite's own attacks, out of a run of a frozen grid: `python -m bench.adopt runs/labels-v1`.

What `leakbench submit` writes of one attack, this writes of each that ran there: its rows and its manifest,
under `results/records`. `leakbench verify` takes them as it takes any other's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from bench import registry, submission, verification
from bench.cases.scenario import Grid, cells
from bench.errors import UserError
from bench.report import record
from bench.report.record import Run


def adopt(folder: Path, out: Path, data_root: Path | None = None) -> Iterator[Path]:
    """Writes the records of each attack that the grid has today, and yields their files.

    What earlier revisions left in the same folder stays there.

    Raises:
        UserError: trials are missing or damaged, the suite had uncommitted changes, an attack isn't its own.
    """
    ran = record.read(folder)
    header = ran.headers[-1]
    grid, grid_file = submission.grid_of(header.grid)
    if grid.hash != header.grid_hash:
        raise UserError(f"{folder} ran another version of {grid.name}: {header.grid_hash[:8]}; run it again")
    if faults := record.faults(folder):
        raise UserError(f"{folder} is not whole: {faults[0]}; the same run goes on where it was")
    if dirty := sorted({row["commit"] for row in ran.rows if not row["commit"] or "+" in row["commit"]}):
        raise UserError(f"{folder} has trials of commit {dirty[0] or '?'}, which nobody has; run a clone")
    revisions = {spec: registry.attacks.revision(spec) for spec in sorted(_specs(grid))}
    rows = tuple(row for row in ran.rows if row["attack_revision"] == revisions.get(row["attack"]))
    for spec in sorted({row["attack"] for row in rows}):
        yield _adopted(spec, grid, grid_file, replace(ran, rows=rows), out, data_root)


def _specs(grid: Grid) -> set[str]:
    """The canonical specs of its attacks."""
    return {attack for _, attack in cells(grid)}


def _adopted(
    spec: str, grid: Grid, grid_file: str | None, ran: Run, out: Path, data_root: Path | None
) -> Path:
    parsed = registry.parse(spec)
    file = submission.built_in(parsed.target)
    if file is None:
        raise UserError(f"{spec} is not the suite's: hand it in by `leakbench submit`")
    class_name = type(registry.attacks.make(spec)).__name__
    asked = {scenario.key: count for scenario, count in submission.asked_of(grid, spec).items()}
    counts = {key: count for (key, attack), count in ran.expected.items() if attack == spec and key in asked}
    if counts.keys() != asked.keys():
        raise UserError(f"{spec} ran on {len(counts)} of its {len(asked)} scenarios; run the whole grid")
    samples = None if counts == asked else max(counts.values())
    relative = str(file.relative_to(registry.ROOT))
    with submission.alone(file, file.name) as copy:
        mine, planned = submission.plan(
            copy, registry.Spec(class_name, parsed.parameters), relative, grid, samples, data_root,
            ran.rows[0]["device"],
        )  # fmt: skip
    header = submission.whole_header(mine, grid, planned)
    if samples is not None:  # a board of parts alone has its ranks, and says what it is a part of
        asked_for = {f"{scenario} {spec}": count for scenario, count in counts.items()}
        header = replace(header, cells=asked_for, whole=max(asked.values()))
    path = submission.publish(mine, grid, grid_file, samples, planned, ran, out, "none", header)
    verification.inspect(path, data_root)
    return path


def main() -> None:
    """Says what was written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a finished run of a grid of the suite")
    parser.add_argument("--out", type=Path, default=registry.ROOT / "results" / "records")
    parser.add_argument("--data", type=Path, help="where data sets lie")
    asked = parser.parse_args()
    try:
        for path in adopt(asked.run, asked.out, asked.data):
            print(path, flush=True)
    except UserError as error:
        print(f"adopt: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
