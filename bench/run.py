"""Runs a grid: clients observe, attacks answer, metrics judge, the driver alone writes.

A chunk is a scenario and a range of samples, a pure function of the grid. Three steps make its rows:
`observe` (a client's work, it meets the truth), `attempt` (an attack's, it meets observations alone) and
`judge` (metrics). The same three run in process and on Dask, where no attack's process holds any truth.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from bench import registry
from bench.cases import data, models
from bench.cases.client import FedSGDClient
from bench.cases.models import Network
from bench.cases.scenario import Grid, Scenario, cells, digest, seed
from bench.errors import UserError
from bench.metrics import score
from bench.metrics.formats import label_format
from bench.metrics.labels import lam_error
from bench.report import record
from bench.report.record import Header, Record
from bench.threat import (
    Attack,
    Batch,
    Defense,
    Facts,
    Knowledge,
    Observation,
    Outcome,
    Reconstruction,
    Update,
    grant,
    mask,
)

PROTOCOL_VERSION = 1
"""Raised when the same trial may give other numbers because client, data or metrics changed."""

STACK = {"head": 64, "all": 4}
"""Samples a chunk, by what its attacks read: heads are small and solved together."""

POOL = 64
"""How many other examples of its own a client holds for defenses that need a partner."""


@dataclass(frozen=True)
class Context:
    """What all chunks of a run share."""

    grid: str
    grid_hash: str
    grid_seed: int
    data_root: Path | None
    device: str
    commit: str


@dataclass(frozen=True)
class Chunk:
    """A scenario, a range of samples, and the attacks on them: what is observed together."""

    scenario: Scenario
    network: Network
    weights_sha256: str
    reads: str
    start: int
    stop: int
    attacks: tuple[str, ...]

    @functools.cached_property
    def _key(self) -> str:
        return digest(asdict(self.scenario), self.network.data_sha256, self.weights_sha256)

    def observation_key(self, sample: int) -> str:
        """What identifies an observation."""
        return digest(self._key, sample)

    @property
    def samples(self) -> range:
        """What it observes."""
        return range(self.start, self.stop)


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


@dataclass(frozen=True, eq=False)
class View:
    """A chunk's observations as one attack may see them, on one copy of the model.

    One object, and not a tuple: Dask sends a tuple's items one by one, each with a model of its own.
    """

    observations: tuple[Observation, ...]


@dataclass(frozen=True, eq=False)
class Attempt:
    """An attack's answer to one observation, and what it cost."""

    reconstruction: Reconstruction
    reason: str = ""
    seconds: float | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True, eq=False)
class Attempts:
    """An attack's answers to a chunk, sent as one."""

    each: tuple[Attempt, ...]


# --- the client's side ------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def _dataset(name: str, root: Path | None) -> data.Dataset:
    return data.load(name, root)


@functools.lru_cache(maxsize=4)
def _model(network: Network, root: Path | None) -> torch.nn.Module:
    defense = registry.defenses.make(network.defense)
    return models.network(network, _dataset(network.dataset, root), defense)


def weights_sha256(network: Network, root: Path | None) -> str:
    """The weights' hash; trains the network where it isn't cached."""
    _one_thread()
    return models.sha256(_model(network, root))


def observe(chunk: Chunk, context: Context) -> Observed:
    """What the clients of a chunk send, one observation a sample, and the truth behind it.

    Raises:
        UserError: the weights on this machine are not those that the run's keys stand for.
    """
    _one_thread()
    scenario = chunk.scenario
    dataset = _dataset(scenario.dataset, context.data_root)
    model = _model(chunk.network, context.data_root)
    if models.sha256(model) != chunk.weights_sha256:
        raise UserError(f"{scenario.model} has other weights on this machine; share one LEAKBENCH_CACHE")
    client = FedSGDClient.with_batch_norm(model.to(context.device), scenario.batch_norm)
    defense = registry.defenses.make(scenario.defense)

    private, released, generators = [], [], []
    for sample in chunk.samples:
        batch_seed = seed(context.grid_seed, *scenario.batch_axes, sample)
        generators.append(_generator(seed(batch_seed, scenario.defense)))
        batch, pool = _batch_and_pool(dataset, scenario, sample, batch_seed, context.device)
        private.append(batch)
        released.append(defense.change_batch(batch, pool, generators[-1]))

    features = client.features(torch.stack([batch.images for batch in released]))  # (M, N, D)
    soft_labels = torch.stack([batch.soft_labels for batch in released])  # (M, N, K)
    head = client.model.get_submodule(client.head)
    with torch.no_grad():
        probabilities = head(features).softmax(-1)
    if chunk.reads == "head" and not defense.stages() & {"gradient", "change_update"}:
        stacked = client.head_updates(features, soft_labels)
        updates = [{name: value[m] for name, value in stacked.items()} for m in range(len(released))]
    else:
        updates = [
            _update(client, defense, batch, rng) for batch, rng in zip(released, generators, strict=True)
        ]
    facts = facts_of(scenario, dataset, client)
    observations = [
        Observation(client.model, update, client.head, facts, _granted(scenario, batch))
        for update, batch in zip(updates, released, strict=True)
    ]
    truths = map(Truth, private, released, features, probabilities)
    return Observed(tuple(observations), tuple(truths))


def _update(client: FedSGDClient, defense: Defense, batch: Batch, rng: torch.Generator) -> Update:
    return defense.change_update(client, defense.gradient(client, batch, rng), rng)


def _batch_and_pool(
    dataset: data.Dataset, scenario: Scenario, sample: int, batch_seed: int, device: str
) -> tuple[Batch, Batch]:
    n = scenario.batch_size
    members = scenario.members == "training"
    chosen = data.attacked(dataset, (sample + 1) * n, members)[sample * n :]
    own = (dataset.training if members else dataset.held_out).numpy()
    others = np.setdiff1d(own, chosen.numpy())
    draw = np.random.default_rng(batch_seed)
    pool = draw.choice(others, size=min(POOL, len(others)), replace=False)
    return dataset.batch(chosen, device), dataset.batch(pool, device)


def facts_of(scenario: Scenario, dataset: data.Dataset, client: FedSGDClient) -> Facts:
    """The public facts of a scenario; what is granted is added for each attack."""
    head = client.model.get_submodule(client.head)
    assert isinstance(head, torch.nn.Linear)
    return Facts(
        batch_size=scenario.batch_size,
        num_classes=dataset.num_classes,
        image_shape=dataset.image_shape,
        feature_width=head.in_features,
        head_bias=head.bias is not None,
        nonnegative_features=models.nonnegative_features(client.model, client.head, dataset.image_shape),
        protocol=scenario.protocol,
    )


def _granted(scenario: Scenario, released: Batch) -> Knowledge:
    """All that the grid grants; an attack gets what it uses of it."""
    formats = sorted({label_format(soft_label) for soft_label in released.soft_labels})
    everything = Knowledge(
        label_format=formats[0] if len(formats) == 1 else None,
        soft_labels=released.soft_labels,
        defense=scenario.defense,
    )
    return grant(everything, frozenset(scenario.knowledge))


def for_attack(observed: Observed, spec: str) -> View:
    """The observations as one attack may see them: its own copy, masked to what it reads and may know."""
    attack = registry.attacks.make(spec)
    model = copy.deepcopy(observed.observations[0].model)
    return View(tuple(_for_attack(observation, attack, model) for observation in observed.observations))


def _for_attack(observation: Observation, attack: Attack, model: torch.nn.Module) -> Observation:
    knowledge = grant(observation.knowledge, attack.uses)
    given = frozenset(name for name, value in vars(knowledge).items() if value is not None)
    facts = replace(observation.facts, granted=given)
    update = mask(observation.update, observation.head, attack.reads)
    own = {name: value.clone() for name, value in update.items()}
    return Observation(model, own, observation.head, facts, knowledge)


# --- the attacker's side ----------------------------------------------------------------------------------


def attempt(spec: str, view: View, seeds: Sequence[int]) -> Attempts:
    """One attack on a stack of observations; whatever it does ends in an attempt a sample."""
    _one_thread()
    return Attempts(tuple(_attempt(registry.attacks.make(spec), view.observations, seeds)))


def _attempt(attack: Attack, observations: Sequence[Observation], seeds: Sequence[int]) -> list[Attempt]:
    facts = observations[0].facts
    try:
        reason = attack.skip(facts)
    except Exception as error:
        return [_crashed(error)] * len(observations)
    if reason is not None:
        return [Attempt(Reconstruction(Outcome.SKIPPED), reason)] * len(observations)
    run_many = getattr(attack, "run_many", None)
    if run_many is not None and len(observations) > 1:
        with contextlib.suppress(Exception, SystemExit):  # alone, each says for itself what is wrong
            return _timed(lambda: run_many(observations, _seeded(seeds)), facts, len(observations))
    return [_alone(attack, *pair) for pair in zip(observations, seeds, strict=True)]


def _alone(attack: Attack, observation: Observation, trial_seed: int) -> Attempt:
    try:
        return _timed(
            lambda: [attack.run(observation, _seeded([trial_seed])[0])], observation.facts, expected=1
        )[0]
    except (Exception, SystemExit) as error:
        return _crashed(error)


def _timed(answers: Callable[[], Sequence[Any]], facts: Facts, expected: int) -> list[Attempt]:
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    got = answers()
    if cuda:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / expected
    if len(got) != expected:
        raise ValueError(f"run_many returned {len(got)} answers to {expected} observations")
    peak = torch.cuda.max_memory_allocated() if cuda else _peak_resident_bytes()
    return [_checked(one, facts, seconds, peak) for one in got]


def _peak_resident_bytes() -> int:
    """The most memory that this process has held so far, whatever it ran."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _checked(answer: Any, facts: Facts, seconds: float, peak: int) -> Attempt:
    """An answer that isn't what the contract says is a crash; one that isn't finite has diverged."""
    if not isinstance(answer, Reconstruction) or not isinstance(answer.outcome, Outcome):
        raise TypeError(f"run returned {type(answer).__name__}, not a Reconstruction")
    n = facts.batch_size
    shapes = {
        "soft_labels": (n, facts.num_classes),
        "features": (n, facts.feature_width),
        "images": (n, *facts.image_shape),
    }
    for name, shape in shapes.items():
        value = getattr(answer, name)
        if value is None:
            continue
        if not isinstance(value, Tensor) or tuple(value.shape) != shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"returned {name} of shape {got}, expected {shape}")
        if not bool(torch.isfinite(value).all()):
            return Attempt(Reconstruction(Outcome.DIVERGED), f"{name} is not finite", seconds, peak)
    detached = Reconstruction(
        answer.outcome,
        _detached(answer.soft_labels),
        _detached(answer.features),
        _detached(answer.images),
        dict(answer.notes),
    )
    return Attempt(detached, str(answer.notes.get("reason", "")), seconds, peak)


def _detached(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach().clone()  # not a view of a whole stack


def _crashed(error: BaseException) -> Attempt:
    out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    outcome = Outcome.OUT_OF_MEMORY if out_of_memory else Outcome.CRASHED
    return Attempt(Reconstruction(outcome), f"{type(error).__name__}: {' '.join(str(error).split())}"[:500])


def _seeded(seeds: Sequence[int]) -> list[torch.Generator]:
    """One generator a trial; the global states, which libraries draw from, follow the first."""
    random.seed(seeds[0])
    np.random.seed(seeds[0] % 2**32)
    torch.default_generator.manual_seed(seeds[0])  # torch.manual_seed keeps a traceback of every call
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seeds[0])
    return [_generator(one) for one in seeds]


def _generator(number: int) -> torch.Generator:
    return torch.Generator(device="cpu").manual_seed(number)


def _one_thread() -> None:
    """Sums in one order, in whatever thread a task runs: results don't depend on the number of cores."""
    torch.set_num_threads(1)


# --- the judge's side -------------------------------------------------------------------------------------


def judge(
    chunk: Chunk, context: Context, observed: Observed, spec: str, attempts: Attempts, isolated: bool
) -> list[Record]:
    """The rows of one attack on a chunk."""
    _one_thread()
    attack, identity = registry.attacks.make(spec), Identity.of(chunk, context, spec)
    scenario = chunk.scenario
    rows = []
    for offset, (one, truth) in enumerate(zip(attempts.each, observed.truths, strict=True)):
        sample, answer = chunk.start + offset, one.reconstruction
        metrics: dict[str, Any] = {}
        if answer.outcome is not Outcome.SKIPPED:
            metrics = score(
                answer.soft_labels,
                answer.features,
                answer.images,
                released=truth.released,
                private=truth.private,
                true_features=truth.features,
                produces=frozenset(attack.produces),
            ) | _about_labels(answer, truth)
        rows.append(
            Record(
                trial=identity.trial(sample),
                grid=context.grid,
                scenario=scenario.key,
                dataset=scenario.dataset,
                model=scenario.model,
                weights=scenario.weights,
                weight_seed=scenario.weight_seed,
                batch_norm=scenario.batch_norm,
                members=scenario.members,
                batch_size=scenario.batch_size,
                protocol=scenario.protocol,
                knowledge=identity.knowledge,
                defense=scenario.defense,
                defense_revision=identity.defense_revision,
                attack=spec,
                attack_revision=identity.attack_revision,
                sample=sample,
                outcome=answer.outcome.name.lower(),
                reason=one.reason,
                **metrics,
                seconds=one.seconds,
                stack=len(observed.observations),
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
    return rows


@dataclass(frozen=True)
class Identity:
    """What the keys of one attack's trials on a chunk are made of."""

    chunk: Chunk
    context: Context
    attack: str
    attack_revision: str
    defense_revision: str
    knowledge: str

    @classmethod
    def of(cls, chunk: Chunk, context: Context, spec: str) -> Identity:
        """The identity of an attack, by its canonical spec, on a chunk."""
        uses = registry.attacks.make(spec).uses
        granted = ",".join(sorted(uses & set(chunk.scenario.knowledge)))
        return cls(
            chunk,
            context,
            spec,
            registry.attacks.revision(spec),
            registry.defenses.revision(chunk.scenario.defense),
            granted,
        )

    def trial(self, sample: int) -> str:
        """The key of one sample's trial."""
        return digest(
            self.context.grid_hash,
            self.chunk.observation_key(sample),
            PROTOCOL_VERSION,
            self.defense_revision,
            self.knowledge,
            self.attack,
            self.attack_revision,
        )

    def seed(self, sample: int) -> int:
        """The seed of the attack's own generator."""
        return seed(self.chunk.observation_key(sample), self.attack, self.attack_revision)


def _about_labels(answer: Reconstruction, truth: Truth) -> dict[str, Any]:
    """`lam_error`, relative to the true λ = 1/(p_r - y_r), and `format_found`, where an attack names them."""
    found: dict[str, Any] = {}
    lam, row = answer.notes.get("lam"), answer.notes.get("row")
    if len(truth.released) == 1 and isinstance(lam, float) and isinstance(row, int):
        u = truth.probabilities[0, row].double() - truth.released.soft_labels[0, row].double()
        error = lam_error(lam, float(1 / u))
        found["lam_error"] = error if np.isfinite(error) else None
    if answer.notes.get("label_format"):
        actual = {label_format(soft_label) for soft_label in truth.released.soft_labels}
        found["format_found"] = actual == {answer.notes["label_format"]}
    return found


# --- the driver -------------------------------------------------------------------------------------------


class Engine(Protocol):
    """Where the work is done: in process, or on Dask."""

    def weights(self, networks: Sequence[Network], root: Path | None) -> Iterator[tuple[Network, str]]:
        """Each network and its weights' hash, as they get ready."""
        ...

    def rows(self, chunks: Sequence[Chunk], context: Context) -> Iterator[tuple[Chunk, list[Record]]]:
        """The rows of each chunk, in parts, as they get ready."""
        ...


class InProcess:
    """Everything in this process, one chunk after the other: for debugging. No trial is isolated."""

    def weights(self, networks: Sequence[Network], root: Path | None) -> Iterator[tuple[Network, str]]:
        """One network after the other."""
        for network in networks:
            yield network, weights_sha256(network, root)

    def rows(self, chunks: Sequence[Chunk], context: Context) -> Iterator[tuple[Chunk, list[Record]]]:
        """One attack after the other."""
        for chunk in chunks:
            observed = observe(chunk, context)
            for spec in chunk.attacks:
                seeds = chunk_seeds(chunk, context, spec)
                attempts = attempt(spec, for_attack(observed, spec), seeds)
                yield chunk, judge(chunk, context, observed, spec, attempts, isolated=False)


def chunk_seeds(chunk: Chunk, context: Context, spec: str) -> list[int]:
    """The seeds of an attack's trials on a chunk."""
    identity = Identity.of(chunk, context, spec)
    return [identity.seed(sample) for sample in chunk.samples]


@dataclass(frozen=True)
class Plan:
    """What a run will do, before it starts."""

    grid: Grid
    context: Context
    cells: dict[tuple[Scenario, str], int]
    networks: dict[Scenario, Network]

    @property
    def trials(self) -> int:
        """How many trials the whole grid has."""
        return sum(self.cells.values())

    @property
    def to_train(self) -> list[Network]:
        """The networks that are not cached yet."""
        return [network for network in dict.fromkeys(self.networks.values()) if not models.is_cached(network)]

    @property
    def cpu_seconds(self) -> float | None:
        """About how long it takes on one core, by what was measured when the grid was written."""
        known = [block for block in self.grid.blocks if block.seconds is not None]
        return sum(block.seconds or 0 for block in known) if len(known) == len(self.grid.blocks) else None

    def header(self) -> Header:
        """What the run's folder says of it."""
        return Header(
            grid=self.grid.name,
            grid_hash=self.context.grid_hash,
            title=self.grid.title,
            cells={f"{scenario.key} {attack}": n for (scenario, attack), n in self.cells.items()},
            scenarios={scenario.key: _json_axes(scenario) for scenario, _ in self.cells},
            seed=self.context.grid_seed,
        )

    def chunks(self, weights: dict[Network, str]) -> list[Chunk]:
        """The whole grid in chunks: a pure function of it."""
        groups: dict[tuple[Scenario, str, int], list[str]] = {}
        for (scenario, attack), samples in self.cells.items():
            reads = registry.attacks.make(attack).reads
            groups.setdefault((scenario, reads, samples), []).append(attack)
        return [
            Chunk(
                scenario,
                self.networks[scenario],
                weights[self.networks[scenario]],
                reads,
                start,
                min(start + STACK[reads], samples),
                tuple(attacks),
            )
            for (scenario, reads, samples), attacks in groups.items()
            for start in range(0, samples, STACK[reads])
        ]


def _json_axes(scenario: Scenario) -> dict[str, Any]:
    return {**asdict(scenario), "knowledge": list(scenario.knowledge)}


def plan(full: Grid, wanted: Grid, data_root: Path | None, device: str) -> Plan:
    """Checks all that a grid names, and counts.

    `full` is the grid as its file has it, `wanted` with what the command line replaced.

    Raises:
        UserError: a name that isn't known, too few examples, a device or data set that isn't there.
    """
    check_device(device)
    wanted_cells = cells(wanted)
    networks = {scenario: network_of(scenario, data_root) for scenario, _ in wanted_cells}
    for network in dict.fromkeys(networks.values()):
        dataset = _dataset(network.dataset, data_root)
        models.build(network.model, dataset.image_shape, dataset.num_classes, network.weight_seed)
        if models.epochs(network.weights):
            dataset.training_indices()
    for (scenario, _), samples in wanted_cells.items():
        dataset = _dataset(scenario.dataset, data_root)
        data.attacked(dataset, samples * scenario.batch_size, scenario.members == "training")
    context = Context(full.name, full.hash, full.seed, data_root, device, commit())
    return Plan(wanted, context, wanted_cells, networks)


def network_of(scenario: Scenario, data_root: Path | None) -> Network:
    """The weights that a scenario's clients hold."""
    defense = registry.defenses.make(scenario.defense)
    return Network(
        scenario.model,
        scenario.dataset,
        _dataset(scenario.dataset, data_root).sha256,
        scenario.weights,
        scenario.weight_seed,
        scenario.defense if "prepare" in defense.stages() else "none",
    )


def check_device(device: str) -> None:
    """Raises a UserError where torch can't put a tensor on the device."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"device {device!r} is not there; use --device cpu") from None


def commit() -> str:
    """The suite's commit, with `+` where files differ from it; empty outside a clone."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"],
            cwd=registry.ROOT,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return described.stdout.strip()


class Progress(Protocol):
    """Whoever watches a run; this one looks away."""

    def trained(self, network: Network) -> None:
        """A network is ready."""

    def started(self, done: int, total: int) -> None:
        """All networks are ready; so many trials are there already."""

    def advanced(self, chunk: Chunk, rows: list[Record]) -> None:
        """These are on the disk."""


def execute(planned: Plan, engine: Engine, folder: Path, progress: Progress) -> None:
    """Runs what the folder lacks of the plan; every part is on the disk before the next is told of.

    Raises:
        UserError: the folder holds another grid.
    """
    with record.writing(folder) as writer:
        done = _done(folder, planned)
        writer.header(planned.header())
        weights: dict[Network, str] = {}
        for network, sha256 in engine.weights(
            list(dict.fromkeys(planned.networks.values())), planned.context.data_root
        ):
            weights[network] = sha256
            progress.trained(network)
        chunks = planned.chunks(weights)
        pending = [chunk for chunk in (_lacking(c, planned.context, done) for c in chunks) if chunk.attacks]
        repeated = sum(len(chunk.attacks) * len(chunk.samples) for chunk in pending)
        progress.started(planned.trials - repeated, planned.trials)
        for chunk, rows in engine.rows(pending, planned.context):
            new = [row for row in rows if row.trial not in done]
            writer.rows(new)
            progress.advanced(chunk, rows)


def _done(folder: Path, planned: Plan) -> frozenset[str]:
    if not (folder / record.FILE).exists():
        return frozenset()
    run = record.read(folder)
    last = run.headers[-1]
    if last.grid_hash != planned.context.grid_hash:
        raise UserError(
            f"{folder} holds another grid ({last.grid}, {last.grid_hash[:8]}); "
            f"choose another --out for {planned.grid.name} ({planned.context.grid_hash[:8]})"
        )
    return run.keys


def _lacking(chunk: Chunk, context: Context, done: frozenset[str]) -> Chunk:
    """The chunk with the attacks of which any sample is missing: a stack is repeated whole."""
    attacks = []
    for spec in chunk.attacks:
        identity = Identity.of(chunk, context, spec)
        if any(identity.trial(sample) not in done for sample in chunk.samples):
            attacks.append(spec)
    return replace(chunk, attacks=tuple(attacks))


def rerun(folder: Path, trial: str, data_root: Path | None) -> tuple[dict[str, Any], Record]:
    """A recorded trial's row, and the row that the same stack gives now, in this process.

    `trial` may be the beginning of a key, where it is the only one.

    Raises:
        UserError: no such trial, or data, weights or revisions are no longer those of the record.
    """
    recorded = record.read(folder)
    matching = [row for row in recorded.rows if row["trial"].startswith(trial)]
    if len(matching) != 1:
        raise UserError(
            f"{folder} has {len(matching)} trials whose key begins with {trial!r}; "
            "a row's `trial` in records.jsonl is its key"
        )
    row, header = matching[0], recorded.headers[-1]
    axes = header.scenarios[row["scenario"]]
    scenario = Scenario(**{**axes, "knowledge": tuple(axes["knowledge"])})
    check_device(row["device"])
    network = network_of(scenario, data_root)
    sha256 = weights_sha256(network, data_root)
    for what, now in (("data_sha256", network.data_sha256), ("weights_sha256", sha256)):
        if row[what] != now:
            kind = what.removesuffix("_sha256")
            raise UserError(f"trial {row['trial']}: the {kind} here are not the record's ({what} differs)")
    reads = registry.attacks.make(row["attack"]).reads
    start = row["sample"] // STACK[reads] * STACK[reads]
    chunk = Chunk(scenario, network, sha256, reads, start, start + row["stack"], (row["attack"],))
    context = Context(header.grid, header.grid_hash, header.seed, data_root, row["device"], commit())
    (_, rows), *_ = InProcess().rows([chunk], context)
    again = rows[row["sample"] - start]
    if again.trial != row["trial"]:
        revisions = ("attack_revision", "defense_revision", "protocol_version")
        before, after = ([one[name] for name in revisions] for one in (row, asdict(again)))
        raise UserError(f"trial {row['trial']}: {', '.join(revisions)} were {before} and are now {after}")
    return row, again
