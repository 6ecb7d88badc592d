"""The board and the frontier of a run of defenses-v1: `python -m bench.studies.defenses runs/defenses-v1`.

Writes results/defenses/board.csv and board.md; frontier.png (accuracy of a network trained with a defense,
against what the strongest attacker gets of the private batch); and augmentations.md: what label smoothing,
mixup and CutMix leave of the released and of the private batch.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from bench import registry
from bench.report import record, utility
from bench.report.defenses import defense_board, render
from bench.report.leaderboard import leaderboard, rows_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RESULTS = Path(__file__).resolve().parents[2] / "results" / "defenses"
AUGMENTATIONS = ("none", "label_smoothing", "mixup", "cutmix")


GIVEN_AWAY = 0.97
"""From here on a class, or an image, counts as given away."""


def _label(axis: Axes, place: tuple[float, float], text: str) -> None:
    """Beside a point, on the side where there is room."""
    left = place[0] > 0.5
    axis.annotate(
        text,
        place,
        fontsize=7,
        xytext=(-6 if left else 6, -3),
        textcoords="offset points",
        ha="right" if left else "left",
    )


def frontier(board: pd.DataFrame, path: Path) -> None:
    """A panel for classes, one for images; a point a defense, on the network whose training was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [
        row
        for row in rows_of(board)
        if row["accuracy"] is not None and row["protocol"] == "fedsgd" and row["batch_size"] == 1
        if row["model"] == row["trained_model"] and row["weights"] == "untrained"
    ]
    figure, panels = pyplot.subplots(1, 2, figsize=(13, 6), layout="constrained")
    measures = (
        ("private_top1", "class of the private example found"),
        ("private_ssim", "SSIM to it, best image"),
    )
    for axis, (metric, name) in zip(panels, measures, strict=True):
        own = [row for row in rows if row[metric] is not None]
        given_away = [row for row in own if row[metric] >= GIVEN_AWAY]
        for row in own:
            told = row["told"] if metric == "private_top1" else row["image_told"]
            place = (row["accuracy"], row[metric])
            axis.plot(*place, "^" if told else "o", color="C1" if told else "C0")
            if row not in given_away:
                _label(axis, place, registry.defenses.short(row["defense"]))
        if given_away:
            at = (max(row["accuracy"] for row in given_away), GIVEN_AWAY)
            _label(axis, at, f"{len(given_away)} defenses hide nothing: board.md names them")
        points = sorted((row["accuracy"], row[metric]) for row in own)
        best = [p for p in points if not any(q[0] >= p[0] and q[1] <= p[1] and q != p for q in points)]
        axis.plot(*zip(*best, strict=True), color="0.6", linewidth=1, zorder=0)
        axis.set(xlabel="accuracy of a network trained with it", ylabel=name)
    figure.suptitle("triangles: the attack was told the defense; line: nothing is better in both", fontsize=9)
    figure.savefig(path, dpi=110)


def augmentations(runs: list[record.Run]) -> str:
    """Each attack that finds the released label, beside what that says of the private example."""
    lines = [
        "# What label smoothing, mixup and CutMix hide\n",
        "Released: what the loss saw. Private: what the client holds. Batches of one, FedSGD, all first",
        "weights together; the label attack is λ-recovery, told nothing; images: the best that any found.\n",
        "| network | weights | defense | n | released label within .01 | released class | private class "
        "| image: MSE to released | to private |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    labels = _plain(leaderboard(runs, "label"))
    images = _plain(leaderboard(runs, "image"))
    for row in labels:
        if not row["attack"].startswith("lambda_recovery(") or row["success"] is None:
            continue
        place = [row[column] for column in ("model", "weights", "defense")]
        there = [
            one
            for one in images
            if [one[column] for column in ("model", "weights", "defense")] == place and one["mse"] is not None
        ]
        best = min(there, key=lambda one: one["mse"], default=None)
        cells = [row["model"].partition("(")[0], row["weights"], registry.defenses.short(row["defense"])]
        cells += [str(row["n"]), *(f"{100 * row[m]:.0f}%" for m in ("success", "top1", "private_top1"))]
        cells += ["", ""] if best is None else [f"{best['mse']:.1e}", f"{best['private_mse']:.1e}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _plain(board: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of single augmentations, batches of one."""
    return [
        row
        for row in rows_of(board)
        if row["batch_size"] == 1 and row["protocol"] == "fedsgd" and row["skipped"] is None
        if row["defense"].partition("(")[0] in AUGMENTATIONS and "+" not in row["defense"]
    ]


def main() -> None:
    """Writes all of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    runs = [record.read(given.run)]
    board = defense_board(runs, utility.read(given.run))
    (given.out / "board.csv").write_text(render(board, "csv"), encoding="utf-8")
    (given.out / "board.md").write_text(render(board, "md"), encoding="utf-8")
    (given.out / "augmentations.md").write_text(augmentations(runs), encoding="utf-8")
    frontier(board, given.out / "frontier.png")


if __name__ == "__main__":
    main()
