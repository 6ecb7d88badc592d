"""Inverting Gradients beside breaching's, in one process on one thread: `python -m bench.speed.images`.

Same observation, label (granted), starts, schedule, step, weight of total variation and number of iterations;
the two take turns on every image, so that whatever else the machine does meets them alike. Breaching's class
runs as its own `reconstruct` runs it, with the starts handed in. One restart, and eight, which are a stack
here and one after the other there. Time is the processor's, from the call to the images.

Writes results/images/speed.csv (a row for each image and side; what is there already isn't run again) and
speed.md (ratios of medians, and PSNR).
"""

from __future__ import annotations

import argparse
import csv
import importlib
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import pandas as pd

    from bench.threat import Observation

RESULTS = Path(__file__).resolve().parents[2] / "results" / "images"
TV, LR = 0.01, 0.1


class Case(NamedTuple):
    """What both sides are put to, on so many images."""

    model: str
    restarts: int
    iterations: int
    images: int
    at_most: float  # the ratio of times that we promise


CASES = [
    Case("lenet(bias=False)", 1, 300, 8, 0.35),
    Case("convnet(bias=False)", 1, 300, 8, 0.5),
    Case("lenet(bias=False)", 8, 100, 3, 0.25),
    Case("convnet(bias=False)", 8, 100, 3, 0.4),
    Case("resnet18(bias=False)", 1, 10, 3, 1.0),
]
COLUMNS = ["model", "restarts", "iterations", "image", "side", "seconds", "psnr"]


def observe(model: str, index: int) -> tuple[Observation, Tensor]:
    """One image of cifar10_samples on an untrained net of its own seed, and the image, (1, 3, 32, 32)."""
    from bench.cases.client import FedSGDClient
    from bench.cases.data import load
    from bench.cases.models import build
    from bench.threat import Batch, Facts, Knowledge, Observation

    dataset = load("cifar10_samples")
    client = FedSGDClient(build(model, dataset.image_shape, dataset.num_classes, seed=index))
    chosen = torch.tensor([index], device="cpu")
    images = dataset.pixels(chosen)
    soft_labels = nn.functional.one_hot(dataset.labels[chosen], dataset.num_classes).to(images)
    facts = Facts(
        batch_size=1,
        num_classes=dataset.num_classes,
        image_shape=dataset.image_shape,
        feature_width=client.model.get_submodule(client.head).in_features,  # type: ignore[arg-type]
        head_bias=False,
        nonnegative_features=True,
        granted=frozenset({"soft_labels"}),
    )
    update = client.gradient(Batch(images, soft_labels))
    seen = Observation(client.model, update, client.head, facts, Knowledge(soft_labels=soft_labels))
    return seen, images


def ours(seen: Observation, case: Case, seed: int) -> Tensor:
    """The attack as the grid runs it."""
    from bench.registry import attacks

    parameters = f"labels='truth', iterations={case.iterations}, restarts={case.restarts}, lr={LR}, tv={TV}"
    found = attacks.make(f"inverting_gradients({parameters})").run(seen, _rng(seed))
    assert found.images is not None
    return found.images


def _rng(seed: int) -> torch.Generator:
    return torch.Generator(device="cpu").manual_seed(seed)


def starts(case: Case, seed: int) -> list[Tensor]:
    """Those that `ours` draws."""
    rng = _rng(seed)
    torch.randint(2**62, (), generator=rng, device="cpu")  # what dropout follows
    return [torch.rand(1, 3, 32, 32, generator=rng, device="cpu") for _ in range(case.restarts)]


def breachings(seen: Observation, case: Case, seed: int) -> Tensor:
    """Its preset `invertinggradients`, on pixels: the model normalises them itself."""
    attacker = _attacker(seen.model, case)
    drawn = iter(starts(case, seed))

    def start(shape: Any) -> Tensor:
        images = next(drawn).clone().requires_grad_()
        images.grad = torch.zeros_like(images)
        return images

    attacker._initialize_data = start
    metadata = _Metadata(shape=(3, 32, 32), mean=(0.0,) * 3, std=(1.0,) * 3, modality="vision")
    public = {
        "parameters": [value.detach() for value in seen.model.parameters()],
        "buffers": [value.detach() for value in seen.model.buffers()],
        "metadata": metadata,
    }
    about = {"num_data_points": 1, "labels": seen.knowledge.soft_labels, "local_hyperparams": None}
    sent = {"gradients": [g.clone() for g in seen.update.values()], "buffers": None, "metadata": about}
    answer, _ = attacker.reconstruct([public], [sent], server_secrets={})
    images: Tensor = answer["data"].detach().clamp(0, 1)
    return images


class _Metadata(dict[str, Any]):
    """Breaching asks for its entries as attributes, too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def _attacker(model: nn.Module, case: Case) -> Any:
    from omegaconf import OmegaConf

    from bench.torchvision_ops import ensure_importable

    ensure_importable()  # breaching imports torchvision
    breaching = importlib.import_module("breaching")
    folder = Path(str(breaching.__file__)).parent / "config" / "attack"
    names = ("_default_optimization_attack.yaml", "invertinggradients.yaml")
    settings = OmegaConf.merge(*[OmegaConf.load(folder / name) for name in names])
    settings.optim.max_iterations = case.iterations
    settings.optim.step_size = LR
    settings.regularization.total_variation.scale = TV
    settings.restarts.num_trials = case.restarts
    setup = {"device": torch.device("cpu"), "dtype": torch.float32}
    return importlib.import_module("breaching.attacks").prepare_attack(
        model, nn.CrossEntropyLoss(), settings, setup
    )


SIDES: dict[str, Callable[[Observation, Case, int], Tensor]] = {"ours": ours, "breaching": breachings}


def measure(case: Case, index: int) -> list[dict[str, object]]:
    """One row a side."""
    seen, truth = observe(case.model, index)
    rows: list[dict[str, object]] = []
    for side in sorted(SIDES, reverse=bool(index % 2)):  # each goes first in turn
        started = time.process_time()
        found = SIDES[side](seen, case, index)
        seconds = time.process_time() - started
        psnr = -10 * float((found - truth).square().mean().log10())
        values = case.model, case.restarts, case.iterations, index, side, round(seconds, 4), round(psnr, 3)
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def summary(rows: pd.DataFrame) -> str:
    """A line for each case: milliseconds an iteration and restart, the ratio, PSNR."""
    lines = [
        "| net | restarts | images | iterations | breaching, ms | ours, ms | ratio | at most "
        "| PSNR, breaching | ours | difference |",
        "|---" * 11 + "|",
    ]
    for case in CASES:
        of = rows[(rows.model == case.model) & (rows.restarts == case.restarts)]
        of = of[of.iterations == case.iterations]
        if of.empty:
            continue
        seconds, psnr = (of.pivot(index="image", columns="side", values=v) for v in ("seconds", "psnr"))
        each = 1e3 * seconds.median() / case.restarts / case.iterations
        ratio = float((seconds.ours / seconds.breaching).median())
        mean = psnr.mean()
        lines.append(
            f"| {case.model} | {case.restarts} | {len(seconds)} | {case.iterations} "
            f"| {each.breaching:.3g} | {each.ours:.3g} | {ratio:.3f} | {case.at_most} "
            f"| {mean.breaching:.2f} | {mean.ours:.2f} | {mean.ours - mean.breaching:+.2f} |"
        )
    return "\n".join(lines) + "\n"


NOTE = """# Inverting Gradients beside breaching's

`python -m bench.speed.images`: same observation, granted label, starts, schedule, step (.1 on pixels),
weight of total variation (.01), iterations; one process, one thread, taking turns. Milliseconds of the
processor an iteration and restart (medians); the ratio is the median over images of ours to breaching's; PSNR
in dB, means. Eight restarts are one stack here, and one after the other there. Steps follow signs, so that
rounding alone parts the two paths within a hundred iterations: single images differ by a dB either way.

"""


def main() -> None:
    """Measures what isn't there yet, writes and prints."""
    import pandas as pd

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="stop then; run again for the rest"
    )
    arguments = parser.parse_args()
    folder: Path = arguments.results
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # breaching's, of schedulers
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "speed.csv"
    done = set()
    if path.exists():
        kept = pd.read_csv(path)
        done = set(zip(kept.model, kept.restarts, kept.iterations, kept.image, strict=True))
    # Not counted: the first calls set up.
    measure(CASES[0]._replace(iterations=2), 0)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if not file.tell():
            writer.writeheader()
        for case in CASES:
            for index in range(case.images):
                within = time.process_time() < arguments.seconds
                if within and (case.model, case.restarts, case.iterations, index) not in done:
                    writer.writerows(measure(case, index))
                    file.flush()
    table = summary(pd.read_csv(path))
    (folder / "speed.md").write_text(NOTE + table)
    print(table)


if __name__ == "__main__":
    main()
