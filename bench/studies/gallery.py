"""Galleries of a run: originals beside reconstructions: `python -m bench.studies.gallery runs/images-v1 OUT`.

One PNG a network, state, batch size and defense: a column a sample, the originals on top, a row an attack,
with the numbers that the records hold under each image. Images are computed again, from the records.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from torch import Tensor

from bench import registry, work
from bench.isolation import Architecture, Attempt, Limits, attempts_here
from bench.report import record
from bench.run import recorded_chunk
from bench.threat import Observation

SAMPLES = 6
Row = dict[str, Any]
GROUP = ("dataset", "model", "weights", "batch_size", "defense")


def galleries(folder: Path, out: Path) -> None:
    """Writes a PNG for each group of a run's trials."""
    ran = record.read(folder)
    groups: dict[tuple[Any, ...], dict[str, list[Row]]] = {}
    for row in sorted(ran.rows, key=lambda row: int(row["sample"])):
        if row["mse"] is not None and row["weight_seed"] == 0 and row["sample"] < SAMPLES:
            attacks = groups.setdefault(tuple(row[axis] for axis in GROUP), {})
            attacks.setdefault(row["attack"], []).append(row)
    out.mkdir(parents=True, exist_ok=True)
    for key, attacks in groups.items():
        pairs = {attack: _pairs(rows, ran.headers[-1]) for attack, rows in attacks.items()}
        path = out / (re.sub(r"[^\w=.]+", "-", " ".join(map(str, key))).strip("-") + ".png")
        _draw("\n".join([*map(str, key[:2]), ", ".join(map(str, key[2:]))]), attacks, pairs, path)
        print(path)


def _pairs(rows: Sequence[Row], header: record.Header) -> dict[int, tuple[Tensor, Tensor]]:
    """Sample -> the first example as it was released, and the reconstruction next to it."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for row in rows:
        if row["sample"] not in found:
            found |= _stack(row, header)
    return found


def _stack(row: Row, header: record.Header) -> dict[int, tuple[Tensor, Tensor]]:
    """The same of all trials that were computed together."""
    chunk, context = recorded_chunk(row, header, None)
    answers: list[Attempt] = []

    def attack(
        spec: str, seen: Sequence[Observation], seeds: Sequence[int], _: Limits, architecture: Architecture
    ) -> list[Attempt]:
        answers.extend(attempts_here(spec, seen, seeds))
        return answers

    work.rows(chunk, context, attack, isolated=False)
    truths = work.observe(chunk, context).truths
    found = {}
    for sample, one in zip(chunk.attacked, answers, strict=True):
        original, images = truths[sample - chunk.start].released.images[0], one.reconstruction.images
        if images is not None:  # the order of a batch is free: the one that is nearest
            nearest = (images - original).square().flatten(1).mean(dim=1).argmin()
            found[sample] = original, images[nearest]
    return found


def _draw(
    title: str,
    attacks: dict[str, list[Row]],
    pairs: dict[str, dict[int, tuple[Tensor, Tensor]]],
    path: Path,
) -> None:
    samples = sorted({sample for found in pairs.values() for sample in found})[:SAMPLES]
    figure, axes = plt.subplots(
        1 + len(attacks),
        len(samples),
        figsize=(max(4.5, 1.6 * len(samples) + 0.4), 1.9 * (1 + len(attacks)) + 0.6),
        squeeze=False,
    )
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for column, sample in enumerate(samples):
        original = next(found[sample][0] for found in pairs.values() if sample in found)
        _show(axes[0, column], original)
    for at, (attack, rows) in enumerate(attacks.items(), start=1):
        numbers = {row["sample"]: row for row in rows}
        axes[at, 0].set_title(registry.attacks.short(attack), fontsize=7, loc="left")
        for column, sample in enumerate(samples):
            if sample in pairs[attack]:
                _show(axes[at, column], pairs[attack][sample][1])
            if sample in numbers:
                axes[at, column].set_xlabel(_numbers(numbers[sample]), fontsize=7)
    axes[0, 0].set_title("what the client trained on", fontsize=7, loc="left")
    figure.suptitle(title, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _show(axis: Any, image: Tensor) -> None:
    axis.imshow(image.permute(1, 2, 0).squeeze(-1).clamp(0, 1).numpy(), cmap="gray", vmin=0, vmax=1)


def _numbers(row: Row) -> str:
    """As in `31.2 dB, SSIM .95, LPIPS .03`: of the whole batch."""
    parts = ["exact" if row["mse"] == 0 else f"{row['psnr']:.1f} dB"]
    if row["ssim"] is not None:
        parts.append(f"SSIM {row['ssim']:.2f}")
    if row["lpips"] is not None:
        parts.append(f"LPIPS {row['lpips']:.2f}")
    return "\n".join([parts[0], ", ".join(parts[1:])])


if __name__ == "__main__":
    torch.set_num_threads(1)
    galleries(Path(sys.argv[1]), Path(sys.argv[2]))
