"""The defense board: what the strongest attacker still gets past each defense, and what the defense costs.

A row is a defense on a network, in a protocol, at a batch size: all three protect. It is scored against the
private batch, and by the worst case: the one attack that gets most, of those that apply, never a mean over
attacks. What an attack gets that was told the defense stands beside what the others get. Attacks that are
given the true labels are upper bounds and left out.
"""

from __future__ import annotations

import json
import statistics as means
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from bench import registry
from bench.errors import UserError, nearest
from bench.report import leaderboard as boards
from bench.report import statistics
from bench.report.leaderboard import CHANCE, rows_of
from bench.report.record import SCENARIO, Run

PLACE = tuple(column for column in SCENARIO if column != "weight_seed")
NETWORK = ("grid", "dataset", "model", "weights", "batch_norm", "members")
"""Within these, rows are ranked against each other."""

TRUTH, TOLD = "soft_labels", "defense"
HALF = 0.5
"""Where its squared error is this much smaller, an image attack owes it to having been told the defense."""

COLUMNS = (
    "rank", "defense", "protocol", "batch_size", "grid", "dataset", "model", "weights", "batch_norm",
    "members", "classes",
    "attack", "told", "n", "private_top1", "private_top1_low", "private_top1_high", "untold_attack",
    "untold_private_top1", "chance", "success", "success_attack",
    "image_attack", "image_told", "image_n", "private_mse", "private_ssim", "private_lpips",
    "untold_image_attack", "untold_private_mse",
    "falls_only_when_told", "attacks", "failed", "unfinished", "skipped",
    "accuracy", "accuracy_cost", "seconds_factor", "bytes", "epsilon", "delta", "rounds", "sample_rate",
    "trained_model",
)  # fmt: skip
"""Of the board. `told`: whether the attack knew the defense; `untold_…`: the best of those that didn't;
`success`: the most labels of the released batch that any attack found; `epsilon`: of `rounds` steps at
`sample_rate`, those of the training whose accuracy is shown; `seconds_factor`: a client's time over that
without a defense."""


def defense_board(runs: Sequence[Run], costs: Sequence[dict[str, Any]] = ()) -> pd.DataFrame:
    """One row for each defense in each scenario; `costs` are rows of `utility.jsonl`.

    Raises:
        UserError: no records.
    """
    labels = _rows(runs, "label")
    images = _rows(runs, "image")
    if not labels and not images:
        boards.leaderboard(runs, "label")  # says why
    places: dict[tuple[Any, ...], tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {}
    for at, rows in enumerate((labels, images)):
        for row in rows:
            place = tuple(row[column] for column in ("grid", *PLACE))
            places.setdefault(place, ([], []))[at].append(row)
    made = [
        dict(zip(("grid", *PLACE), place, strict=True)) | _worst(*rows) | _cost(place, costs)
        for place, rows in places.items()
    ]
    board = pd.DataFrame(made, columns=list(COLUMNS))
    ranks = board.groupby(list(NETWORK), sort=False)["private_top1"].rank(method="min")
    board["rank"] = ranks.where(board["private_top1"].notna()).astype("Int64")
    board["place"] = board.groupby(list(NETWORK), sort=False).ngroup()
    return board.sort_values(["place", "rank"], kind="stable", na_position="last")[list(COLUMNS)].reset_index(
        drop=True
    )


def _rows(runs: Sequence[Run], track: str) -> list[dict[str, Any]]:
    """The track's rows but for upper bounds; none where it has nothing to show."""
    if track not in boards.tracks(runs):
        return []
    return [
        row
        for row in rows_of(boards.leaderboard(runs, track))
        if TRUTH not in str(row["knowledge"]).split(",")
    ]


def _worst(labels: list[dict[str, Any]], images: list[dict[str, Any]]) -> dict[str, Any]:
    """What the strongest attackers get, of one place's rows of the label and of the image board."""
    every = {(row["attack"], row["knowledge"]): row for row in [*images, *labels]}
    skipped = {row["attack"]: row["skipped"] for row in every.values() if row["skipped"] is not None}
    unfinished = [row["attack"] for row in every.values() if _is_unfinished(row)]
    found: dict[str, Any] = {
        "attacks": sum(row["skipped"] is None for row in every.values()),
        "failed": sum(row["failed"] for row in every.values()),
        "unfinished": "; ".join(sorted(set(unfinished))) or None,
        "skipped": "; ".join(f"{attack}: {why}" for attack, why in sorted(skipped.items())) or None,
    }
    only_told = []
    there = [row for row in labels if _counts(row, "private_top1")]
    if there:
        best, untold = (_strongest(rows, _by_class) for rows in (there, [r for r in there if not _told(r)]))
        assert best is not None
        low, high = statistics.wilson(best["private_top1"] * best["n"], best["n"])
        recovered = max(there, key=lambda row: row["success"] or 0)
        found |= {
            "attack": best["attack"],
            "told": _told(best),
            "n": best["n"],
            "private_top1": best["private_top1"],
            "private_top1_low": low,
            "private_top1_high": high,
            "untold_attack": None if untold is None else untold["attack"],
            "untold_private_top1": None if untold is None else untold["private_top1"],
            "chance": next((r["private_top1"] for r in there if r["attack"].startswith(CHANCE)), None),
            "success": recovered["success"],
            "success_attack": recovered["attack"],
        }
        if _told(best) and untold is not None:
            _, ceiling = statistics.wilson(untold["private_top1"] * untold["n"], untold["n"])
            only_told += ["classes"] * (low > ceiling)
    told_labels = max((row["success"] or 0 for row in there if _told(row)), default=0.0)
    if there and told_labels > max((_high(row) for row in there if not _told(row)), default=1.0):
        only_told.append("labels")
    pictured = [row for row in images if _counts(row, "private_mse")]
    if pictured:
        best, untold = (
            _strongest(rows, _by_image) for rows in (pictured, [r for r in pictured if not _told(r)])
        )
        assert best is not None
        found |= {
            "image_attack": best["attack"],
            "image_told": _told(best),
            "image_n": best["n"],
            "private_mse": best["private_mse"],
            "private_ssim": best["private_ssim"],
            "private_lpips": best["private_lpips"],
            "untold_image_attack": None if untold is None else untold["attack"],
            "untold_private_mse": None if untold is None else untold["private_mse"],
        }
        if untold is not None and best["private_mse"] < HALF * untold["private_mse"]:
            only_told.append("images")
    return found | {"falls_only_when_told": ", ".join(only_told) or None}


def _told(row: dict[str, Any]) -> bool:
    return TOLD in str(row["knowledge"]).split(",")


def _is_unfinished(row: dict[str, Any]) -> bool:
    return bool(row["skipped"] is None and row["rank"] is None)


def _counts(row: dict[str, Any], metric: str) -> bool:
    """Whether a row is whole and has the metric: one of which trials are missing is nobody's worst case."""
    return row["skipped"] is None and not _is_unfinished(row) and row[metric] is not None


def _high(row: dict[str, Any]) -> float:
    return float(row["success_high"] or 0)


def _by_class(row: dict[str, Any]) -> tuple[Any, ...]:
    """Of equals the one that needs least comes first."""
    return row["private_top1"], row["success"] or 0, -len(str(row["knowledge"])), not _told(row)


def _by_image(row: dict[str, Any]) -> tuple[Any, ...]:
    """By LPIPS where it was measured, else by the squared error."""
    lpips = row["private_lpips"]
    return -(row["private_mse"] if lpips is None else lpips), not _told(row)


def _strongest(
    rows: Sequence[dict[str, Any]], key: Callable[[dict[str, Any]], tuple[Any, ...]]
) -> dict[str, Any] | None:
    return max(rows, key=key, default=None)


def _cost(place: tuple[Any, ...], costs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over first weights; measured on this very model where it was, else on the one that was."""
    axes = dict(zip(("grid", *PLACE), place, strict=True))
    of_data = [cost for cost in costs if cost["dataset"] == axes["dataset"]]
    models = list(dict.fromkeys(cost["model"] for cost in of_data))
    model = axes["model"] if axes["model"] in models else next(iter(models), None)
    of_model = [cost for cost in of_data if cost["model"] == model]
    own = [cost for cost in of_model if cost["defense"] == axes["defense"]]
    plain = [cost for cost in of_model if cost["defense"] == "none"]
    if not own:
        return {}
    accuracy = means.fmean(cost["accuracy"] for cost in own)
    found = {
        "accuracy": accuracy,
        "bytes": means.fmean(cost["bytes"] for cost in own),
        "epsilon": own[0]["epsilon"],
        "delta": None if own[0]["epsilon"] is None else own[0]["delta"],
        "rounds": own[0]["steps"],
        "sample_rate": own[0]["sample_rate"],
        "trained_model": model,
    }
    if plain:
        found["accuracy_cost"] = means.fmean(cost["accuracy"] for cost in plain) - accuracy
        found["seconds_factor"] = means.fmean(cost["seconds"] for cost in own) / means.fmean(
            cost["seconds"] for cost in plain
        )
    return found


# --- as text ----------------------------------------------------------------------------------------------


def render(board: pd.DataFrame, format: str) -> str:
    """The board as `csv` or `json` (every column), `md` or `table` (the main ones).

    Raises:
        UserError: an unknown format.
    """
    if format not in _FORMATS:
        raise UserError(f"no format is named {format!r}{nearest(format, _FORMATS)}")
    return _FORMATS[format](board)


def _csv(board: pd.DataFrame) -> str:
    return board.to_csv(index=False, lineterminator="\n")


def _json(board: pd.DataFrame) -> str:
    return json.dumps(rows_of(board), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


HEADS = (
    "rank", "defense", "class found", "by", "untold", "labels", "LPIPS", "SSIM", "MSE", "by", "untold MSE",
    "accuracy", "cost", "ε", "time", "kB", "notes",
)  # fmt: skip
"""What people see of the board."""


def _counted(count: int, what: str, how: str) -> str:
    return f"{count} {what}{'s' * (count != 1)} {how}"


def cells_of(row: dict[str, Any], names: dict[str, str]) -> list[str]:
    """A row's main columns, as `HEADS` names them."""

    def percent(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.0f}%"

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    interval = ""
    if row["private_top1"] is not None:
        low, high = (f"{100 * row[end]:.0f}" for end in ("private_top1_low", "private_top1_high"))
        interval = f"{percent(row['private_top1'])} [{low}–{high}]"
    protects = [names[row["defense"]]]
    protects += [row["protocol"]] if row["protocol"] != "fedsgd" else []
    protects += [f"batch of {row['batch_size']}"] if row["batch_size"] != 1 else []
    notes = []
    if row["falls_only_when_told"] is not None:
        notes.append(f"only when told: {row['falls_only_when_told']}")
    if row["failed"]:
        notes.append(_counted(row["failed"], "trial", "failed"))
    if row["skipped"] is not None:
        notes.append(_counted(len(row["skipped"].split("; ")), "attack", "skipped"))
    if row["unfinished"] is not None:
        notes.append(f"unfinished: {row['unfinished']}")
    return [
        "—" if row["rank"] is None else str(row["rank"]),
        ", ".join(protects),
        interval,
        attack_of(row["attack"], row["told"]),
        percent(row["untold_private_top1"]),
        percent(row["success"]),
        number(row["private_lpips"], ".3f"),
        number(row["private_ssim"], ".3f"),
        number(row["private_mse"], ".2g"),
        attack_of(row["image_attack"], row["image_told"]),
        number(row["untold_private_mse"], ".2g"),
        percent(row["accuracy"]),
        percent(row["accuracy_cost"]),
        "no ε" if row["epsilon"] is None and row["accuracy"] is not None else number(row["epsilon"], ".3g"),
        "" if row["seconds_factor"] is None else f"×{row['seconds_factor']:.1f}",
        "" if row["bytes"] is None else f"{row['bytes'] / 1000:.1f}",
        "; ".join(notes),
    ]


def attack_of(spec: str | None, told: bool | None) -> str:
    """The attack's name, and whether it was told the defense."""
    return "" if spec is None else f"{spec.partition('(')[0]}{' (told)' * bool(told)}"


def short_names(board: pd.DataFrame) -> dict[str, str]:
    """Each defense's spec without its defaults; as it is where its code is not at hand."""
    names = {}
    for spec in board["defense"].unique():
        try:
            names[spec] = spec if ".py:" in spec else registry.defenses.short(spec)
        except (UserError, ImportError):
            names[spec] = spec
    return names


def networks(board: pd.DataFrame) -> list[tuple[str, list[dict[str, Any]]]]:
    """(what tells it from the others, its rows) for each network."""
    varying = [column for column in NETWORK if board[column].nunique() > 1]
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows_of(board):
        found.setdefault(", ".join(str(row[column]) for column in varying), []).append(row)
    return list(found.items())


def _markdown(board: pd.DataFrame) -> str:
    names, lines = short_names(board), []
    for network, rows in networks(board):
        lines += [f"**{network}**", ""] if network else []
        shown = [cells_of(row, names) for row in rows]
        kept = [at for at in range(len(HEADS)) if any(cells[at] for cells in shown)]
        table = [[HEADS[at] for at in kept], ["---"] * len(kept)]
        table += [[cells[at].replace("|", "\\|") for at in kept] for cells in shown]
        lines += [*(f"| {' | '.join(cells)} |" for cells in table), ""]
    return "\n".join(lines)


def _table(board: pd.DataFrame) -> str:
    """Plain text in columns; columns without an entry are left out."""
    names = short_names(board)
    lines = ["Defense leaderboard — what the strongest attacker gets of the private batch, and what it costs"]
    for network, rows in networks(board):
        shown = [cells_of(row, names) for row in rows]
        kept = [at for at in range(len(HEADS)) if any(cells[at] for cells in shown)]
        table = [[HEADS[at] for at in kept], *([cells[at] for at in kept] for cells in shown)]
        widths = [max(len(cells[at]) for cells in table) for at in range(len(kept))]
        text = ["  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip() for cells in table]
        lines += ["", *([network] if network else []), text[0], "─" * max(map(len, text)), *text[1:]]
    untold = "told: the attack knew the defense; untold: the best of those that didn't"
    return "\n".join([*lines, "", untold, ""])


_FORMATS: dict[str, Callable[[pd.DataFrame], str]] = {
    "table": _table,
    "csv": _csv,
    "json": _json,
    "md": _markdown,
}
