"""Runs a grid: plans it, has chunks worked on, writes their rows; the driver alone writes.

The same chunks give the same rows in this process and on Dask.
"""

from __future__ import annotations

import functools
import itertools
import subprocess
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from bench import registry, utility, work
from bench.cases import models
from bench.cases.client import FedSGDClient
from bench.cases.models import Network
from bench.cases.scenario import Grid, Scenario, cells, trained_with
from bench.errors import UserError
from bench.isolation import GIB, PARTS, Architecture, Attempt, Limits, attempts_here
from bench.report import record
from bench.report import utility as costs
from bench.report.record import Header, Keys, Record
from bench.report.utility import Utility
from bench.threat import Facts, Observation
from bench.work import Chunk, Context, Entrant, Finished, dataset_named, weights_sha256

STACK = {"head": 64, "all": 1}
"""Samples a chunk, by what its attacks read: heads are small and solved together."""


class Engine(Protocol):
    """Where the work is done: in process, or on Dask."""

    def weights(self, networks: Sequence[Network], root: Path | None) -> Iterator[tuple[Network, str]]:
        """Each network and its weights' hash, as they get ready."""
        ...

    def finish(self, chunks: Iterator[Chunk], count: int, context: Context) -> Iterator[Finished]:
        """The rows of so many chunks, as they get ready; the iterator isn't drawn faster than need be."""
        ...

    @property
    def workers(self) -> int:
        """How many processes work; 0: this one."""
        ...

    def utilities(self, asked: Sequence[utility.Asked], root: Path | None) -> Iterator[Utility]:
        """What each defense costs, as it gets ready."""
        ...


class InProcess:
    """Everything in this process, one chunk after the other: for debugging. No trial is isolated."""

    def weights(self, networks: Sequence[Network], root: Path | None) -> Iterator[tuple[Network, str]]:
        """One network after the other."""
        for network in networks:
            yield network, weights_sha256(network, root)

    workers = 0

    def finish(self, chunks: Iterator[Chunk], count: int, context: Context) -> Iterator[Finished]:
        """One chunk after the other, as long as each takes."""
        for chunk in chunks:
            yield work.finish([chunk], context, _attack_here, isolated=False)

    def rows(self, chunks: Iterable[Chunk], context: Context) -> Iterator[tuple[Chunk, list[Record]]]:
        """Each chunk with its rows."""
        for chunk in chunks:
            yield chunk, work.rows(chunk, context, _attack_here, isolated=False)

    def utilities(self, asked: Sequence[utility.Asked], root: Path | None) -> Iterator[Utility]:
        """One network after the other."""
        for one in asked:
            yield utility.utility(one, root)


def _attack_here(
    spec: str, seen: Sequence[Observation], seeds: Sequence[int], limits: Limits, architecture: Architecture
) -> list[Attempt]:
    return attempts_here(spec, seen, seeds)


@dataclass(frozen=True)
class Plan:
    """What a run will do, before it starts."""

    grid: Grid
    context: Context
    cells: dict[tuple[Scenario, str], int]
    networks: dict[Scenario, Network]
    entrants: dict[tuple[Scenario, str], Entrant]
    utilities: tuple[utility.Asked, ...] = ()
    whole: int = 0  # samples that the grid's file asks of a cell, at most

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
            whole=self.whole,
        )

    def chunks(self, weights: dict[Network, str]) -> Iterator[Chunk]:
        """The whole grid in chunks: a pure function of it."""
        groups: dict[tuple[Scenario, str, int], list[Entrant]] = {}
        for cell, samples in self.cells.items():
            entrant = self.entrants[cell]
            groups.setdefault((cell[0], entrant.reads, samples), []).append(entrant)
        for (scenario, reads, samples), entrants in groups.items():
            network, revision = self.networks[scenario], registry.defenses.revision(scenario.defense)
            for start in range(0, samples, STACK[reads]):
                stop = min(start + STACK[reads], samples)
                yield Chunk(
                    scenario, network, weights[network], revision, reads, start, stop, tuple(entrants)
                )


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
        if not models.is_cached(network):
            dataset_named(network.dataset, data_root).training_indices()
    for (scenario, _), samples in wanted_cells.items():
        work.check_data(scenario, samples, data_root)
    entrants = {
        (scenario, attack): entrant(attack, scenario, public_facts(scenario, networks[scenario], data_root))
        for scenario, attack in wanted_cells
    }
    limits = Limits(full.time_limit, full.memory_limit * GIB)
    context = Context(full.name, full.hash, full.seed, limits, data_root, device, commit())
    whole = max(block.samples for block in full.blocks)
    utilities = _utilities(wanted, data_root)
    return Plan(wanted, context, wanted_cells, networks, entrants, utilities, whole)


def _utilities(wanted: Grid, data_root: Path | None) -> tuple[utility.Asked, ...]:
    """Whose cost the grid asks for, none twice."""
    asked = {
        utility.Asked(
            scenario.dataset,
            dataset_named(scenario.dataset, data_root).sha256,
            scenario.model,
            scenario.weight_seed,
            scenario.defense,
            registry.defenses.revision(scenario.defense),
        ): None
        for scenario in trained_with(wanted)
    }
    for name in {one.dataset for one in asked}:
        dataset_named(name, data_root).training_indices()
    return tuple(asked)


@functools.lru_cache(maxsize=1024)
def public_facts(scenario: Scenario, network: Network, data_root: Path | None) -> Facts:
    """The public facts of a scenario, from the architecture alone."""
    untrained = replace(network, weights="untrained")
    return work.facts_of(
        scenario,
        dataset_named(network.dataset, data_root),
        FedSGDClient(work.model_of(untrained, data_root)),
    )


def entrant(attack: str, scenario: Scenario, facts: Facts) -> Entrant:
    """All that is to be known of an attack in a scenario, so that no worker needs its code.

    Raises:
        UserError: its own `skip` fails.
    """
    made = registry.attacks.make(attack)
    produces = frozenset(made.produces)
    check_declared(attack, produces, made.reads)
    granted = frozenset(made.uses) & facts.granted
    try:
        skip = made.skip(replace(facts, granted=granted))
    except Exception as error:
        raise UserError(f"{attack}: skip fails: {type(error).__name__}: {error}") from error
    if skip is not None and not (isinstance(skip, str) and skip):
        raise UserError(f"{attack}: skip returned {skip!r}; give a reason, or None where it applies")
    return Entrant(
        attack,
        registry.attacks.revision(attack),
        made.reads,
        produces,
        granted,
        skip,
        stacks=hasattr(made, "run_many"),
    )


def check_declared(attack: str, produces: frozenset[str], reads: str) -> None:
    """Raises a UserError where an attack says that it produces or reads what none can."""
    if not produces or produces - set(PARTS):
        raise UserError(f"{attack}: produces = {sorted(produces)} is not some of {', '.join(sorted(PARTS))}")
    if reads not in STACK:
        raise UserError(f"{attack}: reads = {reads!r} is neither 'head' nor 'all'")


def network_of(scenario: Scenario, data_root: Path | None) -> Network:
    """The weights that a scenario's clients hold."""
    defense = registry.defenses.make(scenario.defense)
    return Network(
        scenario.model,
        scenario.dataset,
        dataset_named(scenario.dataset, data_root).sha256,
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

    def advanced(self, part: Finished, workers: int) -> None:
        """These are on the disk; so many workers are there."""

    def measured(self, cost: Utility) -> None:
        """What a defense costs is on the disk."""


def execute(planned: Plan, engine: Engine, folder: Path, progress: Progress) -> None:
    """Runs what the folder lacks of the plan; every part is on the disk before the next is told of.

    Raises:
        UserError: the folder holds another grid.
    """
    with record.writing(folder) as writer:
        _check_grid(folder, writer.last_header, planned)
        writer.header(planned.header())
        weights: dict[Network, str] = {}
        for network, sha256 in engine.weights(
            list(dict.fromkeys(planned.networks.values())), planned.context.data_root
        ):
            frozen = planned.grid.weights_sha256.get(network.key, sha256)
            if sha256 != frozen:
                raise UserError(
                    f"{planned.grid.name} is frozen with other weights of {network.model}, "
                    f"{network.weights}, seed {network.weight_seed}: git checkout {models.COMMITTED}"
                )
            weights[network] = sha256
            progress.trained(network)
        counts = array("I")  # per chunk: what is lacking is found twice, which is cheaper than to keep it
        trials = 0
        for chunk in planned.chunks(weights):
            lacking = _lacking(chunk, planned.context, writer.done)
            counts.append(len(lacking))
            trials += sum(part.trials for part in lacking)
        progress.started(planned.trials - trials, planned.trials)
        pending = (
            part
            for chunk, count in zip(planned.chunks(weights), counts, strict=True)
            if count
            for part in _lacking(chunk, planned.context, writer.done)
        )
        for part in engine.finish(pending, sum(counts), planned.context):
            there = writer.done.having(part.trials)
            writer.lines(line for line, old in zip(part.lines, there, strict=True) if not old)
            progress.advanced(part, engine.workers)
        measured = {row["key"] for row in costs.read(folder)}
        for cost in engine.utilities(
            [one for one in planned.utilities if one.key not in measured], planned.context.data_root
        ):
            costs.append(folder, cost)
            progress.measured(cost)


def _check_grid(folder: Path, last: Header | None, planned: Plan) -> None:
    if last is not None and last.grid_hash != planned.context.grid_hash:
        raise UserError(
            f"{folder} holds another grid ({last.grid}, {last.grid_hash[:8]}); "
            f"choose another --out for {planned.grid.name} ({planned.context.grid_hash[:8]})"
        )


def _lacking(chunk: Chunk, context: Context, done: Keys) -> list[Chunk]:
    """What the chunk lacks, in chunks. A stack of which a sample is missing is repeated whole."""
    if not len(done):
        return [chunk]
    whole, parts = [], []
    for entrant in chunk.entrants:
        missing = [not there for there in done.having(chunk.keys(context, entrant))]
        if all(missing) or (entrant.stacks and any(missing)):
            whole.append(entrant)
            continue
        for is_missing, group in itertools.groupby(
            zip(missing, chunk.attacked, strict=True), lambda pair: pair[0]
        ):
            if is_missing:
                samples = [sample for _, sample in group]
                parts.append(replace(chunk, entrants=(entrant,), only=(samples[0], samples[-1] + 1)))
    return [*([replace(chunk, entrants=tuple(whole))] if whole else []), *parts]


def recorded_chunk(row: dict[str, Any], header: Header, data_root: Path | None) -> tuple[Chunk, Context]:
    """The stack that a recorded trial was part of, with its attack alone; no limits.

    Raises:
        UserError: data or weights are no longer those of the record.
    """
    axes = header.scenarios[row["scenario"]]
    scenario = Scenario(**{**axes, "knowledge": tuple(axes["knowledge"])})
    check_device(row["device"])
    network = network_of(scenario, data_root)
    sha256 = weights_sha256(network, data_root)
    for what, now in (("data_sha256", network.data_sha256), ("weights_sha256", sha256)):
        if row[what] != now:
            kind = what.removesuffix("_sha256")
            raise UserError(f"trial {row['trial']}: the {kind} here are not the record's ({what} differs)")
    again_by = entrant(row["attack"], scenario, public_facts(scenario, network, data_root))
    start = row["sample"] // STACK[again_by.reads] * STACK[again_by.reads]
    chunk = Chunk(
        scenario,
        network,
        sha256,
        registry.defenses.revision(scenario.defense),
        again_by.reads,
        start,
        start + row["stack"],
        (again_by,),
    )
    unlimited = Limits(float("inf"))
    context = Context(
        header.grid, header.grid_hash, header.seed, unlimited, data_root, row["device"], commit()
    )
    return chunk, context


def rerun(folder: Path, trial: str, data_root: Path | None) -> tuple[dict[str, Any], Record]:
    """A recorded trial's row, and the row that the same stack gives now, in this process.

    `trial` may be the beginning of a key, where it is the only one.

    Raises:
        UserError: no such trial, or data, weights or revisions are no longer those of the record.
    """
    runs = [record.read(file) for file in record.files(folder)]
    matching = [(row, ran) for ran in runs for row in ran.rows if row["trial"].startswith(trial)]
    if len(matching) != 1:
        raise UserError(
            f"{folder} has {len(matching)} trials whose key begins with {trial!r}; "
            "a row's `trial` in records.jsonl is its key"
        )
    ((row, ran),) = matching
    chunk, context = recorded_chunk(row, ran.header_of(row), data_root)
    ((_, rows),) = InProcess().rows([chunk], context)
    again = rows[row["sample"] - chunk.start]
    if again.trial != row["trial"]:
        revisions = ("attack_revision", "defense_revision", "protocol_version")
        before, after = ([one[name] for name in revisions] for one in (row, asdict(again)))
        raise UserError(f"trial {row['trial']}: {', '.join(revisions)} were {before} and are now {after}")
    return row, again
