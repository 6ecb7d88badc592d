"""What a worker does with a chunk: its clients observe, attacks attempt, metrics judge.

A chunk is a scenario and a range of samples, a pure function of the grid. Nothing here imports an attack:
what is to be known of one was looked up by the driver, so that no attack's code meets the truth.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import registry
from bench.cases import data, models, protocol
from bench.cases.client import FedSGDClient
from bench.cases.models import Network
from bench.cases.salt import salted
from bench.cases.scenario import Scenario, digest, seed
from bench.errors import UserError
from bench.isolation import Attempt
from bench.metrics import FAILED, score
from bench.metrics.formats import label_format
from bench.metrics.labels import lam_error
from bench.report.record import Record
from bench.threat import Batch, Facts, Knowledge, Observation, Outcome, Reconstruction, Update, grant, mask

PROTOCOL_VERSION = 1
"""Raised when the same trial may give other numbers because client, data or metrics changed."""

POOL = 64
"""How many other examples of its own a client holds for defenses that need a partner."""

AUXILIARY = 256
"""How many public examples an attacker may be granted: of the split that no attacked example is from."""


@dataclass(frozen=True)
class Context:
    """What all chunks of a run share.

    Attributes:
        grid: the grid's name.
        grid_hash: over all that the grid's file says.
        grid_seed: from which every batch's seed follows.
        time_limit: seconds that a trial may take.
        data_root: where data sets lie.
        device: where clients and attacks compute.
        commit: of the suite.
        salt: where it isn't empty, examples are drawn anew by it, and changed in private: see `cases.salt`.
        hidden: files and folders that an attack's process can't see, which is then a sandbox.
    """

    grid: str
    grid_hash: str
    grid_seed: int
    time_limit: float
    data_root: Path | None
    device: str
    commit: str
    salt: str = ""
    hidden: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Entrant:
    """What is to be known of an attack in a scenario, without its code: `spec` is canonical.

    `granted`: the names of Knowledge that the scenario grants and it uses; `skip`: why it doesn't apply;
    `code`: the spec under which its process finds it, where that isn't `spec` itself.
    """

    spec: str
    revision: str
    reads: str
    produces: frozenset[str]
    granted: frozenset[str]
    skip: str | None
    code: str | None = None

    @property
    def knowledge(self) -> str:
        """What it is told, as records say it."""
        return ",".join(sorted(self.granted))


@dataclass(frozen=True)
class Chunk:
    """A scenario, a range of samples, and the attacks on them: what is observed together."""

    scenario: Scenario
    network: Network
    weights_sha256: str
    defense_revision: str
    reads: str
    start: int
    stop: int
    entrants: tuple[Entrant, ...]

    @functools.cached_property
    def _key(self) -> str:
        return digest(asdict(self.scenario), self.network.data_sha256, self.weights_sha256)

    def _observation_key(self, sample: int) -> str:
        return digest(self._key, sample)

    @property
    def samples(self) -> range:
        """What it observes."""
        return range(self.start, self.stop)

    def trial(self, context: Context, entrant: Entrant, sample: int) -> str:
        """The key of one sample's trial."""
        return digest(
            context.grid_hash,
            self._observation_key(sample),
            PROTOCOL_VERSION,
            self.defense_revision,
            entrant.knowledge,
            entrant.spec,
            entrant.revision,
        )

    def seeds(self, entrant: Entrant) -> list[int]:
        """The seeds of an attack's own generators, one a sample."""
        return [
            seed(self._observation_key(sample), entrant.spec, entrant.revision) for sample in self.samples
        ]


@dataclass(frozen=True, eq=False)
class Truth:
    """What only metrics meet, of one sample."""

    private: Batch
    released: Batch
    features: Tensor  # (N, D)
    probabilities: Tensor  # (N, K)


@dataclass(frozen=True, eq=False)
class Observed:
    """A chunk's observations, with all that the grid grants, and the truth behind each."""

    observations: tuple[Observation, ...]
    truths: tuple[Truth, ...]


Attack = Callable[[str, Sequence[Observation], Sequence[int], float], list[Attempt]]
"""Canonical spec, observations, seeds, time limit a trial -> an attempt a sample."""


def rows(chunk: Chunk, context: Context, attack: Attack, isolated: bool) -> list[Record]:
    """All rows of a chunk; an attack that doesn't apply is not run, nor is a client for nobody."""
    applicable = any(entrant.skip is None for entrant in chunk.entrants)
    observed = observe(chunk, context) if applicable else None
    made = []
    for entrant in chunk.entrants:
        if entrant.skip is not None or observed is None:
            skipped = Attempt(Reconstruction(Outcome.SKIPPED), entrant.skip or "")
            made += judge(chunk, context, entrant, [skipped] * len(chunk.samples), None, isolated)
            continue
        views = [_for_attack(observation, entrant) for observation in observed.observations]
        answers = attack(entrant.code or entrant.spec, views, chunk.seeds(entrant), context.time_limit)
        made += judge(chunk, context, entrant, answers, observed, isolated)
    return made


# --- the client's side ------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def dataset_named(name: str, root: Path | None) -> data.Dataset:
    """The data set, loaded once a process."""
    return data.load(name, root)


@functools.lru_cache(maxsize=4)
def model_of(network: Network, root: Path | None) -> torch.nn.Module:
    """The network with its weights, on the CPU; trained where they aren't cached."""
    defense = registry.defenses.make(network.defense)
    return models.network(network, dataset_named(network.dataset, root), defense)


def weights_sha256(network: Network, root: Path | None) -> str:
    """The weights' hash; trains the network where it isn't cached."""
    torch.set_num_threads(1)
    return models.sha256(model_of(network, root))


def observe(chunk: Chunk, context: Context) -> Observed:
    """What the clients of a chunk send, one observation a sample, and the truth behind it.

    Raises:
        UserError: the weights on this machine are not those that the run's keys stand for.
    """
    torch.set_num_threads(1)  # sums in one order: results don't depend on the number of cores
    scenario = chunk.scenario
    dataset = dataset_named(scenario.dataset, context.data_root)
    if context.salt:
        dataset = salted(dataset, context.salt)
    model = model_of(chunk.network, context.data_root)
    if models.sha256(model) != chunk.weights_sha256:
        raise UserError(f"{scenario.model} has other weights on this machine; share one LEAKBENCH_CACHE")
    client = FedSGDClient.with_batch_norm(model.to(context.device), scenario.batch_norm)
    defense = registry.defenses.make(scenario.defense)
    talk = protocol.make(scenario.protocol)

    private, released, updates = [], [], []
    stacked = (
        chunk.reads == "head"
        and scenario.protocol == protocol.FedSGD.name
        and not defense.stages() & {"gradient", "change_update"}
    )
    for sample in chunk.samples:
        batch_seed = seed(context.grid_seed, *scenario.batch_axes, sample)
        rng = torch.Generator(device="cpu").manual_seed(seed(batch_seed, scenario.defense))
        indices, pool = _batch_and_pool(dataset, scenario, talk, sample, batch_seed)
        batches = [dataset.batch(part, context.device) for part in indices.chunk(talk.clients)]
        others = dataset.batch(pool, context.device)
        let_out = [defense.change_batch(batch, others, rng) for batch in batches]
        private.append(_joined(batches))
        released.append(_joined(let_out))
        if not stacked:
            updates.append(talk.updates(client, defense, let_out, rng))

    features = client.features(torch.stack([batch.images for batch in released]))  # (M, N, D)
    with torch.no_grad():
        probabilities = client.model.get_submodule(client.head)(features).softmax(-1)
    if stacked:
        heads = client.head_updates(features, torch.stack([batch.soft_labels for batch in released]))
        updates = [({name: value[m] for name, value in heads.items()},) for m in range(len(released))]
    facts = facts_of(scenario, dataset, client)
    auxiliary = _auxiliary(dataset, scenario, context.device)
    observations = [
        Observation(
            client.model, sent[-1], client.head, facts, _granted(scenario, talk, batch, auxiliary), sent[:-1]
        )
        for sent, batch in zip(updates, released, strict=True)
    ]
    return Observed(tuple(observations), tuple(map(Truth, private, released, features, probabilities)))


def _batch_and_pool(
    dataset: data.Dataset, scenario: Scenario, talk: protocol.Protocol, sample: int, batch_seed: int
) -> tuple[Tensor, Tensor]:
    """The indices of a sample's examples, of all its clients, and of what else the clients hold."""
    members, draw = scenario.members == "training", np.random.default_rng(batch_seed)
    size = scenario.batch_size * talk.clients
    chosen = data.attacked_batch(dataset, members, scenario.classes, sample, size, draw)
    own = (dataset.training if members else dataset.held_out).numpy()
    others = np.setdiff1d(own, chosen.numpy())
    pool = draw.choice(others, size=min(POOL, len(others)), replace=False)
    return chosen, torch.as_tensor(pool, device="cpu")


def check_data(scenario: Scenario, samples: int, root: Path | None) -> None:
    """Raises a UserError where a scenario has too few examples."""
    dataset = dataset_named(scenario.dataset, root)
    talk = protocol.make(scenario.protocol)
    in_turn = samples if scenario.classes == "turns" else 1
    data.attacked(dataset, in_turn * scenario.batch_size * talk.clients, scenario.members == "training")
    if "auxiliary" in scenario.knowledge:
        data.attacked(dataset, 1, members=scenario.members != "training")


def _joined(batches: Sequence[Batch]) -> Batch:
    images = torch.cat([batch.images for batch in batches])
    return Batch(images, torch.cat([batch.soft_labels for batch in batches]))


def facts_of(scenario: Scenario, dataset: data.Dataset, client: FedSGDClient) -> Facts:
    """The public facts of a scenario: all that it grants among them, and the protocol's bare name."""
    head = client.model.get_submodule(client.head)
    assert isinstance(head, torch.nn.Linear)
    talk, defense = protocol.make(scenario.protocol), registry.defenses.make(scenario.defense)
    return Facts(
        batch_size=defense.released_size(scenario.batch_size, dataset.image_shape) * talk.clients,
        num_classes=dataset.num_classes,
        image_shape=dataset.image_shape,
        feature_width=head.in_features,
        head_bias=head.bias is not None,
        nonnegative_features=models.nonnegative_features(client.model, client.head, dataset.image_shape),
        protocol=talk.name,
        granted=frozenset(scenario.knowledge),
    )


def _auxiliary(dataset: data.Dataset, scenario: Scenario, device: str) -> Batch | None:
    """Public examples: held out where members are attacked, else what the network was trained on."""
    if "auxiliary" not in scenario.knowledge:
        return None
    order = data.attacked_order(dataset, members=scenario.members != "training")
    return dataset.batch(order[:AUXILIARY], device)


def _granted(
    scenario: Scenario, talk: protocol.Protocol, released: Batch, auxiliary: Batch | None
) -> Knowledge:
    """All that the grid grants; an attack gets what it uses of it."""
    formats = sorted({label_format(soft_label) for soft_label in released.soft_labels})
    local = talk if isinstance(talk, protocol.FedAvg) else None
    everything = Knowledge(
        label_format=formats[0] if len(formats) == 1 else None,
        soft_labels=released.soft_labels,
        local_steps=None if local is None else local.steps,
        local_lr=None if local is None else local.lr,
        auxiliary=auxiliary,
        defense=scenario.defense,
    )
    return grant(everything, frozenset(scenario.knowledge))


def _for_attack(observation: Observation, entrant: Entrant) -> Observation:
    """The observation as an attack may see it: masked to what it reads, granted what it uses."""

    def masked(update: Update) -> Update:
        return mask(update, observation.head, entrant.reads)

    return replace(
        observation,
        update=masked(observation.update),
        facts=replace(observation.facts, granted=entrant.granted),
        knowledge=grant(observation.knowledge, entrant.granted),
        later_updates=tuple(map(masked, observation.later_updates)),
    )


# --- the judge's side -------------------------------------------------------------------------------------


def judge(
    chunk: Chunk,
    context: Context,
    entrant: Entrant,
    attempts: Sequence[Attempt],
    observed: Observed | None,
    isolated: bool,
) -> list[Record]:
    """The rows of one attack on a chunk; without `observed` nothing was returned that could be scored."""
    scenario = chunk.scenario
    truths = [None] * len(attempts) if observed is None else observed.truths
    made = []
    for sample, one, truth in zip(chunk.samples, attempts, truths, strict=True):
        made.append(
            Record(
                trial=chunk.trial(context, entrant, sample),
                grid=context.grid,
                scenario=scenario.key,
                dataset=scenario.dataset,
                model=scenario.model,
                weights=scenario.weights,
                weight_seed=scenario.weight_seed,
                batch_norm=scenario.batch_norm,
                members=scenario.members,
                batch_size=scenario.batch_size,
                classes=scenario.classes,
                protocol=scenario.protocol,
                knowledge=entrant.knowledge,
                defense=scenario.defense,
                defense_revision=chunk.defense_revision,
                attack=entrant.spec,
                attack_revision=entrant.revision,
                sample=sample,
                outcome=one.reconstruction.outcome.name.lower(),
                reason=one.reason,
                **_metrics(one.reconstruction, entrant, truth),
                seconds=one.seconds,
                stack=len(attempts),
                peak_bytes=one.peak_bytes,
                isolated=isolated,
                protocol_version=PROTOCOL_VERSION,
                commit=context.commit,
                torch=torch.__version__,
                device=context.device,
                data_sha256=chunk.network.data_sha256,
                weights_sha256=chunk.weights_sha256,
            )
        )
    return made


def _metrics(answer: Reconstruction, entrant: Entrant, truth: Truth | None) -> dict[str, Any]:
    if answer.outcome is Outcome.SKIPPED:
        return {}
    if truth is None:
        return {metric: value for part in entrant.produces for metric, value in FAILED[part].items()}
    scored = score(
        _beside(answer.soft_labels, truth),
        _beside(answer.features, truth),
        _beside(answer.images, truth),
        released=truth.released,
        private=truth.private,
        true_features=truth.features,
        produces=entrant.produces,
    )
    return scored | _about_labels(answer, truth)


def _beside(part: Tensor | None, truth: Truth) -> Tensor | None:
    """On the truth's device: what an attack's process sends comes on the CPU."""
    return None if part is None else part.to(truth.released.images.device)


def _about_labels(answer: Reconstruction, truth: Truth) -> dict[str, Any]:
    """`lam_error`, relative to the true λ = 1/(p_r - y_r), and `format_found`, where an attack names them."""
    found: dict[str, Any] = {}
    lam, row = answer.notes.get("lam"), answer.notes.get("row")
    classes = range(truth.probabilities.shape[1])
    if len(truth.released) == 1 and isinstance(lam, float) and isinstance(row, int) and row in classes:
        u = truth.probabilities[0, row].double() - truth.released.soft_labels[0, row].double()
        error = lam_error(lam, float(1 / u))
        found["lam_error"] = error if np.isfinite(error) else None
    if answer.notes.get("label_format"):
        actual = {label_format(soft_label) for soft_label in truth.released.soft_labels}
        found["format_found"] = actual == {answer.notes["label_format"]}
    return found
