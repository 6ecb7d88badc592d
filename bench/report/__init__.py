"""Results for programs: `from bench.report import load; load("runs/quick").leaderboard("label")`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from bench.report.record import Run


@dataclasses.dataclass(frozen=True)
class Results:
    """The records of one or more runs.

    `costs`: what was measured of defenses, rows of `utility.jsonl`.
    """

    runs: tuple[Run, ...]
    costs: tuple[dict[str, Any], ...] = ()

    @property
    def tracks(self) -> list[str]:
        """The tracks that have anything to show."""
        from bench.report import leaderboard

        return leaderboard.tracks(self.runs)

    def leaderboard(self, track: str) -> pd.DataFrame:
        """One row for each attack in each scenario: rank, n, the metrics' means and intervals.

        Of the track `defense` a row for each defense: the strongest attack, and what the defense costs.

        Raises:
            UserError: an unknown track, or one with nothing to show.
        """
        from bench.report import defenses, leaderboard

        if track == "defense":
            return defenses.defense_board(self.runs, self.costs)
        return leaderboard.leaderboard(self.runs, track)

    @property
    def trials(self) -> pd.DataFrame:
        """One row a trial, with the columns of records."""
        import pandas as pd

        from bench.report.record import COLUMNS

        return pd.DataFrame([row for run in self.runs for row in run.rows], columns=list(COLUMNS))


def load(*places: str | Path) -> Results:
    """The records in run folders, records files, or folders of published records (`results/records/GRID`).

    Raises:
        UserError: a place holds no records.
    """
    from bench.report import record, utility

    files = [file for place in places for file in record.files(Path(place))]
    costs = [row for place in places if Path(place).is_dir() for row in utility.read(Path(place))]
    return Results(tuple(map(record.read, files)), tuple(costs))


def manifests(place: str | Path) -> list[dict[str, Any]]:
    """What lies beside records that were submitted; what can't be read is left out."""
    from bench.report import record

    found = []
    for file in record.files(Path(place)):
        beside = file.with_name(f"{file.name.partition('.')[0]}.json")
        try:
            said = json.loads(beside.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        found += [said] if isinstance(said, dict) else []
    return found
