"""Commits the trained weights of a grid: `python -m bench.studies.freeze bench/grids/labels-v1.toml`.

Trains what isn't there, puts it into results/weights, and writes the SHA-256 of each into the grid's file.
Done once, when a grid is made; a published grid is never frozen again.

A second argument names a data set to train on, for a grid whose own images are too few: another sample of
the same classes, none of whose images is attacked. The checkpoint's record names it and its SHA-256.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import safetensors.torch
import torch

from bench import work
from bench.cache import cache_folder
from bench.cases import data, models
from bench.cases.models import Network
from bench.cases.scenario import cells, load_grid
from bench.errors import UserError
from bench.run import network_of


def freeze(path: Path, training: str | None) -> None:
    """Rewrites the file's `weights_sha256` table; `training` is a data set other than the grid's."""
    grid = load_grid(str(path))
    networks = dict.fromkeys(network_of(scenario, None) for scenario, _ in cells(grid))
    models.COMMITTED.mkdir(parents=True, exist_ok=True)
    lines = []
    for network in networks:
        if models.epochs(network.weights) == 0:
            continue
        if training is not None:
            _train_on(training, network)
        sha256 = work.weights_sha256(network, None)
        for suffix in (".safetensors", ".json"):
            trained = cache_folder() / "weights" / f"{network.key}{suffix}"
            if not (models.COMMITTED / trained.name).exists():
                shutil.copy(trained, models.COMMITTED)
        what = f"{network.model}, {network.weights}, seed {network.weight_seed}"
        lines.append(f'{network.key} = "{sha256}"  # {what}')
        print(lines[-1])
    text = re.sub(r"\n*\[weights_sha256\]\n[^\[]*$", "\n", path.read_text())
    path.write_text(f"{text.rstrip()}\n\n[weights_sha256]\n" + "\n".join(lines) + "\n")


def _train_on(name: str, network: Network) -> None:
    """Commits a network of the grid's, trained on images of the same kind that the grid doesn't attack.

    Raises:
        UserError: other shapes or classes, or an attacked image among them.
    """
    path = models.COMMITTED / f"{network.key}.safetensors"
    if path.exists():
        return
    attacked, training = work.dataset_named(network.dataset, None), data.load(name, None)
    if (training.image_shape, training.num_classes) != (attacked.image_shape, attacked.num_classes):
        raise UserError(f"{name} has other shapes or classes than {network.dataset}")
    nearest = torch.cdist(attacked.pixels(attacked.held_out).flatten(1), training.images.flatten(1) / 255)
    if bool((nearest.amin(dim=1) < 1e-3).any()):
        raise UserError(f"{name} holds an image of {network.dataset}")
    model = models.build(network.model, training.image_shape, training.num_classes, network.weight_seed)
    report = models.train(model, training, models.epochs(network.weights), network.weight_seed)
    source = {"trained_on": Path(name).stem, "trained_on_sha256": training.sha256}
    safetensors.torch.save_file(model.state_dict(), path)
    path.with_suffix(".json").write_text(json.dumps(asdict(network) | source | report, indent=2))


if __name__ == "__main__":
    freeze(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
