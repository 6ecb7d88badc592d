"""The command line, a small grid, and attacks that misbehave."""

import sys
from pathlib import Path

import pytest

from bench.__main__ import main

GRID = """
name = "small"
seed = 3

[[blocks]]
dataset = "mnist5k"
model = ["fcn(depth=2, width=24, bias=False)", "fcn(depth=2, width=24)"]
defense = ["none", "label_smoothing(epsilon=(0.1, 0.5))"]
attacks = ["idlg", "bias_closed_form", "lambda_recovery", "random_labels"]
samples = 5
"""

MISBEHAVING = '''
import gc, os, sys
from dataclasses import dataclass
from typing import ClassVar

import torch

from bench.threat import Attack, Observation, Outcome, Reconstruction


@dataclass(frozen=True)
class Base(Attack):
    title: ClassVar[str] = "misbehaving"
    produces: ClassVar[frozenset] = frozenset({"soft_labels"})
    reads: ClassVar[str] = "head"


@dataclass(frozen=True)
class Raises(Base):
    name: ClassVar[str] = "raises"

    def run(self, observation, rng):
        raise RuntimeError("no idea\\nat all")


@dataclass(frozen=True)
class Exits(Base):
    name: ClassVar[str] = "exits"

    def run(self, observation, rng):
        sys.exit(7)


@dataclass(frozen=True)
class Dies(Base):
    name: ClassVar[str] = "dies"

    def run(self, observation, rng):
        os._exit(9)


@dataclass(frozen=True)
class OutOfMemory(Base):
    name: ClassVar[str] = "out_of_memory"

    def run(self, observation, rng):
        raise MemoryError("too much")


@dataclass(frozen=True)
class Misshapen(Base):
    name: ClassVar[str] = "misshapen"

    def run(self, observation, rng):
        return Reconstruction(Outcome.OK, soft_labels=torch.zeros(3))


@dataclass(frozen=True)
class NotFinite(Base):
    name: ClassVar[str] = "not_finite"

    def run(self, observation, rng):
        return Reconstruction(Outcome.OK, soft_labels=torch.full((1, 10), float("nan")))


@dataclass(frozen=True)
class ReturnsNothing(Base):
    name: ClassVar[str] = "returns_nothing"

    def run(self, observation, rng):
        return None


@dataclass(frozen=True)
class Vandal(Base):
    """Spoils the model and the gradient it was given, and all global state."""

    name: ClassVar[str] = "vandal"

    def run(self, observation, rng):
        for tensor in [*observation.model.parameters(), *observation.update.values()]:
            tensor.data.fill_(float("nan"))
        observation.model.train()
        return Reconstruction(Outcome.UNIDENTIFIABLE)


@dataclass(frozen=True)
class Spy(Base):
    """Finds hard labels if any truth lies around in its process, or in what it was handed."""

    name: ClassVar[str] = "spy"

    def run(self, observation, rng):
        truths = [o for o in gc.get_objects() if type(o).__name__ == "Truth"]
        more = set(observation.update) - {"head.weight", "head.bias"}
        if truths or more or any(vars(observation.knowledge).values()):
            raise RuntimeError(f"saw {len(truths)} truths, {more}, {observation.knowledge}")
        return Reconstruction(Outcome.UNIDENTIFIABLE, notes={"reason": "saw nothing"})


@dataclass(frozen=True)
class Told(Base):
    """Says the truth that the grid grants."""

    name: ClassVar[str] = "told"
    uses: ClassVar[frozenset] = frozenset({"soft_labels", "label_format"})

    def run(self, observation, rng):
        assert observation.knowledge.label_format is None  # the grid doesn't grant it
        return Reconstruction(Outcome.OK, soft_labels=observation.knowledge.soft_labels)
'''


@pytest.fixture
def leakbench(monkeypatch, capsys, tmp_path):
    """Runs the command in an empty folder; returns its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["leakbench", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(GRID)
    return path


@pytest.fixture
def misbehaving(tmp_path: Path) -> Path:
    path = tmp_path / "misbehaving.py"
    path.write_text(MISBEHAVING)
    return path
