r"""The paper's label experiments on real images, by its own search and by ours.

    python -m bench.studies.paper_labels --small "CIFAR-10=npz:TEST.npz" --training npz:TRAIN.npz \
        --large "ImageNet=parquet:IMAGES.parquet"

For each network, kind of label, search, and with or without the last layer's bias: how many labels come back
within .01, and how often λ does as the paper's code asks (within .01 in its scaled units). As there, the
published search is told the kind of label; the exact one is told nothing. Unlike there, no λ is compared
with the truth in order to stop. ε is drawn from U(.01, .5), a mix's share from U(.02, .98).

`--small` and `--large` are a name for tables, `=`, and a data set (bench.cases.data); all of its images may
be attacked, so that `--training` must be another set. A cell that results/labels/paper_labels.csv has
already is not run again.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from attacks.solvers import recover_soft_labels
from bench.cases.client import FedSGDClient
from bench.cases.data import Dataset, load
from bench.cases.models import Network, build, network
from bench.registry import defenses
from bench.report.statistics import wilson
from bench.studies.gradients import soft_label

RESULTS = Path(__file__).resolve().parents[2] / "results" / "labels" / "paper_labels.csv"
FORMATS = ("hard", "smoothing", "mixup")
COEFFICIENT = {"hard": 4, "smoothing": 4, "mixup": 2}
"""By which the authors divide the gradient's row: what multiplies λ, and its error."""
WITHIN = 0.01
SEED = 0
SMALL = (
    ("lenet(bias=False)", "untrained"),
    ("fcn(bias=False, depth=4)", "untrained"),
    ("resnet18(bias=False)", "untrained"),
    ("lenet(bias=False, init='default')", "trained"),
    ("lenet(bias=False, init='default', activation='relu')", "trained"),
    ("resnet18(bias=False, stem='imagenet')", "epochs=3"),
)
LARGE = (("resnet18(bias=False, stem='imagenet')", "untrained"),)
WITH_BIAS = (("lenet", "untrained"), ("resnet18", "untrained"))
LARGE_WITH_BIAS = (("resnet18(stem='imagenet')", "untrained"),)
COLUMNS = (
    *("data", "classes", "model", "weights", "bias_gradient", "label_format", "search", "examples"),
    *("within", "low", "high", "lam_within", "ok", "wrong_ok", "milliseconds"),
)


class Cell(NamedTuple):
    """What one row of the table is about; `bias_gradient` is none, given or withheld."""

    data: str
    model: str
    weights: str
    bias_gradient: str
    label_format: str
    search: str


def cells(small: str | None, large: str | None) -> Iterator[Cell]:
    """All of them: the paper's, whose heads have no bias, by both searches; those with a bias by ours."""
    for data, without, with_bias in ((small, SMALL, WITH_BIAS), (large, LARGE, LARGE_WITH_BIAS)):
        if data is None:
            continue
        for net in without:
            for label_format in FORMATS:
                for search in ("exact", "paper"):
                    yield Cell(data, *net, "none", label_format, search)
        for net in with_bias:
            for label_format in FORMATS:
                for bias_gradient in ("given", "withheld"):
                    yield Cell(data, *net, bias_gradient, label_format, "exact")


def row(cell: Cell, dataset: Dataset, training: Dataset | None, examples: int) -> dict[str, object]:
    """One cell's figures, of a stack of `examples` gradients in float32."""
    rng = np.random.default_rng([SEED, FORMATS.index(cell.label_format)])  # the same images for every network
    order = torch.from_numpy(rng.permutation(len(dataset)))
    classes = dataset.labels
    first = order[:examples]
    second = torch.stack(
        [next(j for j in order.roll(-at - 1) if classes[j] != classes[i]) for at, i in enumerate(first)]
    )
    y, share = soft_label(classes[first], classes[second], dataset.num_classes, cell.label_format, rng)
    weight = share.float()[:, None, None, None]
    images = weight * dataset.pixels(first) + (1 - weight) * dataset.pixels(second)
    model = _model(cell, dataset, training)
    client = FedSGDClient(model)
    features = client.features(images[:, None])
    update = client.head_updates(features, y.float()[:, None])
    head = model.get_submodule(client.head)
    assert isinstance(head, nn.Linear)
    gradient, x = update[f"{client.head}.weight"], features[:, 0]
    started = time.process_time()
    found = recover_soft_labels(
        gradient,
        head.weight.detach(),
        None if head.bias is None else head.bias.detach(),
        update[f"{client.head}.bias"] if cell.bias_gradient == "given" else None,
        search=cell.search,
        label_format=cell.label_format if cell.search == "paper" else None,
    )
    seconds = time.process_time() - started
    assert found.soft_labels is not None
    near = (found.soft_labels - y).abs().amax(dim=1).nan_to_num(1.0) <= WITHIN
    largest = gradient[torch.arange(len(x), device="cpu"), found.row].double()
    lam = (x.double() * largest).sum(1) / largest.square().sum(1)
    scaled = COEFFICIENT[cell.label_format] * (found.lam.double() - lam).abs()
    ok = torch.tensor([outcome == "ok" for outcome in found.outcome], device="cpu")
    low, high = wilson(int(near.sum()), len(near))
    return {
        **cell._asdict(),
        "classes": dataset.num_classes,
        "examples": len(near),
        "within": float(near.double().mean()),
        "low": low,
        "high": high,
        "lam_within": float((scaled < WITHIN).double().mean()),
        "ok": float(ok.double().mean()),
        "wrong_ok": int((ok & ~near).sum()),
        "milliseconds": 1000 * seconds / len(near),
    }


def _model(cell: Cell, dataset: Dataset, training: Dataset | None) -> nn.Module:
    """The network on the CPU, in eval mode."""
    if cell.weights == "untrained":
        return build(cell.model, dataset.image_shape, dataset.num_classes, SEED)
    if training is None or training.sha256 == dataset.sha256:
        raise SystemExit(f"{cell.model}, {cell.weights}: give --training, another data set than the attacked")
    wanted = Network(cell.model, training.name, training.sha256, cell.weights, SEED)
    return network(wanted, training, defenses.make("none"))


def _named(text: str) -> tuple[str, str]:
    name, equals, spec = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} has no '=': give a name and a data set, NAME=SPEC")
    return name, spec


def main() -> None:
    """Runs the cells that aren't there yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--small", type=_named, metavar="NAME=SPEC", help="images of a few classes")
    parser.add_argument("--training", metavar="SPEC", help="what trained networks of these are trained on")
    parser.add_argument("--large", type=_named, metavar="NAME=SPEC", help="images of many classes")
    parser.add_argument("--examples", type=int, default=300, help="of each cell")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="stop then; run again for the rest"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    named = dict(filter(None, (arguments.small, arguments.large)))
    data = {name: load(spec) for name, spec in named.items()}
    training = load(arguments.training) if arguments.training else None
    path: Path = arguments.out
    path.parent.mkdir(parents=True, exist_ok=True)
    done = set()
    if path.exists():
        with path.open(newline="") as file:
            done = {Cell(*(kept[name] for name in Cell._fields)) for kept in csv.DictReader(file)}
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not file.tell():
            writer.writeheader()
        names = [argument[0] if argument else None for argument in (arguments.small, arguments.large)]
        for cell in cells(*names):
            if cell not in done and time.process_time() < arguments.seconds:
                made = row(cell, data[cell.data], training, arguments.examples)
                writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in made.items()})
                file.flush()
                print(*made.values(), flush=True)


if __name__ == "__main__":
    main()
