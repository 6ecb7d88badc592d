"""An attack's process: its answers are believed as far as an attack may say them, and it may hang or die."""

import json
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch

from bench import isolation
from bench.cases import models
from bench.cases.client import FedSGDClient
from bench.isolation import Architecture, AttackProcess, Attempt, Limits
from bench.threat import Batch, Facts, Knowledge, Observation, Outcome, Reconstruction

FACTS = Facts(1, 4, (1, 6, 6), 8, head_bias=True, nonnegative_features=True)
NET = Architecture("fcn(depth=2, width=8)", (1, 6, 6), 4, "none", "eval", "seed 1")
AMPLE = Limits(60.0)

ATTACKS = '''
import os, time
from dataclasses import dataclass
from typing import ClassVar

import torch

from bench.threat import Attack, Outcome, Reconstruction


@dataclass(frozen=True)
class Base(Attack):
    title: ClassVar[str] = "misbehaving"
    produces: ClassVar[frozenset] = frozenset({"soft_labels"})
    reads: ClassVar[str] = "head"


@dataclass(frozen=True)
class Hangs(Base):
    """Only over the second sample."""

    name: ClassVar[str] = "hangs"

    def run(self, observation, rng):
        if observation.head_bias_gradient[1] < 0:
            time.sleep(1000)
        return Reconstruction(Outcome.OK, soft_labels=torch.eye(4)[:1])


@dataclass(frozen=True)
class SaysSkipped(Base):
    name: ClassVar[str] = "says_skipped"

    def run(self, observation, rng):
        return Reconstruction(Outcome.SKIPPED)


@dataclass(frozen=True)
class Prints(Base):
    name: ClassVar[str] = "prints"

    def run(self, observation, rng):
        os.write(1, b"noise")
        print("more noise")
        return Reconstruction(Outcome.OK, soft_labels=torch.eye(4)[:1], notes={"pid": str(os.getpid())})
'''


@pytest.fixture
def attacks(tmp_path):
    path = tmp_path / "attacks_of_others.py"
    path.write_text(ATTACKS)
    return path


@pytest.fixture
def process():
    made = AttackProcess()
    yield made
    made.stop()


def observations(count: int) -> list[Observation]:
    client = FedSGDClient(models.build("fcn(depth=2, width=8)", (1, 6, 6), 4, seed=1))
    found = []
    for sample in range(count):
        images = torch.rand(1, 1, 6, 6, generator=torch.Generator().manual_seed(sample))
        update = client.gradient(Batch(images, torch.eye(4)[[sample % 4]]))
        head = {name: value for name, value in update.items() if name.startswith("head.")}
        found.append(Observation(client.model, head, "head", FACTS, Knowledge()))
    return found


def test_gives_what_the_attack_gives_here(process):
    seen = observations(3)
    away = process.attempts("lambda_recovery", seen, [1, 2, 3], AMPLE, NET)
    here = isolation.attempts_here("lambda_recovery", seen, [1, 2, 3])
    for one, other in zip(away, here, strict=True):
        assert one.reconstruction.outcome is other.reconstruction.outcome is Outcome.OK
        assert torch.equal(one.reconstruction.soft_labels, other.reconstruction.soft_labels)
        assert torch.equal(one.reconstruction.features, other.reconstruction.features)
        assert one.reconstruction.notes == other.reconstruction.notes


def test_a_trial_past_its_time_is_stopped_and_the_others_go_on(process, attacks):
    first, second, third = process.attempts(f"{attacks}:Hangs", observations(3), [1, 2, 3], Limits(5.0), NET)
    assert first.reconstruction.outcome is third.reconstruction.outcome is Outcome.OK
    assert second.reconstruction.outcome is Outcome.TIMEOUT
    assert second.reason == "stopped after 5 s"


def test_what_an_attack_prints_harms_nothing_and_its_process_is_kept(process, attacks):
    notes = [
        process.attempts(f"{attacks}:Prints", observations(1), [1], AMPLE, NET)[0].reconstruction.notes
        for _ in range(2)
    ]
    assert notes[0] == notes[1] != {}


def test_an_attack_can_not_say_that_it_was_skipped(process, attacks):
    (answer,) = process.attempts(f"{attacks}:SaysSkipped", observations(1), [1], AMPLE, NET)
    assert answer.reconstruction.outcome is Outcome.CRASHED


def test_its_process_ends_with_the_one_that_asks():
    script = (
        "import os; from bench.isolation import AttackProcess; p = AttackProcess(); p._start();"
        "print(p._process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    asked = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    pid = int(asked.stdout)
    deadline = time.monotonic() + 60
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def answer(outcome="OK", reason="", seconds=0.1, peak=1, notes=None, **tensors) -> bytes:
    there = [part in tensors for part in isolation.PARTS]
    text = json.dumps([[outcome, reason, seconds, peak, notes or {}, there]])
    return text.encode() + b"\0" + safetensors.torch.save(tensors)


@pytest.mark.parametrize(
    "forged",
    [
        b"",
        b"[]\0",
        b"null\0" + safetensors.torch.save({}),
        b"[[1, 2]]\0" + safetensors.torch.save({}),
        answer(outcome="SKIPPED"),
        answer(outcome="TIMEOUT"),
        answer(outcome="WON"),
        answer(seconds="fast"),
        answer(notes=5),
        answer(soft_labels=torch.ones(1, 7)),
        answer(images=torch.ones(1, 1, 3, 6, 6)),
        answer(soft_labels=torch.ones(0, 1, 4)),
        answer().replace(b"false", b" true"),
        answer()[:-3],
    ],
)
def test_a_forged_answer_is_refused(forged):
    with pytest.raises(isolation._UnreadableError):
        isolation._decoded(forged, FACTS, 1)


def test_a_forged_number_that_is_not_finite_has_diverged():
    (found,) = isolation._decoded(answer(soft_labels=torch.full((1, 1, 4), float("nan"))), FACTS, 1)
    assert found.reconstruction.outcome is Outcome.DIVERGED


def test_what_is_encoded_is_decoded():
    made = Reconstruction(Outcome.STEP_LIMIT, soft_labels=torch.eye(4)[:1], notes={"loss": 0.5, "row": 3})
    (found,) = isolation._decoded(isolation._encoded([Attempt(made, "so", 0.25, 7)]), FACTS, 1)
    assert (found.reason, found.seconds, found.peak_bytes) == ("so", 0.25, 7)
    assert found.reconstruction.outcome is Outcome.STEP_LIMIT
    assert found.reconstruction.notes == made.notes
    assert torch.equal(found.reconstruction.soft_labels, made.soft_labels)
