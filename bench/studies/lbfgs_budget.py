"""What L-BFGS makes of a small budget: `python -m bench.studies.lbfgs_budget`.

`lbfgs_tv` with its falling weight of total variation, the same with a constant one, and torch's own L-BFGS on
the same objective from the same starts, 20 iterations a step as DLG's code has it: 40 of its steps are 800
evaluations. The label is given.

Writes results/images/lbfgs_budget.csv (a row a search; what is there is not made again) and .md.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from attacks.images._matching import gradients, in_box, with_labels
from attacks.images.lbfgs_tv import LBFGSTV
from attacks.solvers.gradient_matching import Objective
from attacks.solvers.matching_objectives import TotalVariation, relative
from bench.cases.client import FedSGDClient
from bench.cases.data import attacked, load
from bench.cases.models import Network, canonical, network
from bench.evidence import table
from bench.metrics.images import psnr
from bench.registry import defenses
from bench.studies.resumed import appending, done
from bench.threat import Batch, Facts, Knowledge, Observation

RESULTS = Path(__file__).resolve().parents[2] / "results" / "images"
DATASET = "cifar10_samples"
MODELS = {
    "LeNet": "lenet(init='uniform', bias=False)",
    "ConvNet": "convnet(bias=False)",
}
WEIGHTS = ("untrained", "epochs=1")
IMAGES, WEIGHT_SEEDS = 6, 3
BUDGETS = (40, 100, 300, 800)
INNER = 20
CONSTANT = 0.01
SEARCHES = {
    "falling, 3 to 0.01": (3.0, 0.01),
    "constant, 0.01": (CONSTANT, CONSTANT),
    "constant, 0.1": (0.1, 0.1),
}
TORCHS = "constant, 0.01; torch's L-BFGS"


def observe(model: str, weights: str, sample: int) -> tuple[Observation, Batch]:
    """The gradient of one image that no training has seen, and the image with its label."""
    dataset = load(DATASET)
    wanted = Network(canonical(model), DATASET, dataset.sha256, weights, sample % WEIGHT_SEEDS)
    client = FedSGDClient(network(wanted, dataset, defenses.make("none")))
    truth = dataset.batch(attacked(dataset, IMAGES, members=False)[sample : sample + 1])
    head = client.model.get_submodule(client.head)
    assert isinstance(head, torch.nn.Linear)
    facts = Facts(1, dataset.num_classes, dataset.image_shape, head.in_features, head.bias is not None, True)
    known = Knowledge(soft_labels=truth.soft_labels)
    return Observation(client.model, client.gradient(truth), client.head, facts, known), truth


def by_torch(seen: Observation, start: Tensor, labels: Tensor, evaluations: int) -> Tensor:
    """Images (N, C, H, W) in [0, 1], from such."""
    distance = relative(seen.update.values())
    objective = Objective(gradients(seen, seen.update), distance, (TotalVariation(CONSTANT),))
    function = in_box(with_labels(objective, labels))
    moved = torch.logit(start.clamp(0.02, 0.98))[None].requires_grad_()
    optimizer = torch.optim.LBFGS([moved], max_iter=INNER, history_size=100)

    def closure() -> float:
        value = function((moved.detach(),))
        (moved.grad,) = value.slopes
        return float(value.total)

    for _ in range(evaluations // INNER):
        optimizer.step(closure)
    return torch.sigmoid(moved.detach()[0])


def run(name: str, seen: Observation, truth: Batch, sample: int, evaluations: int) -> dict[str, float]:
    """PSNR, and the seconds it took."""
    rng = torch.Generator(device="cpu").manual_seed(sample)
    started = time.process_time()
    if name == TORCHS:
        start = torch.rand(truth.images.shape, generator=rng, device="cpu")
        images = by_torch(seen, start, truth.soft_labels, evaluations)
    else:
        first, last = SEARCHES[name]
        attack = LBFGSTV(labels="truth", iterations=evaluations, tv=first, tv_end=last)
        found = attack.run(seen, rng).images
        assert found is not None
        images = found
    return {"psnr": float(psnr(images, truth.images)[0]), "seconds": time.process_time() - started}


def summary(rows: pd.DataFrame) -> str:
    """Means over the images, with the worst."""
    lines = [
        (
            str(net), str(weights), str(name),
            *(
                f"{part.psnr.mean():.1f} ({part.psnr.min():.1f})"
                for _, part in of.groupby("evaluations", sort=True)
            ),
        )
        for (net, weights, name), of in rows.groupby(["net", "weights", "search"], sort=False)
    ]  # fmt: skip
    heads = ["net", "weights", "weight of total variation", *(f"{budget} evaluations" for budget in BUDGETS)]
    return (
        "# L-BFGS at a small budget\n\n"
        f"`python -m bench.studies.lbfgs_budget`: {DATASET}, {IMAGES} images, nets without a bias in the "
        "head, label given; PSNR in dB, the mean and the worst. 800 evaluations are 40 steps of torch's "
        f"L-BFGS at its {INNER} iterations a step, as DLG's code counts.\n\n" + table(heads, lines)
    )


def main() -> None:
    """Runs what is missing, then writes the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop then; run again to go on")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path: Path = arguments.results / "lbfgs_budget.csv"
    key = ["net", "weights", "sample", "evaluations", "search"]
    made = done(path, key)
    started = time.monotonic()
    with appending(path, [*key, "psnr", "seconds"]) as write:
        for sample, (net, model), weights in itertools.product(range(IMAGES), MODELS.items(), WEIGHTS):
            seen, truth = observe(model, weights, sample)
            for evaluations, name in itertools.product(BUDGETS, (*SEARCHES, TORCHS)):
                case = (net, weights, sample, evaluations, name)
                if case in made or time.monotonic() - started > 60 * arguments.minutes:
                    continue
                found = run(name, seen, truth, sample, evaluations)
                figures = {column: f"{value:.4g}" for column, value in found.items()}
                write(dict(zip(key, case, strict=True)) | figures)
    text = summary(pd.read_csv(path))
    (arguments.results / "lbfgs_budget.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
