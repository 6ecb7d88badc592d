"""Chunks on their way: dealt out so that nobody waits, done once whatever dies, on clusters of one's own."""

import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from bench import cluster, run
from bench.cases.scenario import load_grid, replaced
from bench.cluster import DaskEngine, Supply
from bench.errors import UserError
from bench.report import record
from bench.work import Chunk, Entrant, Finished

COMPARED = ("outcome", "reason", *record.METRICS)
ONE = Entrant("a", "1", "head", frozenset(), frozenset(), None, stacks=False)


def chunk(samples: int, *entrants: Entrant) -> Chunk:
    return Chunk(None, None, "", "1", "head", 0, samples, entrants or (ONE,))


def trials(chunks: list[Chunk]) -> list[tuple[str, int]]:
    return [(entrant.spec, sample) for one in chunks for entrant in one.entrants for sample in one.attacked]


def simulated(supply: Supply, workers: int, seconds_of: dict[str, float]) -> tuple[list[float], list]:
    """When each worker ends, in seconds that the trials' costs stand for; and all trials that were done."""
    clocks, done = [0.0] * workers, []
    waiting: list[tuple[Chunk, ...]] = []
    while True:
        while len(waiting) < workers and (task := supply.task(workers)):
            waiting.append(task)
        if not waiting:
            return clocks, done
        at = clocks.index(min(clocks))
        left, took, worked = list(waiting.pop(0)), 0.0, 0
        while left and (not worked or took < cluster.SECONDS):
            first, *rest = dataclasses.replace(left[0], entrants=left[0].entrants[:1]).parted(1)
            others = [dataclasses.replace(left[0], entrants=left[0].entrants[1:])]
            left[:1] = [*rest, *(one for one in others if one.entrants)]
            took += seconds_of[first.entrants[0].spec] * len(first.attacked) + 1e-4
            worked += 1
            done += trials([first])
        clocks[at] += took + 0.002
        supply.learn(1, took)
        supply.give_back(left)


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_ten_long_trials_in_one_chunk_keep_all_workers_busy(workers):
    ends, done = simulated(Supply(iter([chunk(10)]), 1), workers, {"a": 60.0})
    assert sorted(done) == sorted(trials([chunk(10)]))
    assert max(ends) <= 60.1 * -(-10 // workers)


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_many_tiny_trials_keep_all_workers_busy(workers):
    chunks = [chunk(64) for _ in range(300)]
    ends, done = simulated(Supply(iter(chunks), len(chunks)), workers, {"a": 1e-4})
    assert len(done) == 300 * 64
    assert min(ends) > 0.7 * max(ends)


def test_a_long_chunk_among_short_ones_is_shared():
    slow = dataclasses.replace(ONE, spec="slow")
    chunks = [*(chunk(8) for _ in range(6)), chunk(10, slow), *(chunk(8) for _ in range(4))]
    ends, done = simulated(Supply(iter(chunks), len(chunks)), 2, {"a": 1e-3, "slow": 30.0})
    assert len(done) == len(set(done)) + 9 * 8 == 90
    assert max(ends) < 5.3 * 30


def test_chunks_are_drawn_no_faster_than_they_are_worked_on():
    drawn = []

    def endless():
        while True:
            drawn.append(None)
            yield chunk(64)

    supply = Supply(endless(), 10**6)
    for _ in range(50):
        supply.task(4)
        supply.learn(1, 0.01)
    assert len(drawn) <= 50 * cluster.SECONDS / 0.01


def test_a_stack_is_never_parted():
    stacked = dataclasses.replace(ONE, stacks=True)
    assert chunk(64, stacked).halves() == (chunk(64, stacked),)
    supply = Supply(iter([chunk(64, stacked)]), 1)
    assert supply.task(8) == (chunk(64, stacked),)
    assert supply.task(8) == ()


def test_suspects_go_alone():
    supply = Supply(iter([chunk(4) for _ in range(40)]), 40)
    supply.learn(1000, 0.001)
    task = supply.task(1)
    assert len(task) == 10
    supply.suspect(task)
    assert [len(supply.task(1)) for _ in range(10)] == [1] * 10


# --- with real processes ----------------------------------------------------------------------------------


class Silent(run.Progress):
    """Looks away."""


def planned(grid: Path, **changes) -> run.Plan:
    full = load_grid(str(grid))
    return run.plan(full, replaced(full, **changes), None, "cpu")


def results(folder: Path) -> dict[str, tuple]:
    rows = record.read(folder).rows
    lines = (folder / record.FILE).read_bytes().splitlines()
    assert len(rows) == len({row["trial"] for row in rows}) == sum(b'{"trial"' in line for line in lines)
    return {row["trial"]: tuple(row[column] for column in COMPARED) for row in rows}


@pytest.fixture
def unbroken(small, tmp_path):
    run.execute(planned(small), run.InProcess(), tmp_path / "unbroken", Silent())
    return results(tmp_path / "unbroken")


@pytest.fixture
def scheduler(tmp_path):
    """Starts `dask scheduler` and `dask worker` by hand; gives the address and what starts a worker."""
    started = []

    def start(*command: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-m", "distributed.cli." + command[0], *command[1:]],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        return process

    file = tmp_path / "scheduler.json"
    head = start(
        "dask_scheduler",
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "--no-dashboard",
        "--scheduler-file",
        str(file),
    )

    def worker() -> subprocess.Popen:
        return start("dask_worker", "--scheduler-file", str(file), "--nthreads", "1", "--no-dashboard")

    deadline = time.monotonic() + 60
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    yield json.loads(file.read_text())["address"], worker, head
    for process in started:
        for child in (
            [*psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
        ):
            child.kill()
        process.kill()
        process.wait()


def test_a_cluster_that_is_there_is_used_and_left_as_it_was(small, unbroken, scheduler, tmp_path):
    address, worker, head = scheduler
    with (
        pytest.raises(UserError, match=r"has no workers; start some with: dask worker tcp://127"),
        DaskEngine(0, address),
    ):
        pass
    workers = [worker(), worker()]
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            with DaskEngine(0, address) as engine:
                if engine.workers == 2:
                    run.execute(planned(small), engine, tmp_path / "out", Silent())
                    break
        except UserError:
            time.sleep(0.5)
    assert results(tmp_path / "out") == unbroken
    assert all(process.poll() is None for process in [head, *workers])


def test_a_scheduler_that_goes_is_one_line_and_the_same_run_goes_on(small, unbroken, scheduler, tmp_path):
    address, worker, head = scheduler
    worker()

    class Kills(Silent):
        def advanced(self, part: Finished, workers: int) -> None:
            os.killpg(head.pid, signal.SIGKILL)

    deadline = time.monotonic() + 60
    error = ""
    while "the scheduler is gone" not in error and time.monotonic() < deadline:
        try:
            with DaskEngine(0, address) as engine:
                run.execute(planned(small), engine, tmp_path / "out", Kills())
        except UserError as caught:  # the first time, perhaps, that there are no workers yet
            error = str(caught)
            time.sleep(0.2)
    assert "the scheduler is gone" in error
    assert 0 < len(record.read(tmp_path / "out").rows) < len(unbroken)
    run.execute(planned(small), run.InProcess(), tmp_path / "out", Silent())
    assert results(tmp_path / "out") == unbroken


def workers_and_attacks() -> list[psutil.Process]:
    """The processes that work for this one."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            if any(kind in " ".join(child.cmdline()) for kind in ("spawn_main", "bench.isolation")):
                found.append(child)
    return found


def test_killed_workers_lose_nothing_and_double_nothing(small, unbroken, tmp_path):
    """The short form of bench/speed/faults.py."""
    rng, kills = random.Random(7), 0

    class Kills(Silent):
        def advanced(self, part: Finished, workers: int) -> None:
            nonlocal kills
            if kills < 4:
                rng.choice(workers_and_attacks()).kill()
                kills += 1

    with DaskEngine(2, None) as engine:
        run.execute(planned(small), engine, tmp_path / "out", Kills())
    assert kills == 4
    assert results(tmp_path / "out") == unbroken


def test_a_chunk_that_kills_its_worker_three_times_has_crashed(small, misbehaving, tmp_path):
    """The attack kills the worker that asks it: its parent."""
    misbehaving.write_text(
        misbehaving.read_text()
        + """

@dataclass(frozen=True)
class Assassin(Base):
    name: ClassVar[str] = "assassin"

    def run(self, observation, rng):
        os.kill(os.getppid(), 9)
"""
    )
    attacks = [f"{misbehaving}:Assassin", "lambda_recovery"]
    small.write_text(small.read_text().replace(', "fcn(depth=2, width=24)"', ""))
    with DaskEngine(1, None) as engine:
        run.execute(
            planned(small, attacks=attacks, defenses=["none"], samples=1), engine, tmp_path / "out", Silent()
        )
    rows = record.read(tmp_path / "out").rows
    ended = {(row["attack"].split(":")[-1].split("(")[0], row["outcome"], row["reason"]) for row in rows}
    assert ("Assassin", "crashed", "3 workers died over its chunk") in ended
    assert ("lambda_recovery", "ok") in {(attack, outcome) for attack, outcome, _ in ended}


def test_workers_see_one_gpu_each():
    with DaskEngine(2, None, gpus=["3", "GPU-7"]) as engine:
        seen = engine._client.run(os.getenv, "CUDA_VISIBLE_DEVICES")
    assert sorted(seen.values()) == ["3", "GPU-7"]


def test_a_worker_leaves_ctrl_c_to_the_driver_also_one_that_comes_instead_of_another():
    with DaskEngine(1, None) as engine:
        workers_and_attacks()[0].kill()
        time.sleep(1)
        engine._client.wait_for_workers(1, timeout=60)
        (handler,) = engine._client.run(signal.getsignal, signal.SIGINT).values()
    assert handler is signal.SIG_IGN


def test_the_wall_clock_may_jump():
    """The scheduler doesn't part with workers that it hasn't heard of for a while by the wall clock."""
    with DaskEngine(1, None) as engine:
        assert engine._client.cluster.scheduler.worker_ttl is None
