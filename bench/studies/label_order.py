"""How the label attacks compare, and what training does to them: `python -m bench.studies.label_order`.

Batches of 128 with i.i.d. classes and of 32 with Dirichlet(.5) classes on untrained nets; on the same nets
trained to accuracy 1.00, batches of 32 of either kind, from the images that they were trained on and from
others; eight nets (weight seeds), each with a draw of its own. Images are those of mnist5k, or noise with
labels drawn at random (which training learns by heart). Chance, `random_labels`, meets the same draws. Public
images are from the held-out part.

Writes results/labels/order.csv: one row an attack, net and draw, with the seeds and the weights' hash.
`class_counts` is LnAcc as the boards have it (the authors of iLRG call it IRec); `class_counts_exact` is
the share of classes whose number is right, their LnAcc.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from bench import registry
from bench.cases import data, models
from bench.cases.client import FedSGDClient
from bench.metrics.labels import class_counts, class_counts_exact, class_existence
from bench.threat import Attack, Batch, Facts, Knowledge, Observation, grant, mask

RESULTS = Path(__file__).resolve().parents[2] / "results" / "labels"
MODEL = "convnet"
ATTACKS = (
    "llg",
    "llg_star",
    "llg_plus",
    "zlg",
    "zlg(images='auxiliary')",
    "ilrg",
    "bias_counts",
    "bias_counts(images='auxiliary')",
    "rlu",
    "gdbr",
    "gdbr(images='auxiliary')",
    "random_labels",
)
TRAINED = {"mnist5k": "trained", "noise": "epochs=40"}
"""The states in which every net of a set has learnt its training part by heart."""
PUBLIC = 200
NOISE_IMAGES, NOISE_CLASSES, NOISE_SHAPE = 1000, 10, (1, 28, 28)


@dataclass(frozen=True)
class Setting:
    """A kind of batch on nets in one state; `alpha` of the Dirichlet classes, None for i.i.d. examples.

    `members` is the part of the data that the batch is from: `training` or `held_out`.
    """

    dataset: str
    trained: bool
    batch_size: int
    alpha: float | None
    members: str


SETTINGS = tuple(
    Setting(dataset, trained, batch_size, alpha, members)
    for dataset in TRAINED
    for trained, batch_size, alpha, members in (
        (False, 128, None, "training"),
        (False, 32, 0.5, "training"),
        (True, 32, 0.5, "training"),
        (True, 32, None, "training"),
        (True, 32, 0.5, "held_out"),
        (True, 32, None, "held_out"),
    )
)


def noise() -> data.Dataset:
    """Uniform noise with labels drawn at random; one half is for training."""
    rng = np.random.default_rng(0)
    pixels = rng.random((NOISE_IMAGES, *NOISE_SHAPE), dtype=np.float32)
    labels = torch.from_numpy(rng.integers(0, NOISE_CLASSES, NOISE_IMAGES))
    half = torch.arange(NOISE_IMAGES // 2, device="cpu")
    return data.Dataset(
        name="noise",
        read=data.InMemory(torch.from_numpy(pixels)),
        labels=labels,
        num_classes=NOISE_CLASSES,
        class_names=None,
        image_shape=NOISE_SHAPE,
        sha256=hashlib.sha256(pixels.tobytes() + labels.numpy().tobytes()).hexdigest(),
        training=half,
        held_out=half + NOISE_IMAGES // 2,
    )


def drawn(dataset: data.Dataset, setting: Setting, rng: np.random.Generator) -> NDArray[np.int64]:
    """The indices of a batch from one part: i.i.d., or with class shares from a Dirichlet distribution."""
    pool, n = getattr(dataset, setting.members).numpy(), setting.batch_size
    if setting.alpha is None:
        return rng.choice(pool, n, replace=False)
    wanted = rng.multinomial(n, rng.dirichlet([setting.alpha] * dataset.num_classes))
    labels = dataset.labels.numpy()[pool]
    of_class = [rng.choice(pool[labels == c], k, replace=False) for c, k in enumerate(wanted)]
    return np.concatenate(of_class)


def attempt(
    attack: Attack, client: FedSGDClient, private: Batch, public: Batch, seed: int
) -> dict[str, object]:
    """What one attack makes of the batch's gradient: metrics, or why there are none."""
    head = client.model.get_submodule(client.head)
    assert isinstance(head, torch.nn.Linear)
    image_shape = (private.images.shape[1], private.images.shape[2], private.images.shape[3])
    facts = Facts(
        batch_size=len(private),
        num_classes=private.soft_labels.shape[1],
        image_shape=image_shape,
        feature_width=head.in_features,
        head_bias=head.bias is not None,
        nonnegative_features=models.nonnegative_features(client.model, client.head, image_shape),
        granted=attack.uses & {"auxiliary"},
    )
    reason = attack.skip(facts)
    if reason is not None:
        return {"outcome": "skipped", "reason": reason}
    update = mask(client.gradient(private), client.head, attack.reads)
    knowledge = grant(Knowledge(auxiliary=public), attack.uses)
    seen = Observation(client.model, update, client.head, facts, knowledge)
    found = attack.run(seen, torch.Generator(device="cpu").manual_seed(seed))
    outcome: dict[str, object] = {
        "outcome": found.outcome.name.lower(),
        "reason": found.notes.get("reason", ""),
    }
    if found.soft_labels is None:  # a failed trial counts
        return outcome | {"class_counts": 0.0, "class_counts_exact": 0.0, "class_existence": 0.0}
    return outcome | {
        "class_counts": float(class_counts(found.soft_labels, private.soft_labels)),
        "class_counts_exact": float(class_counts_exact(found.soft_labels, private.soft_labels)),
        "class_existence": float(class_existence(found.soft_labels, private.soft_labels)),
    }


def rows(setting: Setting, dataset: data.Dataset, weight_seed: int) -> list[dict[str, object]]:
    """One row an attack, on one net and one draw; both are named by the seed."""
    state = TRAINED[setting.dataset] if setting.trained else "untrained"
    wanted = models.Network(models.canonical(MODEL), dataset.name, dataset.sha256, state, weight_seed)
    model = models.network(wanted, dataset, registry.defenses.make("none"))
    training = dataset.training
    with torch.no_grad():
        p = torch.cat([model(part).softmax(1) for part in dataset.pixels(training).split(256)])
    accuracy = float((p.argmax(1) == dataset.labels[training]).double().mean())
    rng = np.random.default_rng(weight_seed)
    chosen = drawn(dataset, setting, rng)
    others = np.setdiff1d(dataset.held_out.numpy(), chosen)
    private, public = dataset.batch(chosen), dataset.batch(rng.choice(others, PUBLIC, replace=False))
    identity: dict[str, object] = {
        "dataset": setting.dataset,
        "model": wanted.model,
        "weights": state,
        "weight_seed": weight_seed,
        "weights_sha256": models.sha256(model),
        "training_accuracy": accuracy,
        "members": setting.members,
        "batch_size": setting.batch_size,
        "classes": "i.i.d." if setting.alpha is None else f"dirichlet({setting.alpha})",
        "draw_seed": weight_seed,
    }
    client = FedSGDClient(model)
    return [
        identity
        | {"attack": spec}
        | attempt(registry.attacks.make(spec), client, private, public, weight_seed)
        for spec in ATTACKS
    ]


def table(trials: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Means over nets and draws: a row a setting, a column an attack."""
    by = ["dataset", "weights", "members", "batch_size", "classes"]
    means = trials.groupby([*by, "attack"], sort=False)[metric].mean().unstack("attack", sort=False)
    return means.round(3)


def main() -> None:
    """Runs the study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=8, help="nets, each with a draw of its own")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    datasets = {"mnist5k": data.load("mnist5k"), "noise": noise()}
    made: list[dict[str, object]] = []
    for setting, seed in itertools.product(SETTINGS, range(arguments.seeds)):
        made += rows(setting, datasets[setting.dataset], seed)
    trials = pd.DataFrame(made)
    arguments.out.mkdir(parents=True, exist_ok=True)
    trials.to_csv(arguments.out / "order.csv", index=False, float_format="%.4g")
    with pd.option_context("display.width", 250, "display.max_columns", None):
        for metric in ("class_counts", "class_existence"):
            print(f"\n{metric}\n{table(trials, metric).T.to_string()}")
    print(trials.groupby(["dataset", "weights"])["training_accuracy"].agg(["min", "max"]).to_string())


if __name__ == "__main__":
    main()
