"""Grids and scenarios: what is attacked, how often, and by whom.

A grid is a TOML file: blocks of axes, each axis one value or a list of them, crossed. What it names is
checked before anything runs, so that a mistake costs a line and not an hour.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from bench.errors import UserError, nearest

GRANTABLE = ("label_format", "soft_labels", "defense", "local_steps", "local_lr", "auxiliary")
GRIDS = Path(__file__).resolve().parent.parent / "grids"


def digest(*parts: Any) -> str:
    """H: the hash that seeds, keys and names are made of; 24 hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:24]


def seed(*parts: Any) -> int:
    """H as a seed for a generator, below 2⁶³."""
    return int(digest(*parts)[:16], 16) >> 1


@dataclass(frozen=True)
class Scenario:
    """One cell's private side: everything but the attack. Specs are canonical."""

    dataset: str
    model: str
    weights: str
    weight_seed: int
    batch_norm: str
    members: str
    batch_size: int
    classes: str
    protocol: str
    defense: str
    knowledge: tuple[str, ...]

    @property
    def key(self) -> str:
        """Its name in records: a hash of all axes."""
        return digest(dataclasses.asdict(self))[:12]

    @property
    def batch_axes(self) -> tuple[Any, ...]:
        """The axes that decide which examples a client holds: what all defenses and models share."""
        return (self.dataset, self.members, self.batch_size, self.classes)


def _listed(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


Texts = Annotated[list[str], BeforeValidator(_listed), Field(min_length=1)]
Seeds = Annotated[list[Annotated[int, Field(ge=0, lt=2**63)]], BeforeValidator(_listed), Field(min_length=1)]


class Block(BaseModel):
    """A crossing of axes, the attacks that meet it, and how many samples each cell gets."""

    model_config = ConfigDict(extra="forbid", strict=True)

    dataset: Texts
    model: Texts
    attacks: Texts
    samples: Annotated[int, Field(ge=1)]
    weights: Texts = ["untrained"]
    weight_seed: Seeds = [0]
    batch_norm: Annotated[list[Literal["eval", "train"]], BeforeValidator(_listed), Field(min_length=1)] = [
        "eval"
    ]
    members: Annotated[
        list[Literal["held_out", "training"]], BeforeValidator(_listed), Field(min_length=1)
    ] = ["held_out"]
    batch_size: Annotated[
        list[Annotated[int, Field(ge=1)]], BeforeValidator(_listed), Field(min_length=1)
    ] = [1]
    classes: Texts = ["turns"]
    protocol: Texts = ["fedsgd"]
    defense: Texts = ["none"]
    knowledge: Annotated[list[str], BeforeValidator(_listed)] = []
    utility: bool = False
    """Whether what each of its defenses costs is measured too, on these networks."""

    seconds: Annotated[float, Field(gt=0)] | None = None
    """CPU-seconds that the whole block took when the grid was written, on a 2-core machine."""


class Grid(BaseModel):
    """A named set of scenarios × attacks."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    title: str = ""
    seed: Annotated[int, Field(ge=0)] = 0
    time_limit: Annotated[float, Field(gt=0)] = 3600.0
    """Seconds that a trial may take."""
    memory_limit: Annotated[float, Field(gt=0)] = 8.0
    """GiB that an attack's process may hold; on a GPU it is the host's memory that counts."""
    weights_sha256: dict[str, str] = {}
    """Of a frozen grid's trained networks, by their keys: with other weights it isn't the same grid."""

    blocks: Annotated[list[Block], Field(min_length=1)]

    @property
    def hash(self) -> str:
        """Over the grid but for how many samples it takes: a larger run begins with the same trials."""
        content = self.model_dump(exclude_defaults=True)  # so that a later axis leaves it as it is
        for block in content["blocks"]:
            del block["samples"]
            block.pop("seconds", None)
        return digest(content)


def grid_names() -> list[str]:
    """The grids that come with the suite."""
    return sorted(path.stem for path in GRIDS.glob("*.toml"))


def load_grid(name: str) -> Grid:
    """A grid by name, or from a TOML file.

    Raises:
        UserError: an unknown name, a file that isn't there or doesn't parse, a wrong key or type.
    """
    if not name.endswith(".toml") and name not in grid_names():
        raise UserError(f"no grid is named {name!r}{nearest(name, grid_names())}")
    try:
        path = Path(name).expanduser() if name.endswith(".toml") else GRIDS / f"{name}.toml"
        there = path.is_file()
    except (OSError, RuntimeError):  # too long a name, no such user
        there = False
    if not there:
        raise UserError(f"{name} is not there; give a grid's name or a TOML file")
    try:
        return Grid.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise UserError(f"{path}: {_first(error)}") from None
    except (ValueError, RecursionError) as error:  # syntax, bytes, nesting, numbers of too many digits
        raise UserError(f"{path} is no TOML: {' '.join(str(error).split())}") from None


def _first(error: ValidationError) -> str:
    """The first mistake, with the place where it stands and the keys that are known there."""
    mistakes = error.errors()  # a misspelt key is missing too: say first how it was spelt
    mistake = min(mistakes, key=lambda one: one["type"] != "extra_forbidden")
    place = ".".join(str(part) for part in mistake["loc"])
    if mistake["type"] == "extra_forbidden":
        model = Block if mistake["loc"][0] == "blocks" else Grid
        return f"unknown key {place!r}{nearest(str(mistake['loc'][-1]), model.model_fields)}"
    return f"{place}: {mistake['msg'].lower()}, got {str(mistake['input'])[:60]!r}"


def replaced(
    grid: Grid, attacks: Sequence[str] = (), defenses: Sequence[str] = (), samples: int | None = None
) -> Grid:
    """The grid with what the command line replaces; `random_labels` and `none` stay where they were."""

    def keeping(own: list[str], given: Sequence[str], always: str) -> list[str]:
        if not given:
            return own
        return list(dict.fromkeys([*given, *([always] if always in own else [])]))

    blocks = [
        block.model_copy(
            update={
                "attacks": keeping(block.attacks, attacks, "random_labels"),
                "defense": keeping(block.defense, defenses, "none"),
                "samples": block.samples if samples is None else samples,
            }
        )
        for block in grid.blocks
    ]
    return grid.model_copy(update={"blocks": blocks})


def cells(grid: Grid) -> dict[tuple[Scenario, str], int]:
    """(scenario, attack) -> how many samples, in the grid's order; of two blocks the larger number holds.

    Raises:
        UserError: an axis names what isn't known.
    """
    wanted: dict[tuple[Scenario, str], int] = {}
    for block in grid.blocks:
        for scenario, attack in itertools.product(_scenarios(block), _canonical_attacks(block.attacks)):
            wanted[scenario, attack] = max(block.samples, wanted.get((scenario, attack), 0))
    return wanted


def trained_with(grid: Grid) -> list[Scenario]:
    """The scenarios of blocks that ask what defenses cost; only data set, model, seed and defense matter."""
    return [scenario for block in grid.blocks if block.utility for scenario in _scenarios(block)]


def _canonical_attacks(specs: Sequence[str]) -> tuple[str, ...]:
    from bench.registry import attacks

    return tuple(dict.fromkeys(attacks.canonical(spec) for spec in specs))


def _scenarios(block: Block) -> Iterator[Scenario]:
    from bench.cases import data, models, protocol
    from bench.registry import defenses

    for name in block.knowledge:
        if name not in GRANTABLE:
            raise UserError(f"knowledge can't grant {name!r}{nearest(name, GRANTABLE)}")
    for state in block.weights:
        models.epochs(state)
    crossed = itertools.product(
        block.dataset,
        [models.canonical(spec) for spec in block.model],
        block.weights,
        block.weight_seed,
        block.batch_norm,
        block.members,
        block.batch_size,
        [data.class_draw(spec) for spec in block.classes],
        [protocol.canonical(spec) for spec in block.protocol],
        [defenses.canonical(spec) for spec in block.defense],
    )
    for axes in crossed:
        yield Scenario(*axes, knowledge=tuple(sorted(set(block.knowledge))))
