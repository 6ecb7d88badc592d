"""How much the feature should count against the gradient: `python -m bench.studies.feature_weight`.

The paper adds f · (1 - cos of features) to g · (1 - cos of gradients) and leaves f/g open. Here a stack of
weights goes down from one start, label and feature from λ-recovery, for small convolutional nets, untrained,
after one epoch and after five, and for hard, smoothed and mixed labels. The truth is used to judge rules for
the choice among the stack, never in one.

Writes results/images/feature_weight.csv (a row for each case and weight; what is there already isn't run
again), .png and .md.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from attacks.images._matching import gradients, with_labels
from attacks.solvers.gradient_matching import Objective
from attacks.solvers.matching_objectives import Cosine, FeaturePull, TotalVariation
from attacks.solvers.matching_optimisers import SignedAdam, Value, Variables, descend
from bench.cases.client import FedSGDClient
from bench.cases.data import load
from bench.registry import attacks
from bench.studies.gradients import Net, prepared, soft_label
from bench.threat import Batch, Facts, Knowledge, Observation

RESULTS = Path(__file__).resolve().parents[2] / "results" / "images"
DATASET, CLASSES = "mnist5k", 10
MODELS = ("lenet(bias=False, init='default')", "convnet(bias=False)")
STATES = ("untrained", "epochs=1", "epochs=5")
FORMATS = ("hard", "smoothing", "mixup")
WEIGHTS = (0.0, 0.01, 0.1, 1.0, 10.0, 100.0)
ITERATIONS, LR, TV = 300, 0.1, 0.01
EARLY = (50, 100)
COLUMNS = [
    *("model", "state", "label_format", "image", "label_error", "weight", "psnr", "distance", "feature"),
    *(f"distance_at_{iteration}" for iteration in EARLY),
]


class Case(NamedTuple):
    """One example, by number among those that may be attacked."""

    model: str
    state: str
    label_format: str
    image: int


def cases(images: int) -> Iterator[Case]:
    """All images before the next label format, so that a run cut short has some of each."""
    for image in range(images):
        for model in MODELS:
            for state in STATES:
                for label_format in FORMATS:
                    yield Case(model, state, label_format, image)


def observe(case: Case) -> tuple[Observation, Batch]:
    """The gradient of one example, and the example."""
    dataset = load(DATASET)
    model, chosen, classes = prepared(Net(case.model, CLASSES, case.state, DATASET), dataset, seed=0)
    rng = np.random.default_rng([case.image, FORMATS.index(case.label_format), 11])
    order = rng.permutation(len(chosen))
    first = order[:1]
    partner = np.array([next(j for j in order if classes[j] != classes[first[0]])])
    y, share = soft_label(classes[first], classes[partner], CLASSES, case.label_format, rng)
    pixels = dataset.pixels(chosen[first]) * share.float() + dataset.pixels(chosen[partner]) * (
        1 - share.float()
    )
    batch = Batch(pixels, y.float())
    client = FedSGDClient(model)
    head = model.get_submodule(client.head)
    assert isinstance(head, nn.Linear)
    facts = Facts(1, CLASSES, dataset.image_shape, head.in_features, False, True)
    return Observation(model, client.gradient(batch), client.head, facts, Knowledge()), batch


def descents(case: Case) -> list[dict[str, object]]:
    """A row for each weight; none where λ-recovery finds no feature."""
    seen, truth = observe(case)
    given = attacks.make("lambda_recovery").run(seen, torch.Generator(device="cpu").manual_seed(0))
    if given.soft_labels is None or given.features is None:
        return []
    rng = torch.Generator(device="cpu").manual_seed(case.image)
    start = torch.rand(1, *truth.images.shape, generator=rng, device="cpu").repeat(len(WEIGHTS), 1, 1, 1, 1)
    weights = torch.tensor(WEIGHTS, device="cpu")
    found = gradients(seen, seen.update)
    variation = TotalVariation(TV)
    function = with_labels(
        Objective(found, Cosine(), (variation,), FeaturePull(given.features, weights)), given.soft_labels
    )
    history: list[Tensor] = []

    def noted(variables: Variables) -> Value:
        value = function(variables)
        history.append(value.distance)
        return value

    end = descend(noted, (start,), SignedAdam(LR), ITERATIONS, boxed=True)
    images = end.variables[0]
    alone = Objective(found, Cosine(), (), FeaturePull(given.features, torch.ones_like(weights)))
    judged = alone(images, given.soft_labels.expand(len(images), *given.soft_labels.shape))
    feature = judged.total - judged.distance
    psnr = -10 * (images - truth.images).square().mean(dim=(1, 2, 3, 4)).log10()
    label_error = float((given.soft_labels - truth.soft_labels).abs().max())
    rows = []
    for row, weight in enumerate(WEIGHTS):
        early = [float(history[iteration][row]) for iteration in EARLY]
        values = *case, label_error, weight, float(psnr[row]), end.distances[row], float(feature[row]), *early
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


Rule = Callable[[pd.DataFrame], float]
"""The rows of a case, one a weight -> the weight that is chosen."""


def lowest(column: str) -> Rule:
    """The weight at which it is lowest."""
    return lambda rows: float(rows.weight.iloc[rows[column].argmin()])


def lowest_product(rows: pd.DataFrame) -> float:
    """Gradient's and feature's distance, each relative to any scale."""
    return float(rows.weight.iloc[(rows.distance * rows.feature.clip(lower=1e-6)).argmin()])


RULES: dict[str, Rule] = {
    "lowest final distance of gradients": lowest("distance"),
    "lowest distance × feature's": lowest_product,
    **{f"lowest distance at iteration {i}": lowest(f"distance_at_{i}") for i in EARLY},
    **{f"always {weight:g}": lambda rows, weight=weight: weight for weight in WEIGHTS},  # type: ignore[misc]
}


def judged(rows: pd.DataFrame) -> pd.DataFrame:
    """For each net, state and label format: how far each rule stays behind the best of the stack, in dB."""
    lines = []
    for _, case in rows.groupby(["model", "state", "label_format", "image"], sort=False):
        best, of = float(case.psnr.max()), case.set_index("weight").psnr
        behind = {name: best - float(of[rule(case)]) for name, rule in RULES.items()}
        first = case.iloc[0]
        lines.append(
            {"model": first.model, "state": first.state, "label_format": first.label_format}
            | {"best": best, "best_weight": float(case.weight.iloc[case.psnr.argmax()])}
            | behind
        )
    return pd.DataFrame(lines)


def markdown(lines: pd.DataFrame) -> str:
    """As a table."""
    head = "| " + " | ".join(map(str, lines.columns)) + " |\n" + "|---" * len(lines.columns) + "|\n"
    return head + "".join("| " + " | ".join(map(str, row)) + " |\n" for row in lines.itertuples(index=False))


def summary(rows: pd.DataFrame) -> str:
    """Mean PSNR by weight; what each rule loses, over all cases and by net and state."""
    by = ["model", "state", "label_format"]
    gains = rows.pivot_table(index=by, columns="weight", values="psnr", sort=False).round(2).reset_index()
    gains.insert(3, "cases", rows[rows.weight == 0].groupby(by, sort=False).size().to_numpy())
    behind = judged(rows)
    losses = pd.DataFrame(
        {
            "rule": list(RULES),
            "behind the best, dB (mean)": [f"{behind[name].mean():.2f}" for name in RULES],
            "worst case": [f"{behind[name].max():.2f}" for name in RULES],
            **{
                f"{str(model).partition('(')[0]} {state}": [f"{part[name].mean():.2f}" for name in RULES]
                for (model, state), part in behind.groupby(["model", "state"], sort=False)
            },
        }
    )
    return (
        f"{len(behind)} cases.\n\n## PSNR, dB, by f/g\n\n{markdown(gains)}\n"
        f"## Rules without the truth: dB behind the best of the stack\n\n{markdown(losses)}"
    )


def picture(rows: pd.DataFrame, path: Path) -> None:
    """What a weight gains over none, for each net and state."""
    figure, axes = plt.subplots(len(MODELS), len(STATES), figsize=(10, 5.5), sharex=True, squeeze=False)
    at = range(len(WEIGHTS))
    for line, model in zip(axes, MODELS, strict=True):
        for axis, state in zip(line, STATES, strict=True):
            for label_format in FORMATS:
                of = rows[(rows.model == model) & (rows.state == state) & (rows.label_format == label_format)]
                if not of.empty:
                    gained = of.pivot(index="image", columns="weight", values="psnr")
                    axis.plot(at, gained.sub(gained[0.0], axis=0).mean(), marker="o", label=label_format)
            axis.axhline(0, color="grey", linewidth=0.5)
            axis.set_title(f"{model.partition('(')[0]}, {state}", fontsize=9)
            axis.set_xticks(list(at), [f"{weight:g}" for weight in WEIGHTS])
        line[0].set_ylabel("PSNR over that of f = 0, dB")
    for axis in axes[-1]:
        axis.set_xlabel("f/g")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


NOTE = """# The feature's weight against the gradient's

`python -m bench.studies.feature_weight`: 1 - cos of gradients + f/g · (1 - cos of features) + .01 · TV by
signed Adam, {iterations} iterations from one start a case, a stack of weights at once; label and feature from
λ-recovery; {dataset}. 100 is nearly the feature alone.

"""


def main() -> None:
    """Runs what isn't there yet, writes and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=2, help="of each net, state and label format")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="stop then; run again for the rest"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder: Path = arguments.results
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "feature_weight.csv"
    done = set()
    if path.exists():
        kept = pd.read_csv(path)
        done = set(zip(kept.model, kept.state, kept.label_format, kept.image, strict=True))
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if not file.tell():
            writer.writeheader()
        for case in cases(arguments.images):
            if tuple(case) not in done and time.process_time() < arguments.seconds:
                for row in descents(case):
                    writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})
                file.flush()
    rows = pd.read_csv(path)
    text = summary(rows)
    (folder / "feature_weight.md").write_text(NOTE.format(iterations=ITERATIONS, dataset=DATASET) + text)
    picture(rows, folder / "feature_weight.png")
    print(text)


if __name__ == "__main__":
    main()
