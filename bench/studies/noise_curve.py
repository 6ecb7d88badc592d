"""How much DP noise stops λ-recovery, and what ε that noise is worth: `python -m bench.studies.noise_curve`.

One example behind `dp_gaussian(clip=1)` at each σ, on the same network and images; the label is hard or
mixed. `lambda_recovery` estimates the noise and knows nothing of clipping; `lambda_recovery_adaptive` is told
the spec; the published search is told the format and the noise's level. ε is opacus' RDP accountant's for
ROUNDS rounds at Poisson rate RATE. One row a σ beside them is the published experiment: noise on the one row
of ∇W that its search uses, on no other, without clipping, hence without ε.

Writes results/defenses/noise_curve.csv (a row a point; what is there is not made again) and noise_curve.png.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from attacks.solvers import recover_soft_labels
from bench import registry
from bench.cases import models
from bench.cases.client import FedSGDClient
from bench.cases.data import attacked_order, load
from bench.cases.models import Network
from bench.threat import Batch, Facts, Knowledge, Observation, mask

RESULTS = Path(__file__).resolve().parents[2] / "results" / "defenses"
DATASET, MODEL = "mnist5k", "fcn(depth=3, width=64, bias=False)"
STATES = ("untrained", "epochs=1")
SIGMAS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
LABELS = {"hard": "", "mixup": "mixup(low=0.1, high=0.9)+"}
ROUNDS, RATE, DELTA = 1000, 0.01, 1e-5
PUBLISHED = "published experiment"
WITHIN = 0.01


def observations(state: str, spec: str, count: int) -> list[tuple[Batch, Observation]]:
    """Released batches of one example, and what of each leaves the client."""
    dataset = load(DATASET)
    network = Network(models.canonical(MODEL), DATASET, dataset.sha256, state, 0)
    client = FedSGDClient(models.network(network, dataset, registry.defenses.make("none")))
    spec, defense = registry.defenses.canonical(spec), registry.defenses.make(spec)
    order = attacked_order(dataset, members=False)
    pool = dataset.batch(order[count : count + 64])
    head = client.model.get_submodule(client.head)
    assert isinstance(head, torch.nn.Linear)
    facts = Facts(
        batch_size=1,
        num_classes=dataset.num_classes,
        image_shape=dataset.image_shape,
        feature_width=head.in_features,
        head_bias=head.bias is not None,
        nonnegative_features=True,
        granted=frozenset({"defense"}),
    )
    made = []
    for index in range(count):
        rng = torch.Generator(device="cpu").manual_seed(index)
        released = defense.change_batch(dataset.batch(order[index : index + 1]), pool, rng)
        sent = defense.change_update(client, defense.gradient(client, released, rng), rng)
        update = mask(sent, client.head, "head")
        made.append(
            (released, Observation(client.model, update, client.head, facts, Knowledge(defense=spec)))
        )
    return made


def by_attack(cases: list[tuple[Batch, Observation]], name: str) -> list[torch.Tensor | None]:
    """What an attack of the suite finds."""
    attack = registry.attacks.make(name)
    found = []
    for index, (_, seen) in enumerate(cases):
        own = replace(seen, knowledge=seen.knowledge if attack.uses & {"defense"} else Knowledge())
        found.append(attack.run(own, torch.Generator(device="cpu").manual_seed(index)).soft_labels)
    return found


def as_published(
    cases: list[tuple[Batch, Observation]], label: str, sigma: float, one_row: bool
) -> list[torch.Tensor | None]:
    """What the published search finds, told the format and σ; `one_row`: with noise on its row alone."""
    gradients = torch.stack([seen.update[f"{seen.head}.weight"] for _, seen in cases])
    if one_row:
        rng = torch.Generator(device="cpu").manual_seed(0)
        row = gradients.sum(dim=2).abs().argmax(dim=1)
        noise = torch.randn(gradients[:, 0].shape, generator=rng, device="cpu")
        gradients[torch.arange(len(row), device="cpu"), row] += sigma * noise
    seen = cases[0][1]
    found = recover_soft_labels(
        gradients, seen.head_weight, seen.head_bias, label_format=label, search="paper", noise_std=sigma
    )
    assert found.soft_labels is not None
    return [None if bool(y.isnan().any()) else y[None] for y in found.soft_labels]


def row(state: str, label: str, sigma: float, attack: str, count: int) -> dict[str, object]:
    """How often the label, and its largest class, are found."""
    one_row = attack == PUBLISHED
    noise = f"dp_gaussian(clip=1.0, noise_multiplier={sigma})"
    spec = f"{LABELS[label]}{'none' if one_row else noise}"
    cases = observations(state, spec, count)
    if one_row or attack == "published search":
        found = as_published(cases, label, sigma, one_row)
    else:
        found = by_attack(cases, attack)
    errors = [
        1.0 if y is None else float((y - released.soft_labels).abs().max())
        for y, (released, _) in zip(found, cases, strict=True)
    ]
    right = [
        y is not None and bool(y.argmax() == released.soft_labels.argmax())
        for y, (released, _) in zip(found, cases, strict=True)
    ]
    promised = None if one_row else registry.defenses.make(noise).privacy(ROUNDS, RATE, DELTA)
    return {
        "weights": state,
        "label": label,
        "mechanism": "noise on one row of ∇W, no clipping" if one_row else "dp_gaussian(clip=1)",
        "sigma": sigma,
        "epsilon": None if promised is None else promised[0],
        "delta": None if promised is None else DELTA,
        "rounds": ROUNDS,
        "sample_rate": RATE,
        "attack": attack,
        "cases": count,
        "within_0.01": sum(error <= WITHIN for error in errors) / count,
        "class_found": sum(right) / count,
        "median_error": float(torch.tensor(errors, device="cpu").median()),
    }


def draw(points: pd.DataFrame, path: Path) -> None:
    """One panel a label and state; σ below, its ε above."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        len(STATES), len(LABELS), figsize=(11, 8), sharey=True, layout="constrained", squeeze=False
    )
    for axis, (state, label) in zip(
        panels.flat, [(state, label) for state in STATES for label in LABELS], strict=True
    ):
        own = points[(points["weights"] == state) & (points["label"] == label)]
        for attack, curve in own.groupby("attack", sort=False):
            style = "o:" if attack == PUBLISHED else "o-"
            axis.semilogx(curve["sigma"], curve["within_0.01"], style, label=str(attack), markersize=4)
        axis.set(title=f"{label} label, {state}", ylim=(-0.03, 1.03))
        axis.set_xlabel("noise multiplier σ (clip 1)")
        axis.set_ylabel("labels within 0.01")
        private = own.dropna(subset="epsilon").drop_duplicates("sigma")
        above = axis.secondary_xaxis("top")
        above.set_xticks(private["sigma"], [f"{epsilon:.2g}" for epsilon in private["epsilon"]], fontsize=7)
        above.minorticks_off()
        above.set_xlabel(f"ε at δ = {DELTA:g}, {ROUNDS} rounds, rate {RATE:g}", fontsize=8)
    panels[0, 0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Makes the points that the table lacks, then draws."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "noise_curve.csv"
    there: list[Any] = pd.read_csv(path).to_dict("records") if path.exists() else []
    keys = {(r["weights"], r["label"], r["sigma"], r["attack"]) for r in there}
    attacks = ("lambda_recovery", "lambda_recovery_adaptive", "published search", PUBLISHED)
    for state in STATES:
        for label in LABELS:
            for sigma in SIGMAS:
                for attack in attacks:
                    if (state, label, sigma, attack) not in keys:
                        there.append(row(state, label, sigma, attack, given.cases))
                        pd.DataFrame(there).to_csv(path, index=False, float_format="%.6g")
                        print(there[-1], flush=True)
    draw(pd.read_csv(path), given.out / "noise_curve.png")


if __name__ == "__main__":
    main()
