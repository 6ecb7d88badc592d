"""The report: one HTML page that needs no network, made from records alone and from what was drawn of them.

Everything that comes from records or manifests is text, and escaped; the page allows no script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup, escape

from bench import registry
from bench.errors import UserError
from bench.report import defenses, plots, tables
from bench.report import leaderboard as boards
from bench.report.leaderboard import FAILED, NETWORK, Track
from bench.report.plots import Axis, Series
from bench.report.record import METRICS, Run

TEMPLATE = Path(__file__).with_name("page.html.j2")

MOST_TRIALS = 4000
"""Trials that the page holds for a closer look: of larger runs the first samples of each cell."""

MOST_CURVES = 6

THREAT_MODELS = {
    "A": "eavesdropper",
    "B": "informed eavesdropper",
    "C": "parameter-aware",
    "D": "data-enhanced",
    "E": "statistical-informed",
    "F": "active manipulator",
    "G": "data-enhanced manipulator",
    "H": "active client manipulator",
}
"""Letters and names of the USENIX Security 2025 systematisation."""

SHOWN = {
    "label": ("success", "top1", "label_error", "class_existence", "class_counts", "lam_error"),
    "image": ("psnr", "ssim", "lpips", "identified", "mse"),
    "feature": ("feature_cosine", "feature_error"),
}
"""Track -> the metrics that its board shows; the first one ranks."""

TITLES = {
    "success": "labels recovered",
    "top1": "top-1",
    "label_error": "label error",
    "lam_error": "λ error",
    "class_existence": "classes (LeAcc)",
    "class_counts": "counts (LnAcc)",
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "mse": "MSE",
    "identified": "identified",
    "feature_cosine": "feature cosine",
    "feature_error": "feature error",
}

RATES = {"success", "top1", "class_existence", "class_counts", "identified"}


@dataclass(frozen=True)
class Picture:
    """A reconstruction beside what the client trained on, as PNG files.

    Attributes:
        row: the trial's record.
        released: what the loss saw.
        private: what the client had, where that is another image.
        found: what the attack made of the gradient; None where it made nothing.
    """

    row: dict[str, Any]
    released: bytes
    private: bytes | None
    found: bytes | None


@dataclass(frozen=True)
class Landscape:
    """The published loss of λ on a recorded gradient.

    Attributes:
        row: the trial's record.
        lam: where it was looked at: λ in ascending order, both signs.
        loss: there.
        minima: λ of its local minima.
        truth: the true λ.
        found: the attack's, where it gave one.
        bound: of |λ| in the published search.
    """

    row: dict[str, Any]
    lam: Sequence[float]
    loss: Sequence[float]
    minima: Sequence[float]
    truth: float
    found: float | None
    bound: float


@dataclass(frozen=True)
class Exhibits:
    """What has to be computed again to be shown, and why some of it isn't."""

    pictures: tuple[Picture, ...] = ()
    landscape: Landscape | None = None
    missing: tuple[str, ...] = ()


def render(
    runs: Sequence[Run],
    place: str,
    exhibits: Exhibits,
    costs: Sequence[dict[str, Any]] = (),
    speed: Path | None = None,
    manifests: Sequence[dict[str, Any]] = (),
) -> str:
    """The page.

    Args:
        runs: what is shown.
        place: where it lies, for commands.
        exhibits: see there.
        costs: what defenses cost, rows of `utility.jsonl`.
        speed: the folder of asv's results, if there is one.
        manifests: of submissions, for what their attacks say of themselves.

    Raises:
        UserError: there are no records yet.
    """
    made = [boards.track_named(name) for name in boards.tracks(runs)]
    if not made:
        raise UserError(f"{place} has no records yet; the `leakbench run` that made it continues it")
    shown = {track.name: boards.leaderboard(runs, track.name) for track in made}
    defended = defenses.defense_board(runs, costs) if _defends(runs) else None
    trials = _trials(runs)
    source = TEMPLATE.read_text(encoding="utf-8")
    script = source.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["breaks"] = _breaks
    return environment.from_string(source).render(
        script_sha256=digest,
        title=", ".join(dict.fromkeys(header.grid for run in runs for header in run.headers)),
        questions=list(dict.fromkeys(h.title for run in runs for h in run.headers if h.title)),
        facts=_facts(runs),
        boards=[
            *(_board(track, shown[track.name], trials) for track in made),
            *(_defense_tables(defended) if defended is not None else ()),
        ],
        maps=[_heat_maps(track, shown[track.name]) for track in made],
        pictures=_gallery(exhibits.pictures, place),
        landscape=_landscape(exhibits.landscape, place),
        missing=exhibits.missing,
        frontiers=[] if defended is None else _frontiers(defended),
        curves=_noise_curves(shown.get("label")),
        speed=_speed(speed),
        threats=_threats(shown.values(), manifests),
        trials=_embedded(trials),
        cut=sum(len(run.rows) for run in runs) - sum(map(len, trials.values())),
        place=place,
    )


def _breaks(text: Any) -> Markup:
    """The text, escaped, with places where a line may break: in specs, before brackets and after commas."""
    return Markup(re.sub(r"(?<=[a-z0-9])(?=[(_])|(?<=[/:=])(?=\w)", "<wbr>", str(escape(text))))


# --- boards -----------------------------------------------------------------------------------------------


def _facts(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """What all rows share, for the head of the page."""
    rows = [row for run in runs for row in run.rows]

    def values(column: str) -> str:
        return (
            ", ".join(sorted({str(row[column]) for row in rows if row[column] not in ("", None)})[:6]) or "—"
        )

    outcomes: dict[str, int] = {}
    for row in rows:
        outcomes[row["outcome"]] = outcomes.get(row["outcome"], 0) + 1
    counted = ", ".join(f"{count} {name}" for name, count in sorted(outcomes.items(), key=lambda o: -o[1]))
    hashes = ", ".join(dict.fromkeys(header.grid_hash[:12] for run in runs for header in run.headers))
    wanted = sum(sum(run.expected.values()) for run in runs)
    return [
        ("trials", f"{len(rows)} of {wanted}: {counted}"),
        ("grid's hash", hashes),
        ("protocol version", values("protocol_version")),
        ("isolated", values("isolated")),
        ("commit", ", ".join(sorted({row["commit"][:10] for row in rows})[:6]) or "—"),
        ("torch", values("torch")),
        ("device", values("device")),
    ]


def _cell_key(row: dict[str, Any]) -> str:
    """What a board's row and its trials share."""
    axes = [str(row[axis]) for axis in ("grid", *NETWORK, "defense", "attack", "knowledge")]
    return hashlib.sha256(json.dumps(axes).encode()).hexdigest()[:12]


def _trials(runs: Sequence[Run]) -> dict[str, list[dict[str, Any]]]:
    """The first trials of each cell, failed ones before the others."""
    cells: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        for row in run.rows:
            if row["outcome"] != "skipped":
                cells.setdefault(_cell_key(row), []).append(row)
    each = max(1, MOST_TRIALS // max(1, len(cells)))
    order = dict.fromkeys(FAILED, 0)
    return {
        key: sorted(rows, key=lambda row: (order.get(row["outcome"], 1), row["weight_seed"], row["sample"]))[
            :each
        ]
        for key, rows in cells.items()
    }


def _board(track: Track, board: pd.DataFrame, trials: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """A track's table: its columns' names, and for each row its cells with what they sort by."""
    names = tables.Names(board, track)
    rows = boards.rows_of(board)
    varying = [axis for axis in ("grid", *NETWORK) if len({row[axis] for row in rows}) > 1]
    networks = _network_names(rows, varying)
    metrics = [
        metric
        for metric in SHOWN[track.name]
        if metric == track.ranks_by or any(row[metric] is not None for row in rows)
    ]
    if all(row["batch_size"] == 1 for row in rows):  # of one example top-1 says as much
        metrics = [metric for metric in metrics if metric not in ("class_existence", "class_counts")]
    ranked = [row for row in rows if row[f"{track.ranks_by}_low"] is not None]
    least, most = 0.0, 1.0
    if track.ranks_by not in RATES and ranked:
        least = min(0.0, *(row[f"{track.ranks_by}_low"] for row in ranked))
        most = max(row[f"{track.ranks_by}_high"] for row in ranked)
    heads = ["attack", "rank", "defense", *(["network and batch"] if varying else []), "n"]
    heads += [TITLES[metric] for metric in metrics] + ["failed", "threat model"]
    constant = [axis for axis in ("grid", *NETWORK) if axis not in varying]
    return {
        "name": track.name,
        "question": track.question,
        "constant": tables.phrase(rows[0], constant),
        "heads": heads,
        "numeric": {"rank", "n", "failed", *(TITLES[metric] for metric in metrics)},
        "rows": [
            _board_row(row, names, networks, metrics, track, (least, most), _cell_key(row) in trials)
            for row in rows
        ],
    }


def _network(row: dict[str, Any]) -> str:
    return json.dumps([str(row[axis]) for axis in ("grid", *NETWORK)])


def _network_names(rows: Sequence[dict[str, Any]], varying: Sequence[str]) -> dict[str, str]:
    """What tells each network and batch from the board's others, as short as it gets."""
    models = {row["model"]: tables.parsed(row["model"]) for row in rows}
    differing: dict[str, set[str]] = {}
    for one, other in itertools.permutations(models.values(), 2):
        if one.target == other.target:
            names = {n for n, value in one.parameters.items() if other.parameters.get(n) != value}
            differing.setdefault(one.target, set()).update(names)
    short = {}
    for model, spec in models.items():
        kept = {n: v for n, v in spec.parameters.items() if n in differing.get(spec.target, set())}
        short[model] = str(registry.Spec(spec.target, kept))
    return {
        _network(row): tables.phrase(row | {"model": short[row["model"]]}, varying) if varying else ""
        for row in rows
    }


def _defends(runs: Sequence[Run]) -> bool:
    """Whether there is any defense."""
    return any(
        axes.get("defense") != "none" for run in runs for h in run.headers for axes in h.scenarios.values()
    )


def _defense_tables(board: pd.DataFrame) -> list[dict[str, Any]]:
    """The defense track, a row a defense: the worst case, and what it costs."""
    names = defenses.short_names(board)
    rows = boards.rows_of(board)
    cells = [defenses.cells_of(row, names) for row in rows]
    varying = [axis for axis in defenses.NETWORK if len({row[axis] for row in rows}) > 1]
    networks = _network_names([row | dict.fromkeys(NETWORK, "") | row for row in rows], varying)
    kept = [at for at in range(len(defenses.HEADS)) if any(row[at] for row in cells)]
    order = [1, *(at for at in kept if at != 1)]
    heads = [defenses.HEADS[at] for at in order]
    heads.insert(1, "network")
    shown = []
    for row, texts in zip(rows, cells, strict=True):
        listed = [{"text": texts[at], "sort": _first_number(texts[at]), "head": at == 1} for at in order]
        place = networks[_network(row)]
        shown.append(
            {
                "key": "",
                "skipped": None,
                "partial": False,
                "cells": [listed[0], {"text": place, "sort": place}, *listed[1:]],
            }
        )
    return [
        {
            "name": "defense",
            "question": "what the strongest attacker gets of the private batch, told the defense or not, "
            "and what the defense costs",
            "constant": tables.phrase(rows[0], [axis for axis in defenses.NETWORK if axis not in varying]),
            "heads": heads,
            "numeric": set(heads) - {"defense", "network", "by", "notes"},
            "rows": shown,
        }
    ]


def _first_number(text: str) -> float | str:
    """What a cell sorts by: its number, if it begins with one."""
    number = re.match(r"[×]?(-?\d+(?:\.\d+)?(?:e-?\d+)?)", text)
    return float(number[1]) if number else text


def _board_row(
    row: dict[str, Any],
    names: tables.Names,
    networks: dict[str, str],
    metrics: Sequence[str],
    track: Track,
    ends: tuple[float, float],
    has_trials: bool,
) -> dict[str, Any]:
    partial = row["rank"] is None and row["skipped"] is None
    counted = f"{row['n']} of {row['expected']}" if partial else str(row["n"])
    cells: list[dict[str, Any]] = [
        {"text": names.attack(row), "sort": names.attack(row), "head": True},
        {"text": "—" if row["rank"] is None else str(row["rank"]), "sort": row["rank"] or 1e9},
        {"text": names.defenses[row["defense"]], "sort": names.defenses[row["defense"]]},
        *({"text": networks[place], "sort": networks[place]} for place in [_network(row)] if networks[place]),
        {"text": counted, "sort": row["n"]},
    ]
    for metric in metrics:
        value = row[metric] if row["skipped"] is None else None
        cell: dict[str, Any] = {"text": _number(metric, value), "sort": -1e9 if value is None else value}
        low = row.get(f"{metric}_low")
        if metric == track.ranks_by and value is not None and low is not None:
            high = row[f"{metric}_high"]
            cell["drawing"] = plots.interval(value, low, high, *ends)
            cell["interval"] = f"{_number(metric, low)} to {_number(metric, high)}"
        cells.append(cell)
    letter = _letter(row["attack"])
    return {
        "key": _cell_key(row) if has_trials else "",
        "skipped": row["skipped"],
        "partial": partial,
        "cells": [
            *cells,
            {"text": str(row["failed"] or ""), "sort": row["failed"]},
            {"text": letter or "—", "sort": letter, "title": THREAT_MODELS.get(letter, "not known here")},
        ],
    }


def _number(metric: str, value: float | None) -> str:
    if value is None:
        return ""
    if metric in RATES:
        return f"{100 * value:.0f}%" if value in (0, 1) or 0.01 <= value <= 0.99 else f"{100 * value:.1f}%"
    if metric == "psnr":
        return f"{value:.1f}"
    return f"{value:.3f}" if metric in ("ssim", "lpips", "feature_cosine") else f"{value:.2g}"


def _letter(spec: str) -> str:
    """The threat model's letter that an attack's class says; empty where the class can't be had."""
    cls = _class(spec)
    return "" if cls is None else str(cls.threat_model)


def _class(spec: str) -> Any:
    if not boards.is_loadable(spec):
        return None
    try:
        return registry.attacks.find(tables.parsed(spec).target)
    except (UserError, ImportError):
        return None


# --- attack × defense -------------------------------------------------------------------------------------


def _heat_maps(track: Track, board: pd.DataFrame) -> dict[str, Any]:
    """For each network a table of the metric that ranks, attacks down, defenses across."""
    names = tables.Names(board, track)
    rows = boards.rows_of(board)
    values = [row[track.ranks_by] for row in rows if row[track.ranks_by] is not None]
    most = 1.0 if track.ranks_by in RATES else max([*values, 1e-9])
    named = _network_names(
        rows, [axis for axis in ("grid", *NETWORK) if len({row[axis] for row in rows}) > 1]
    )
    networks: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        networks.setdefault(named[_network(row)] or tables.phrase(row, NETWORK), []).append(row)
    maps = []
    for network, members in networks.items():
        defenses = [d for d in names.in_order if any(row["defense"] == d for row in members)]
        by_place = {(names.attack(row), row["defense"]): row for row in members}
        attacks = list(dict.fromkeys(names.attack(row) for row in members))
        lines = [
            (attack, [_heat(by_place.get((attack, d)), track, most) for d in defenses]) for attack in attacks
        ]
        maps.append({"network": network, "defenses": [names.defenses[d] for d in defenses], "lines": lines})
    return {"name": track.name, "metric": TITLES[track.ranks_by], "maps": maps}


def _heat(row: dict[str, Any] | None, track: Track, most: float) -> dict[str, Any]:
    """One field: its text and how full its colour is, in tenths."""
    if row is None:
        return {"text": "", "level": None, "title": "not in the grid"}
    if row["skipped"] is not None:
        return {"text": "–", "level": None, "title": f"skipped: {row['skipped']}"}
    value = row[track.ranks_by]
    if value is None:
        return {"text": "—", "level": None, "title": f"{row['n']} of {row['expected']} trials"}
    share = min(max(value / most, 0.0), 1.0)
    return {"text": _number(track.ranks_by, value), "level": round(10 * share), "title": f"n = {row['n']}"}


# --- pictures and landscape -------------------------------------------------------------------------------


def _image(content: bytes | None) -> str | None:
    return None if content is None else "data:image/png;base64," + base64.b64encode(content).decode()


def _gallery(pictures: Sequence[Picture], place: str) -> list[dict[str, Any]]:
    shown = []
    for one in pictures:
        row = one.row
        score = (
            "exact"
            if row["mse"] == 0
            else f"{_number('psnr', row['psnr'])} dB"
            if row["psnr"]
            else row["outcome"]
        )
        shown.append(
            {
                "attack": tables.short(registry.attacks, row["attack"]),
                "defense": tables.short(registry.defenses, row["defense"]),
                "where": f"{row['dataset']}, {row['model']}, {row['weights']}",
                "sample": row["sample"],
                "score": score,
                "images": [
                    (name, _image(content))
                    for name, content in (
                        ("client's image", one.private),
                        ("what the loss saw", one.released),
                        ("recovered", one.found),
                    )
                    if content is not None
                ],
                "command": _command(place, row),
            }
        )
    return shown


def _command(place: str, row: dict[str, Any]) -> str:
    return f"leakbench rerun {place} {row['trial']}"


def _landscape(one: Landscape | None, place: str) -> dict[str, Any] | None:
    """Two drawings, λ below zero and above, each on a logarithmic scale."""
    if one is None:
        return None
    losses = [loss for loss in one.loss if loss > 0]
    low, high = plots.span(losses, log=True)
    y = Axis("loss", max(low, high * 1e-16), high, log=True)
    panels = []
    for sign, name in ((1, "λ > 0"), (-1, "λ < 0")):
        points = sorted(
            (abs(lam), loss) for lam, loss in zip(one.lam, one.loss, strict=True) if lam * sign > 0
        )
        if not points:
            continue
        x = Axis(f"{name}: |λ|", points[0][0], points[-1][0], log=True)
        at = {abs(lam): loss for lam, loss in zip(one.lam, one.loss, strict=True) if lam * sign > 0}
        minima = sorted(abs(lam) for lam in one.minima if lam * sign > 0)
        series = [Series("published loss", [p[0] for p in points], [p[1] for p in points], marked=False)]
        if minima:
            series.append(Series("its local minima", minima, [at[lam] for lam in minima], joined=False))
        for label, lam in (("the true λ", one.truth), ("λ that was found", one.found)):
            if lam is not None and lam * sign > 0:
                series.append(Series(label, [abs(lam)] * 2, [y.low, y.high], marked=False))
        if points[0][0] < one.bound < points[-1][0]:
            series.append(
                Series("end of the published search", [one.bound] * 2, [y.low, y.high], marked=False)
            )
        words = f"{len(minima)} local minima at {', '.join(f'{lam:.3g}' for lam in minima[:8]) or 'none'}"
        panels.append((name, plots.chart(series, x, y, f"Loss over {name}", words), words))
    found = "none" if one.found is None else f"{one.found:.6g}"
    return {
        "panels": panels,
        "truth": f"{one.truth:.6g}",
        "found": found,
        "attack": tables.short(registry.attacks, one.row["attack"]),
        "where": f"{one.row['dataset']}, {one.row['model']}, {one.row['weights']}, {one.row['defense']}",
        "command": _command(place, one.row),
    }


# --- curves -----------------------------------------------------------------------------------------------


def _noise_curves(board: pd.DataFrame | None) -> list[dict[str, Any]]:
    """How the rate falls with a defense's one number that varies, for each network."""
    if board is None:
        return []
    groups: dict[tuple[str, str], dict[str, list[tuple[float, dict[str, Any]]]]] = {}
    fixed: dict[tuple[str, str], str] = {}
    rows = [row for row in boards.rows_of(board) if row["success"] is not None and row["skipped"] is None]
    names = _network_names(
        rows, [axis for axis in ("grid", *NETWORK) if len({row[axis] for row in rows}) > 1]
    )
    for network, defense, parameter in sorted(_varied(rows)):
        key = (network, defense)
        fixed[key] = parameter
        for row in rows:
            spec = _single(row["defense"])
            if _network(row) == network and spec and spec.target == defense:
                attack = tables.short(registry.attacks, row["attack"]) + (
                    f", told {row['knowledge']}" if row["knowledge"] else ""
                )
                groups.setdefault(key, {}).setdefault(attack, []).append(
                    (float(spec.parameters[parameter]), row)
                )
    found = []
    for (network, defense), attacks in groups.items():
        parameter = fixed[network, defense]
        best = sorted(attacks.items(), key=lambda item: -sum(row["success"] for _, row in item[1]))[
            :MOST_CURVES
        ]
        series = []
        for attack, points in best:
            points = sorted(points, key=lambda point: point[0])
            series.append(
                Series(
                    attack,
                    [x for x, _ in points],
                    [row["success"] for _, row in points],
                    [row["success_low"] for _, row in points],
                    [row["success_high"] for _, row in points],
                )
            )
        values = [x for one in series for x in one.x]
        log = min(values) > 0 and max(values) / min(values) > 20
        low, high = plots.span(values, log)
        chart = plots.chart(
            series,
            Axis(f"{defense}: {parameter}", low, high, log),
            Axis("labels recovered", -0.03, 1.03, percent=True),
            f"Labels recovered against {defense}, by {parameter}",
            "; ".join(map(_words, series)),
        )
        found.append(
            {
                "network": names[network],
                "defense": defense,
                "chart": chart,
                "series": series,
                "parameter": parameter,
            }
        )
    return found


def _words(one: Series) -> str:
    """A curve for those who don't see it."""
    points = (f"{x:g}: {y:.0%}" for x, y in zip(one.x, one.y, strict=True) if y is not None)
    return f"{one.name}: {', '.join(points)}"


def _varied(rows: Iterable[dict[str, Any]]) -> set[tuple[str, str, str]]:
    """(network, defense, parameter) where a defense stands in the grid with several values of one number."""
    seen: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        spec = _single(row["defense"])
        if spec is not None:
            key = (_network(row), spec.target)
            if spec.parameters not in seen.setdefault(key, []):
                seen[key].append(spec.parameters)
    varied = set()
    for (network, defense), parameters in seen.items():
        differing = [name for name in parameters[0] if len({repr(one.get(name)) for one in parameters}) > 1]
        if len(differing) == 1 and all(_is_number(one.get(differing[0])) for one in parameters):
            varied.add((network, defense, differing[0]))
    return varied


def _single(defense: str) -> registry.Spec | None:
    """The spec of a defense that is no chain."""
    parts = registry.split_chain(defense)
    return tables.parsed(parts[0]) if len(parts) == 1 else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _frontiers(board: pd.DataFrame) -> list[dict[str, Any]]:
    """For each network on which training was measured: accuracy across, what the strongest attack gets up."""
    names = defenses.short_names(board)
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in boards.rows_of(board):
        if row["accuracy"] is not None and row["private_top1"] is not None:
            axes = (*defenses.NETWORK, "protocol", "batch_size", "classes")
            groups.setdefault(tables.phrase(row, axes), []).append(row)
    found = []
    for where, rows in groups.items():
        rows.sort(key=lambda row: (row["accuracy"], row["private_top1"]))
        points = [(row["accuracy"], row["private_top1"]) for row in rows]
        best = [p for p in points if not any(q[0] >= p[0] and q[1] <= p[1] and q != p for q in points)]
        low, high = plots.span([p[0] for p in points], log=False)
        series = [
            Series(
                "defenses",
                [p[0] for p in points],
                [p[1] for p in points],
                [row["private_top1_low"] for row in rows],
                [row["private_top1_high"] for row in rows],
                joined=False,
                labels=[names[row["defense"]] for row in rows],
            ),
            Series("no other is better in both", [p[0] for p in best], [p[1] for p in best], marked=False),
        ]
        shown = [
            (
                names[row["defense"]],
                row["accuracy"],
                row["private_top1"],
                defenses.attack_of(row["attack"], row["told"]),
                row["n"],
                row["epsilon"],
            )
            for row in rows
        ]
        chart = plots.chart(
            series,
            Axis("accuracy of a network trained with it", low, min(high, 1.02), percent=True),
            Axis("classes found by the strongest", -0.03, 1.03, percent=True),
            f"Privacy and utility: {where}",
            "; ".join(f"{name}: accuracy {x:.0%}, {y:.0%} found by {by}" for name, x, y, by, *_ in shown),
        )
        found.append({"where": where, "chart": chart, "points": shown})
    return found


# --- speed ------------------------------------------------------------------------------------------------


def _speed(folder: Path | None) -> dict[str, Any] | None:
    """Times by asv over the commits: each benchmark's geometric mean over cases, the first commit as 1."""
    if folder is None or not folder.is_dir():
        return None
    commits: list[tuple[float, str, dict[str, dict[int, float]]]] = []
    for path in sorted(folder.glob("*/*.json")):
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            times = {
                name: {
                    at: float(value)
                    for at, value in enumerate(result[0] or [])
                    if _is_number(value) and value > 0
                }
                for name, result in said["results"].items()
                if "time_" in name
            }
            commits.append((float(said["date"]), str(said["commit_hash"])[:8], times))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            continue  # asv's other files
    commits.sort(key=lambda commit: commit[0])
    series = []
    for name in sorted({name for _, _, times in commits for name in times}):
        of_name = [(at, times[name]) for at, (_, _, times) in enumerate(commits) if times.get(name)]
        first = of_name[0][1] if of_name else {}
        ratios = []
        for at, values in of_name:
            shared = [values[case] / first[case] for case in values if case in first]
            if shared:
                ratios.append((float(at), math.exp(statistics.fmean(map(math.log, shared)))))
        if len(ratios) > 1:
            series.append(
                Series(name.rpartition(".")[2] or name, [r[0] for r in ratios], [r[1] for r in ratios])
            )
    if not series:
        return None
    y_low, y_high = plots.span([y for one in series for y in one.y if y is not None], log=True)
    last = len(commits) - 1
    chart = plots.chart(
        series[: plots.SERIES],
        Axis("commits, in the order of their dates", -0.2, last + 0.2),
        Axis("time, first commit = 1", min(y_low, 0.9), max(y_high, 1.1), log=False),
        "Time of the solver over commits",
        "; ".join(f"{one.name}: {one.y[-1]:.2f} of the first commit's time" for one in series),
    )
    return {"chart": chart, "first": commits[0][1], "last": commits[-1][1], "count": len(commits)}


# --- who needs what ---------------------------------------------------------------------------------------


def _threats(shown: Iterable[pd.DataFrame], manifests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The threat model of every attack on the boards, in its class's words, or its manifest's."""
    by_spec = {str(manifest.get("attack")): manifest for manifest in manifests}
    found: dict[str, dict[str, Any]] = {}
    for board in shown:
        needs = tables.needs_of(board)
        for row in boards.rows_of(board):
            spec = row["attack"]
            entry = found.setdefault(spec, {"told": set()} | _said(spec, by_spec))
            entry["spec"] = tables.short(registry.attacks, spec)
            entry["needs"] = "; ".join(needs.get(spec.partition("(")[0], [])) or "—"
            entry["told"] |= {row["knowledge"]} - {""}
    return [
        entry | {"told": "; ".join(sorted(entry["told"])) or "nothing beyond update and model"}
        for _, entry in sorted(found.items())
    ]


def _said(spec: str, manifests: dict[str, dict[str, Any]]) -> dict[str, Any]:
    cls = _class(spec)
    said = manifests.get(spec, {}) if cls is None else {
        "title": cls.title, "threat_model": cls.threat_model, "reads": cls.reads, "paper": cls.paper,
    }  # fmt: skip
    letter, paper = str(said.get("threat_model", "")), str(said.get("paper", ""))
    reads = {"head": "the last layer's gradient", "all": "all gradients"}
    return {
        "title": str(said.get("title", "")) or spec.partition("(")[0],
        "letter": letter or "—",
        "name": THREAT_MODELS.get(letter, "not known here"),
        "reads": reads.get(str(said.get("reads", "")), "—"),
        "paper": paper if re.fullmatch(r"https?://[^\s\"'<>]+", paper) else "",
    }


# --- trials -----------------------------------------------------------------------------------------------


def _embedded(trials: dict[str, list[dict[str, Any]]]) -> Markup:
    """The trials as JSON that can stand in a page: no tag begins in it."""
    columns = ["trial", "sample", "weight_seed", "outcome", "reason", "seconds", *METRICS]
    rows = [row for members in trials.values() for row in members]
    kept = [c for c in columns if c not in METRICS or any(row[c] is not None for row in rows)]
    content = {
        "columns": kept,
        "cells": {
            key: [[_plain(row[c]) for c in kept] for row in members] for key, members in trials.items()
        },
    }
    text = json.dumps(content, ensure_ascii=True, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _plain(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value
