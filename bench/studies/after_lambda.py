"""Images after λ: `python -m bench.studies.after_lambda [--attacked SPEC] [--training SPEC] [--part NAME]`.

`fcn_analytic` on fully connected nets, `layerwise` on DLG's LeNet, `delta_matching` on the ReLU ConvNet,
none with a bias in its head, float32; hard, smoothed and mixed labels, untrained and trained; then Gaussian
noise on every tensor, of a share of its root mean square, beside plain matching (`inverting_gradients`).
Attacks are told nothing; a trial that fails counts. Every trial is written as it ends: a run that was stopped
goes on from there.

Writes results/images/after_lambda.csv (one row a trial), .md (quantiles) and .png (curves under noise).
Trained rows need a colour data set to train on; the committed ones: 846 images of CIFAR-10's test set
attacked, 4,660 of its training set trained on.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from bench.cases.client import FedSGDClient
from bench.cases.data import Dataset, attacked, load
from bench.cases.models import Network, build, network
from bench.metrics.images import psnr
from bench.registry import attacks, defenses
from bench.threat import Batch, Facts, Knowledge, Observation, Update

RESULTS = Path(__file__).resolve().parents[2] / "results" / "images"
LENET, CONVNET = "lenet(bias=False)", "convnet(bias=False)"
KINDS = ("hard", "smoothed", "mixed")
WEIGHT_SEEDS = 3
EXACT = 200.0
"""dB: what an image without any error is entered as."""
NOISES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class Trial:
    """One attack on one observation; `noise` is a share of each tensor's root mean square."""

    part: str
    attack: str
    model: str
    weights: str
    label: str
    noise: float
    size: int
    sample: int


def trials(part: str) -> Iterator[Trial]:
    """The trials of a part."""
    match part:
        case "fcn":
            for activation in ("relu", "leaky_relu", "sigmoid", "tanh"):
                for depth in (2, 3, 4, 5, 6):
                    for size in (32, 64):
                        for index, label in enumerate(KINDS):
                            model = f"fcn(bias=False, depth={depth}, width=64, activation='{activation}')"
                            yield Trial(part, "fcn_analytic", model, "untrained", label, 0.0, size, index)
        case "layerwise" | "delta_matching":
            model = LENET if part == "layerwise" else CONVNET
            for sample in range(10):
                for weights in ("untrained", "trained"):
                    for label in KINDS:
                        yield Trial(part, part, model, weights, label, 0.0, 32, sample)
        case "noise":
            for sample in range(3):
                for noise in (0.0, *NOISES):
                    for attack, model in (
                        ("layerwise", LENET),
                        ("delta_matching", CONVNET),
                        ("inverting_gradients", LENET),
                        ("inverting_gradients", CONVNET),
                    ):
                        for weights in ("untrained", "trained"):
                            label = KINDS[sample % len(KINDS)]
                            yield Trial(part, attack, model, weights, label, noise, 32, sample)


PARTS = ("fcn", "layerwise", "delta_matching", "noise")


def soft_label(label: str, index: int, num_classes: int) -> Tensor:
    """(1, K): one class, smoothed by ε = .2, or mixed .7 to .3 with another."""
    y = torch.zeros(1, num_classes, device="cpu")
    y[0, index] = {"hard": 1.0, "smoothed": 0.8, "mixed": 0.7}[label]
    if label == "mixed":
        y[0, (index + 3) % num_classes] = 0.3
    return y + (0.2 / num_classes if label == "smoothed" else 0.0)


def model_of(trial: Trial, images: Dataset, training: Dataset | None) -> nn.Module:
    """The attacked network; of `WEIGHT_SEEDS` in turn."""
    seed = trial.sample % WEIGHT_SEEDS
    if trial.weights == "untrained":
        return build(trial.model, images.image_shape, images.num_classes, seed)
    assert training is not None
    wanted = Network(trial.model, training.name, training.sha256, trial.weights, seed)
    return network(wanted, training, defenses.make("none"))


def run(trial: Trial, images: Dataset, training: Dataset | None) -> dict[str, object]:
    """One trial's row."""
    model = model_of(trial, images, training)
    index = int(attacked(images, 20, members=False)[trial.sample])
    # Mixed labels come with mixed images, whose pixels are no 8-bit numbers any more.
    image = images.pixels([index])
    if trial.label == "mixed":
        other = int(attacked(images, 20, members=False)[trial.sample + 1])
        image = 0.7 * image + 0.3 * images.pixels([other])
    label = soft_label(trial.label, int(images.labels[index]), images.num_classes)
    client = FedSGDClient(model)
    rng = torch.Generator(device="cpu").manual_seed(1000 * trial.sample + KINDS.index(trial.label))
    update = disturbed(client.gradient(Batch(image, label)), trial.noise, rng)
    head = model.get_submodule(client.head)
    assert isinstance(head, nn.Linear)
    facts = Facts(
        1,
        images.num_classes,
        images.image_shape,
        head.in_features,
        head.bias is not None,
        "tanh" not in trial.model,
    )
    attack = attacks.make(trial.attack)
    seen = Observation(model, update, client.head, facts, Knowledge())
    seconds = []
    for _ in range(5 if trial.part == "fcn" else 1):
        started = time.perf_counter()
        found = attack.run(seen, torch.Generator(device="cpu").manual_seed(trial.sample))
        seconds.append(time.perf_counter() - started)
    row: dict[str, object] = asdict(trial) | {"outcome": found.outcome.name.lower(), "psnr": 0.0}
    if found.images is not None:
        # Clamped and in float32, as an attack has to return it; rounded, it is compared pixel by pixel.
        row["psnr"] = min(EXACT, float(psnr(found.images, image)[0]))
        same = (found.images * 255).round() == (image * 255).round()
        row["identical_8_bit"] = bool(same.all()) if trial.label != "mixed" else None
    units = [float((values == 0).float().mean()) for values in hidden(model, image)]
    row["dead_units"] = max(units) if units else 0.0
    errors = None if found.soft_labels is None else (found.soft_labels - label).abs().max()
    row["label_error"] = None if errors is None else float(errors)
    row["milliseconds"] = 1000 * min(seconds)
    row["misfit"], row["reason"] = found.notes.get("misfit"), found.notes.get("reason")
    return row


def hidden(model: nn.Module, image: Tensor) -> list[Tensor]:
    """What the ReLUs give: their zeros are dead units."""
    given: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda *called: given.append(called[2].detach()))
        for module in model.modules()
        if isinstance(module, nn.ReLU)
    ]
    with torch.no_grad():
        model(image)
    for hook in hooks:
        hook.remove()
    return given


def disturbed(update: Update, noise: float, rng: torch.Generator) -> Update:
    """Gaussian noise on every entry, of a share of its tensor's root mean square."""
    drawn = {name: torch.randn(sent.shape, generator=rng, device="cpu") for name, sent in update.items()}
    return {name: s.detach() + noise * s.square().mean().sqrt() * drawn[name] for name, s in update.items()}


def key(row: dict[str, object]) -> tuple[str, ...]:
    """What identifies a trial in the table."""
    return tuple(str(row[name]) for name in Trial.__dataclass_fields__)


WHERE_IT_ENDS = """# Images after λ

`python -m bench.studies.after_lambda`; one float32 gradient, no bias in the head, labels from λ. PSNR of
clamped float images; rounded to 8 bits, an image is identical or not (mixed images have no 8-bit pixels).
Times are of a shared machine. Where each attack ends:

| | `fcn_analytic` | `layerwise` | `delta_matching` |
|---|---|---|---|
| ReLU | yes, but for a layer all of whose units are dead | above the convolutions only | yes |
| sigmoid, tanh, LeakyReLU | yes | yes | yes |
| average, max pooling | no | no: it hides which unit gave what | below the last convolution |
| residual blocks | no | no | yes, but for a pooling above the last one |
| batch norm, eval mode | no | yes, folded in | yes |
| batch norm, batch statistics | no | no | not above the last convolution |
| ResNet-18 | no | no | no: its global average hides δ |
| equations | any width | counted by place under the stride | D + last weights ≥ pixels |

"""


def summary(table: pd.DataFrame) -> str:
    """Quantiles by attack, net, state, label and noise, as Markdown."""
    table = table.assign(net=table.model.str.replace(r", depth=\d", "", regex=True))
    lines = [
        "| attack | net | weights | label | size | noise | trials | ok | worst dB | 10 % | median | 90 % "
        "| 8-bit identical | median ms |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    noisy = table[table.part == "noise"].assign(label="each")
    for part, by in ((table[table.part != "noise"], "label"), (noisy, "label")):
        axes = ["attack", "net", "weights", by, "size", "noise"]
        for values, group in part.groupby(axes, sort=False):
            q = group.psnr.quantile([0, 0.1, 0.5, 0.9])
            same = group.identical_8_bit.dropna().astype(str)
            identical = f"{(same == 'True').sum()} of {len(same)}" if len(same) else ""
            cells = [*map(str, values), str(len(group)), str((group.outcome == "ok").sum())]
            cells += [f"{value:.1f}" for value in q] + [identical, f"{group.milliseconds.median():.0f}"]
            lines.append("| " + " | ".join(cells) + " |")
    run = [f"{part}: {(table.part == part).sum()} of {len(list(trials(part)))}" for part in PARTS]
    return WHERE_IT_ENDS + f"Trials run: {', '.join(run)}.\n\n" + "\n".join(lines) + "\n"


def plot(table: pd.DataFrame, path: Path) -> None:
    """PSNR against noise: ours beside plain matching, by net and state."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    noisy = table[table.part == "noise"]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for axis, (model, ours) in zip(axes, ((LENET, "layerwise"), (CONVNET, "delta_matching")), strict=True):
        for attack, colour in ((ours, "C0"), ("inverting_gradients", "C1")):
            for weights, style in (("untrained", "-o"), ("trained", "--s")):
                part = noisy[(noisy.model == model) & (noisy.attack == attack) & (noisy.weights == weights)]
                line = part.groupby("noise").psnr.median()
                places = [max(level, 1e-6) for level in line.index]
                axis.plot(
                    places, line.to_numpy(), style, color=colour, markersize=4, label=f"{attack}, {weights}"
                )
        axis.set(xscale="log", title=model, xlabel="noise, a share of each tensor's rms (1e-6: none)")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0].set_ylabel("PSNR, dB (median)")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    """Runs what is missing, then writes the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--attacked", default="cifar10_samples", help="32 × 32 colour images")
    parser.add_argument(
        "--training", help="32 × 32 colour images to train on; without it, untrained rows only"
    )
    parser.add_argument("--part", action="append", choices=PARTS, help="all by default")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="stop after so long; run again to go on"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "after_lambda.csv"
    done = set()
    if path.exists():
        with path.open(newline="") as file:
            done = {key(row) for row in csv.DictReader(file)}
    data = {32: load(arguments.attacked), 64: load("photos?size=64")}
    training = load(arguments.training) if arguments.training else None
    wanted = [trial for part in arguments.part or PARTS for trial in trials(part)]
    wanted = [trial for trial in wanted if training is not None or trial.weights == "untrained"]
    started = time.monotonic()
    for number, trial in enumerate(wanted, 1):
        if key(asdict(trial)) in done:
            continue
        if time.monotonic() - started > 60 * arguments.minutes:
            break
        row = run(trial, data[trial.size], training)
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if new:
                writer.writeheader()
            writer.writerow(
                {k: f"{v:.6g}" if isinstance(v, float) and k != "noise" else v for k, v in row.items()}
            )
        print(f"{number}/{len(wanted)} {trial}: {row['outcome']} {row['psnr']:.1f} dB", flush=True)
    table = pd.read_csv(path)
    (arguments.out / "after_lambda.md").write_text(summary(table))
    plot(table, arguments.out / "after_lambda.png")


if __name__ == "__main__":
    main()
