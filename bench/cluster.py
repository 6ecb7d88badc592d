"""The engine on Dask: a worker observes and judges, and has a process of its own beside it that attacks.

No process in which an attack runs holds any truth. On a cluster that is already there, start workers with
`dask worker ADDRESS --nthreads 1`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import dask
from distributed import Client, Future, KilledWorker, LocalCluster, as_completed

from bench import utility, work
from bench.cases.models import Network
from bench.errors import UserError
from bench.isolation import AttackProcess, Attempt
from bench.report.record import Record
from bench.report.utility import Utility
from bench.threat import Outcome, Reconstruction
from bench.work import Chunk, Context

DEATHS = 2
"""How many workers a chunk may take with it and be tried again."""

AHEAD = 2
"""Chunks that wait beside a worker's own, so that it never waits for the driver."""

SETTINGS = {
    "distributed.scheduler.allowed-failures": DEATHS,
    "distributed.scheduler.worker-saturation": 1.0,
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,  # what a client holds never goes to the disk
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": False,
    "distributed.admin.large-graph-warning-threshold": "1 TiB",
    "distributed.comm.timeouts.connect": "60s",
}


class DaskEngine:
    """Runs chunks on a cluster; a context manager that closes what it started."""

    def __init__(self, workers: int, scheduler: str | None) -> None:
        """`workers` processes here, or the cluster at the address `scheduler`."""
        self._workers, self._address = workers, scheduler
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> DaskEngine:
        self._stack.enter_context(dask.config.set(SETTINGS))
        for name in ("distributed", "distributed.nanny", "distributed.worker", "distributed.scheduler"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        if self._address is None:
            self._client = self._stack.enter_context(Client(self._stack.enter_context(self._local())))
            return self
        try:
            self._client = self._stack.enter_context(Client(self._address, timeout="10s"))
        except (OSError, ValueError) as error:
            raise UserError(f"no Dask scheduler answers at {self._address}: {error}") from None
        if not self._count():
            raise UserError(
                f"the scheduler at {self._address} has no workers; "
                f"start some with: dask worker {self._address} --nthreads 1"
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _local(self) -> LocalCluster:
        return LocalCluster(
            n_workers=self._workers,
            threads_per_worker=1,
            processes=True,
            memory_limit=0,
            dashboard_address=None,
            silence_logs=logging.CRITICAL,
            env={"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )

    def _count(self) -> int:
        return len(self._client.scheduler_info(n_workers=-1)["workers"])

    def weights(self, networks: Sequence[Network], root: Path | None) -> Iterator[tuple[Network, str]]:
        """Each network and its weights' hash, as they get ready; trained by any worker."""
        futures = {
            self._client.submit(work.weights_sha256, network, root, key=f"weights-{network.key}"): network
            for network in networks
        }
        for future in as_completed(futures):
            yield futures[future], future.result()

    def utilities(self, asked: Sequence[utility.Asked], root: Path | None) -> Iterator[Utility]:
        """What each defense costs, as it gets ready; trained by any worker, none of which attacks."""
        futures = [self._client.submit(utility.utility, one, root, key=f"utility-{one.key}") for one in asked]
        for future in as_completed(futures):
            yield future.result()

    def rows(self, chunks: Sequence[Chunk], context: Context) -> Iterator[tuple[Chunk, list[Record]]]:
        """The rows of each chunk, as they get ready; only so many are under way as keep workers busy."""
        waiting = iter(chunks)
        under_way: dict[Future, Chunk] = {}
        ready = as_completed()

        def start_next() -> None:
            for chunk in waiting:
                future = self._client.submit(_rows, chunk, context, pure=False)
                under_way[future] = chunk
                ready.add(future)
                return

        for _ in range((1 + AHEAD) * self._count()):
            start_next()
        for future in ready:
            chunk = under_way.pop(future)
            try:
                yield chunk, future.result()
            except KilledWorker:
                yield chunk, _lost(chunk, context)
            start_next()


@functools.cache
def _attack_process() -> AttackProcess:
    """This worker's."""
    return AttackProcess()


def _rows(chunk: Chunk, context: Context) -> list[Record]:
    return work.rows(chunk, context, _attack_process().attempts, isolated=True)


def _lost(chunk: Chunk, context: Context) -> list[Record]:
    """The rows of a chunk that no worker survived."""
    died = Attempt(Reconstruction(Outcome.CRASHED), f"{DEATHS + 1} workers died over its chunk")
    attempts = [died] * len(chunk.samples)
    return [
        row
        for entrant in chunk.entrants
        for row in work.judge(chunk, context, entrant, attempts, None, isolated=True)
    ]
