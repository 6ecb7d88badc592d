"""What the report shows and records don't hold: images, and the loss over λ. Computed again from records.

Only attacks of the suite are run, in this process; what a record names by a path is nobody's to run here.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bench import run, work
from bench.errors import UserError
from bench.isolation import Architecture, Attempt, Limits, attempts_here
from bench.metrics.formats import label_format
from bench.report.leaderboard import is_loadable
from bench.report.page import Exhibits, Landscape, Picture
from bench.report.record import Run
from bench.threat import Observation
from bench.work import Truth

MOST_PICTURES = 12
SECONDS_A_PICTURE = 20.0
SECONDS = 90.0
"""What images may take to be made again, in all, by what the records say."""

POINTS_PER_SIDE = 700
PUBLISHED_BOUND = 50.0
PUBLISHED_COEFFICIENT = {1: 4.0, 2: 2.0}
"""What the published search divides the gradient by, for a label of so many entries that stand out."""


def exhibits(runs: Sequence[Run], data_root: Path | None) -> Exhibits:
    """Pictures and a landscape of what these runs recorded, and in words what couldn't be shown."""
    missing: list[str] = []
    pictures = _pictures(runs, data_root, missing)
    return Exhibits(tuple(pictures), _landscape(runs, data_root, missing), tuple(dict.fromkeys(missing)))


# --- pictures ---------------------------------------------------------------------------------------------


def _pictures(runs: Sequence[Run], data_root: Path | None, missing: list[str]) -> list[Picture]:
    """The first sample of each cell that has images, then the second, as far as they go."""
    chosen = sorted(
        (
            (row["sample"], at, row)
            for at, (row, _) in enumerate(_imaged(runs))
            if row["sample"] < 2 and row["weight_seed"] == 0
        ),
        key=lambda one: one[:2],
    )
    of_trial = {row["trial"]: ran for row, ran in _imaged(runs)}
    found: list[Picture] = []
    spent = 0.0
    for _, _, row in chosen:
        seconds = row["seconds"] or 0.0
        if len(found) == MOST_PICTURES or spent + seconds > SECONDS:
            break
        if not is_loadable(row["attack"]):
            missing.append(f"No images of {row['attack']}: its code is not the suite's.")
        elif seconds > SECONDS_A_PICTURE:
            missing.append(f"No images of {row['attack']}: {seconds:.0f} s each.")
        else:
            spent += seconds
            try:
                found.append(_picture(row, of_trial[row["trial"]], data_root))
            except (UserError, ImportError) as error:
                missing.append(f"No images of {row['attack']} on {row['dataset']}: {error}.")
    return found


def _imaged(runs: Sequence[Run]) -> list[tuple[dict[str, Any], Run]]:
    """The trials that were scored for images."""
    return [(row, ran) for ran in runs for row in ran.rows if row["mse"] is not None]


def _picture(row: dict[str, Any], ran: Run, data_root: Path | None) -> Picture:
    truth, _, attempt = _again(row, ran, data_root)
    released, private = truth.released.images[0], truth.private.images[0]
    images = attempt.reconstruction.images
    best = None
    if images is not None:  # the order of a batch is free: the one that is nearest
        best = images[int(((images - released.cpu()) ** 2).flatten(1).mean(1).argmin())]
    differs = released.shape != private.shape or not torch.allclose(released, private)
    return Picture(row, png(released), png(private) if differs else None, None if best is None else png(best))


def _again(row: dict[str, Any], ran: Run, data_root: Path | None) -> tuple[Truth, Observation, Attempt]:
    """One recorded trial: the truth, what its attack saw, and its answer."""
    chunk, context = run.recorded_chunk(row, ran.header_of(row), data_root)
    kept: list[tuple[Observation, Attempt]] = []

    def attack(
        spec: str, seen: Sequence[Observation], seeds: Sequence[int], _: Limits, architecture: Architecture
    ) -> list[Attempt]:
        answers = attempts_here(spec, seen, seeds)
        kept.extend(zip(seen, answers, strict=True))
        return answers

    work.rows(chunk, context, attack, isolated=False)
    at = row["sample"] - chunk.start
    return work.observe(chunk, context).truths[at], *kept[at]


def png(image: Tensor) -> bytes:
    """(C, H, W) in [0, 1] -> a PNG file."""
    pixels = (image.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[2] == 1 else pixels).save(file, format="PNG")
    return file.getvalue()


# --- the loss over λ --------------------------------------------------------------------------------------


def _landscape(runs: Sequence[Run], data_root: Path | None, missing: list[str]) -> Landscape | None:
    """Of the first trial of λ-recovery; where there is one, of a smoothed label on a head without bias."""
    candidates = [
        (("label_smoothing" not in row["defense"], "bias=False" not in row["model"], row["sample"]), at)
        for at, (row, _) in enumerate(_by_lambda(runs))
    ]
    if not candidates:
        return None
    row, ran = _by_lambda(runs)[min(candidates)[1]]
    try:
        truth, seen, attempt = _again(row, ran, data_root)
    except (UserError, ImportError) as error:
        missing.append(f"No loss over λ: {error}.")
        return None
    return landscape(row, truth, seen, attempt)


def _by_lambda(runs: Sequence[Run]) -> list[tuple[dict[str, Any], Run]]:
    return [
        (row, ran)
        for ran in runs
        for row in ran.rows
        if row["attack"].startswith("lambda_recovery(") and row["outcome"] == "ok" and row["batch_size"] == 1
    ]


def landscape(row: dict[str, Any], truth: Truth, seen: Observation, attempt: Attempt) -> Landscape | None:
    """The published loss, 1000 times the variance of the pseudo-label's K - k smallest entries, over λ.

    With r the row of the largest norm, x = λ g_r, and the pseudo-label is softmax(W x + b) - s / λ for
    s = ∇W g_r / ‖g_r‖². It is looked at from the least |λ| that a label allows to 100 times the true one.
    """
    gradient = seen.head_weight_gradient
    if gradient is None or not bool(gradient.norm()):
        return None
    gradient, weight = gradient.double().cpu(), seen.head_weight.double().cpu()
    bias = torch.zeros(len(weight), dtype=torch.float64, device="cpu")
    if seen.head_bias is not None:
        bias = seen.head_bias.double().cpu()
    r = int(gradient.norm(dim=1).argmax())
    g = gradient[r]
    s, a = gradient @ g / (g @ g), weight @ g  # (K,) each
    label = truth.released.soft_labels[0].double().cpu()
    p = torch.softmax(weight @ truth.features[0].double().cpu() + bias, dim=0)
    true_lam = float(1 / (p[r] - label[r]))
    left_out = 2 if "mixup" in label_format(truth.released.soft_labels[0]) else 1
    least = float(s.abs().sum()) / 2 * 0.9
    most = max(100 * abs(true_lam), 1.2 * PUBLISHED_BOUND / PUBLISHED_COEFFICIENT[left_out])
    side = torch.logspace(
        float(np.log10(least)), float(np.log10(most)), POINTS_PER_SIDE, dtype=torch.float64, device="cpu"
    )
    lam = torch.cat([-side.flip(0), side])  # (P,)
    y = torch.softmax(lam[:, None] * a + bias, dim=1) - s / lam[:, None]  # (P, K)
    loss = 1000 * y.sort(dim=1).values[:, : len(s) - left_out].var(dim=1, correction=0)
    is_lower = (loss[1:-1] < loss[:-2]) & (loss[1:-1] < loss[2:])
    minima = lam[1:-1][
        is_lower & (lam[1:-1].sign() == lam[2:].sign()) & (lam[1:-1].sign() == lam[:-2].sign())
    ]
    found = attempt.reconstruction.notes.get("lam")
    same_row = attempt.reconstruction.notes.get("row", r) == r
    return Landscape(
        row,
        lam.tolist(),
        loss.tolist(),
        minima.tolist(),
        true_lam,
        float(found) if isinstance(found, int | float) and same_row else None,
        PUBLISHED_BOUND / PUBLISHED_COEFFICIENT[left_out],
    )
