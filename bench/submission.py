"""`leakbench submit`: one attack from one file, on a grid, isolated; and what a pull request needs of it.

The attack's code is copied alone into an empty folder and meets the suite in sandboxes only: the process
that observes, judges and writes never imports it. Records carry the attack's own name, as if it lay in
`attacks/` already, and beside them lies a manifest that says how they were made.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import registry, run, sandbox, work
from bench.cases import data
from bench.cases.scenario import Grid, Scenario, cells, grid_names, load_grid, replaced, seed
from bench.errors import UserError, nearest
from bench.isolation import AttackProcess
from bench.report import record
from bench.report.leaderboard import CHANCE
from bench.report.record import Header, Record
from bench.run import InProcess, Plan
from bench.threat import Facts, Knowledge
from bench.work import Chunk, Context, Entrant, Finished

SCHEMA = 1
"""Raised when the manifest's entries change their meaning."""

GRIDS = {"images": "images-v1", "soft_labels": "labels-v1", "features": "labels-v1"}
"""What an attack produces -> the grid of its track; the first that fits."""

NAME = re.compile(r"[a-z][a-z0-9_]{0,60}")
"""What an attack may be named: records lie in a folder of that name."""

GRANTABLE = frozenset(field.name for field in dataclasses.fields(Knowledge))


@dataclass(frozen=True)
class Submitted:
    """An attack as it describes itself, checked; its code lies alone in a folder.

    Attributes:
        spec: its name and parameters, as records have them.
        code: the spec under which a sandbox finds it.
        label: the name of its folder of records.
        file: where it came from, as it was given.
        class_name: in that file.
        sha256: of the file.
    """

    spec: str
    code: str
    label: str
    file: str
    class_name: str
    sha256: str
    name: str
    title: str
    revision: str
    paper: str
    threat_model: str
    produces: tuple[str, ...]
    reads: str
    uses: tuple[str, ...]
    stacks: bool

    @property
    def grid(self) -> str:
        """The grid of its track."""
        return next(grid for part, grid in GRIDS.items() if part in self.produces)


# --- the attack -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def alone(path: Path, name: str) -> Iterator[Path]:
    """A copy of the file, as `name`, in a folder that holds nothing else."""
    with tempfile.TemporaryDirectory(prefix="leakbench-") as folder:
        copy = Path(folder).resolve() / name
        try:
            shutil.copyfile(path, copy)
        except OSError as error:
            raise UserError(f"{path} can't be read: {error.strerror}; give FILE.py:CLASS") from None
        yield copy


def parsed(target: str) -> tuple[Path, registry.Spec]:
    """The file, and the spec without its path: `Class(parameters)`.

    Raises:
        UserError: it is no FILE.py:CLASS.
    """
    spec = registry.parse(target)
    path, _, class_name = spec.target.rpartition(":")
    if not path.endswith(".py") or not class_name.isidentifier():
        raise UserError(f"{target!r} can't be submitted; give FILE.py:CLASS, as in my_attack.py:MyAttack")
    if not Path(path).expanduser().is_file():
        raise UserError(f"{path} is not there; give FILE.py:CLASS")
    return Path(path).expanduser(), registry.Spec(class_name, spec.parameters)


def ask(copy: Path, spec: registry.Spec, file: str, facts: Sequence[Facts]) -> tuple[Submitted, list[Any]]:
    """What an attack says of itself, and why it skips each of the facts; asked in a sandbox.

    Raises:
        UserError: it can't be imported or made, or says what no attack may.
    """
    try:
        said = sandbox.described(f"{copy}:{spec}", facts, [])
        return _checked(said, copy, spec, file, len(facts))
    except UserError:
        raise
    except (KeyError, TypeError) as error:
        raise UserError(f"{file}:{spec.target} describes itself as no attack does: {error!r}") from None
    except ValueError as error:
        raise UserError(f"{file}:{spec.target}: {str(error).replace(str(copy), file)}") from None


def _checked(
    said: dict[str, Any], copy: Path, spec: registry.Spec, file: str, count: int
) -> tuple[Submitted, list[Any]]:
    """A description, believed as far as an attack may say it."""
    name, produces, uses = str(said["name"]), frozenset(said["produces"]), frozenset(said["uses"])
    if not NAME.fullmatch(name):
        raise UserError(f"{file}: name = {name!r} is no name: lower-case letters, digits and _")
    run.check_declared(file, produces, said["reads"])
    if uses - GRANTABLE:
        raise UserError(
            f"{file}: uses {sorted(uses - GRANTABLE)[0]!r}{nearest(min(uses - GRANTABLE), GRANTABLE)}"
        )
    if "soft_labels" in produces & uses:
        raise UserError(f"{file}: soft_labels can't be both told and produced: name them in uses or produces")
    if said["threat_model"] not in tuple("ABCDEFGH"):
        raise UserError(f"{file}: threat_model = {said['threat_model']!r} is no letter from A to H")
    reasons = [None if one is None else str(one)[:300] for one in said["skips"]]
    revision = re.sub(r"@[0-9a-f]{12}", "", str(said["revision"]))
    if not re.fullmatch(r"\d{1,6}(/[\w@.+-]{1,40})*", revision) or len(reasons) != count:
        raise UserError(f"{file}: revision = {revision!r} is no whole number")
    digest = hashlib.sha256(copy.read_bytes()).hexdigest()
    _not_taken(name, digest, file)
    full, short = (registry.parse(str(said[kind])).parameters for kind in ("spec", "short"))
    mine = Submitted(
        spec=str(registry.Spec(name, full)),
        code=f"{copy}:{registry.Spec(spec.target, full)}",
        label=re.sub(r"[^A-Za-z0-9_.=-]+", "-", str(registry.Spec(name, short)).replace("'", "")).strip("-"),
        file=file,
        class_name=spec.target,
        sha256=digest,
        name=name,
        title=str(said["title"])[:100],
        revision=revision,
        paper=str(said["paper"])[:300],
        threat_model=said["threat_model"],
        produces=tuple(sorted(produces)),
        reads=said["reads"],
        uses=tuple(sorted(uses)),
        stacks=said["stacks"] is True,
    )
    return mine, reasons


def _not_taken(name: str, sha256: str, file: str) -> None:
    """Raises a UserError where another attack of the suite has the name."""
    if name not in registry.attacks.names():
        return
    own = built_in(name)
    if own is None or hashlib.sha256(own.read_bytes()).hexdigest() != sha256:
        raise UserError(f"{file}: the name {name!r} is taken by another attack; choose one of your own")


def built_in(name: str) -> Path | None:
    """The file of the suite's own attack of that name."""
    places = [registry.ROOT / "attacks" / track / f"{name}.py" for track in ("labels", "images")]
    return next((place for place in places if place.is_file()), None)


# --- the plan ---------------------------------------------------------------------------------------------


def plan(
    copy: Path,
    spec: registry.Spec,
    file: str,
    grid: Grid,
    samples: int | None,
    data_root: Path | None,
    device: str,
) -> tuple[Submitted, Plan]:
    """The attack, and the grid with it in the place of its own ones; chance stays where it was.

    Raises:
        UserError: as `run.plan`; the attack's `skip` fails.
    """
    full = grid  # what records say that they are of
    blocks = [
        block.model_copy(update={"samples": min(block.samples, samples or block.samples), "utility": False})
        for block in grid.blocks
    ]
    grid = grid.model_copy(update={"blocks": blocks})
    base = run.plan(full, replaced(grid, [CHANCE]), data_root, device)
    by_chance = grid.model_copy(
        update={"blocks": [block for block in grid.blocks if CHANCE in block.attacks]}
    )
    kept = set(cells(replaced(by_chance, [CHANCE])) if by_chance.blocks else ())
    facts = [run.public_facts(scenario, base.networks[scenario], data_root) for scenario, _ in base.cells]
    mine, skips = ask(copy, spec, file, facts)

    wanted: dict[tuple[Scenario, str], int] = {}
    entrants: dict[tuple[Scenario, str], Entrant] = {}
    asked = asked_of(grid, mine.spec)
    for ((scenario, chance), count), one, skip in zip(base.cells.items(), facts, skips, strict=True):
        if scenario not in asked:
            continue
        wanted[scenario, mine.spec] = asked[scenario]
        entrants[scenario, mine.spec] = Entrant(
            mine.spec,
            mine.revision,
            mine.reads,
            frozenset(mine.produces),
            frozenset(mine.uses) & one.granted,
            skip,
            stacks=mine.stacks,
            code=mine.code,
        )
        if (scenario, chance) in kept and mine.spec != chance:
            wanted[scenario, chance] = count
            entrants[scenario, chance] = base.entrants[scenario, chance]
    context = replace(base.context, hidden=hidden(grid, data_root))
    return mine, replace(base, context=context, cells=wanted, entrants=entrants)


def asked_of(grid: Grid, spec: str) -> dict[Scenario, int]:
    """Scenario -> samples: of an attack that the grid itself names, its own cells; of any other, all."""
    own = {scenario: count for (scenario, attack), count in cells(grid).items() if attack == spec}
    return own or {scenario: count for (scenario, _), count in cells(replaced(grid, [CHANCE])).items()}


def hidden(grid: Grid, data_root: Path | None) -> tuple[str, ...]:
    """What an attack on this grid must not see: the user's data sets, and those that the grid names."""
    named = [
        dataset.partition("?")[0].partition(":")[2]
        for block in grid.blocks
        for dataset in block.dataset
        if dataset.partition(":")[0] in data.FILES
    ]
    root = data.data_folder(data_root)
    places = [root, *(Path(path).expanduser() for path in named), *(root / path for path in named)]
    return tuple(str(place.resolve()) for place in places if place.exists())


def salted(planned: Plan, salt: str) -> Plan:
    """The same cells on fresh, privately changed examples."""
    context = replace(planned.context, salt=salt, grid_seed=seed(planned.context.grid_seed, salt))
    return replace(planned, context=context)


class Sandboxed(InProcess):
    """Everything in this process but the attacks: those sit in one sandbox."""

    def __init__(self, hidden: Sequence[str]) -> None:
        self._attacks = AttackProcess(hidden)

    def __enter__(self) -> Sandboxed:
        return self

    def __exit__(self, *_: object) -> None:
        self._attacks.stop()

    def finish(self, chunks: Iterator[Chunk], count: int, context: Context) -> Iterator[Finished]:
        """One chunk after the other."""
        for chunk in chunks:
            yield work.finish([chunk], context, self._attacks.attempts, isolated=True)


def engine(workers: int, context: Context) -> Any:
    """Where a submission runs: in `workers` processes, each with a sandbox beside it."""
    if workers <= 1:
        return Sandboxed(context.hidden or ())
    from bench.cluster import DaskEngine

    return DaskEngine(workers, None)


# --- what is handed in ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Manifest:
    """How records were made, beside them as `rN.json`.

    Attributes:
        attack: its spec, as in the records.
        file: where its code lay.
        code_sha256: of that file.
        records_sha256: of the records' file.
        samples: how many a cell at most; None: all that the grid has.
        grid_file: where the grid isn't one of the suite's.
        knowledge: what it was told, where it was told anything.
    """

    schema: int
    attack: str
    name: str
    title: str
    class_name: str
    file: str
    code_sha256: str
    revision: str
    paper: str
    threat_model: str
    produces: list[str]
    reads: str
    uses: list[str]
    knowledge: list[str]
    grid: str
    grid_hash: str
    grid_file: str | None
    samples: int | None
    seed: int
    weight_seeds: list[int]
    trials: int
    records_sha256: str
    protocol_version: int
    leakbench: str
    commit: str
    python: str
    torch: str
    numpy: str
    device: str
    machine: str
    sandbox: str


def machine() -> str:
    """The processor, by which digits may differ."""
    with contextlib.suppress(OSError, IndexError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return f"{platform.machine()} {names[0]}"
    return f"{platform.machine()} {platform.processor()}".strip()


def publish(
    mine: Submitted,
    grid: Grid,
    grid_file: str | None,
    samples: int | None,
    planned: Plan,
    ran: record.Run,
    out: Path,
    kept: str,
    header: Header,
) -> Path:
    """Writes the attack's records, under their header, and its manifest; returns the records' file.

    `kept`: how tightly the attack was.
    """
    rows = [row for row in ran.rows if row["attack"] == mine.spec]
    lines = [record.line(header), *(record.line(Record(**row)) for row in _in_order(rows, header))]
    content = "".join(f"{line}\n" for line in lines).encode()
    manifest = Manifest(
        schema=SCHEMA,
        attack=mine.spec,
        name=mine.name,
        title=mine.title,
        class_name=mine.class_name,
        file=mine.file,
        code_sha256=mine.sha256,
        revision=mine.revision,
        paper=mine.paper,
        threat_model=mine.threat_model,
        produces=list(mine.produces),
        reads=mine.reads,
        uses=list(mine.uses),
        knowledge=sorted({row["knowledge"] for row in rows} - {""}),
        grid=grid.name,
        grid_hash=grid.hash,
        grid_file=grid_file,
        samples=samples,
        seed=grid.seed,
        weight_seeds=sorted({row["weight_seed"] for row in rows}),
        trials=len(rows),
        records_sha256=hashlib.sha256(content).hexdigest(),
        protocol_version=work.PROTOCOL_VERSION,
        leakbench=importlib.metadata.version("leakbench"),
        commit=rows[-1]["commit"],
        python=platform.python_version(),
        torch=torch.__version__,
        numpy=np.__version__,
        device=planned.context.device,
        machine=machine(),
        sandbox=kept,
    )
    path = out / grid.name / mine.label / f"r{mine.revision.partition('/')[0]}.jsonl"
    _write(path, content)
    _write(
        path.with_suffix(".json"), json.dumps(asdict(manifest), indent=1, ensure_ascii=False).encode() + b"\n"
    )
    return path


def whole_header(mine: Submitted, grid: Grid, planned: Plan) -> Header:
    """It asks for all that the grid has of the attack, so that a part of it is shown as one."""
    cells = {f"{scenario.key} {mine.spec}": count for scenario, count in asked_of(grid, mine.spec).items()}
    return replace(planned.header(), cells=cells, whole=0)


def _in_order(rows: Sequence[dict[str, Any]], header: Header) -> list[dict[str, Any]]:
    place = {scenario: at for at, scenario in enumerate(header.scenarios)}
    return sorted(rows, key=lambda row: (place[row["scenario"]], row["sample"]))


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror}; choose another --out") from error


def grid_of(name: str) -> tuple[Grid, str | None]:
    """The grid, and its file where it isn't one of the suite's."""
    return load_grid(name), None if name in grid_names() else name


def references(grid: Grid, folder: Path, besides: Path, samples: int | None) -> list[record.Run]:
    """The records of the same grid under `folder`, but for a file, and of as many samples."""
    found = []
    for path in sorted((folder / grid.name).glob("*/r*.jsonl*")):
        if path == besides:
            continue
        ran = record.read(path)
        if ran.headers[-1].grid_hash == grid.hash:
            found.append(first_samples(ran, samples))
    return found


def first_samples(ran: record.Run, samples: int | None) -> record.Run:
    """The run with so many samples of each cell."""
    if samples is None:
        return ran
    headers = [
        replace(header, cells={cell: min(count, samples) for cell, count in header.cells.items()})
        for header in ran.headers
    ]
    return replace(
        ran, headers=tuple(headers), rows=tuple(row for row in ran.rows if row["sample"] < samples)
    )
