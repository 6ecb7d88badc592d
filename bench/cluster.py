"""The engine on Dask: a worker observes and judges, and has a process of its own beside it that attacks.

No process in which an attack runs holds any truth. On a cluster that is already there, start workers with
`dask worker ADDRESS --nthreads 1`.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import itertools
import logging
import math
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from types import TracebackType

import dask
from distributed import Client, Future, KilledWorker, LocalCluster, Worker, as_completed
from distributed.comm import CommClosedError

from bench import utility, work
from bench.cases.models import Network
from bench.errors import UserError
from bench.isolation import AttackProcess, Attempt
from bench.report.utility import Utility
from bench.threat import Outcome, Reconstruction
from bench.work import Chunk, Context, Finished

DEATHS = 2
"""How many workers a chunk may take with it and be tried again."""

AHEAD = 2
"""Tasks that wait beside a worker's own, so that it never waits for the driver."""

SECONDS = 1.0
"""How long a worker works before it hands back what is left."""

MOST_CHUNKS = 1_000
"""In one task."""

REVIVED = 5.0
"""Seconds between two looks whether all local workers are there."""

STARTS = 3
"""How often a local cluster is tried to be started."""

GPUS = "LEAKBENCH_GPUS"
"""The variable that tells local workers the GPUs, as CUDA_VISIBLE_DEVICES names them."""

SETTINGS = {
    "distributed.admin.system-monitor.interval": "10s",  # looks at the machine, which short trials pay for
    "distributed.deploy.lost-worker-timeout": "60s",  # a busy machine takes its time to start one again
    "distributed.nanny.pre-spawn-environ": {},  # Dask's makes malloc slow: it hands all memory back
    "distributed.scheduler.allowed-failures": DEATHS,
    "distributed.scheduler.worker-saturation": 1.0,
    "distributed.scheduler.work-stealing": False,
    "distributed.scheduler.worker-ttl": None,  # by the wall clock, which jumps; a lost connection says it too
    "distributed.worker.profile.enabled": False,  # it looks at all threads a hundred times a second
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,  # what a client holds never goes to the disk
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": False,
    "distributed.admin.large-graph-warning-threshold": "1 TiB",
    "distributed.comm.timeouts.connect": "60s",
}


class Supply:
    """Chunks on their way to workers: in tasks of about a second, and parted where workers would wait.

    A worker hands back what it didn't come to; that goes out again first. How chunks are dealt out changes
    nothing in any row: stacks and seeds are the chunks' own.
    """

    def __init__(self, chunks: Iterator[Chunk], count: int) -> None:
        """`count`: how many chunks there are; they are drawn one by one."""
        self._fresh, self._unseen = chunks, count
        self._returned: deque[Chunk] = deque()
        self._suspects: deque[Chunk] = deque()
        self._each: float | None = None

    def __len__(self) -> int:
        return self._unseen + len(self._returned) + len(self._suspects)

    def task(self, workers: int) -> tuple[Chunk, ...]:
        """What one worker should do next; nothing where nothing is left."""
        if len(self) < 2 * workers:
            self._part(2 * workers)
        if self._suspects:
            return (self._suspects.popleft(),)
        fair = len(self) // (4 * workers)
        wanted = 1 if self._each is None else int(SECONDS / max(self._each, 1e-9))
        return tuple(self._draw(max(1, min(wanted, fair, MOST_CHUNKS))))

    def learn(self, chunks: int, seconds: float) -> None:
        """So many chunks took so long."""
        each = seconds / max(chunks, 1)
        self._each = each if self._each is None else 0.7 * self._each + 0.3 * each

    def give_back(self, chunks: Sequence[Chunk]) -> None:
        """What a worker has left over."""
        self._returned.extendleft(reversed(chunks))

    def suspect(self, chunks: Sequence[Chunk]) -> None:
        """One of these may kill workers: from now on each goes alone."""
        self._suspects.extend(chunks)

    def _draw(self, most: int) -> list[Chunk]:
        drawn = [self._returned.popleft() for _ in range(min(most, len(self._returned)))]
        fresh = list(itertools.islice(self._fresh, most - len(drawn)))
        self._unseen -= len(fresh)
        return drawn + fresh

    def _part(self, enough: int) -> None:
        """Parts the chunks that are left until there are enough, the largest first."""
        whole = [(-chunk.trials, at, chunk) for at, chunk in enumerate(self._draw(len(self)))]
        heapq.heapify(whole)
        parted: list[Chunk] = []
        made = itertools.count(len(whole))
        while whole and len(whole) + len(parted) < enough:
            _, _, largest = heapq.heappop(whole)
            halves = largest.halves()
            if len(halves) == 1:
                parted.append(largest)
            else:
                for half in halves:
                    heapq.heappush(whole, (-half.trials, next(made), half))
        self._returned = deque([*parted, *(chunk for _, _, chunk in sorted(whole))])


def dask_setup(worker: Worker) -> None:
    """What a local worker does before anything else: Dask calls it, by its name, in a process of its own.

    Ctrl-C reaches all processes of a terminal at once: only the driver answers, and closes its workers. Each
    worker, and the process of its attacks, sees one GPU: they take them in turn.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a worker's event loop is in its main thread
    if gpus := os.environ.get(GPUS):
        names = gpus.split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = names[int(worker.name) % len(names)]


class DaskEngine:
    """Runs chunks on a cluster; a context manager that closes what it started."""

    def __init__(self, workers: int, scheduler: str | None, gpus: Sequence[str] = ()) -> None:
        """`workers` processes here, each seeing one of `gpus` alone, or the cluster at `scheduler`."""
        self._workers, self._address, self._gpus = workers, scheduler, gpus
        self._stack = contextlib.ExitStack()
        self._count, self._counted = 0, -math.inf

    def __enter__(self) -> DaskEngine:
        try:
            self._connect()
        except BaseException:
            self._stack.close()
            raise
        return self

    def _connect(self) -> None:
        self._stack.enter_context(dask.config.set(SETTINGS))
        for name in ("distributed", "distributed.nanny", "distributed.worker", "distributed.scheduler"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        if self._address is None:
            cluster = self._stack.enter_context(self._local())
            self._client = self._stack.enter_context(Client(cluster))
            over = threading.Event()
            threading.Thread(target=self._keep_whole, args=(cluster, over), daemon=True).start()
            self._stack.callback(over.set)
            return
        try:
            self._client = self._stack.enter_context(Client(self._address, timeout="10s"))
        except (OSError, ValueError) as error:
            raise UserError(f"no Dask scheduler answers at {self._address}: {error}") from None
        if not self.workers:
            raise UserError(
                f"the scheduler at {self._address} has no workers; "
                f"start some with: dask worker {self._address} --nthreads 1"
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _keep_whole(self, cluster: LocalCluster, over: threading.Event) -> None:
        """Starts a worker in place of each that died and whose nanny couldn't bring it back."""
        while not over.wait(REVIVED):
            cluster.scale(self._workers)

    def _local(self) -> LocalCluster:
        for _ in range(STARTS - 1):
            with contextlib.suppress(RuntimeError):  # a worker died before it had begun
                return self._cluster()
        try:
            return self._cluster()
        except RuntimeError as error:
            raise UserError(f"no workers can be started here: {error.__cause__ or error}") from error

    def _cluster(self) -> LocalCluster:
        return LocalCluster(
            n_workers=self._workers,
            threads_per_worker=1,
            processes=True,
            memory_limit=0,
            dashboard_address="127.0.0.1:0",  # any port: several runs don't quarrel
            silence_logs=logging.CRITICAL,
            env={"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            | ({GPUS: ",".join(self._gpus)} if self._gpus else {}),
            preload=[__name__],
        )

    @property
    def workers(self) -> int:
        """How many there are, as of a second ago."""
        if time.monotonic() - self._counted > 1:
            self._count, self._counted = (
                len(self._client.scheduler_info(n_workers=-1)["workers"]),
                time.monotonic(),
            )
        return self._count

    def weights(self, networks: Sequence[Network], root: Path | None) -> Iterator[tuple[Network, str]]:
        """Each network and its weights' hash, as they get ready; trained by any worker."""
        futures = {
            self._client.submit(work.weights_sha256, network, root, key=f"weights-{network.key}"): network
            for network in networks
        }
        for future in as_completed(futures):
            try:
                yield futures[future], future.result()
            except KilledWorker as error:
                raise UserError(
                    f"{error.allowed_failures + 1} workers died over the weights of {futures[future].model}; "
                    "the same command tries again"
                ) from None

    def utilities(self, asked: Sequence[utility.Asked], root: Path | None) -> Iterator[Utility]:
        """What each defense costs, as it gets ready; trained by any worker, none of which attacks."""
        futures = [self._client.submit(utility.utility, one, root, key=f"utility-{one.key}") for one in asked]
        for future in as_completed(futures):
            yield future.result()

    def finish(self, chunks: Iterator[Chunk], count: int, context: Context) -> Iterator[Finished]:
        """The rows of all chunks, as they get ready; only so many are under way as keep workers busy.

        A task whose workers die again and again is parted into its chunks; a chunk that is alone to blame
        has crashed.

        Raises:
            UserError: the scheduler is gone, or the suite isn't where the workers are.
        """
        supply = Supply(chunks, count)
        under_way: dict[Future, tuple[Chunk, ...]] = {}
        ready = as_completed()

        def fill() -> None:
            workers = max(1, self.workers)
            while len(under_way) < (1 + AHEAD) * workers and (task := supply.task(workers)):
                future = self._client.submit(_finish, task, context, pure=False)
                under_way[future] = task
                ready.add(future)

        fill()
        for future in ready:
            task = under_way.pop(future)
            try:
                part = future.result()
                supply.give_back(part.left)
                supply.learn(len(task) - len(part.left), part.seconds)
                yield part
            except KilledWorker as error:
                if len(task) > 1:
                    supply.suspect(task)
                else:
                    yield _lost(task[0], context, error.allowed_failures + 1)
            except (CommClosedError, CancelledError) as error:
                raise UserError(
                    f"the scheduler is gone ({type(error).__name__}); the same command goes on"
                ) from None
            except ModuleNotFoundError as error:
                raise UserError(
                    f"a worker lacks a module: {error}; install leakbench where workers run"
                ) from None
            fill()


@functools.cache
def _attack_process(hidden: tuple[str, ...] | None) -> AttackProcess:
    """This worker's."""
    return AttackProcess(hidden)


_ONE_AT_A_TIME = threading.Lock()
"""A worker has one attack process, however many threads it was started with."""


def _finish(chunks: Sequence[Chunk], context: Context) -> Finished:
    with _ONE_AT_A_TIME:
        process = _attack_process(context.hidden)
        process.make_ready()
        return work.finish(chunks, context, process.attempts, isolated=True, seconds=SECONDS)


def _lost(chunk: Chunk, context: Context, deaths: int) -> Finished:
    """The rows of a chunk that no worker survived."""
    died = Attempt(Reconstruction(Outcome.CRASHED), f"{deaths} workers died over its chunk")
    attempts = [died] * len(chunk.attacked)
    rows = [
        row
        for entrant in chunk.entrants
        for row in work.judge(chunk, context, entrant, attempts, None, isolated=True)
    ]
    return work.finished(rows, (), 0.0)
