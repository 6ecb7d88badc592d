"""iLRG on untrained nets, to batches of 4096: `python -m bench.studies.ilrg_batches`.

Published: LeAcc > 99 % and LnAcc > 96 % in most cases. Images of mnist5k with their own labels (K = 10), or
with labels drawn uniformly (K = 100, 1000: an untrained net's features know nothing of labels). One net and
draw each; `--seeds` takes more.

Writes results/labels/ilrg_batches.csv: `class_existence` is LeAcc; `class_counts_exact` the share of
classes whose number is right, the authors' LnAcc; `class_counts` the overlap of the multisets, their IRec
and our boards' LnAcc.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from bench import registry
from bench.cases import data, models
from bench.cases.client import FedSGDClient
from bench.metrics.labels import class_counts, class_counts_exact, class_existence
from bench.threat import Facts, Knowledge, Observation

RESULTS = Path(__file__).resolve().parents[2] / "results" / "labels"
NETS = (
    "fcn(depth=3, width=300)",
    "lenet(activation='relu', init='default')",
    "convnet",
    "resnet18",
)
CLASSES, BATCHES = (10, 100, 1000), (24, 128, 512, 1024, 4096)
AT_ONCE = 128


def rows(
    dataset: data.Dataset, net: str, num_classes: int, seed: int, largest: int
) -> list[dict[str, object]]:
    """One row a batch size, on one net; the smaller batches are the beginnings of the largest."""
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(dataset), largest, replace=False)
    labels = dataset.labels[chosen]
    if num_classes != dataset.num_classes:
        labels = torch.from_numpy(rng.integers(0, num_classes, largest))
    client = FedSGDClient(models.build(net, dataset.image_shape, num_classes, seed))
    features = torch.cat([client.features(part[None])[0] for part in dataset.pixels(chosen).split(AT_ONCE)])
    soft_labels = torch.nn.functional.one_hot(labels, num_classes).float()
    ilrg, made = registry.attacks.make("ilrg"), []
    for n in [n for n in BATCHES if n <= largest]:
        stacked = client.head_updates(features[None, :n], soft_labels[None, :n])
        update = {name: value[0] for name, value in stacked.items()}
        facts = Facts(n, num_classes, dataset.image_shape, features.shape[1], True, True)
        seen = Observation(client.model, update, client.head, facts, Knowledge())
        found = ilrg.run(seen, torch.Generator(device="cpu").manual_seed(seed)).soft_labels
        assert found is not None
        row: dict[str, object] = {
            "model": models.canonical(net),
            "weights_sha256": models.sha256(client.model),
            "seed": seed,
            "classes": num_classes,
            "batch_size": n,
            "class_existence": float(class_existence(found, soft_labels[:n])),
            "class_counts_exact": float(class_counts_exact(found, soft_labels[:n])),
            "class_counts": float(class_counts(found, soft_labels[:n])),
        }
        made.append(row)
    return made


def main() -> None:
    """Runs the study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--net", default="", help="only nets whose spec holds this")
    parser.add_argument("--largest", type=int, default=max(BATCHES))
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dataset, made = data.load("mnist5k"), []
    nets = [net for net in NETS if arguments.net in net]
    for net, num_classes, seed in itertools.product(nets, CLASSES, range(arguments.seeds)):
        made += rows(dataset, net, num_classes, seed, arguments.largest)
    trials = pd.DataFrame(made)
    arguments.out.mkdir(parents=True, exist_ok=True)
    trials.to_csv(arguments.out / "ilrg_batches.csv", index=False, float_format="%.5g")
    metrics = ["class_existence", "class_counts_exact", "class_counts"]
    means = trials.groupby(["model", "classes", "batch_size"], sort=False)[metrics].mean()
    print(means.round(3).to_string())


if __name__ == "__main__":
    main()
