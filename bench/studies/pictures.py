"""The README's pictures, from a run of `quick`: `python -m bench.studies.pictures runs/quick`.

Writes results/pictures/leaderboard.svg and results/pictures/reconstructions.png.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from rich.console import Console
from rich.text import Text
from torch import Tensor

from bench import work
from bench.cases.scenario import load_grid, replaced
from bench.isolation import Attempt, attempts_here
from bench.metrics.images import psnr
from bench.report import record, tables
from bench.report.leaderboard import leaderboard
from bench.run import plan
from bench.threat import Observation
from bench.work import Chunk

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "results" / "pictures"
WIDTH = 118
SHOWN = {
    "fcn": {"fcn_analytic": "exactly, after λ"},
    "convnet": {"idlg": "by search, iDLG's label", "lambda_recovery": "by search, λ's label"},
}
"""Model -> part of an attack's spec -> how it finds its image."""


def draw_leaderboard(folder: Path) -> None:
    """The label board of one network, as a terminal shows it."""
    os.environ["COLUMNS"] = str(WIDTH)
    board = leaderboard([record.read(folder)], "label")
    board = board[(board["model"].str.startswith("fcn")) & (board["model"].str.contains("bias=False"))]
    board = board[~board["attack"].str.contains("fcn_analytic")]
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(Text(tables.render(board, "label", "table")))
    console.save_svg(str(OUT / "leaderboard.svg"), title="leakbench run")


def draw_reconstructions(samples: int = 4) -> None:
    """What the quick grid's image attacks see of a mixed-up pair, and what they make of it."""
    grid = replaced(load_grid("quick"), defenses=["mixup(low=0.1, high=0.9)"], samples=samples)
    planned = plan(grid, grid, None, "cpu")
    weights = {network: work.weights_sha256(network, None) for network in planned.networks.values()}
    columns: list[tuple[str, list[Tensor]]] = []
    for model, attacks in SHOWN.items():
        chunks = [
            chunk
            for chunk in planned.chunks(weights)
            if chunk.scenario.model.startswith(model)
            and chunk.scenario.defense != "none"
            and chunk.reads == "all"
        ]
        observed = [work.observe(chunk, planned.context) for chunk in chunks]
        truth = [one.truths[0].released.images[0] for one in observed]
        columns.append((f"{model}: what the client trained on", truth))
        for part, title in attacks.items():
            columns.append((f"{model}: {title}", [_image(chunk, planned.context, part) for chunk in chunks]))
    figure, axes = plt.subplots(samples, len(columns), figsize=(2.1 * len(columns), 2.1 * samples))
    for at, (title, images) in enumerate(columns):
        truth = columns[0 if title.startswith("fcn") else 2][1]
        for row, image in enumerate(images):
            axis = axes[row, at]
            axis.imshow(image.permute(1, 2, 0).squeeze(-1).clamp(0, 1), cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
            if image is not truth[row]:
                decibels = float(psnr(image[None], truth[row][None]))
                axis.set_xlabel(f"{decibels:.1f} dB", fontsize=9)
        axes[0, at].set_title(title.replace(": ", "\n"), fontsize=9)
    figure.tight_layout()
    figure.savefig(OUT / "reconstructions.png", dpi=80)


def _image(chunk: Chunk, context: work.Context, part: str) -> Tensor:
    (entrant,) = [one for one in chunk.entrants if part in one.spec]
    found: list[Tensor] = []

    def attack(spec: str, seen: Sequence[Observation], seeds: Sequence[int], *_: object) -> list[Attempt]:
        answers = attempts_here(spec, seen, seeds)
        found.extend(one.reconstruction.images[0] for one in answers if one.reconstruction.images is not None)
        return answers

    work.rows(replace(chunk, entrants=(entrant,)), context, attack, isolated=False)
    return found[0]


if __name__ == "__main__":
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    draw_leaderboard(Path(sys.argv[1]))
    draw_reconstructions()
