"""Leaderboards: who recovers what, from which networks, past which defense.

A trial that crashed, ran out of time or memory, diverged or gave up counts as not recovered: `success` is
0, and a metric that it lacks takes its value in `WORST`. A trial that an attack skipped is shown with its
reason and counted nowhere. An exact image has no finite PSNR and counts as `EXACT_PSNR`.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench import registry
from bench.errors import UserError, nearest
from bench.report import statistics
from bench.report.record import COLUMNS, METRICS, SCENARIO, Run

FAILED = ("crashed", "timeout", "out_of_memory", "diverged", "unidentifiable")
"""The outcomes that count as not recovered."""

WORST = {
    "success": 0.0,
    "label_error": 1.0,  # two probabilities differ by no more
    "label_l1": 2.0,  # nor two distributions
    "top1": 0.0,
    "class_existence": 0.0,
    "class_counts": 0.0,
    "format_found": 0.0,
    "feature_error": 1.0,  # what answering zero gives
    "feature_cosine": 0.0,  # what a random direction gives
    "mse": 1.0,
    "psnr": 0.0,
    "ssim": 0.0,
    "lpips": 1.0,
    "private_top1": 0.0,
    "private_mse": 1.0,
    "private_lpips": 1.0,
}
"""What a trial without an answer scores; λ's error isn't here: it is the mean over those who gave a λ."""

EXACT_PSNR = 200.0
"""In dB; also the most that an image which is nearly exact scores."""

CHANCE = "random_labels"
"""The attack that guesses: people see it last."""


@dataclass(frozen=True)
class Track:
    """What a leaderboard ranks.

    Attributes:
        name: as on the command line.
        produces: what an attack must produce to be on it, as in `Attack.produces`.
        ranks_by: the metric that ranks; higher is better.
        answered: the metric that every trial with such an answer has.
        optional: metrics of an answer that not every attack or installation has.
        metrics: all that is shown of an answer.
        question: what is measured, for people.
    """

    name: str
    produces: str
    ranks_by: str
    answered: str
    metrics: tuple[str, ...]
    optional: tuple[str, ...]
    question: str


_TRACKS = {
    "label": Track(
        "label", "soft_labels", "success", "success",
        ("success", "label_error", "label_l1", "top1", "class_existence", "class_counts", "lam_error",
         "format_found", "private_top1"),
        ("lam_error", "format_found", "private_top1"),
        "trials in which every soft label is recovered (within 0.01), with 95 % intervals",
    ),
    "image": Track(
        "image", "images", "psnr", "mse",
        ("mse", "psnr", "ssim", "lpips", "private_mse", "private_lpips"),
        ("lpips", "private_mse", "private_lpips"),
        f"how near the images are, with 95 % intervals; an exact image counts as {EXACT_PSNR:.0f} dB",
    ),
    "feature": Track(
        "feature", "features", "feature_cosine", "feature_cosine",
        ("feature_error", "feature_cosine"),
        (),
        "how near the last layer's inputs are, with 95 % intervals",
    ),
}  # fmt: skip

TRACKS = tuple(_TRACKS)
"""The tracks that there are."""

_NETWORK = tuple(column for column in SCENARIO if column not in ("defense", "weight_seed"))
_GROUP = ("grid", *SCENARIO)
_CELL = (*_GROUP, "scenario", "knowledge", "attack")
_REVISIONS = ["attack_revision", "defense_revision"]
_NEEDS = {"lpips": "mse", "private_lpips": "private_mse"}  # LPIPS's trunk was missing where only the right is


def tracks(runs: Sequence[Run]) -> list[str]:
    """The tracks that these runs have anything to show on; none before the first record."""
    trials = _trials(runs)
    made = set().union(*_produced(trials).values())
    return [track.name for track in _TRACKS.values() if track.produces in made]


def leaderboard(runs: Sequence[Run], track: str) -> pd.DataFrame:
    """One row for each attack in each scenario: the rank, the means, how sure they are.

    Its columns: `rank` (within the scenario; ties share it; none where trials are missing or skipped),
    `attack`, `defense` and the rest of the scenario, `n` (trials that count), `expected` (trials asked
    for), `failed` (how many of n ended as in `FAILED`), each metric's mean, `success_low` and
    `success_high` and the same for the metric that ranks, `skipped` (why, where every trial was).

    Only the newest protocol version of a grid counts, and in each cell one revision of attack and defense,
    the one written last.

    Raises:
        UserError: an unknown track, no records, or none that the track can rank.
    """
    shown = _track(track)
    trials = _trials(runs)
    if trials.empty:
        grids = ", ".join(sorted({header.grid for run in runs for header in run.headers})) or "these runs"
        raise UserError(f"no records yet in {grids}; the `leakbench run` that made the folder continues it")
    produced = _produced(trials)
    if not any(shown.produces in made for made in produced.values()):
        there = ", ".join(tracks(runs)) or "none"
        raise UserError(f"no attack here produces {shown.produces}; tracks with something to show: {there}")
    scored = _scored(trials, produced)
    scored = scored[[shown.produces in produced[attack] for attack in scored["attack"]]]
    asked = {cell: n for cell, n in _expected(runs).items() if _makes(cell[2], produced, shown)}
    begun = _cells(scored, asked, shown)
    board = pd.DataFrame([*_rows(begun), *_not_begun(begun, asked, runs)], columns=begun.columns)
    board[_numeric(shown)] = board[_numeric(shown)].astype("float64")
    ranked = _with_ranks(board, scored, shown)
    return _sorted(ranked, list(asked), shown)[_columns(shown)].reset_index(drop=True)


def _track(name: str) -> Track:
    if name not in _TRACKS:
        raise UserError(f"there is no {name!r} leaderboard; there are {', '.join(TRACKS)}")
    return _TRACKS[name]


def _columns(track: Track) -> list[str]:
    """The board's columns, in order."""
    bounded = {"success", track.ranks_by}
    means = [[m, f"{m}_low", f"{m}_high"] if m in bounded else [m] for m in METRICS]
    others = [column for column in SCENARIO if column != "defense"]
    scenario = ["attack", "defense", *others, "knowledge", "grid", "scenario"]
    return ["rank", *scenario, "n", "expected", "failed", *itertools.chain(*means), "skipped"]


def _numeric(track: Track) -> list[str]:
    """The board's columns of means and their bounds."""
    columns = _columns(track)
    return columns[columns.index("failed") + 1 : columns.index("skipped")]


def _trials(runs: Sequence[Run]) -> pd.DataFrame:
    """All rows, a trial once, with their cell's number; those of an older revision are left out."""
    rows = {row["trial"]: row for run in runs for row in run.rows}
    trials = pd.DataFrame(list(rows.values()), columns=list(COLUMNS))
    trials[list(METRICS)] = trials[list(METRICS)].astype("float64")
    if trials.empty:
        return trials
    newest = trials.groupby("grid")["protocol_version"].transform("max")
    trials = trials[trials["protocol_version"] == newest]
    latest = trials.groupby(list(_CELL), sort=False)[_REVISIONS].transform("last")
    trials = trials[(trials[_REVISIONS] == latest).all(axis=1)].reset_index(drop=True)
    return trials.assign(cell=trials.groupby(list(_CELL), sort=False).ngroup())


def _expected(runs: Sequence[Run]) -> dict[tuple[str, str, str], int]:
    """(grid, scenario, attack) -> the trials asked for, in the grids' order."""
    cells: dict[tuple[str, str, str], int] = {}
    for run in runs:
        for (scenario, attack), samples in run.expected.items():
            cell = (run.headers[-1].grid, scenario, attack)
            cells[cell] = max(samples, cells.get(cell, 0))
    return cells


def _produced(trials: pd.DataFrame) -> dict[str, frozenset[str]]:
    """Attack -> what it produces: what its answers were scored for, else what its class says.

    An attack without an answer and without a class produces whatever the others do, so that one which
    always fails can't hide.
    """
    answered = pd.DataFrame({track.produces: trials[track.answered].notna() for track in _TRACKS.values()})
    seen = answered.groupby(trials["attack"]).any()
    made = {str(a): frozenset(seen.columns[row]) for a, row in zip(seen.index, seen.to_numpy(), strict=True)}
    anything = frozenset().union(*made.values()) or frozenset({"soft_labels"})
    return {attack: seen or _declared(attack) or anything for attack, seen in made.items()}


def _declared(attack: str) -> frozenset[str]:
    """What an attack's class says that it produces; nothing where the class can't be had."""
    if not _is_loadable(attack):
        return frozenset()
    try:
        return frozenset(registry.attacks.find(registry.parse(attack).target).produces)
    except (UserError, ImportError):
        return frozenset()


def _is_loadable(spec: str) -> bool:
    """Whether to import a spec's class for a look: not from a path, which others' records may name."""
    return ".py:" not in spec


def _makes(attack: str, produced: dict[str, frozenset[str]], track: Track) -> bool:
    return track.produces in (produced.get(attack) or _declared(attack))


def _scored(trials: pd.DataFrame, produced: dict[str, frozenset[str]]) -> pd.DataFrame:
    """The trials with what they lack filled in, as the module's first lines say."""
    scored = trials.copy()
    counts = trials["outcome"] != "skipped"
    exact = trials["psnr"].isna() & (trials["mse"] == 0)
    scored["psnr"] = trials["psnr"].mask(exact, EXACT_PSNR).clip(upper=EXACT_PSNR)
    scored["success"] = trials["success"].mask(trials["outcome"].isin(FAILED) & trials["success"].notna(), 0)
    for track in _TRACKS.values():
        makes = counts & pd.Series([track.produces in produced[attack] for attack in trials["attack"]])
        for metric in track.metrics:
            if metric not in WORST:
                continue
            there = trials[metric].notna()
            if metric in _NEEDS:
                unmeasured = (
                    (trials[_NEEDS[metric]].notna() & ~there).groupby(trials["cell"]).transform("any")
                )
                scored[metric] = scored[metric].mask(unmeasured)
                fills = makes & bool(there.any()) & ~unmeasured
            elif metric in track.optional:
                fills = makes & there.groupby(trials["attack"]).transform("any")
            else:
                fills = makes
            scored[metric] = scored[metric].mask(fills & scored[metric].isna(), WORST[metric])
    return scored


def _cells(scored: pd.DataFrame, asked: dict[tuple[str, str, str], int], track: Track) -> pd.DataFrame:
    """One row for each cell that has begun, without its rank; `complete` says whether it may have one."""
    counted = scored[scored["outcome"] != "skipped"]
    by_cell, every = counted.groupby("cell"), scored.groupby("cell")
    board = scored.drop_duplicates("cell").set_index("cell")[list(_CELL)]
    board["n"] = by_cell.size().reindex(board.index, fill_value=0)
    board["failed"] = every["outcome"].agg(lambda outcomes: outcomes.isin(FAILED).sum())
    names = zip(board["grid"], board["scenario"], board["attack"], strict=True)
    board["expected"] = [asked.get(name, n) for name, n in zip(names, every.size()[board.index], strict=True)]
    board["complete"] = (board["n"] > 0) & (every["sample"].nunique() >= board["expected"])
    reasons = every["reason"].agg(lambda reasons: "; ".join(sorted(set(reasons) - {""})))
    board["skipped"] = reasons.replace("", "does not apply here").astype(object).where(board["n"] == 0, None)
    board = board.join(by_cell[list(METRICS)].mean())
    for metric in {"success", track.ranks_by}:
        bounds = {cell: _interval(trials, metric) for cell, trials in by_cell[[metric, "weights_sha256"]]}
        columns = [f"{metric}_low", f"{metric}_high"]
        board = board.join(pd.DataFrame.from_dict(bounds, orient="index", columns=columns))
    return board.reset_index().reindex(columns=[*_columns(track), "complete", "cell"])


def _not_begun(
    begun: pd.DataFrame, asked: dict[tuple[str, str, str], int], runs: Sequence[Run]
) -> list[dict[str, Any]]:
    """A row of no trials for each cell that was asked for and has none yet."""
    rows = _rows(begun)
    cells = {(row["grid"], row["scenario"], row["attack"]) for row in rows}
    knows = {row["attack"]: row["knowledge"] for row in rows}
    axes_of = {
        (header.grid, scenario): axes
        for run in runs
        for header in run.headers
        for scenario, axes in header.scenarios.items()
    } | {(row["grid"], row["scenario"]): row for row in rows}
    zeros = []
    for (grid, scenario, attack), expected in asked.items():
        axes = axes_of.get((grid, scenario), {})
        if (grid, scenario, attack) not in cells and set(SCENARIO) <= set(axes):
            names = {"grid": grid, "scenario": scenario, "attack": attack, "knowledge": knows.get(attack, "")}
            counts = {"n": 0, "expected": expected, "failed": 0, "complete": False, "cell": -1}
            zeros.append(names | counts | {column: axes[column] for column in SCENARIO})
    return zeros


def _interval(counted: pd.DataFrame, metric: str) -> tuple[float, float]:
    """The metric's interval in a cell: Wilson's for the rate, bootstrapped for a mean."""
    if counted[metric].isna().any():
        return math.nan, math.nan
    if metric == "success":
        return statistics.wilson(counted[metric].sum(), len(counted))
    return statistics.clustered_bootstrap(counted[metric], list(counted["weights_sha256"]))


def _with_ranks(board: pd.DataFrame, scored: pd.DataFrame, track: Track) -> pd.DataFrame:
    """The board with ranks, each among the complete cells of the same scenario."""
    board = board.assign(rank=pd.array([pd.NA] * len(board), dtype="Int64"))
    scores = scored.groupby(["cell", "sample"])[track.ranks_by].mean().unstack("sample")
    for _, group in board[board["complete"]].groupby(list(_GROUP), sort=False):
        board.loc[group.index, "rank"] = statistics.ranks(scores.loc[group["cell"]].to_numpy())
    return board


def _sorted(board: pd.DataFrame, asked: list[tuple[str, str, str]], track: Track) -> pd.DataFrame:
    """Scenarios in their grid's order, attacks by rank, then score, then name."""
    place = {(grid, scenario): at for at, (grid, scenario, _) in reversed(list(enumerate(asked)))}
    at = [place.get(cell, len(asked)) for cell in zip(board["grid"], board["scenario"], strict=True)]
    board = board.assign(place=at, score=-board[track.ranks_by].astype("float64"))
    board["place"] = board.groupby(list(_GROUP), sort=False)["place"].transform("min")
    return board.sort_values(["place", *_GROUP, "rank", "score", "attack", "knowledge"], na_position="last")


def render(board: pd.DataFrame, track: str, format: str) -> str:
    """A leaderboard as text: `csv` and `json` hold every column, `md` the main ones, `table` is for people.

    Raises:
        UserError: an unknown track or format.
    """
    if format not in _FORMATS:
        raise UserError(f"no format is named {format!r}{nearest(format, _FORMATS)}")
    return _FORMATS[format](board, _track(track))


def _csv(board: pd.DataFrame, track: Track) -> str:
    return board.to_csv(index=False, lineterminator="\n")


def _json(board: pd.DataFrame, track: Track) -> str:
    return json.dumps(_rows(board), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _markdown(board: pd.DataFrame, track: Track) -> str:
    """A GitHub table: rank, who, what was attacked (the axes that vary), how well."""
    names = _Names(board, track)
    varying = [c for c in ("grid", *SCENARIO) if c != "defense" and board[c].nunique() > 1]
    axes = [c for c in ("grid", *SCENARIO) if c in varying or c in ("model", "weights")]
    heads = ["rank", "attack", "defense", *(_words(axis) for axis in axes), "n"]
    heads += [title for title, _ in _MEASURES[track.name]]
    lines = [heads, ["---"] * len(heads)]
    for row in _rows(board):
        who = [_rank(row), names.attack(row), names.defenses[row["defense"]]]
        cells = [*who, *(str(row[axis]) for axis in axes)]
        if row["skipped"] is None:
            cells += [_counted(row), *(measure(row) for _, measure in _MEASURES[track.name])]
        else:
            cells += ["–", f"skipped: {row['skipped']}", *[""] * (len(heads) - len(cells) - 2)]
        lines.append([cell.replace("|", "\\|") for cell in cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _rows(board: pd.DataFrame) -> list[dict[str, Any]]:
    """The board's rows, with None for what isn't there."""
    rows = board.astype(object).to_dict(orient="records")
    return [{str(name): None if pd.isna(value) else value for name, value in row.items()} for row in rows]


def _words(column: str) -> str:
    return column.replace("_", " ")


def _rank(row: dict[str, Any]) -> str:
    return "—" if row["rank"] is None else str(row["rank"])


def _counted(row: dict[str, Any]) -> str:
    """How many trials count; of how many, where some are missing."""
    return f"{row['n']}/{row['expected']}" if _partial(row) else str(row["n"])


def _partial(row: dict[str, Any]) -> bool:
    """Trials are missing: it can't be ranked."""
    return bool(row["rank"] is None and row["skipped"] is None)


def _percent(rate: float) -> str:
    """A rate in per cent; 100 % is all and 0 % is none, whatever the rounding."""
    rounded = f"{100 * rate:.0f}%"
    if rounded == "100%" and rate < 1:
        return ">99%"
    return "<1%" if rounded == "0%" and rate > 0 else rounded


def _success(row: dict[str, Any]) -> str:
    """As in `98% [90–100]`."""
    if row["success"] is None:
        return ""
    low, high = row["success_low"], row["success_high"]
    return f"{_percent(row['success'])} [{100 * low:.0f}–{100 * high:.0f}]"


def _psnr(row: dict[str, Any]) -> str:
    """As in `17.9 [17.2–18.7]`, or `110 [108–113]`."""
    return _bounded(row, "psnr", 1 if (row["psnr"] or 0) < 100 else 0)


def _cosine(row: dict[str, Any]) -> str:
    return _bounded(row, "feature_cosine", 4)


def _bounded(row: dict[str, Any], metric: str, digits: int) -> str:
    if row[metric] is None:
        return ""
    low, high = row[f"{metric}_low"], row[f"{metric}_high"]
    return f"{row[metric]:.{digits}f} [{low:.{digits}f}–{high:.{digits}f}]"


def _mean(metric: str, form: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: "" if row[metric] is None else format(row[metric], form)


def _rate(metric: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: "" if row[metric] is None else _percent(row[metric])


def _failures(row: dict[str, Any]) -> str:
    return str(row["failed"] or "")


_MEASURES: dict[str, list[tuple[str, Callable[[dict[str, Any]], str]]]] = {
    "label": [
        ("success", _success),
        ("top-1", _rate("top1")),
        ("label error", _mean("label_error", ".2g")),
        ("failed", _failures),
    ],
    "image": [
        ("PSNR (dB)", _psnr),
        ("SSIM", _mean("ssim", ".3f")),
        ("LPIPS", _mean("lpips", ".3f")),
        ("MSE", _mean("mse", ".1e")),
        ("labels", _rate("success")),
        ("failed", _failures),
    ],
    "feature": [
        ("cosine", _cosine),
        ("relative error", _mean("feature_error", ".1e")),
        ("failed", _failures),
    ],
}


class _Names:
    """What people read for the attacks and defenses of a board."""

    def __init__(self, board: pd.DataFrame, track: Track) -> None:
        self._attacks = {spec: _short(registry.attacks, spec) for spec in board["attack"].unique()}
        self.defenses = {spec: _short(registry.defenses, spec) for spec in board["defense"].unique()}
        if track.name == "label" and "none" in self.defenses:
            self.defenses["none"] = "none (hard labels)"

    @property
    def in_order(self) -> list[str]:
        """The defenses: the undefended first, the others in their grid's order."""
        return sorted(self.defenses, key="none".__ne__)

    def attack(self, row: dict[str, Any]) -> str:
        """The attack, and what it is told."""
        name = self._attacks[row["attack"]]
        return f"{name}, told {row['knowledge']}" if row["knowledge"] else name


def _short(kind: registry.Registry[Any], spec: str) -> str:
    """The short spec; one that can't be resolved any more as it is."""
    if not _is_loadable(spec):
        return spec
    try:
        return kind.short(spec)
    except (UserError, ImportError):
        return spec


# --- The table for people -------------------------------------------------------------------------------


def _table(board: pd.DataFrame, track: Track) -> str:
    """On a terminal in its width and with colour, else plain and 110 columns wide (or `COLUMNS`)."""
    console = Console(width=shutil.get_terminal_size((110, 24)).columns, highlight=False, emoji=False)
    if board.empty:
        return f"Nothing to show on the {track.name} leaderboard yet.\n"
    notes = _Notes()
    draw = _draw_pivot if track.name == "label" else _draw_list
    with console.capture() as capture:
        _draw_caption(console, board, track)
        draw(console, board, track, notes)
        _draw_notes(console, board, track, notes)
    return "".join(line.rstrip() + "\n" for line in capture.get().splitlines())


class _Notes:
    """Footnotes, numbered as they come up."""

    def __init__(self) -> None:
        self.numbers: dict[str, str] = {}

    def mark(self, note: str) -> str:
        """The note's number, raised."""
        number = self.numbers.setdefault(note, str(len(self.numbers) + 1))
        return number.translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


_AXES = {
    "grid": "grid {}",
    "dataset": "{}",
    "model": "{}",
    "weights": "{}",
    "weight_seed": "weight seed {}",
    "batch_norm": "batch norm {}",
    "members": "{} examples",
    "batch_size": "batch of {}",
    "protocol": "{}",
}


def _phrase(row: dict[str, Any], axes: Iterable[str]) -> str:
    return ", ".join(_AXES[axis].format(str(row[axis]).replace("_", " ")) for axis in axes if row[axis] != "")


def _draw_caption(console: Console, board: pd.DataFrame, track: Track) -> None:
    rows = _rows(board)
    constant = [axis for axis in _AXES if board[axis].nunique() == 1]
    counts = sorted({row["n"] for row in rows if row["skipped"] is None and row["n"] >= row["expected"]})
    n = f"; n = {counts[0]}" + (f"–{counts[-1]}" if len(counts) > 1 else "") if counts else ""
    console.print(Text(f"{track.name.capitalize()} leaderboard", style="bold"), Text(f"— {track.question}"))
    console.print(Text(f"{_phrase(rows[0], constant)}{n}"))


def _networks(board: pd.DataFrame) -> list[tuple[str, list[dict[str, Any]]]]:
    """(what tells it from the others, its rows) for each network, in the board's order."""
    varying = [axis for axis in ("grid", *_NETWORK) if board[axis].nunique() > 1]
    networks: dict[str, list[dict[str, Any]]] = {}
    for row in _rows(board):
        networks.setdefault(_phrase(row, varying), []).append(row)
    return list(networks.items())


def _draw_pivot(console: Console, board: pd.DataFrame, track: Track, notes: _Notes) -> None:
    """One row for each attack, one column for each defense; side by side as many as fit."""
    names, networks = _Names(board, track), _networks(board)
    order = _by_overall_success(board)
    seeds = ["seed"] if board["weight_seed"].nunique() > 1 else []
    attack_width = _width(_broken(names.attack(row), 28) for row in _rows(board))
    room = console.width - attack_width - sum(2 + len(seed) for seed in seeds) - 2
    cells: dict[tuple[str, str, str, Any, str], list[Text]] = {}
    for network, rows in networks:
        for row in rows:
            key = (network, row["attack"], row["knowledge"], row["weight_seed"], row["defense"])
            cells.setdefault(key, []).append(_rate_cell(row, notes))

    def columns(width: int) -> dict[str, tuple[str, int]]:
        """Defense -> its title, broken at `width`, and how wide its column is."""
        titles = {defense: _broken(names.defenses[defense], width) for defense in names.in_order}
        texts = {defense: [title] for defense, title in titles.items()}
        for (*_, defense), found in cells.items():
            texts[defense] += [text.plain for text in found]
        return {defense: (title, _width(texts[defense])) for defense, title in titles.items()}

    shown = min(map(columns, (22, 18, 13)), key=lambda columns: len(_blocks(columns, room)))
    for block in _blocks(shown, room):
        sections = []
        for network, rows in networks:
            entrants = {
                (row["attack"], row["knowledge"], row["weight_seed"]): _broken(names.attack(row), 28)
                for row in rows
                if row["defense"] in block
            }
            section = []
            for entrant in sorted(entrants, key=lambda entrant: (order[entrant[0]], *entrant)):
                first = [Text(entrants[entrant]), *(Text(str(entrant[2])) for _ in seeds)]
                of = [cells.get((network, *entrant, defense), []) for defense in block]
                section.append(first + [Text("\n").join(texts) for texts in of])
            if section:
                sections.append((network, section))
        heads = [("attack", attack_width), *((seed, len(seed)) for seed in seeds)]
        _draw_sections(console, heads + [shown[defense] for defense in block], sections)


def _by_overall_success(board: pd.DataFrame) -> dict[str, tuple[bool, float]]:
    """Attack -> its place: by the sum of its rates, so that breadth counts; chance last."""
    rates = board["success"].astype("float64").fillna(0).groupby(board["attack"]).sum()
    return {str(a): (str(a).split("(")[0] == CHANCE, -float(rate)) for a, rate in rates.items()}


def _rate_cell(row: dict[str, Any], notes: _Notes) -> Text:
    if row["skipped"] is not None:
        return Text(f"–{notes.mark(row['skipped'])}", style="dim")
    if _partial(row):
        return Text(f"— {_counted(row)}", style="dim")
    style = "green" if row["success"] >= 0.99 else "red" if row["success"] == 0 else ""
    cell = Text().append(_success(row), style=style)
    if row["top1"] is not None and _percent(row["top1"]) != _percent(row["success"]):
        cell.append(f"\ntop-1 {_percent(row['top1'])}")
    if row["failed"]:
        cell.append(f"\n{row['failed']} failed")
    return cell


_LEFT_OUT: tuple[tuple[str, ...], ...] = ((), ("MSE",), ("MSE", "labels"), ("MSE", "labels", "LPIPS"))
"""What a narrow terminal doesn't get, the least first; LPIPS only where it is empty."""


def _draw_list(console: Console, board: pd.DataFrame, track: Track, notes: _Notes) -> None:
    """One row for each attack against each defense, a defense's rows together."""
    names = _Names(board, track)
    order = {defense: at for at, defense in enumerate(names.in_order)}
    networks = [
        (
            network,
            [_list_row(row, names, track, notes) for row in sorted(rows, key=lambda r: order[r["defense"]])],
        )
        for network, rows in _networks(board)
    ]
    every = [row for _, rows in networks for row in rows]
    seeds = board["weight_seed"].nunique() > 1
    heads = [
        head
        for head in every[0]
        if (seeds if head == "seed" else head == "LPIPS" or any(row[head] for row in every))
    ]
    for left_out in _LEFT_OUT:
        dropped = {head for head in left_out if head != "LPIPS" or not any(row[head] for row in every)}
        shown = [head for head in heads if head not in dropped]
        widths = {head: _width([head, *(row[head] for row in every)]) for head in shown}
        taken = sum(width for head, width in widths.items() if head not in ("attack", "defense"))
        half = max((console.width - taken - 2 * (len(shown) - 1)) // 2, 12)
        if half >= 20:
            break
    for head in ("attack", "defense"):
        for row in every:
            row[head] = _broken(row[head], half)
        widths[head] = min(half, _width([head, *(row[head] for row in every)]))
    sections = [
        (network, [[Text(row[head]) for head in shown] for row in rows]) for network, rows in networks
    ]
    _draw_sections(console, list(widths.items()), sections)


def _list_row(row: dict[str, Any], names: _Names, track: Track, notes: _Notes) -> dict[str, str]:
    """Column's head -> what stands there."""
    cells = {
        "rank": _rank(row),
        "attack": names.attack(row),
        "defense": names.defenses[row["defense"]],
        "seed": str(row["weight_seed"]),
        "n": _counted(row),
    } | {head: measure(row) for head, measure in _MEASURES[track.name]}
    if row["skipped"] is not None:
        cells |= {"n": f"–{notes.mark(row['skipped'])}"} | {head: "" for head, _ in _MEASURES[track.name]}
    return cells


def _draw_sections(
    console: Console, heads: Sequence[tuple[str, int]], sections: Sequence[tuple[str, list[list[Text]]]]
) -> None:
    """Column heads once, then each network's name and rows, all in the same columns."""
    widths = [width for _, width in heads]
    console.print()
    console.print(_grid(widths, [[Text(head, style="bold") for head, _ in heads]]))
    console.print(Text("─" * min(console.width, sum(widths) + 2 * len(widths) - 2), style="dim"))
    for at, (network, rows) in enumerate(sections):
        if at:
            console.print()
        if network:
            console.print(Text(network, style="italic"))
        console.print(_grid(widths, rows))


def _grid(widths: Sequence[int], rows: Iterable[Sequence[Text]]) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    for width in widths:
        grid.add_column(min_width=min(width, 4), width=width, overflow="fold", vertical="top")
    for row in rows:
        grid.add_row(*row)
    return grid


def _draw_notes(console: Console, board: pd.DataFrame, track: Track, notes: _Notes) -> None:
    rows = _rows(board)
    lines = [f"{notes.mark(note)} skipped: {note}" for note in notes.numbers]
    if any(_partial(row) for row in rows):
        lines.append("— not ranked: trials are missing; the same `leakbench run` continues")
    if any(row["failed"] for row in rows):
        lines.append(
            "failed: crashed, timed out, out of memory, diverged or gave up; counts as not recovered"
        )
    if track.name == "image" and board["lpips"].isna().all():
        lines.append("LPIPS: run `leakbench data lpips` first")
    if lines:
        console.print()
    for line in lines:
        console.print(Text(line, style="dim"))


def _blocks(columns: dict[str, tuple[str, int]], room: int) -> list[list[str]]:
    """The columns in as few blocks as fit beside each other, at least one a block."""
    blocks: list[list[str]] = [[]]
    for column, (_, width) in columns.items():
        used = sum(columns[other][1] + 2 for other in blocks[-1])
        if blocks[-1] and used + width > room:
            blocks.append([])
        blocks[-1].append(column)
    return blocks


_BREAKS = (r"(?<!\de)(?=\+)", r"(?<!=)(?=\()", r"(?<= )", r"(?<=[=/])")
"""Where a spec may be broken, the best first: before pluses and brackets, after commas, equals, slashes."""


def _broken(spec: str, width: int, breaks: Sequence[str] = _BREAKS) -> str:
    """A spec in lines of at most `width` where its pieces allow."""
    if len(spec) <= width or not breaks:
        return spec
    lines = [""]
    for piece in re.split(breaks[0], spec):
        if lines[-1] and len((lines[-1] + piece).rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(_broken(line.rstrip(), width, breaks[1:]) for line in lines)


def _width(texts: Iterable[str]) -> int:
    """Of the longest line."""
    return max(len(line) for text in texts for line in text.split("\n"))


_FORMATS: dict[str, Callable[[pd.DataFrame, Track], str]] = {
    "table": _table,
    "csv": _csv,
    "json": _json,
    "md": _markdown,
}
