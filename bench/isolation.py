"""Attacks at work: in this process, or in one of their own that never holds any truth.

What goes into an attack's process is its spec, its view of the observations and its seeds; what comes out
is its answers: safetensors and JSON both ways, and what comes out is checked before anybody trusts it. Time
and memory are limited from outside; a process that hangs, bloats or dies is replaced.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import json
import math
import multiprocessing
import os
import queue
import random
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import psutil
import safetensors.torch
import torch
from torch import Tensor, nn

from bench import registry
from bench.cases import models
from bench.cases.client import FedSGDClient
from bench.errors import UserError
from bench.threat import Attack, Batch, Facts, Knowledge, Observation, Outcome, Reconstruction, Update

PARTS = ("soft_labels", "features", "images")
OWN_ACCOUNT = (Outcome.OK, Outcome.STEP_LIMIT, Outcome.DIVERGED, Outcome.UNIDENTIFIABLE)
"""The outcomes that an attack may return."""
ENDED_BADLY = (Outcome.CRASHED.name, Outcome.OUT_OF_MEMORY.name)
"""What its process may say of it besides."""

GIB = 2**30


@dataclass(frozen=True)
class Limits:
    """What a trial may take: seconds, and bytes that the attack's process and its children hold."""

    seconds: float
    memory: float = math.inf


@dataclass(frozen=True)
class Architecture:
    """The public model of some observations but for its weights, as whoever builds it again needs it.

    Attributes:
        model: its spec.
        image_shape: (C, H, W).
        num_classes: K.
        defense: whose `prepare` changed it.
        batch_norm: the client's mode, `eval` or `train`.
        weights_sha256: of the weights, which are sent beside it.
    """

    model: str
    image_shape: tuple[int, int, int]
    num_classes: int
    defense: str
    batch_norm: str
    weights_sha256: str


@dataclass(frozen=True, eq=False)
class Attempt:
    """An attack's answer to one observation, and what it cost."""

    reconstruction: Reconstruction
    reason: str = ""
    seconds: float | None = None
    peak_bytes: int | None = None


def attempts(spec: str, observations: Sequence[Observation], seeds: Sequence[int]) -> list[Attempt]:
    """One attack on a stack of observations; whatever it does ends in an attempt a sample."""
    torch.set_num_threads(1)  # sums in one order: results don't depend on the number of cores
    attack, facts = registry.attacks.make(spec), observations[0].facts
    run_many = getattr(attack, "run_many", None)
    if run_many is not None and len(observations) > 1:
        with contextlib.suppress(Exception, SystemExit):  # alone, each says for itself what is wrong
            return _timed(lambda: run_many(observations, _seeded(seeds)), facts, len(observations))
    return [_alone(attack, *pair) for pair in zip(observations, seeds, strict=True)]


def attempts_here(spec: str, observations: Sequence[Observation], seeds: Sequence[int]) -> list[Attempt]:
    """The same in this process, on copies that the attack may spoil."""
    return attempts(spec, copy.deepcopy(list(observations)), seeds)


def _alone(attack: Attack, observation: Observation, trial_seed: int) -> Attempt:
    try:
        return _timed(lambda: [attack.run(observation, _seeded([trial_seed])[0])], observation.facts, 1)[0]
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
    return _checked(got, facts, [seconds] * expected, [peak] * expected)


def _peak_resident_bytes() -> int:
    """The most memory that this process has held so far, whatever it ran."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _checked(
    answers: Sequence[Any], facts: Facts, seconds: Sequence[float | None], peaks: Sequence[int | None]
) -> list[Attempt]:
    """An answer that isn't what the contract says is a crash; one that isn't finite has diverged."""
    for answer in answers:
        _check_kind(answer, facts)
    diverged: dict[int, str] = {}
    parts: list[dict[str, Tensor]] = [{} for _ in answers]
    for name in PARTS:
        there = [at for at, answer in enumerate(answers) if getattr(answer, name) is not None]
        if not there:
            continue
        stack = torch.stack([getattr(answers[at], name).detach() for at in there])  # a copy of their own
        for at, value, finite in zip(there, stack, stack.isfinite().flatten(1).all(1).tolist(), strict=True):
            parts[at][name] = value
            if not finite:
                diverged.setdefault(at, f"{name} is not finite")
    made = []
    for at, (answer, took, peak) in enumerate(zip(answers, seconds, peaks, strict=True)):
        if at in diverged:
            made.append(Attempt(Reconstruction(Outcome.DIVERGED), diverged[at], took, peak))
            continue
        notes = dict(answer.notes)
        whole = Reconstruction(
            answer.outcome,
            parts[at].get("soft_labels"),
            parts[at].get("features"),
            parts[at].get("images"),
            notes,
        )
        made.append(Attempt(whole, str(notes.get("reason", "")), took, peak))
    return made


def _check_kind(answer: Any, facts: Facts) -> None:
    if not isinstance(answer, Reconstruction) or not isinstance(answer.outcome, Outcome):
        raise TypeError(f"run returned {type(answer).__name__}, not a Reconstruction")
    if answer.outcome not in OWN_ACCOUNT:
        raise ValueError(f"run returned {answer.outcome}, which is not an attack's to say")
    for name, shape in zip(PARTS, _shapes(facts), strict=True):
        value = getattr(answer, name)
        if value is not None and (not isinstance(value, Tensor) or tuple(value.shape) != shape):
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"returned {name} of shape {got}, expected {shape}")
        if value is not None and (value.is_complex() or value.dtype == torch.bool):
            raise ValueError(f"returned {name} of {value.dtype}, expected floating point")


def _crashed(error: BaseException) -> Attempt:
    no_room = ("can't allocate memory", "not enough memory")  # torch's words for a MemoryError on the CPU
    out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in no_room)
    )
    outcome = Outcome.OUT_OF_MEMORY if out_of_memory else Outcome.CRASHED
    return Attempt(Reconstruction(outcome), f"{type(error).__name__}: {' '.join(str(error).split())}"[:500])


def _seeded(seeds: Sequence[int]) -> list[torch.Generator]:
    """One generator a trial; the global states, which libraries draw from, follow the first."""
    random.seed(seeds[0])
    np.random.seed(seeds[0] % 2**32)
    torch.default_generator.manual_seed(seeds[0])  # torch.manual_seed keeps a traceback of every call
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seeds[0])
    return [torch.Generator(device="cpu").manual_seed(one) for one in seeds]


# --- a process of its own ---------------------------------------------------------------------------------


MODELS = 2
"""How many models a process keeps between questions."""

STARTS = 3
"""How often a process is tried to be started."""

LOOKS = 0.05
"""Seconds between two looks at how much memory an attack's process holds."""

MOST_WORDS = 2**16
"""Bytes that the notes and reason of one answer may take."""


class _Asked(NamedTuple):
    """What an attack's process is asked: a stack of trials."""

    spec: str
    observations: Sequence[Observation]
    seeds: Sequence[int]
    limits: Limits
    architecture: Architecture

    def one_by_one(self) -> Iterator[_Asked]:
        """Each trial by itself."""
        for observation, seed in zip(self.observations, self.seeds, strict=True):
            yield self._replace(observations=[observation], seeds=[seed])


class AttackProcess:
    """A process that runs attacks: started when it is first needed, and again after it hung or died.

    With `hidden` it is a sandbox, which sees none of these files and folders.
    """

    def __init__(self, hidden: Sequence[str] | None = None) -> None:
        self._command = ["bench.isolation"] if hidden is None else ["bench.sandbox", *hidden]
        self._process: subprocess.Popen[bytes] | None = None
        self._sent: OrderedDict[Architecture, None] = OrderedDict()
        self._answered = 0

    def attempts(
        self,
        spec: str,
        observations: Sequence[Observation],
        seeds: Sequence[int],
        limits: Limits,
        architecture: Architecture,
    ) -> list[Attempt]:
        """As `attempts` above; `limits` are a trial's, `architecture` that of the observations' model.

        Where a stack ends the process or breaks a limit, each of its trials is tried alone. A process that
        somebody kills may not be the attack's fault: the same is asked once more.
        """
        return self._attempts(_Asked(spec, observations, seeds, limits, architecture))

    def _attempts(self, asked: _Asked) -> list[Attempt]:
        for _ in range(2):
            try:
                return self._answers(asked)
            except _KilledError:
                self.stop()
        return self._alone(
            Attempt(Reconstruction(Outcome.CRASHED), "the attack's process was killed, twice"), asked
        )

    def _answers(self, asked: _Asked) -> list[Attempt]:
        fresh = self._answered == 0
        try:
            answer = self._ask(asked)
            found = _decoded(answer, asked.observations[0].facts, len(asked.observations))
            self._answered += 1
            return found
        except TimeoutError:
            seconds = asked.limits.seconds
            lost = Attempt(Reconstruction(Outcome.TIMEOUT), f"stopped after {seconds:g} s", seconds)
        except MemoryError:
            reason = f"stopped at more than {asked.limits.memory / GIB:g} GiB"
            lost = Attempt(Reconstruction(Outcome.OUT_OF_MEMORY), reason)
            fresh = fresh or self._answered == 0
        except (EOFError, OSError):
            lost = Attempt(Reconstruction(Outcome.CRASHED), self._last_words())
        except _UnreadableError as error:
            lost = _crashed(error)
        self.stop()
        if lost.reconstruction.outcome is Outcome.OUT_OF_MEMORY and not fresh and len(asked.seeds) == 1:
            return self._answers(asked)  # it held others' leavings
        return self._alone(lost, asked)

    def _alone(self, lost: Attempt, asked: _Asked) -> list[Attempt]:
        """Each trial of a stack by itself; of a trial that was alone, what is known."""
        return [lost] if len(asked.seeds) == 1 else [self._attempts(one)[0] for one in asked.one_by_one()]

    def _ask(self, asked: _Asked) -> bytes:
        """The process' answer.

        Raises:
            TimeoutError: it takes too long.
            MemoryError: it holds too much.
            EOFError, OSError: it dies.
        """
        self.make_ready()
        assert self._process is not None
        spec, observations, seeds, limits, architecture = asked
        deadline = time.monotonic() + limits.seconds * len(seeds)
        messages = [_question(spec, observations, seeds, architecture)]
        if architecture not in self._sent:
            messages.insert(0, _model_message(observations[0].model, architecture))
        _keep(self._sent, architecture, None)
        # Beside the wait for the answer: a process that doesn't read breaks its limit of time.
        threading.Thread(target=_send, args=(self._connection, messages), daemon=True).start()
        part = sum(math.prod(shape) for shape in _shapes(observations[0].facts)) * 8
        most = len(seeds) * (part + MOST_WORDS) + MOST_WORDS
        return _received(self._connection, most, deadline, limits.memory, self._process.pid)

    def make_ready(self) -> None:
        """Starts the process where it isn't there: seconds, which are nobody's trial's.

        Raises:
            UserError: it ends as it starts, again and again.
        """
        for _ in range(STARTS):
            if self._process is not None and self._process.poll() is None:
                return
            with contextlib.suppress(EOFError):  # somebody killed it meanwhile
                self._start()
                return
            assert self._process is not None
            code = self._process.wait()
        raise UserError(
            f"a process for attacks ends as it starts, with code {code}; does `leakbench info` work here?"
        )

    def _start(self) -> None:
        _hide_memory()
        self._sent.clear()
        self._answered = 0
        self._connection, theirs = multiprocessing.Pipe()
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", *self._command, str(theirs.fileno())],
            env=environment,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # what the attack starts ends with it
        )
        theirs.close()
        self._connection.recv_bytes()  # it is ready: the limits of trials begin after this

    def _last_words(self) -> str:
        """Why the process isn't there any more.

        Raises:
            _KilledError: somebody killed it.
        """
        code = 0
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self._process.wait(1)
        if code == -signal.SIGKILL:
            raise _KilledError
        return f"the attack's process died{f' of signal {-code}' * (code < 0)}"

    def stop(self) -> None:
        """Ends the process, whatever it does."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()
            self._process.wait()
            self._connection.close()
            self._process = None
            self._answered = 0


def _send(connection: Connection, messages: Sequence[bytes]) -> None:
    with contextlib.suppress(OSError):  # it died: whoever waits for its answer finds out
        for message in messages:
            connection.send_bytes(message)


@functools.cache
def _hide_memory() -> None:
    """No process of the same user may read this one's memory, as an attack might; root still may."""
    if sys.platform == "linux":
        not_dumpable = (4, 0)  # PR_SET_DUMPABLE
        ctypes.CDLL(None).prctl(*not_dumpable)


class _Meter:
    """What a process and its children hold; who they are is looked up twice a second."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._all, self._found = [self._root], time.monotonic()

    def resident_bytes(self) -> int:
        """In all."""
        with contextlib.suppress(psutil.Error):
            if time.monotonic() - self._found > 10 * LOOKS:
                self._all = [self._root, *self._root.children(recursive=True)]
                self._found = time.monotonic()
        held = 0
        for process in self._all:
            with contextlib.suppress(psutil.Error):
                held += process.memory_info().rss
        return held


def _received(connection: Connection, most: int, deadline: float, memory: float, pid: int) -> bytes:
    """One message of `multiprocessing`, of at most so many bytes, while time and memory are watched."""
    meter = _Meter(pid)
    looked = time.monotonic()

    def exactly(count: int) -> bytes:
        nonlocal looked
        content = bytearray()
        while len(content) < count:
            now = time.monotonic()
            if now >= deadline:
                raise TimeoutError
            if now - looked >= LOOKS:
                looked = now
                if meter.resident_bytes() > memory:
                    raise MemoryError
            if connection.poll(min(LOOKS, deadline - now)):
                got = os.read(connection.fileno(), min(count - len(content), 2**20))
                if not got:
                    raise EOFError
                content += got
        return bytes(content)

    (size,) = struct.unpack("!i", exactly(4))
    if size == -1:
        (size,) = struct.unpack("!Q", exactly(8))
    if not 0 <= size <= most:
        raise _UnreadableError(f"the attack's process sent what is no answer: {size} bytes")
    return exactly(size)


class _KilledError(Exception):
    """Somebody killed an attack's process: a person, or a system that runs out of memory."""


class _UnreadableError(ValueError):
    """What came out of an attack's process can't be read."""


# --- what goes in ------------------------------------------------------------------------------------------


def _message(text: dict[str, Any] | list[Any], tensors: dict[str, Tensor]) -> bytes:
    """JSON, a NUL, and the tensors."""
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    return json.dumps(text).encode() + b"\0" + safetensors.torch.save(plain)


def _loaded(blob: bytes, device: str) -> dict[str, Tensor]:
    """The tensors of a message, where torch itself would put them.

    MKL's sums come out with other last digits where numbers don't start at a multiple of 16 bytes, and bytes
    lie wherever there was room.
    """
    return {name: one.to(device, copy=True) for name, one in safetensors.torch.load(blob).items()}


def _model_message(model: nn.Module, architecture: Architecture) -> bytes:
    """The weights of a model; a weight that has two names is sent once."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first: dict[int, str] = {}
    tied = {name: first.setdefault(id(value), name) for name, value in named}
    frozen = [name for name, value in model.named_parameters() if not value.requires_grad]
    text = {"architecture": asdict(architecture), "tied": tied, "frozen": frozen}
    return _message(text, {name: value for name, value in named if tied[name] == name})


def _question(
    spec: str, observations: Sequence[Observation], seeds: Sequence[int], architecture: Architecture
) -> bytes:
    """What an attack is asked. All observations are of one model and of the same kind."""
    first = observations[0]
    known = first.knowledge
    text = {
        "spec": spec,
        "seeds": list(seeds),
        "architecture": asdict(architecture),
        "device": str(first.head_weight.device),
        "head": first.head,
        "facts": asdict(first.facts) | {"granted": sorted(first.facts.granted)},
        "sent": [list(update) for update in (first.update, *first.later_updates)],
        "batch_norm": list(known.batch_norm or {}),
        "label_formats": [one.knowledge.label_format for one in observations],
        "knowledge": {
            "local_steps": known.local_steps,
            "local_lr": known.local_lr,
            "defense": known.defense,
        },
    }
    tensors = {}

    def stack(name: str, values: Iterator[Tensor]) -> None:
        tensors[name] = torch.stack(list(values))

    for name in first.update:
        stack(f"update 0 {name}", (one.update[name] for one in observations))
    for later in range(len(first.later_updates)):
        for name in first.later_updates[later]:
            stack(f"update {later + 1} {name}", (one.later_updates[later][name] for one in observations))
    if known.soft_labels is not None:
        stack("soft_labels", (one.knowledge.soft_labels for one in observations))  # type: ignore[misc]
    if known.auxiliary is not None:
        tensors["auxiliary images"] = known.auxiliary.images
        tensors["auxiliary soft_labels"] = known.auxiliary.soft_labels
    for layer in known.batch_norm or {}:
        for at, what in enumerate(("mean", "variance")):
            stack(f"{what} {layer}", (one.knowledge.batch_norm[layer][at] for one in observations))  # type: ignore[index]
    return _message(text, tensors)


def _keep(kept: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    """Enters a key as the newest; both ends of a connection forget the same ones."""
    kept.pop(key, None)
    kept[key] = value
    while len(kept) > MODELS:
        kept.popitem(last=False)


class _Model:
    """A model as it was sent: whole again for each question, whatever the last attack did to it."""

    def __init__(self, text: dict[str, Any], weights: bytes) -> None:
        asked = _architecture(text)
        built = models.build(asked.model, asked.image_shape, asked.num_classes, seed=0)
        prepare = registry.defenses.make(asked.defense).prepare
        built = prepare(built, torch.Generator(device="cpu").manual_seed(0)).eval()
        self._skeleton = FedSGDClient.with_batch_norm(built, asked.batch_norm).model
        self._parameters = frozenset(name for name, _ in self._skeleton.named_parameters())
        self._tied, self._frozen, self._weights = text["tied"], frozenset(text["frozen"]), weights
        for name in self._tied:
            self._give(self._skeleton, name, None)  # copied for each question: the less, the faster

    def whole(self, device: str) -> nn.Module:
        """A copy of its own."""
        model = copy.deepcopy(self._skeleton)
        tensors = _loaded(self._weights, device)
        for name in self._parameters:
            tensors[name] = nn.Parameter(tensors[name], requires_grad=name not in self._frozen)
        for name, source in self._tied.items():
            self._give(model, name, tensors[source])
        return model

    def _give(self, model: nn.Module, name: str, value: Tensor | None) -> None:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        held: dict[str, Any] = module._parameters if leaf in module._parameters else module._buffers
        held[leaf] = value


def _architecture(text: dict[str, Any]) -> Architecture:
    fields = text["architecture"]
    return Architecture(**(fields | {"image_shape": tuple(fields["image_shape"])}))


def _asked(text: dict[str, Any], blob: bytes, model: nn.Module) -> list[Observation]:
    """The observations of a question."""
    tensors = _loaded(blob, text["device"])
    given = text["facts"]
    facts = Facts(
        **(given | {"image_shape": tuple(given["image_shape"]), "granted": frozenset(given["granted"])})
    )
    auxiliary = None
    if "auxiliary images" in tensors:
        auxiliary = Batch(tensors["auxiliary images"], tensors["auxiliary soft_labels"])

    def own(name: str, at: int) -> Tensor:
        """An observation's part of a stack, which may begin anywhere within it."""
        return tensors[name][at].clone()

    def update(when: int, at: int) -> Update:
        """In the order in which it was sent, as sums over it depend on that."""
        return {name: own(f"update {when} {name}", at) for name in text["sent"][when]}

    return [
        Observation(
            model,
            update(0, at),
            text["head"],
            facts,
            Knowledge(
                label_format=label_format,
                soft_labels=own("soft_labels", at) if "soft_labels" in tensors else None,
                auxiliary=auxiliary,
                batch_norm={
                    layer: (own(f"mean {layer}", at), own(f"variance {layer}", at))
                    for layer in text["batch_norm"]
                }
                or None,
                **text["knowledge"],
            ),
            tuple(update(when, at) for when in range(1, len(text["sent"]))),
        )
        for at, label_format in enumerate(text["label_formats"])
    ]


# --- what comes out ----------------------------------------------------------------------------------------


def _encoded(answers: Sequence[Attempt]) -> bytes:
    """JSON, a NUL, and of each part the stack of those that are there."""
    texts, stacks = [], {}
    made = [one.reconstruction for one in answers]
    for one in answers:
        notes = {str(key)[:100]: _plain(value) for key, value in list(one.reconstruction.notes.items())[:50]}
        there = [getattr(one.reconstruction, part) is not None for part in PARTS]
        outcome = one.reconstruction.outcome.name
        texts.append([outcome, one.reason[:500], one.seconds, one.peak_bytes, notes, there])
    for part in PARTS:
        values = [value for one in made if (value := getattr(one, part)) is not None]
        if values:
            stacks[part] = torch.stack(values)
    return _message(texts, stacks)


def _plain(value: Any) -> float | str | int | bool:
    return value if isinstance(value, float | int | bool) else str(value)[:500]


def _shapes(facts: Facts) -> tuple[tuple[int, ...], ...]:
    """The shapes of an answer's parts."""
    n = facts.batch_size
    return (n, facts.num_classes), (n, facts.feature_width), (n, *facts.image_shape)


def _decoded(answer: bytes, facts: Facts, expected: int) -> list[Attempt]:
    """The attempts; what is said of them is believed only as far as an attack may say it."""
    text, _, blob = answer.partition(b"\0")
    try:
        texts, stacks = json.loads(text), safetensors.torch.load(blob)
        if len(texts) != expected:
            raise ValueError(f"{len(texts)} answers to {expected} observations")
        rest = {part: iter(stack) for part, stack in stacks.items()}
        made, seconds, peaks = [], [], []
        for outcome, _, took, peak, notes, there in texts:
            parts = [next(rest[part]) if has else None for part, has in zip(PARTS, there, strict=True)]
            failed = outcome in ENDED_BADLY
            own = Outcome.DIVERGED if failed else Outcome[outcome]
            made.append(Reconstruction(own, parts[0], parts[1], parts[2], dict(notes)))
            seconds.append(float(took) if took is not None and math.isfinite(took) else None)
            peaks.append(None if peak is None else int(peak))
        checked = _checked(made, facts, seconds, peaks)
        return [
            Attempt(Reconstruction(Outcome[text[0]]), str(text[1]))
            if text[0] in ENDED_BADLY
            else replace(one, reason=str(text[1]))
            for one, text in zip(checked, texts, strict=True)
        ]
    except StopIteration:
        raise _UnreadableError("the attack's process sent fewer parts than it says") from None
    except (
        ValueError,
        TypeError,
        KeyError,
        RecursionError,
        OverflowError,
        safetensors.SafetensorError,
    ) as error:
        raise _UnreadableError(f"the attack's process sent what is no answer: {error}") from None


# --- inside the process ------------------------------------------------------------------------------------


def _serve(connection: Connection) -> None:
    """What the process of an attack does, until whoever asks is gone."""
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def receive() -> None:
        try:
            while True:
                inbox.put(connection.recv_bytes())
        except (EOFError, OSError):
            if os.getpgrp() == os.getpid():
                os.killpg(0, signal.SIGKILL)  # with all that an attack may have started
            os._exit(0)  # also in the middle of an attack

    threading.Thread(target=receive, daemon=True).start()
    connection.send_bytes(b"ready")
    known: OrderedDict[Architecture, _Model] = OrderedDict()
    while True:
        head, _, blob = inbox.get().partition(b"\0")
        text = json.loads(head)
        architecture = _architecture(text)
        if "spec" not in text:
            _keep(known, architecture, _Model(text, blob))
            continue
        _keep(known, architecture, known[architecture])
        seen = _asked(text, blob, known[architecture].whole(text["device"]))
        connection.send_bytes(_encoded(attempts(text["spec"], seen, text["seeds"])))


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[-1])))
