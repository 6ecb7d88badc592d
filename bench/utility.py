"""What a defense costs: the accuracy of a network trained with it in every step, time and bytes of an update.

Measured once for a data set, model, first weights and defense, and cached; what frozen grids ask for is
committed (results/defenses/utility.jsonl). Training holds private data: it is done where clients are, never
in a process that attacks.
"""

from __future__ import annotations

import functools
import json
import statistics
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import filelock
import numpy as np
import torch

from bench import registry
from bench.cache import cache_folder
from bench.cases import models
from bench.cases.client import FedSGDClient
from bench.cases.data import Dataset, load
from bench.cases.models import Network
from bench.cases.scenario import digest, seed
from bench.report import utility as rows
from bench.report.utility import COLUMNS, Utility
from bench.threat import Batch, Defense, Update

RECIPE = 1
"""Raised when training or what is measured of it changes."""

STEPS = 300
BATCH = 32
LR = 1e-3
DELTA = 1e-5
POOL = 64
"""Other examples of its own that a client holds, for defenses that need a partner."""

COMMITTED = Path(__file__).resolve().parent.parent / "results" / "defenses"
"""Where a `utility.jsonl` has what was measured for frozen grids."""


@dataclass(frozen=True)
class Asked:
    """What a measurement follows from; specs are canonical."""

    dataset: str
    data_sha256: str
    model: str
    weight_seed: int
    defense: str
    defense_revision: str

    @property
    def key(self) -> str:
        """Its name in records and caches."""
        return digest(RECIPE, STEPS, BATCH, LR, DELTA, POOL, asdict(self))


def utility(asked: Asked, root: Path | None) -> Utility:
    """As committed or cached, else measured now."""
    if found := _committed().get(asked.key):
        return found
    path = cache_folder() / "utility" / f"{asked.key}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(path.with_suffix(".lock")):
        found = _read(path)
        if found is None:
            found = measured(asked, load(asked.dataset, root))
            part = path.with_suffix(".part")
            part.write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")
            part.replace(path)
    return found


@functools.cache
def _committed() -> dict[str, Utility]:
    return {row["key"]: Utility(**row) for row in rows.read(COMMITTED)}


def _read(path: Path) -> Utility | None:
    try:
        entry = json.loads(path.read_bytes())
        return Utility(**{column: entry[column] for column in COLUMNS})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def measured(asked: Asked, dataset: Dataset) -> Utility:
    """Trains on one thread: Adam, `STEPS` steps, each on the update of a client with `BATCH` examples.

    Adam doesn't see an update's scale, so that none is judged by whether a learning rate suits it. Batch
    norm keeps its first statistics. Held-out images are plain, also for defenses whose authors would
    transform them too (InstaHide, ATS). ε is that of Poisson sampling at the same rate, as is usual, though
    batches here are cut from a shuffled set.
    """
    defense = registry.defenses.make(asked.defense)
    client = FedSGDClient(
        models.network(
            Network(
                asked.model,
                asked.dataset,
                asked.data_sha256,
                "untrained",
                asked.weight_seed,
                asked.defense if "prepare" in defense.stages() else "none",
            ),
            dataset,
            defense,
        )
    )
    rng = torch.Generator(device="cpu").manual_seed(seed(asked.key))
    optimizer = torch.optim.Adam(client.model.parameters(), lr=LR)
    seconds, update = [], {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for batch, pool in _batches(dataset, asked.weight_seed):
            started = time.process_time()
            update = _sent(client, defense, batch, pool, rng)
            seconds.append(time.process_time() - started)
            for name, parameter in client.model.named_parameters():
                parameter.grad = update.get(name)
            optimizer.step()
        accuracy = _accuracy(client.model, dataset)
    finally:
        torch.set_num_threads(threads)
    rate = BATCH / len(dataset.training_indices())
    promised = defense.privacy(STEPS, rate, DELTA)
    return Utility(
        key=asked.key,
        dataset=asked.dataset,
        model=asked.model,
        weight_seed=asked.weight_seed,
        defense=asked.defense,
        defense_revision=asked.defense_revision,
        steps=STEPS,
        batch_size=BATCH,
        accuracy=accuracy,
        seconds=statistics.median(seconds),
        bytes=len(zlib.compress(b"".join(value.numpy().tobytes() for value in update.values()))),
        epsilon=None if promised is None else promised[0],
        delta=DELTA,
        sample_rate=rate,
        torch=torch.__version__,
    )


def _sent(client: FedSGDClient, defense: Defense, batch: Batch, pool: Batch, rng: torch.Generator) -> Update:
    """All that a client does to a batch."""
    released = defense.change_batch(batch, pool, rng)
    client = replace(client, pool=pool)
    sent = defense.change_update(client, defense.gradient(client, released, rng), rng)
    return {name: value.detach() for name, value in sent.items()}


def _batches(dataset: Dataset, order_seed: int) -> Iterator[tuple[Batch, Batch]]:
    """`STEPS` batches, the same for every defense, each with what else its client holds."""
    training, order = dataset.training_indices().numpy(), np.random.default_rng(order_seed)
    left = np.empty(0, dtype=training.dtype)
    size = min(BATCH, len(training) - 1)
    for _ in range(STEPS):
        if len(left) < size:
            left = order.permutation(training)
        own, left = left[:size], left[size:]
        others = np.setdiff1d(training, own)
        pool = order.choice(others, size=min(POOL, len(others)), replace=False)
        yield dataset.batch(own), dataset.batch(pool)


@torch.no_grad()
def _accuracy(model: torch.nn.Module, dataset: Dataset) -> float:
    """The share of held-out examples whose largest logit is their class's; one that isn't finite is wrong."""
    images, labels = dataset.pixels(dataset.held_out), dataset.labels[dataset.held_out]
    logits = torch.cat([model(part) for part in images.split(256)])
    right = (logits.argmax(1) == labels) & logits.isfinite().all(1)
    return right.double().mean().item()
