"""An attack's process: its answers are believed as far as an attack may say them, and it may hang or die."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from bench import isolation
from bench.cases import models
from bench.cases.client import FedSGDClient
from bench.errors import UserError
from bench.isolation import GIB, Architecture, AttackProcess, Attempt, Limits
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
class Bloats(Base):
    """Only over the second sample; in a process of its own if need be."""

    name: ClassVar[str] = "bloats"

    def run(self, observation, rng):
        held = []
        while observation.head_bias_gradient[1] < 0:
            held.append(torch.ones(2**23))  # 32 MiB
        return Reconstruction(Outcome.OK, soft_labels=torch.eye(4)[:1])


@dataclass(frozen=True)
class AsksTooMuch(Base):
    name: ClassVar[str] = "asks_too_much"

    def run(self, observation, rng):
        torch.ones(2**60)


@dataclass(frozen=True)
class Leaves(Base):
    """Something behind that goes on."""

    name: ClassVar[str] = "leaves"

    def run(self, observation, rng):
        import subprocess

        child = subprocess.Popen(["sleep", "1000"])
        return Reconstruction(Outcome.OK, soft_labels=torch.eye(4)[:1], notes={"pid": child.pid})


@dataclass(frozen=True)
class Babbles(Base):
    name: ClassVar[str] = "babbles"

    def run(self, observation, rng):
        notes = {str(i): "x" * 10**6 for i in range(100)}
        return Reconstruction(Outcome.OK, soft_labels=torch.eye(4)[:1], notes=notes)


@dataclass(frozen=True)
class Detective(Base):
    """Looks for the truth in all that a process can look at, and says where it has looked."""

    name: ClassVar[str] = "detective"

    def run(self, observation, rng):
        import gc, glob, sys

        looked, found = set(), []
        frame = sys._getframe()
        held = []
        while frame is not None:
            held += [*frame.f_locals.values(), *frame.f_globals.values()]
            frame = frame.f_back
            looked.add("frames")
        for thing in [*gc.get_objects(), *held]:
            name = type(thing).__name__
            ours = str(type(thing).__module__).startswith("bench.")
            if ours and name in ("Truth", "Observed", "Dataset", "Chunk", "Context", "Batch"):
                found.append(f"gc: {name}")
            if isinstance(thing, torch.Tensor) and thing.ndim >= 3 and tuple(thing.shape[-3:]) == (1, 6, 6):
                found.append("gc: images")
        looked.add("gc")
        for text in [*os.environ.values(), *sys.argv]:
            found += [f"environment: {text}" for word in ("secret", "mnist5k") if word in text]
        looked.add("environment")
        for link in glob.glob("/proc/self/fd/*"):
            try:
                target = os.readlink(link)
            except OSError:
                continue
            if not target.startswith(("/dev/", "socket:", "pipe:", "/proc/", "anon_inode:")):
                found.append(f"file: {target}")
        looked.add("files")
        if os.geteuid() != 0:
            try:
                open(f"/proc/{os.getppid()}/mem", "rb").close()
                found.append("memory of the parent")
            except OSError:
                pass
        given = vars(observation.knowledge)
        found += [f"knowledge: {name}" for name in given if given[name] is not None]
        found += [f"update: {name}" for name in observation.update if not name.startswith("head.")]
        notes = {"found": "; ".join(found), "looked": ",".join(sorted(looked))}
        return Reconstruction(Outcome.UNIDENTIFIABLE, notes=notes)


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


@pytest.fixture(scope="module")
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
    first, second, third = process.attempts(f"{attacks}:Hangs", observations(3), [1, 2, 3], Limits(3.0), NET)
    assert first.reconstruction.outcome is third.reconstruction.outcome is Outcome.OK
    assert second.reconstruction.outcome is Outcome.TIMEOUT
    assert second.reason == "stopped after 3 s"


def test_a_process_that_somebody_kills_is_asked_again_and_its_stack_stays_whole(process):
    seen = observations(3)
    before = process.attempts("lambda_recovery", seen, [1, 2, 3], AMPLE, NET)
    pid = process._process.pid
    os.kill(pid, signal.SIGSTOP)
    threading.Timer(0.3, lambda: os.kill(pid, signal.SIGKILL)).start()
    after = process.attempts("lambda_recovery", seen, [1, 2, 3], AMPLE, NET)
    assert process._process.pid != pid
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one.reconstruction.soft_labels, other.reconstruction.soft_labels)


def test_a_trial_that_holds_too_much_is_stopped_and_the_others_go_on(process, attacks):
    limits = Limits(60.0, memory=1.5 * GIB)
    first, second, third = process.attempts(f"{attacks}:Bloats", observations(3), [1, 2, 3], limits, NET)
    assert first.reconstruction.outcome is third.reconstruction.outcome is Outcome.OK
    assert second.reconstruction.outcome is Outcome.OUT_OF_MEMORY
    assert second.reason == "stopped at more than 1.5 GiB"


def test_what_an_earlier_trial_left_in_memory_is_not_blamed_on_the_next(process, attacks, monkeypatch):
    process.attempts("idlg", observations(1), [1], AMPLE, NET)
    old = process._process.pid
    honest = isolation._Meter.resident_bytes

    def bloated(meter):
        return 10 * GIB if meter._root.pid == old else honest(meter)

    monkeypatch.setattr(isolation._Meter, "resident_bytes", bloated)
    monkeypatch.setattr(isolation, "LOOKS", 0.0)
    (answer,) = process.attempts("idlg", observations(1), [1], Limits(60.0, memory=2 * GIB), NET)
    assert answer.reconstruction.outcome is Outcome.OK
    assert process._process.pid != old


def test_what_torch_can_not_allocate_is_out_of_memory(process, attacks):
    (answer,) = process.attempts(f"{attacks}:AsksTooMuch", observations(1), [1], AMPLE, NET)
    assert answer.reconstruction.outcome is Outcome.OUT_OF_MEMORY


def test_what_an_attack_started_ends_with_its_process(process, attacks):
    (answer,) = process.attempts(f"{attacks}:Leaves", observations(1), [1], AMPLE, NET)
    pid = answer.reconstruction.notes["pid"]
    assert _runs(pid)
    process.stop()
    deadline = time.monotonic() + 10
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(pid)


def test_endless_notes_are_cut(process, attacks):
    (answer,) = process.attempts(f"{attacks}:Babbles", observations(1), [1], AMPLE, NET)
    assert answer.reconstruction.outcome is Outcome.OK
    assert sum(map(len, answer.reconstruction.notes.values())) < 10**5


def test_a_detective_finds_no_truth(process, attacks):
    """Where it looks: frames, the garbage collector, environment and arguments, open files, its parent."""
    (answer,) = process.attempts(f"{attacks}:Detective", observations(1), [1], AMPLE, NET)
    assert answer.reconstruction.notes["found"] == ""
    assert answer.reconstruction.notes["looked"] == "environment,files,frames,gc"


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("spec", ["resnet18(bias=False)", "convnet(width=4)", "lenet"])
def test_a_model_arrives_as_it_was_sent(spec, mode):
    sent = FedSGDClient.with_batch_norm(models.build(spec, (3, 16, 16), 4, seed=2), mode).model
    next(iter(sent.parameters())).requires_grad_(False)
    architecture = Architecture(spec, (3, 16, 16), 4, "none", mode, "")
    head, _, weights = isolation._model_message(sent, architecture).partition(b"\0")
    model = isolation._Model(json.loads(head), weights)
    spoilt, arrived = model.whole("cpu"), model.whole("cpu")
    for parameter in spoilt.parameters():
        parameter.data.fill_(float("nan"))
    assert arrived.training == sent.training
    assert [name for name, _ in arrived.named_modules()] == [name for name, _ in sent.named_modules()]
    for (name, one), (other_name, other) in zip(
        arrived.named_parameters(), sent.named_parameters(), strict=True
    ):
        assert name == other_name
        assert one.requires_grad == other.requires_grad
        assert torch.equal(one, other)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(arrived(images), sent(images))


def test_all_that_is_granted_arrives(process):
    known = Knowledge(
        label_format="hard",
        soft_labels=torch.eye(4)[:1],
        local_steps=3,
        local_lr=0.5,
        batch_norm={"bn": (torch.ones(2), torch.zeros(2))},
        auxiliary=Batch(torch.rand(5, 1, 6, 6), torch.eye(4)[[0, 1, 2, 3, 0]]),
        defense="mixup",
    )
    facts = replace(FACTS, protocol="fedavg", granted=frozenset({"label_format", "auxiliary"}))
    (seen,) = observations(1)
    sent = replace(seen, knowledge=known, facts=facts, later_updates=(seen.update, seen.update))
    head, _, blob = isolation._question("idlg", [sent], [5], NET).partition(b"\0")
    (arrived,) = isolation._asked(json.loads(head), blob, sent.model)
    assert arrived.facts == facts
    assert arrived.head == "head"
    assert len(arrived.later_updates) == 2
    for update, other in zip(
        (arrived.update, *arrived.later_updates), (sent.update, *sent.later_updates), strict=True
    ):
        assert list(update) == list(other)  # the last digits of sums over it hang on the order
        assert all(torch.equal(update[name], other[name]) for name in other)
    plain = ("label_format", "local_steps", "local_lr", "defense")
    assert all(getattr(arrived.knowledge, name) == getattr(known, name) for name in plain)
    assert torch.equal(arrived.knowledge.soft_labels, known.soft_labels)
    assert torch.equal(arrived.knowledge.auxiliary.images, known.auxiliary.images)
    assert torch.equal(arrived.knowledge.batch_norm["bn"][0], torch.ones(2))


def test_what_arrives_lies_where_torch_puts_tensors():
    """Else the last digits of a matrix product hang on what was asked before."""
    told = Knowledge(soft_labels=torch.eye(4)[:1])
    seen = [replace(one, knowledge=told) for one in observations(3)]
    for _ in range(20):
        head, _, blob = isolation._question("idlg", seen, [1, 2, 3], NET).partition(b"\0")
        text, _, weights = isolation._model_message(seen[0].model, NET).partition(b"\0")
        model = isolation._Model(json.loads(text), weights).whole("cpu")
        arrived = isolation._asked(json.loads(head), blob, model)
        tensors = [*model.parameters(), *(value for one in arrived for value in one.update.values())]
        tensors += [one.knowledge.soft_labels for one in arrived]
        assert {tensor.data_ptr() % 64 for tensor in tensors} == {0}


def test_an_attack_gets_no_more_bytes_than_its_observations(process):
    """A view of a stack must not bring the stack along: others' observations would come with it."""
    seen = observations(3)
    stacked = {name: torch.stack([one.update[name] for one in seen]) for name in seen[0].update}
    views = [
        replace(one, update={name: value[at] for name, value in stacked.items()})
        for at, one in enumerate(seen)
    ]
    assert len(isolation._question("idlg", views[:1], [1], NET)) == len(
        isolation._question("idlg", seen[:1], [1], NET)
    )


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


def test_a_process_that_is_killed_as_it_starts_is_started_again(monkeypatch):
    started, popen = [], subprocess.Popen

    def killed_at_first(*given, **options):
        process = popen(*given, **options)
        if not started:
            process.kill()
        started.append(process)
        return process

    monkeypatch.setattr(subprocess, "Popen", killed_at_first)
    process = AttackProcess()
    try:
        process.make_ready()
        assert len(started) == 2
        assert started[1].poll() is None
    finally:
        process.stop()


def test_a_process_that_never_starts_is_one_line():
    process = AttackProcess()
    process._command = ["no_such_module"]
    with pytest.raises(UserError, match="ends as it starts, with code 1"):
        process.make_ready()
