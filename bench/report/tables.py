"""A leaderboard as text: a table for people, CSV and JSON for programs, Markdown for pages."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench import registry
from bench.errors import UserError, nearest
from bench.report.leaderboard import CHANCE, NETWORK, Track, is_loadable, rows_of, track_named
from bench.report.record import SCENARIO


def render(board: pd.DataFrame, track: str, format: str) -> str:
    """A leaderboard as text: `csv` and `json` hold every column, `md` the main ones, `table` is for people.

    Raises:
        UserError: an unknown track or format.
    """
    if format not in _FORMATS:
        raise UserError(f"no format is named {format!r}{nearest(format, _FORMATS)}")
    return _FORMATS[format](board, track_named(track))


def _csv(board: pd.DataFrame, track: Track) -> str:
    return board.to_csv(index=False, lineterminator="\n")


def _json(board: pd.DataFrame, track: Track) -> str:
    return json.dumps(rows_of(board), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _markdown(board: pd.DataFrame, track: Track) -> str:
    """A GitHub table: rank, who, what was attacked (the axes that vary), how well."""
    names = Names(board, track)
    varying = [c for c in ("grid", *SCENARIO) if c != "defense" and board[c].nunique() > 1]
    axes = [c for c in ("grid", *SCENARIO) if c in varying or c in ("model", "weights")]
    heads = ["rank", "attack", "defense", *(_words(axis) for axis in axes), "n"]
    heads += [title for title, _ in MEASURES[track.name]]
    lines = [heads, ["---"] * len(heads)]
    for row in rows_of(board):
        who = [_rank(row), names.attack(row), names.defenses[row["defense"]]]
        cells = [*who, *(str(row[axis]) for axis in axes)]
        if row["skipped"] is None:
            cells += [_counted(row), *(measure(row) for _, measure in MEASURES[track.name])]
        else:
            cells += ["–", f"skipped: {row['skipped']}", *[""] * (len(heads) - len(cells) - 2)]
        lines.append([cell.replace("|", "\\|") for cell in cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


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


MEASURES: dict[str, list[tuple[str, Callable[[dict[str, Any]], str]]]] = {
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
        ("identified", _rate("identified")),
        ("labels", _rate("success")),
        ("failed", _failures),
    ],
    "feature": [
        ("cosine", _cosine),
        ("relative error", _mean("feature_error", ".1e")),
        ("failed", _failures),
    ],
}


class Names:
    """What people read for the attacks and defenses of a board."""

    def __init__(self, board: pd.DataFrame, track: Track) -> None:
        attacks = list(board["attack"].unique())
        self._attacks = {spec: short(registry.attacks, spec, _told_apart(spec, attacks)) for spec in attacks}
        single = [spec for spec in board["defense"].unique() if len(registry.split_chain(spec)) == 1]
        self.defenses = {
            spec: short(registry.defenses, spec, _told_apart(spec, single) if spec in single else ())
            for spec in board["defense"].unique()
        }
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


def _told_apart(spec: str, others: Iterable[str]) -> set[str]:
    """The parameters by which an attack or defense differs from others of the same name."""
    own = parsed(spec)
    namesakes = [other for other in map(parsed, others) if other.target == own.target]
    return {
        name
        for name, value in own.parameters.items()
        if any(other.parameters.get(name) != value for other in namesakes)
    }


def parsed(spec: str) -> registry.Spec:
    """The spec; of what is none, a name without parameters: records may hold anything."""
    try:
        return registry.parse(spec)
    except UserError:
        return registry.Spec(spec, {})


def needs_of(board: pd.DataFrame) -> dict[str, list[str]]:
    """What each attack needs, one spec for those of one name; of attacks whose code is at hand."""
    from bench.report.assumptions import assumptions  # needs torch, which a board may do without

    specs = {str(spec).split("(")[0]: str(spec) for spec in board["attack"].unique() if is_loadable(spec)}
    found = {}
    for name, spec in sorted(specs.items()):
        try:
            needs = assumptions(spec)
        except (UserError, ImportError):
            continue
        if needs:
            found[name] = needs
    return found


def short(kind: registry.Registry[Any], spec: str, keeping: Collection[str] = ()) -> str:
    """The short spec; one that can't be resolved any more as it is."""
    if not is_loadable(spec):
        return spec
    try:
        return kind.short(spec, keeping)
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
    "classes": "classes in {}",
    "protocol": "{}",
}


def phrase(row: dict[str, Any], axes: Iterable[str]) -> str:
    """Some of a row's axes in a person's words."""
    return ", ".join(_AXES[axis].format(row[axis]) for axis in axes if row[axis] != "")


def _draw_caption(console: Console, board: pd.DataFrame, track: Track) -> None:
    rows = rows_of(board)
    constant = [axis for axis in _AXES if board[axis].nunique() == 1]
    counts = sorted({row["n"] for row in rows if row["skipped"] is None and row["n"] >= row["expected"]})
    n = f"; n = {counts[0]}" + (f"–{counts[-1]}" if len(counts) > 1 else "") if counts else ""
    console.print(Text(f"{track.name.capitalize()} leaderboard", style="bold"), Text(f"— {track.question}"))
    console.print(Text(f"{phrase(rows[0], constant)}{n}"))


def _networks(board: pd.DataFrame) -> list[tuple[str, list[dict[str, Any]]]]:
    """(what tells it from the others, its rows) for each network, in the board's order."""
    varying = [axis for axis in ("grid", *NETWORK) if board[axis].nunique() > 1]
    networks: dict[str, list[dict[str, Any]]] = {}
    for row in rows_of(board):
        networks.setdefault(phrase(row, varying), []).append(row)
    return list(networks.items())


def _draw_pivot(console: Console, board: pd.DataFrame, track: Track, notes: _Notes) -> None:
    """One row for each attack, one column for each defense; side by side as many as fit."""
    names, networks = Names(board, track), _networks(board)
    order = _by_overall_success(board)
    attack_width = _width(_broken(names.attack(row), 28) for row in rows_of(board))
    room = console.width - attack_width - 2
    cells: dict[tuple[str, str, str, str], list[Text]] = {}
    for network, rows in networks:
        for row in rows:
            key = (network, row["attack"], row["knowledge"], row["defense"])
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
                (row["attack"], row["knowledge"]): _broken(names.attack(row), 28)
                for row in rows
                if row["defense"] in block
            }
            section = []
            for entrant in sorted(entrants, key=lambda entrant: (order[entrant[0]], *entrant)):
                of = [cells.get((network, *entrant, defense), []) for defense in block]
                section.append([Text(entrants[entrant]), *(Text("\n").join(texts) for texts in of)])
            if section:
                sections.append((network, section))
        heads = [("attack", attack_width), *(shown[defense] for defense in block)]
        _draw_sections(console, heads, sections)


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
    # Of a batch the literature asks which classes it holds, and how often each.
    name, lesser = ("counts", row["class_counts"]) if row["batch_size"] > 1 else ("top-1", row["top1"])
    if lesser is not None and _percent(lesser) != _percent(row["success"]):
        cell.append(f"\n{name} {_percent(lesser)}")
    if row["failed"]:
        cell.append(f"\n{row['failed']} failed")
    return cell


_LEFT_OUT: tuple[tuple[str, ...], ...] = ((), ("MSE",), ("MSE", "labels"), ("MSE", "labels", "LPIPS"))
"""What a narrow terminal doesn't get, the least first; LPIPS only where it is empty."""


def _draw_list(console: Console, board: pd.DataFrame, track: Track, notes: _Notes) -> None:
    """One row for each attack against each defense, a defense's rows together."""
    names = Names(board, track)
    order = {defense: at for at, defense in enumerate(names.in_order)}
    networks = [
        (
            network,
            [_list_row(row, names, track, notes) for row in sorted(rows, key=lambda r: order[r["defense"]])],
        )
        for network, rows in _networks(board)
    ]
    every = [row for _, rows in networks for row in rows]
    heads = [head for head in every[0] if head == "LPIPS" or any(row[head] for row in every)]
    for left_out in _LEFT_OUT:
        dropped = {head for head in left_out if head != "LPIPS" or not any(row.get(head) for row in every)}
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


def _list_row(row: dict[str, Any], names: Names, track: Track, notes: _Notes) -> dict[str, str]:
    """Column's head -> what stands there."""
    cells = {
        "rank": _rank(row),
        "attack": names.attack(row),
        "defense": names.defenses[row["defense"]],
        "n": _counted(row),
    } | {head: measure(row) for head, measure in MEASURES[track.name]}
    if row["skipped"] is not None:
        cells |= {"n": f"–{notes.mark(row['skipped'])}"} | {head: "" for head, _ in MEASURES[track.name]}
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
    rows = rows_of(board)
    lines = [f"{notes.mark(note)} skipped: {note}" for note in notes.numbers]
    if any(_partial(row) for row in rows):
        lines.append("— not ranked: trials are missing; the same `leakbench run` continues")
    if any(row["failed"] for row in rows):
        lines.append(
            "failed: crashed, timed out, out of memory, diverged or gave up; counts as not recovered"
        )
    if track.name == "label":
        lines += [f"{name} needs {'; '.join(needs)}" for name, needs in needs_of(board).items()]
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
