"""Where the labels of a batch are recovered, and where that ends: `python -m bench.studies.batch_map`.

Batches of n examples on one head, its features real (a net's, on images that come with the install) or
synthetic (half-normal, a share of them zero). Labels are drawn uniformly, in a format or, `any`, in one of
four formats an example; trained nets also get their images' own, `own`. Gradients are autograd's, in their
dtype. A batch counts as recovered where every entry of every label is within 0.01 after matching; as wrong
where it isn't and the solver says "ok". Each cell has `--batches` batches over three draws of the weights.

Writes results/solver/batch_map.csv (a row a cell), .md and .png; `--study` limits it to one axis. Cells that
the table holds already are kept: stopped, it goes on where it was.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from attacks.solvers.batch import recover_soft_labels_of_batch
from bench.cases import data, models
from bench.cases.client import FedSGDClient
from bench.metrics.labels import label_distances, match, success
from bench.registry import defenses
from bench.report.statistics import wilson

RESULTS = Path(__file__).resolve().parents[2] / "results" / "solver"
FORMATS = ("hard", "smoothing", "mixup", "smoothed_mixup")
SEEDS = 3
IMAGES = 120
CONVNET, RESNET = "convnet(width=4, bias=False)", "resnet18(bias=False)"
SYNTHETIC = "synthetic"


@dataclass(frozen=True)
class Cell:
    """One point of the map.

    `zeros` is the share of zeros of synthetic features; real ones have their own.
    """

    study: str
    model: str
    n: int
    classes: int
    label_format: str = "any"
    dtype: str = "float64"
    state: str = "untrained"
    dataset: str = "mnist5k"
    zeros: float = 0.0
    width: int = 512


def cells() -> Iterator[Cell]:
    """The acceptance cells, then one axis after the other."""
    for model in (CONVNET, RESNET):
        for classes, n in ((10, 4), (100, 4), (100, 8)):
            for label_format in (*FORMATS, "any"):
                yield Cell("acceptance", model, n, classes, label_format, dataset="cifar10_samples")
    for model in (CONVNET, RESNET):
        for dtype in ("float64", "float32"):
            for n in (2, 4, 8, 16):
                yield Cell("examples", model, n, 100, dtype=dtype)
        for classes in (6, 8, 10, 12, 20):
            for label_format in ("hard", "any"):
                yield Cell("classes", model, 4, classes, label_format)
        for n, classes in ((4, 10), (8, 10), (8, 100)):
            yield Cell("bias", model.replace("False", "True"), n, classes)
    for width in (1, 2, 4, 16):
        for n in (4, 8):
            yield Cell("width", f"convnet(width={width}, bias=False)", n, 10)
    for zeros in (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 0.8, 0.95):
        for n, classes in ((4, 10), (8, 10), (8, 100)):
            yield Cell("density", SYNTHETIC, n, classes, zeros=zeros)
    for model in (CONVNET, "fcn(depth=2, width=512, bias=False)"):
        for state in ("untrained", "epochs=1", "trained"):
            for dtype in ("float64", "float32"):
                for n in (2, 4, 8):
                    for label_format in ("own", "any"):
                        yield Cell("training", model, n, 10, label_format, dtype, state)


def label(num_classes: int, label_format: str, rng: np.random.Generator) -> Tensor:
    """A label (K,): ε in [.05, .5], the mixing weight in [.05, .95]."""
    label_format = FORMATS[rng.integers(len(FORMATS))] if label_format == "any" else label_format
    y = np.zeros(num_classes)
    chosen = rng.choice(num_classes, 2, replace=False)
    share = rng.uniform(0.05, 0.95) if "mixup" in label_format else 1.0
    y[chosen] = share, 1 - share
    epsilon = rng.uniform(0.05, 0.5) if label_format.startswith("smooth") else 0.0
    return torch.from_numpy((1 - epsilon) * y + epsilon / num_classes)


@lru_cache(maxsize=6)
def network(
    model: str, dataset: str, classes: int, state: str, seed: int
) -> tuple[nn.Module, Tensor, Tensor]:
    """A net, the features (M, D) of its images, float64, and their classes."""
    images = data.load(dataset)
    if state == "untrained":
        net = models.build(model, images.image_shape, classes, seed)
    else:
        wanted = models.Network(model, images.name, images.sha256, state, seed)
        net = models.network(wanted, images, defenses.make("none"))
    net = net.double()
    chosen = images.held_out[torch.from_numpy(np.random.default_rng(seed).permutation(len(images.held_out)))]
    chosen = chosen[:IMAGES]
    client = FedSGDClient(net)
    parts = [client.features(images.pixels(some).double()[None])[0] for some in chosen.split(20)]
    return net, torch.cat(parts), images.labels[chosen]


def batches(cell: Cell, count: int) -> Iterator[tuple[nn.Linear, Tensor, Tensor]]:
    """(head, features (n, D), labels (n, K)) of each batch, float64."""
    for index in range(count):
        seed = index % SEEDS
        rng = np.random.default_rng([seed, index, cell.n, cell.classes])
        if cell.model == SYNTHETIC:
            head = nn.Linear(cell.width, cell.classes, bias=False, dtype=torch.float64, device="cpu")
            bound = cell.width**-0.5
            drawn = rng.uniform(-bound, bound, (cell.classes, cell.width))
            with torch.no_grad():
                head.weight.copy_(torch.from_numpy(drawn))
            x = np.abs(rng.standard_normal((cell.n, cell.width)))
            x[rng.random(x.shape) < cell.zeros] = 0
            features, own = torch.from_numpy(x), None
        else:
            net, all_features, classes = network(cell.model, cell.dataset, cell.classes, cell.state, seed)
            found = net.get_submodule(models.find_head(net))
            assert isinstance(found, nn.Linear)
            head = found
            chosen = torch.from_numpy(rng.choice(len(all_features), cell.n, replace=False))
            features, own = all_features[chosen], classes[chosen]
        if cell.label_format == "own":
            assert own is not None
            soft_labels = torch.nn.functional.one_hot(own, cell.classes).double()
        else:
            soft_labels = torch.stack([label(cell.classes, cell.label_format, rng) for _ in range(cell.n)])
        yield head, features, soft_labels


def row(cell: Cell, count: int) -> dict[str, object]:
    """What became of a cell's batches."""
    dtype = getattr(torch, cell.dtype)
    recovered = said_ok = wrong = by_zeros = 0
    seconds = 0.0
    reasons: Counter[str] = Counter()
    zeros, width = 0.0, 0
    for head, features, soft_labels in batches(cell, count):
        head = _as(head, dtype)
        x, y = features.to(dtype), soft_labels.to(dtype)
        update = FedSGDClient(nn.Sequential(head)).head_updates(x[None], y[None])
        started = time.process_time()  # the machine may be shared
        solution = recover_soft_labels_of_batch(
            update["0.weight"][0],
            head.weight.detach(),
            cell.n,
            None if head.bias is None else head.bias.detach(),
            None if head.bias is None else update["0.bias"][0],
            nonnegative_features=True,
        )
        seconds += time.process_time() - started
        order = match(label_distances(solution.soft_labels, y))
        right = bool(success(solution.soft_labels[order], y))
        ok = solution.outcome == "ok"
        recovered += right
        said_ok += ok
        wrong += ok and not right
        by_zeros += solution.by_zeros
        zeros, width = zeros + float((features == 0).double().mean()), features.shape[1]
        if not ok:
            reasons[solution.reason] += 1
    low, high = wilson(recovered, count)
    return (
        {"cell": str(cell)}
        | asdict(cell)
        | {
            "zeros": zeros / count,
            "width": width,
            "batches": count,
            "recovered": recovered / count,
            "low": low,
            "high": high,
            "said_ok": said_ok / count,
            "wrong_ok": wrong / count,
            "by_zeros": by_zeros / count / cell.n,
            "seconds": seconds / count,
            "reason": reasons.most_common(1)[0][0] if reasons else "",
        }
    )


def _as(head: nn.Linear, dtype: torch.dtype) -> nn.Linear:
    """A copy of the head in another dtype."""
    copy = nn.Linear(head.in_features, head.out_features, head.bias is not None, device="cpu", dtype=dtype)
    copy.load_state_dict({name: value.to(dtype) for name, value in head.state_dict().items()})
    return copy


def plot(made: pd.DataFrame, path: Path) -> None:
    """One panel an axis: the share of batches recovered."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    axes_of = {
        "examples": ("n", ["model", "dtype"], "examples (K = 100)"),
        "classes": ("classes", ["model", "label_format"], "classes (n = 4)"),
        "width": ("width", ["n"], "width D (ConvNet, K = 10)"),
        "density": ("zeros", ["n", "classes"], "share of zeros (synthetic, D = 512)"),
    }
    figure, panels = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    for panel, (study, (x, by, name)) in zip(panels.flat, axes_of.items(), strict=False):
        for key, group in made[made.study == study].groupby(by, sort=False):
            text = ", ".join(f"{column}={value}" for column, value in zip(by, key, strict=True))
            panel.plot(group[x], group.recovered, marker="o", label=text.replace(", bias=False", ""))
        panel.set(xlabel=name, ylim=(-0.05, 1.05))
        if x != "zeros":
            panel.set_xscale("log", base=2)
        panel.legend(fontsize=6) if len(panel.lines) else None
    for panel, label_format in zip(panels.flat[4:], ("own", "any"), strict=True):
        part = made[(made.study == "training") & (made.label_format == label_format)]
        for key, group in part.groupby(["model", "dtype", "n"], sort=False):
            text = f"{str(key[0]).split('(')[0]}, {key[1]}, n={key[2]}"
            panel.plot(group.state, group.recovered, marker="o", label=text)
        panel.set(xlabel=f"training state (K = 10, labels: {label_format})", ylim=(-0.05, 1.05))
        panel.legend(fontsize=5) if len(panel.lines) else None
    figure.supylabel("share of batches recovered")
    figure.savefig(path, dpi=110)


def report(made: pd.DataFrame) -> str:
    """The tables as Markdown."""
    parts = [
        "# Batches: where soft labels are recovered\n",
        "`python -m bench.studies.batch_map`. A batch is recovered where every label is within 0.01 after "
        "matching; `wrong ok`: it isn't, though the solver says so. Format unknown, features "
        "non-negative. `by zeros`: the share of directions that exact zeros told; `seconds`: of one "
        "processor, a batch.\n",
    ]
    for study, group in made.groupby("study", sort=False):
        used = ["model", "state", "dataset", "n", "classes", "width", "zeros", "dtype", "label_format"]
        varied = [column for column in used if group[column].nunique() > 1]
        parts.append(f"## {study}\n")
        fixed = ", ".join(f"{c} {group[c].iloc[0]}" for c in used if c not in varied)
        parts.append(f"{int(group.batches.iloc[0])} batches a cell; {fixed}.\n")
        columns = [*varied, "recovered", "said_ok", "wrong_ok", "by_zeros", "seconds", "reason"]
        parts.append(_table(group[columns]) + "\n")
    total = made.batches.sum()
    wrong = (made.wrong_ok * made.batches).sum()
    said = (made.said_ok * made.batches).sum()
    parts.append(f"In all {total} batches, {said:.0f} answers were returned as ok; {wrong:.0f} were wrong.\n")
    return "\n".join(parts)


def _table(frame: pd.DataFrame) -> str:
    def text(value: object) -> str:
        return f"{value:.2f}" if isinstance(value, float) else str(value)

    lines = [" | ".join(frame.columns).replace("_", " "), "|".join(["---"] * len(frame.columns))]
    lines += [" | ".join(text(value) for value in values) for values in frame.itertuples(index=False)]
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    """Runs the study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--acceptance-batches", type=int, default=24)
    parser.add_argument("--study", default="", help="only this axis")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    table = arguments.out / "batch_map.csv"
    every = list(cells())
    for cell in every:
        if arguments.study in ("", cell.study) and str(cell) not in set(_read(table).get("cell", [])):
            count = arguments.acceptance_batches if cell.study == "acceptance" else arguments.batches
            new = pd.DataFrame([row(cell, count)])
            print(new.to_csv(index=False, header=False, float_format="%.3g"), end="", flush=True)
            pd.concat([_read(table), new]).to_csv(table, index=False, float_format="%.4g")
    place = {str(cell): index for index, cell in enumerate(every)}
    made = _read(table)
    made = made[made.cell.isin(place)].sort_values("cell", key=lambda names: names.map(place))
    made.to_csv(table, index=False, float_format="%.4g")
    (arguments.out / "batch_map.md").write_text(report(made))
    plot(made, arguments.out / "batch_map.png")


def _read(table: Path) -> pd.DataFrame:
    return pd.read_csv(table, keep_default_na=False) if table.exists() else pd.DataFrame()


if __name__ == "__main__":
    main()
