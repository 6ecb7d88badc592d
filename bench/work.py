"""What a worker does with a chunk: its clients observe, attacks attempt, metrics judge.

A chunk is a scenario and a range of samples, a pure function of the grid. Nothing here imports an attack:
what is to be known of one was looked up by the driver, so that no attack's code meets the truth.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import json
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench import registry
from bench.cases import data, models, protocol
from bench.cases.client import FedSGDClient
from bench.cases.models import Network
from bench.cases.salt import salted
from bench.cases.scenario import Scenario, digest, seed
from bench.errors import UserError
from bench.isolation import PARTS, Architecture, Attempt, Limits
from bench.metrics import UNANSWERED, stacks
from bench.metrics.formats import label_formats
from bench.metrics.labels import lam_error
from bench.report.record import SCENARIO, Record, line
from bench.threat import Batch, Facts, Knowledge, Observation, Outcome, Reconstruction, Update, grant, mask

PROTOCOL_VERSION = 1
"""Raised when the same trial may give other numbers because client, data or metrics changed."""

POOL = 64
"""How many other examples of its own a client holds for defenses that need a partner."""

IDENTIFIED_AMONG = 64
"""Among how many other images of its split a reconstruction has to tell its own."""

AUXILIARY = 256
"""How many public examples an attacker may be granted: of the split that no attacked example is from."""


@dataclass(frozen=True)
class Context:
    """What all chunks of a run share.

    Attributes:
        grid: the grid's name.
        grid_hash: over all that the grid's file says.
        grid_seed: from which every batch's seed follows.
        limits: what a trial may take.
        data_root: where data sets lie.
        device: where clients and attacks compute.
        commit: of the suite.
        salt: where it isn't empty, examples are drawn anew by it, and changed in private: see `cases.salt`.
        hidden: files and folders that an attack's process can't see, which is then a sandbox.
    """

    grid: str
    grid_hash: str
    grid_seed: int
    limits: Limits
    data_root: Path | None
    device: str
    commit: str
    salt: str = ""
    hidden: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Entrant:
    """What is to be known of an attack in a scenario, without its code: `spec` is canonical.

    `granted`: the names of Knowledge that the scenario grants and it uses; `skip`: why it doesn't apply;
    `stacks`: whether it solves several observations together;
    `code`: the spec under which its process finds it, where that isn't `spec` itself.
    """

    spec: str
    revision: str
    reads: str
    produces: frozenset[str]
    granted: frozenset[str]
    skip: str | None
    stacks: bool
    code: str | None = None

    @property
    def knowledge(self) -> str:
        """What it is told, as records say it."""
        return ",".join(sorted(self.granted))


def _digests(before: Sequence[Any], each: Sequence[str | int], after: Sequence[Any]) -> list[str]:
    """`digest(*before, one, *after)` for each number or digest, of which millions are made."""
    mark = "\0"  # JSON escapes it: nothing else looks like this
    head, tail = json.dumps([*before, mark, *after], ensure_ascii=False, sort_keys=True).split(
        json.dumps(mark)
    )
    texts = [f'"{one}"' if isinstance(one, str) else str(one) for one in each]
    return [hashlib.sha256(f"{head}{text}{tail}".encode()).hexdigest()[:24] for text in texts]


@dataclass(frozen=True)
class Chunk:
    """A scenario, a range of samples, and the attacks on them: what is observed together.

    `only`: of what is observed, the samples that are attacked (all by default); an attack that solves whole
    stacks is never given less than all.
    """

    scenario: Scenario
    network: Network
    weights_sha256: str
    defense_revision: str
    reads: str
    start: int
    stop: int
    entrants: tuple[Entrant, ...]
    only: tuple[int, int] | None = None

    @property
    def samples(self) -> range:
        """What it observes."""
        return range(self.start, self.stop)

    @property
    def attacked(self) -> range:
        """What it attacks."""
        return range(*self.only) if self.only else self.samples

    @property
    def trials(self) -> int:
        """How many rows it gives."""
        return len(self.entrants) * len(self.attacked)

    @functools.cached_property
    def _observation_keys(self) -> list[str]:
        """One for each attacked sample."""
        scenario = digest(asdict(self.scenario), self.network.data_sha256, self.weights_sha256)
        return _digests([scenario], self.attacked, [])

    def keys(self, context: Context, entrant: Entrant) -> list[str]:
        """The keys of an attack's trials, one for each attacked sample."""
        after = [
            PROTOCOL_VERSION, self.defense_revision, entrant.knowledge, entrant.spec, entrant.revision
        ]  # fmt: skip
        return _digests([context.grid_hash], self._observation_keys, after)

    def seeds(self, entrant: Entrant) -> list[int]:
        """The seeds of an attack's own generators, one for each attacked sample."""
        found = _digests([], self._observation_keys, [entrant.spec, entrant.revision])
        return [int(one[:16], 16) >> 1 for one in found]  # as `seed`

    def halves(self) -> tuple[Chunk, ...]:
        """Two chunks with the same trials, by attacks, else by attacked samples; itself where it is one."""
        if len(self.entrants) > 1:
            middle = len(self.entrants) // 2
            return tuple(
                replace(self, entrants=part) for part in (self.entrants[:middle], self.entrants[middle:])
            )
        return self.parted(max(1, len(self.attacked) // 2))

    def parted(self, first: int) -> tuple[Chunk, ...]:
        """The chunk with the first so many samples of its one attack, and with the others, if any."""
        (entrant,) = self.entrants
        start, stop = self.attacked.start, self.attacked.stop
        if entrant.stacks or entrant.skip is not None or start + first >= stop:
            return (self,)
        return replace(self, only=(start, start + first)), replace(self, only=(start + first, stop))


@dataclass(frozen=True, eq=False)
class Truth(stacks.Truth):
    """What only metrics meet, of one sample."""

    u: Tensor  # (N, K), the probabilities less the released labels, float64
    formats: frozenset[str]  # of the released labels


@dataclass(frozen=True, eq=False)
class Observed:
    """A chunk's observations, with all that the grid grants, and the truth behind each."""

    observations: tuple[Observation, ...]
    truths: tuple[Truth, ...]
    architecture: Architecture


Attack = Callable[[str, Sequence[Observation], Sequence[int], Limits, Architecture], list[Attempt]]
"""Canonical spec, observations, seeds, limits of a trial, their model -> an attempt a sample."""


def rows(chunk: Chunk, context: Context, attack: Attack, isolated: bool) -> list[Record]:
    """All rows of a chunk."""
    parts = [replace(chunk, entrants=(entrant,)) for entrant in chunk.entrants]
    return [row for part in parts for row in rows_of_one(part, context, attack, isolated)]


def rows_of_one(chunk: Chunk, context: Context, attack: Attack, isolated: bool) -> list[Record]:
    """The rows of a chunk with one attack.

    Where the attack doesn't apply it isn't run, nor is a client for nobody; what is observed is kept, so
    that all attacks on it share one gradient.
    """
    (entrant,) = chunk.entrants
    if entrant.skip is not None:
        skipped = Attempt(Reconstruction(Outcome.SKIPPED), entrant.skip)
        return judge(chunk, context, entrant, [skipped] * len(chunk.attacked), None, isolated)
    observed = _observed(replace(chunk, entrants=(), only=None), context)
    first = chunk.attacked.start - chunk.start
    mine = slice(first, first + len(chunk.attacked))
    views = _for_attack(observed.observations[mine], entrant)
    spec, seeds = entrant.code or entrant.spec, chunk.seeds(entrant)
    answers = attack(spec, views, seeds, context.limits, observed.architecture)
    return judge(chunk, context, entrant, answers, observed.truths[mine], isolated)


@dataclass(frozen=True)
class Finished:
    """What came of some chunks.

    Attributes:
        trials: the keys of its rows.
        lines: the rows, as records hold them.
        failures: how many of them crashed, ran out of time or of memory.
        doing: what was attacked last, for people.
        left: what it didn't come to.
        seconds: how long it took.
    """

    trials: tuple[str, ...]
    lines: tuple[str, ...]
    failures: int
    doing: str
    left: tuple[Chunk, ...]
    seconds: float


FAILURES = frozenset({"crashed", "timeout", "out_of_memory"})
"""Outcomes that somebody should look at."""

CHEAP = 0.1
"""What share of the time a second look at the same observation may cost."""


def finish(
    chunks: Sequence[Chunk], context: Context, attack: Attack, isolated: bool, seconds: float = math.inf
) -> Finished:
    """Works on chunks, one after the other, and hands back what is left after so many seconds.

    At least one trial, or stack, is done. A chunk that was begun is handed back only where observing it
    again costs next to nothing beside what its attacks take.
    """
    started = time.monotonic()
    made: list[Record] = []
    left, begun, observing = deque(chunks), False, 0.0
    while left:
        passed = time.monotonic() - started
        if made and passed > seconds and (not begun or observing < CHEAP * passed):
            break
        chunk = left.popleft()
        one, *others = (replace(chunk, entrants=(entrant,)) for entrant in chunk.entrants)
        (entrant,) = one.entrants
        one, *rest = one.parted(_affordable(entrant, seconds - passed, len(one.attacked)))
        if entrant.skip is None:
            observing = _seconds_of(lambda: _observed(replace(one, entrants=(), only=None), context))  # noqa: B023
        attacking = _seconds_of(lambda: made.extend(rows_of_one(one, context, attack, isolated)))  # noqa: B023
        _SECONDS[entrant.spec] = attacking / len(one.attacked)
        remaining = [*rest, *others]
        begun = bool(remaining)
        left.extendleft(reversed(remaining))
    return finished(made, tuple(left), time.monotonic() - started)


_SECONDS: dict[str, float] = {}
"""What a trial of each attack took in this process the last time."""


def _affordable(entrant: Entrant, seconds: float, most: int) -> int:
    """How many trials of an attack fit into so many seconds; one where nothing is known of it."""
    if seconds == math.inf:
        return most
    each = _SECONDS.get(entrant.spec)
    return 1 if each is None else max(1, int(seconds / max(each, 1e-9)))


def _seconds_of(call: Callable[[], object]) -> float:
    started = time.monotonic()
    call()
    return time.monotonic() - started


def finished(rows: Sequence[Record], left: tuple[Chunk, ...], seconds: float) -> Finished:
    """Rows as they are sent to whoever writes them."""
    last = rows[-1]
    return Finished(
        tuple(row.trial for row in rows),
        tuple(map(line, rows)),
        sum(row.outcome in FAILURES for row in rows),
        " | ".join(spec.partition("(")[0] for spec in (last.attack, last.model, last.defense)),
        left,
        seconds,
    )


# --- the client's side ------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def dataset_named(name: str, root: Path | None) -> data.Dataset:
    """The data set, loaded once a process."""
    return data.load(name, root)


@functools.lru_cache(maxsize=1)
def _observed(chunk: Chunk, context: Context) -> Observed:
    """As `observe`; a client that fails is nobody's row.

    Raises:
        UserError: the client fails.
    """
    _observed.cache_clear()  # what was observed before makes room
    try:
        return observe(chunk, context)
    except UserError:
        raise
    except Exception as error:
        scenario = chunk.scenario
        where = f"{scenario.dataset}, {scenario.model}, {scenario.protocol}, defense {scenario.defense}"
        raise UserError(
            f"the client of {where} fails: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error


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
    if _sha256(chunk.network, context.data_root) != chunk.weights_sha256:
        raise UserError(f"{scenario.model} has other weights on this machine; share one LEAKBENCH_CACHE")
    client = _client(chunk.network, context.data_root, context.device, scenario.batch_norm)
    defense = registry.defenses.make(scenario.defense)
    talk = protocol.make(scenario.protocol)

    drawn = [seed(context.grid_seed, *scenario.batch_axes, sample) for sample in chunk.samples]
    changes = "change_batch" in defense.stages()
    needs_pool = changes or "gradient" in defense.stages()
    chosen, pools = zip(
        *(
            _batch_and_pool(dataset, scenario, talk, sample, batch_seed, needs_pool)
            for sample, batch_seed in zip(chunk.samples, drawn, strict=True)
        ),
        strict=True,
    )
    private = _split(dataset.batch(torch.cat(chosen), context.device), len(chosen))
    released, updates = [], []
    random_features = {"prepare", "gradient"} <= defense.stages()  # a bottleneck draws noise with each
    drawn_features: list[Tensor] = []
    stacked = (
        chunk.reads == "head"
        and scenario.protocol == protocol.FedSGD.name
        and "gradient" not in defense.stages()
        and defense.is_tensorwise()
    )
    rngs = [torch.Generator(device="cpu").manual_seed(seed(one, scenario.defense)) for one in drawn]
    for batch, pool, rng in zip(private, pools, rngs, strict=True):
        let_out = _split(batch, talk.clients)
        holder = client
        if needs_pool:
            others = dataset.batch(pool, context.device)
            holder = replace(client, pool=others)
        if changes:
            let_out = [defense.change_batch(one, others, rng) for one in let_out]
        released.append(_joined(let_out))
        if not stacked:
            with client.head_inputs() as passed:
                updates.append(talk.updates(holder, defense, let_out, rng))
            if random_features:
                # What is attacked is the last round's update; of several local steps the first is on the
                # public weights.
                a_round = len(passed) // len(updates[-1])
                drawn_features.append(torch.cat(passed[-a_round:][: talk.clients]))

    if random_features:
        features = torch.stack(drawn_features)
    else:
        features = client.features(torch.stack([batch.images for batch in released]))  # (M, N, D)
    with torch.no_grad():
        probabilities = client.model.get_submodule(client.head)(features).softmax(-1)
    labels = torch.stack([batch.soft_labels for batch in released])  # (M, N, K)
    each = iter(label_formats(labels.flatten(0, 1)))
    formats = [frozenset(itertools.islice(each, labels.shape[1])) for _ in released]
    if stacked:
        heads = client.head_updates(features, labels)
        plain = [{name: value[m] for name, value in heads.items()} for m in range(len(released))]
        updates = [(defense.change_update(client, one, rng),) for one, rng in zip(plain, rngs, strict=True)]
    facts = _facts_of(scenario, dataset, client)
    auxiliary = _auxiliary(dataset, scenario, context.device)
    head = client.head  # looked up once
    observations = [
        Observation(
            client.model,
            sent[-1],
            head,
            facts,
            _granted(scenario, talk, batch.soft_labels, named, auxiliary),
            sent[:-1],
        )
        for sent, batch, named in zip(updates, released, formats, strict=True)
    ]
    architecture = Architecture(
        scenario.model,
        facts.image_shape,
        facts.num_classes,
        chunk.network.defense,
        scenario.batch_norm,
        chunk.weights_sha256,
    )
    u = probabilities.double() - labels.double()
    pooled = [  # where somebody may see images
        _pool_of_images(dataset, scenario, indices, context.device) if chunk.reads == "all" else None
        for indices in chosen
    ]
    truths = tuple(
        Truth(*truth, pool=pool)
        for *truth, pool in zip(released, private, features, u, formats, pooled, strict=True)
    )
    return Observed(tuple(observations), truths, architecture)


def _pool_of_images(dataset: data.Dataset, scenario: Scenario, chosen: Tensor, device: str) -> Tensor:
    """(P, C, H, W), the first other images of the split that is attacked."""
    own = dataset.training if scenario.members == "training" else dataset.held_out
    others = own[~torch.isin(own, chosen)][:IDENTIFIED_AMONG]
    return dataset.batch(others, device).images


@functools.lru_cache(maxsize=4)
def _sha256(network: Network, root: Path | None) -> str:
    return models.sha256(model_of(network, root))


@functools.lru_cache(maxsize=4)
def _client(network: Network, root: Path | None, device: str, batch_norm: str) -> FedSGDClient:
    return FedSGDClient.with_batch_norm(copy.deepcopy(model_of(network, root)).to(device), batch_norm)


def _split(batch: Batch, count: int) -> list[Batch]:
    """So many batches of the same size."""
    images, soft_labels = batch.images.chunk(count), batch.soft_labels.chunk(count)
    return [Batch(*parts) for parts in zip(images, soft_labels, strict=True)]


def _batch_and_pool(
    dataset: data.Dataset,
    scenario: Scenario,
    talk: protocol.Protocol,
    sample: int,
    batch_seed: int,
    needs_pool: bool,
) -> tuple[Tensor, Tensor]:
    """The indices of a sample's examples, of all its clients, and of what else the clients hold."""
    members, draw = scenario.members == "training", np.random.default_rng(batch_seed)
    size = scenario.batch_size * talk.clients
    chosen = data.attacked_batch(dataset, members, scenario.classes, sample, size, draw)
    if not needs_pool:
        return chosen, chosen[:0]
    own = _own(dataset, members)
    others = np.delete(own, np.searchsorted(own, chosen.numpy()))
    pool = draw.choice(others, size=min(POOL, len(others)), replace=False)
    return chosen, torch.as_tensor(pool, device="cpu")


@functools.lru_cache(maxsize=4)
def _own(dataset: data.Dataset, members: bool) -> NDArray[np.int64]:
    """All that the clients hold, sorted."""
    return np.unique((dataset.training if members else dataset.held_out).numpy())


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


@functools.lru_cache(maxsize=4)
def _facts_of(scenario: Scenario, dataset: data.Dataset, client: FedSGDClient) -> Facts:
    return facts_of(scenario, dataset, client)


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
    scenario: Scenario,
    talk: protocol.Protocol,
    soft_labels: Tensor,
    formats: frozenset[str],
    auxiliary: Batch | None,
) -> Knowledge:
    """All that the grid grants; an attack gets what it uses of it."""
    local = talk if isinstance(talk, protocol.FedAvg) else None
    everything = Knowledge(
        label_format=next(iter(formats)) if len(formats) == 1 else None,
        soft_labels=soft_labels,
        local_steps=None if local is None else local.steps,
        local_lr=None if local is None else local.lr,
        auxiliary=auxiliary,
        defense=scenario.defense,
    )
    return grant(everything, frozenset(scenario.knowledge))


def _for_attack(observations: Sequence[Observation], entrant: Entrant) -> list[Observation]:
    """A chunk's observations as an attack may see them: masked to what it reads, granted what it uses."""
    first = observations[0]
    facts = replace(first.facts, granted=entrant.granted)

    def masked(update: Update) -> Update:
        return mask(update, first.head, entrant.reads)

    return [
        Observation(
            one.model,
            masked(one.update),
            one.head,
            facts,
            grant(one.knowledge, entrant.granted),
            tuple(map(masked, one.later_updates)),
        )
        for one in observations
    ]


# --- the judge's side -------------------------------------------------------------------------------------


def judge(
    chunk: Chunk,
    context: Context,
    entrant: Entrant,
    attempts: Sequence[Attempt],
    truths: Sequence[Truth] | None,
    isolated: bool,
) -> list[Record]:
    """The rows of one attack on a chunk; without `truths` nothing was returned that could be scored."""
    scenario = chunk.scenario
    common: dict[str, Any] = {
        "grid": context.grid,
        "scenario": scenario.key,
        **{axis: getattr(scenario, axis) for axis in SCENARIO},
        "knowledge": entrant.knowledge,
        "defense_revision": chunk.defense_revision,
        "attack": entrant.spec,
        "attack_revision": entrant.revision,
        "stack": len(chunk.samples),
        "isolated": isolated,
        "protocol_version": PROTOCOL_VERSION,
        "commit": context.commit,
        "torch": torch.__version__,
        "device": context.device,
        "data_sha256": chunk.network.data_sha256,
        "weights_sha256": chunk.weights_sha256,
    }
    keys, metrics = chunk.keys(context, entrant), _metrics(attempts, entrant, truths)
    return [
        Record(
            trial=trial,
            sample=sample,
            outcome=one.reconstruction.outcome.name.lower(),
            reason=one.reason,
            seconds=one.seconds,
            peak_bytes=one.peak_bytes,
            **common,
            **found,
        )
        for trial, sample, one, found in zip(keys, chunk.attacked, attempts, metrics, strict=True)
    ]


def _metrics(
    attempts: Sequence[Attempt], entrant: Entrant, truths: Sequence[Truth] | None
) -> list[dict[str, Any]]:
    if entrant.skip is not None:
        return [{} for _ in attempts]
    if truths is None:
        failed = {metric: value for part in entrant.produces for metric, value in UNANSWERED[part].items()}
        return [failed for _ in attempts]
    answers = [_beside(one.reconstruction, truth) for one, truth in zip(attempts, truths, strict=True)]
    scored = stacks.scores(answers, truths, entrant.produces)
    return [
        columns | _about_labels(answer, truth)
        for columns, answer, truth in zip(scored, answers, truths, strict=True)
    ]


def _beside(answer: Reconstruction, truth: Truth) -> Reconstruction:
    """On the truth's device: what an attack's process sends comes on the CPU."""
    device = truth.released.images.device
    moved = {
        part: value.to(device)
        for part in PARTS
        if (value := getattr(answer, part)) is not None and value.device != device
    }
    return replace(answer, **moved) if moved else answer


def _about_labels(answer: Reconstruction, truth: Truth) -> dict[str, Any]:
    """`lam_error`, relative to the true λ = 1/(p_r - y_r), and `format_found`, where an attack names them."""
    found: dict[str, Any] = {}
    lam, row = answer.notes.get("lam"), answer.notes.get("row")
    classes = range(truth.u.shape[1])
    if len(truth.released) == 1 and isinstance(lam, float) and isinstance(row, int) and row in classes:
        u = float(truth.u[0, row])
        error = lam_error(lam, 1 / u if u else math.inf)
        found["lam_error"] = error if math.isfinite(error) else None
    if answer.notes.get("label_format"):
        found["format_found"] = truth.formats == {answer.notes["label_format"]}
    return found
