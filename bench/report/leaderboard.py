"""Leaderboards: who recovers what, from which networks, past which defense.

A trial that crashed, ran out of time or memory, diverged or gave up counts as not recovered: the metric
that ranks, and one that it lacks, take their value in `WORST`. A trial that an attack skipped is shown with
its reason and counted nowhere. An exact image has no finite PSNR and counts as `EXACT_PSNR`. Scenarios that
differ in the weights' seed alone are one.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

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
    "class_counts_exact": 0.0,
    "format_found": 0.0,
    "feature_error": 1.0,  # what answering zero gives
    "feature_cosine": 0.0,  # what a random direction gives
    "mse": 1.0,
    "psnr": 0.0,
    "psnr_8bit": 0.0,
    "ssim": 0.0,
    "lpips": 1.0,
    "identified": 0.0,
    "private_top1": 0.0,
    "private_mse": 1.0,
    "private_ssim": 0.0,
    "private_lpips": 1.0,
}
"""What a trial without an answer scores; λ's error isn't here: it is the mean over those who gave a λ."""

EXACT_PSNR = 200.0
"""In dB; also the most that an image which is nearly exact scores. As `metrics` has it within a batch."""

CHANCE = "random_labels"
"""The attack that guesses: people see it last."""


@dataclass(frozen=True)
class Track:
    """What a leaderboard ranks.

    Attributes:
        name: as on the command line.
        produces: what an attack must produce to be on it, as in `Attack.produces`.
        ranks_by: the metric that ranks; higher is better.
        finest: the difference in it that counts: less is rounding.
        answered: the metric that every trial with such an answer has.
        optional: metrics of an answer that not every attack or installation has.
        metrics: all that is shown of an answer.
        question: what is measured, for people.
    """

    name: str
    produces: str
    ranks_by: str
    finest: float
    answered: str
    metrics: tuple[str, ...]
    optional: tuple[str, ...]
    question: str


_TRACKS = {
    "label": Track(
        "label", "soft_labels", "success", 0.0, "success",
        ("success", "label_error", "label_l1", "top1", "class_existence", "class_counts",
         "class_counts_exact", "lam_error", "format_found", "private_top1"),
        ("lam_error", "format_found", "private_top1"),
        "trials in which every soft label is recovered (within 0.01), with 95 % intervals",
    ),
    "image": Track(
        "image", "images", "psnr", 0.1, "mse",
        ("mse", "psnr", "psnr_8bit", "ssim", "lpips", "identified", "private_mse", "private_ssim",
         "private_lpips"),
        ("lpips", "identified", "private_mse", "private_ssim", "private_lpips"),
        f"how near the images are, with 95 % intervals; an exact image counts as {EXACT_PSNR:.0f} dB",
    ),
    "feature": Track(
        "feature", "features", "feature_cosine", 1e-6, "feature_cosine",
        ("feature_error", "feature_cosine"),
        (),
        "how near the last layer's inputs are, with 95 % intervals",
    ),
}  # fmt: skip

RANKS_BY = {track.produces: track.ranks_by for track in _TRACKS.values()}
"""What is produced -> the metric that ranks its track."""

TRACKS = tuple(_TRACKS)
"""The tracks that there are."""

NETWORK = tuple(column for column in SCENARIO if column not in ("defense", "weight_seed"))
"""The columns that say which network and batch was attacked."""

_GROUP = ("grid", *(column for column in SCENARIO if column != "weight_seed"))
_CELL = (*_GROUP, "knowledge", "attack")
_REVISIONS = ["attack_revision", "defense_revision"]
_NEEDS = {"lpips": "mse", "private_lpips": "private_mse"}  # LPIPS's trunk was missing where only the right is


def tracks(runs: Sequence[Run]) -> list[str]:
    """The tracks that these runs have anything to show on; none before the first record."""
    trials = _trials(tuple(runs))
    made = set().union(*_produced(trials).values())
    return [track.name for track in _TRACKS.values() if track.produces in made]


def leaderboard(runs: Sequence[Run], track: str) -> pd.DataFrame:
    """One row for each attack in each scenario: the rank, the means, how sure they are.

    Its columns: `rank` (within the scenario; ties share it; none where trials are missing or skipped),
    `attack`, `defense` and the rest of the scenario, `n` (trials that count), `expected` (trials asked
    for), `failed` (how many of n ended as in `FAILED`), each metric's mean, `success_low` and
    `success_high` and the same for the metric that ranks, `skipped` (why, where every trial was).

    `weight_seed` names all that were pooled, `scenario` the first of theirs.

    Only the newest protocol version of a grid counts, and in each cell one revision of attack and defense,
    the one written last.

    Raises:
        UserError: an unknown track, no records, or none that the track can rank.
    """
    shown = track_named(track)
    trials = _trials(tuple(runs))
    if trials.empty:
        grids = ", ".join(sorted({header.grid for run in runs for header in run.headers})) or "these runs"
        raise UserError(f"no records yet in {grids}; the `leakbench run` that made the folder continues it")
    produced = _produced(trials)
    if not any(shown.produces in made for made in produced.values()):
        there = ", ".join(tracks(runs)) or "none"
        raise UserError(f"no attack here produces {shown.produces}; tracks with something to show: {there}")
    scored = _scored(trials, produced)
    scored = scored[scored["attack"].map({a: shown.produces in made for a, made in produced.items()})]
    asked = {cell: n for cell, n in _expected(runs).items() if _makes(cell[2], produced, shown)}
    begun = _cells(scored, asked, shown)
    board = pd.DataFrame([*rows_of(begun), *_not_begun(begun, asked, runs)], columns=begun.columns)
    board[_numeric(shown)] = board[_numeric(shown)].astype("float64")
    board["protocol_version"] = board["protocol_version"].astype("Int64")  # none where nothing has begun
    ranked = _with_ranks(board, scored, shown)
    return _sorted(ranked, list(asked), shown)[_columns(shown)].reset_index(drop=True)


def track_named(name: str) -> Track:
    """The track of that name.

    Raises:
        UserError: an unknown one.
    """
    if name not in _TRACKS:
        raise UserError(f"there is no {name!r} leaderboard{nearest(name, TRACKS)}")
    return _TRACKS[name]


def _columns(track: Track) -> list[str]:
    """The board's columns, in order."""
    bounded = {"success", track.ranks_by}
    means = [[m, f"{m}_low", f"{m}_high"] if m in bounded else [m] for m in METRICS]
    others = [column for column in SCENARIO if column != "defense"]
    scenario = ["attack", "defense", *others, "knowledge", "grid", "scenario", "protocol_version"]
    return ["rank", *scenario, "n", "expected", "failed", *itertools.chain(*means), "skipped"]


def _numeric(track: Track) -> list[str]:
    """The board's columns of means and their bounds."""
    columns = _columns(track)
    return columns[columns.index("failed") + 1 : columns.index("skipped")]


@functools.lru_cache(maxsize=1)  # one board after another is made from the same runs
def _trials(runs: tuple[Run, ...]) -> pd.DataFrame:
    """All rows, a trial once, with their cell's number; those of an older revision are left out.

    Not to be changed in place.
    """
    rows = {row["trial"]: row for run in runs for row in run.rows}
    trials = pd.DataFrame(list(rows.values()), columns=list(COLUMNS))
    trials[list(METRICS)] = trials[list(METRICS)].astype("float64")
    if trials.empty:
        return trials
    newest = trials.groupby("grid")["protocol_version"].transform("max")
    trials = trials[trials["protocol_version"] == newest]
    latest = trials.groupby(list(_CELL), sort=False)[_REVISIONS].transform("last")
    trials = trials[(trials[_REVISIONS] == latest).all(axis=1)].reset_index(drop=True)
    pools = _pools(runs)
    names = zip(trials["grid"], trials["scenario"], strict=True)
    pooled = trials.assign(
        cell=trials.groupby(list(_CELL), sort=False).ngroup(),
        scenario=[pools.get(name, name[1]) for name in names],
        sample=trials["weight_seed"].astype(str) + "/" + trials["sample"].astype(str),
        weight_seed=trials.groupby(list(_GROUP), sort=False)["weight_seed"].transform(_listed),
    )
    # Two scenarios may differ in what they grant to others alone: the same trial, made twice.
    return pooled.drop_duplicates(["cell", "sample"]).reset_index(drop=True)


def _listed(seeds: pd.Series) -> str:
    return ",".join(map(str, sorted(set(seeds))))


def _pools(runs: Sequence[Run]) -> dict[tuple[str, str], str]:
    """(grid, scenario) -> the first scenario of which the same board row speaks."""
    firsts: dict[tuple[str, ...], str] = {}
    pools = {}
    for run in runs:
        for header in run.headers:
            for scenario, axes in header.scenarios.items():
                group = (header.grid, *(str(axes.get(name)) for name in _GROUP[1:]))
                pools[header.grid, scenario] = firsts.setdefault(group, scenario)
    return pools


Cell = tuple[str, str, str, str]
"""Grid, the first of the scenarios, attack, and what it is told."""


def _expected(runs: Sequence[Run]) -> dict[Cell, int]:
    """The trials asked for in each cell, over all weight seeds, in the grids' order."""
    pools = _pools(runs)
    by_seed: dict[Cell, dict[Any, int]] = {}
    for run in runs:
        grid = run.headers[-1].grid
        axes = {scenario: axes for header in run.headers for scenario, axes in header.scenarios.items()}
        told = {(row["scenario"], row["attack"]): row["knowledge"] for row in run.rows}
        for (scenario, attack), samples in run.expected.items():
            granted = axes.get(scenario, {}).get("knowledge", ())
            knowledge = told.get((scenario, attack), _would_be_told(attack, granted))
            seeds = by_seed.setdefault((grid, pools.get((grid, scenario), scenario), attack, knowledge), {})
            seed = axes.get(scenario, {}).get("weight_seed")
            seeds[seed] = max(samples, seeds.get(seed, 0))
    return {cell: sum(seeds.values()) for cell, seeds in by_seed.items()}


def _would_be_told(attack: str, granted: Iterable[str]) -> str:
    """What records will say that the attack is told; nothing where its class can't be had."""
    if not granted or not is_loadable(attack):
        return ""
    try:
        return ",".join(sorted(set(granted) & registry.attacks.make(attack).uses))
    except (UserError, ImportError):
        return ""


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
    if not is_loadable(attack):
        return frozenset()
    try:
        return frozenset(registry.attacks.find(registry.parse(attack).target).produces)
    except (UserError, ImportError):
        return frozenset()


def is_loadable(spec: str) -> bool:
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
    exact_bytes = trials["psnr_8bit"].isna() & trials["mse"].notna()
    scored["psnr_8bit"] = trials["psnr_8bit"].mask(exact_bytes, EXACT_PSNR)
    lost = trials["outcome"].isin(FAILED)
    for metric in RANKS_BY.values():  # whatever was answered beside
        scored[metric] = scored[metric].mask(lost & scored[metric].notna(), WORST[metric])
    for track in _TRACKS.values():
        makes = counts & trials["attack"].map({a: track.produces in made for a, made in produced.items()})
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


def _cells(scored: pd.DataFrame, asked: dict[Cell, int], track: Track) -> pd.DataFrame:
    """One row for each cell that has begun, without its rank; `complete` says whether it may have one."""
    counted = scored[scored["outcome"] != "skipped"]
    by_cell, every = counted.groupby("cell"), scored.groupby("cell")
    board = scored.drop_duplicates("cell").set_index("cell")[
        [*_CELL, "weight_seed", "scenario", "protocol_version"]
    ]
    board["n"] = by_cell.size().reindex(board.index, fill_value=0)
    board["failed"] = every["outcome"].agg(lambda outcomes: outcomes.isin(FAILED).sum())
    names = zip(board["grid"], board["scenario"], board["attack"], board["knowledge"], strict=True)
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


def _not_begun(begun: pd.DataFrame, asked: dict[Cell, int], runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row of no trials for each cell that was asked for and has none yet."""
    rows = rows_of(begun)
    cells = {(row["grid"], row["scenario"], row["attack"], row["knowledge"]) for row in rows}
    axes_of = {
        (header.grid, scenario): axes
        for run in runs
        for header in run.headers
        for scenario, axes in header.scenarios.items()
    } | {(row["grid"], row["scenario"]): row for row in rows}
    zeros = []
    for cell, expected in asked.items():
        grid, scenario, attack, knowledge = cell
        axes = axes_of.get((grid, scenario), {})
        if cell not in cells and set(SCENARIO) <= set(axes):
            names = {"grid": grid, "scenario": scenario, "attack": attack, "knowledge": knowledge}
            counts = {"n": 0, "expected": expected, "failed": 0, "complete": False, "cell": -1}
            axes = {column: axes[column] for column in SCENARIO}
            zeros.append(names | counts | axes | {"weight_seed": str(axes["weight_seed"])})
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
        board.loc[group.index, "rank"] = statistics.ranks(scores.loc[group["cell"]].to_numpy(), track.finest)
    return board


def _sorted(board: pd.DataFrame, asked: list[Cell], track: Track) -> pd.DataFrame:
    """Scenarios in their grid's order, attacks by rank, then score, then name."""
    place = {(grid, scenario): at for at, (grid, scenario, *_) in reversed(list(enumerate(asked)))}
    at = [place.get(cell, len(asked)) for cell in zip(board["grid"], board["scenario"], strict=True)]
    board = board.assign(place=at, score=-board[track.ranks_by].astype("float64"))
    board["place"] = board.groupby(list(_GROUP), sort=False)["place"].transform("min")
    return board.sort_values(["place", *_GROUP, "rank", "score", "attack", "knowledge"], na_position="last")


def rows_of(board: pd.DataFrame) -> list[dict[str, Any]]:
    """The board's rows, with None for what isn't there."""
    rows = board.astype(object).to_dict(orient="records")
    return [{str(name): None if pd.isna(value) else value for name, value in row.items()} for row in rows]
