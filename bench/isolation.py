"""Attacks at work: in this process, or in one of their own that never holds any truth.

What goes into an attack's process is its spec, its view of the observations and its seeds; what comes out
is safetensors and JSON, which is checked before anybody trusts it. A process that hangs or dies is replaced.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import multiprocessing
import os
import pickle
import queue
import random
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from bench import registry
from bench.threat import Attack, Facts, Observation, Outcome, Reconstruction

PARTS = ("soft_labels", "features", "images")
OWN_ACCOUNT = (Outcome.OK, Outcome.STEP_LIMIT, Outcome.DIVERGED, Outcome.UNIDENTIFIABLE)
"""The outcomes that an attack may return."""


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
    return [_checked(one, facts, seconds, peak) for one in got]


def _peak_resident_bytes() -> int:
    """The most memory that this process has held so far, whatever it ran."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _checked(answer: Any, facts: Facts, seconds: float | None, peak: int | None) -> Attempt:
    """An answer that isn't what the contract says is a crash; one that isn't finite has diverged."""
    if not isinstance(answer, Reconstruction) or not isinstance(answer.outcome, Outcome):
        raise TypeError(f"run returned {type(answer).__name__}, not a Reconstruction")
    if answer.outcome not in OWN_ACCOUNT:
        raise ValueError(f"run returned {answer.outcome}, which is not an attack's to say")
    n = facts.batch_size
    shapes = (n, facts.num_classes), (n, facts.feature_width), (n, *facts.image_shape)
    for name, shape in zip(PARTS, shapes, strict=True):
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
    return [torch.Generator(device="cpu").manual_seed(one) for one in seeds]


# --- a process of its own ---------------------------------------------------------------------------------


class AttackProcess:
    """A process that runs attacks: started when it is first needed, and again after it hung or died.

    With `hidden` it is a sandbox, which sees none of these files and folders.
    """

    def __init__(self, hidden: Sequence[str] | None = None) -> None:
        self._command = ["bench.isolation"] if hidden is None else ["bench.sandbox", *hidden]
        self._process: subprocess.Popen[bytes] | None = None

    def attempts(
        self, spec: str, observations: Sequence[Observation], seeds: Sequence[int], time_limit: float
    ) -> list[Attempt]:
        """As `attempts` above; `time_limit` in seconds a trial.

        Where a stack kills the process or outlasts the limit, each of its trials is tried alone.
        """
        question = pickle.dumps((spec, list(observations), list(seeds)))
        lost = Attempt(Reconstruction(Outcome.CRASHED), "the attack's process died")
        try:
            answer = self._ask(question, time_limit * len(seeds))
            return _decoded(answer, [observation.facts for observation in observations])
        except TimeoutError:
            lost = Attempt(Reconstruction(Outcome.TIMEOUT), f"stopped after {time_limit:g} s", time_limit)
        except (EOFError, OSError):
            pass
        except _UnreadableError as error:
            lost = _crashed(error)
        self.stop()
        if len(seeds) == 1:
            return [lost]
        pairs = zip(observations, seeds, strict=True)
        return [self.attempts(spec, [one], [seed], time_limit)[0] for one, seed in pairs]

    def _ask(self, question: bytes, seconds: float) -> bytes:
        if self._process is None or self._process.poll() is not None:
            self._start()
        self._connection.send_bytes(question)
        if not self._connection.poll(seconds):
            raise TimeoutError
        return self._connection.recv_bytes()

    def _start(self) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", *self._command, str(theirs.fileno())],
            env=environment,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        theirs.close()
        self._connection.recv_bytes()  # it is ready: the limits of trials begin after this

    def stop(self) -> None:
        """Ends the process, whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._connection.close()
            self._process = None


class _UnreadableError(ValueError):
    """What came out of an attack's process can't be read."""


def _encoded(answers: Sequence[Attempt]) -> bytes:
    """JSON, a NUL, and the tensors."""
    texts, tensors = [], {}
    for index, one in enumerate(answers):
        made = one.reconstruction
        notes = {str(key): _plain(value) for key, value in made.notes.items()}
        texts.append([made.outcome.name, one.reason, one.seconds, one.peak_bytes, notes])
        for part in PARTS:
            value = getattr(made, part)
            if value is not None:
                tensors[f"{index} {part}"] = value.contiguous().cpu()
    return json.dumps(texts).encode() + b"\0" + safetensors.torch.save(tensors)


def _plain(value: Any) -> float | str | int | bool:
    return value if isinstance(value, float | str | int | bool) else str(value)


def _decoded(answer: bytes, facts: Sequence[Facts]) -> list[Attempt]:
    """The attempts; what is said of them is believed only as far as an attack may say it."""
    text, _, blob = answer.partition(b"\0")
    try:
        texts, tensors = json.loads(text), safetensors.torch.load(blob)
        return [
            _believed(texts[at], [tensors.get(f"{at} {part}") for part in PARTS], one)
            for at, one in enumerate(facts)
        ]
    except (ValueError, TypeError, KeyError, IndexError, safetensors.SafetensorError) as error:
        raise _UnreadableError(f"the attack's process sent what is no answer: {error}") from None


def _believed(text: Any, parts: Sequence[Tensor | None], facts: Facts) -> Attempt:
    outcome, reason, seconds, peak, notes = text
    if outcome in (Outcome.CRASHED.name, Outcome.OUT_OF_MEMORY.name):
        return Attempt(Reconstruction(Outcome[outcome]), str(reason))
    checked = _checked(
        Reconstruction(Outcome[outcome], parts[0], parts[1], parts[2], notes=dict(notes)),
        facts,
        float(seconds) if math.isfinite(seconds) else None,
        None if peak is None else int(peak),
    )
    return Attempt(checked.reconstruction, str(reason), checked.seconds, checked.peak_bytes)


def _serve(connection: Connection) -> None:
    """What the process of an attack does, until whoever asks is gone."""
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def receive() -> None:
        try:
            while True:
                inbox.put(connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)  # also in the middle of an attack

    threading.Thread(target=receive, daemon=True).start()
    connection.send_bytes(b"ready")
    while True:
        connection.send_bytes(_encoded(attempts(*pickle.loads(inbox.get()))))


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[-1])))
