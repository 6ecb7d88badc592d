"""What the engine costs, and whether it scales: `python -m bench.speed.scale` prints it and writes SCALE.md.

Everything is a ratio or a count, with both sides in one process and taking turns, so that a busy machine
spoils a figure less; still, run it on an otherwise idle one.

- `overhead`: label trials on one worker against the attacks alone, called in a bare loop on the same stacks.
- `speedup`: one worker and two on the same grid.
- `resume`: a folder with 100,000 trials done, until the first that is lacking could go out.
- `memory`: the driver over synthetic trials, 10,000 to 1,000,000 of them.
- `minute`: 10,000 examples × 4 defenses × {λ, iDLG} on 2 workers.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from bench import isolation, registry, run, work
from bench.cases.models import Network
from bench.cases.scenario import load_grid
from bench.cluster import AHEAD, DaskEngine
from bench.report import record
from bench.report.utility import Utility
from bench.run import Plan
from bench.utility import Asked
from bench.work import Chunk, Context, Finished

OUT = Path(__file__).resolve().parent / "SCALE.md"

GRID = """
name = "scale"
[[blocks]]
dataset = "{dataset}"
model = "{model}"
weight_seed = {seeds}
defense = {defenses}
attacks = ["idlg", "lambda_recovery"]
samples = {samples}
"""
DEFENSES = ["none", "label_smoothing(epsilon=0.1)", "mixup(low=0.1, high=0.9)", "quantization"]
TRIALS, WORKERS = 10**8, 1_000
"""What the cost model is asked about."""


class Silent:
    """Looks away."""

    def trained(self, network: Network) -> None:
        """As all of these: nothing."""

    def started(self, done: int, total: int) -> None:
        """Nothing."""

    def advanced(self, part: Finished, workers: int) -> None:
        """Nothing."""

    def measured(self, cost: Utility) -> None:
        """Nothing."""


def planned(
    folder: Path, samples: int, defenses: Sequence[str] = ("none",), seeds: int = 1, **axes: str
) -> Plan:
    """A grid of label attacks, on networks of so many seeds."""
    path = folder / "scale.toml"
    given = {"dataset": "mnist5k", "model": "fcn(bias=False)"} | axes
    lists = {"seeds": json.dumps(list(range(seeds))), "defenses": json.dumps(list(defenses))}
    path.write_text(GRID.format(samples=samples, **lists, **given))
    grid = load_grid(str(path))
    return run.plan(grid, grid, None, "cpu")


def chunks_of(plan: Plan) -> list[Chunk]:
    """All its chunks."""
    weights = {network: work.weights_sha256(network, None) for network in plan.networks.values()}
    return list(plan.chunks(weights))


@dataclass
class Cost:
    """Seconds that pass, and seconds that processors work, on all processes together."""

    wall: float
    cpu: float


def measured(call: Callable[[], Any]) -> Cost:
    """What a call costs here and in the processes below this one."""
    wall, cpu = time.perf_counter(), _cpu()
    call()
    return Cost(time.perf_counter() - wall, _cpu() - cpu)


def _cpu() -> float:
    me = psutil.Process()
    total = 0.0
    for process in [me, *me.children(recursive=True)]:
        try:
            times = process.cpu_times()
            total += times.user + times.system
        except psutil.Error:
            continue
    return total


def drained(engine: DaskEngine, chunks: Sequence[Chunk], context: Context, folder: Path) -> None:
    """Runs chunks and writes what comes, as `execute` does."""
    with record.writing(folder) as writer:
        for part in engine.finish(iter(chunks), len(chunks), context):
            writer.lines(part.lines)


def overhead(folder: Path, repeats: int) -> dict[str, float]:
    """Milliseconds a trial: the attacks alone, the clients alone, and the engine with one worker."""
    plan = planned(folder, 960, DEFENSES[:1], seeds=5)
    chunks, context = chunks_of(plan), plan.context
    trials = sum(chunk.trials for chunk in chunks)
    observed = [work.observe(chunk, context) for chunk in chunks]

    def bare() -> None:
        for chunk, seen in zip(chunks, observed, strict=True):
            for entrant in chunk.entrants:
                attack = registry.attacks.make(entrant.spec)
                rngs = [torch.Generator().manual_seed(one) for one in chunk.seeds(entrant)]
                if entrant.stacks:
                    attack.run_many(seen.observations, rngs)  # type: ignore[attr-defined]
                else:
                    for observation, rng in zip(seen.observations, rngs, strict=True):
                        attack.run(observation, rng)

    def clients() -> None:
        for chunk in chunks:
            work.observe(chunk, context)

    costs: dict[str, list[Cost]] = {"attacks": [], "clients": [], "engine": []}
    with DaskEngine(1, None) as engine:
        drained(engine, chunks, context, folder / "warm")
        for repeat in range(repeats):
            costs["attacks"].append(measured(bare))
            costs["clients"].append(measured(clients))
            out = folder / f"overhead{repeat}"
            costs["engine"].append(measured(lambda: drained(engine, chunks, context, out)))  # noqa: B023
    each = {
        f"{name} {kind}": 1e3 * statistics.median(getattr(one, kind) for one in ones) / trials
        for name, ones in costs.items()
        for kind in ("wall", "cpu")
    }
    return each | {"trials": trials, "bytes": (folder / "overhead0" / record.FILE).stat().st_size / trials}


def speedup(folder: Path, repeats: int) -> dict[str, float]:
    """Seconds with one worker and with two, taking turns."""
    plan = planned(folder, 960, DEFENSES, seeds=3)
    chunks, context = chunks_of(plan), plan.context
    seconds: dict[int, list[float]] = {1: [], 2: []}
    with DaskEngine(1, None) as one, DaskEngine(2, None) as two:
        engines = {1: one, 2: two}
        for workers, engine in engines.items():
            drained(engine, chunks, context, folder / f"warm{workers}")
        for repeat in range(repeats):
            for workers, engine in engines.items():
                out = folder / f"speedup{workers}-{repeat}"
                seconds[workers].append(measured(lambda: drained(engine, chunks, context, out)).wall)  # noqa: B023
    ratios = [one / two for one, two in zip(seconds[1], seconds[2], strict=True)]
    return {"one": statistics.median(seconds[1]), "two": statistics.median(seconds[2]),
            "ratio": statistics.median(ratios)}  # fmt: skip


class Synthetic:
    """An engine that makes rows up: less what that takes, what remains is the driver's."""

    workers = 1

    def __init__(self) -> None:
        self.seconds = 0.0

    def weights(self, networks: Sequence[Network], root: Path | None) -> Iterator[tuple[Network, str]]:
        """No weights are trained."""
        yield from ((network, "0" * 64) for network in networks)

    def utilities(self, asked: Sequence[Asked], root: Path | None) -> Iterator[Utility]:
        """None."""
        yield from ()

    def finish(self, chunks: Iterator[Chunk], count: int, context: Context) -> Iterator[Finished]:
        """Failed rows for all trials."""
        lost = isolation.Attempt(isolation.Reconstruction(isolation.Outcome.CRASHED), "made up")
        for chunk in chunks:
            started = time.process_time()
            rows = [
                row
                for entrant in chunk.entrants
                for row in work.judge(chunk, context, entrant, [lost] * len(chunk.attacked), None, True)
            ]
            part = work.finished(rows, (), 0.0)
            self.seconds += time.process_time() - started
            yield part


def synthetic(plan: Plan, trials: int) -> Plan:
    """The plan with so many trials, which no data set could give."""
    samples = -(-trials // len(plan.cells))
    return replace(plan, cells=dict.fromkeys(plan.cells, samples))


class Memory(Silent):
    """Watches the driver's memory."""

    def __init__(self) -> None:
        self.most = 0

    def advanced(self, part: Finished, workers: int) -> None:
        """A look now and then would do; one is cheap."""
        self.most = max(self.most, psutil.Process().memory_info().rss)


def memory(folder: Path, sizes: Sequence[int]) -> dict[int, dict[str, float]]:
    """MiB that the driver holds at most, for runs from nothing and resumed ones; seconds a trial."""
    base = planned(folder, 10, DEFENSES)
    found = {}
    for trials in sizes:
        plan, out = synthetic(base, trials), folder / f"memory{trials}"
        watcher, again = Memory(), Memory()
        gc.collect()
        before = psutil.Process().memory_info().rss
        made_up = Synthetic()
        cost = measured(lambda: run.execute(plan, made_up, out, watcher))  # noqa: B023
        lines = (out / record.FILE).stat().st_size
        _drop_last_chunk(out)
        gc.collect()
        resumed = measured(lambda: run.execute(plan, Synthetic(), out, again))  # noqa: B023
        found[trials] = {
            "before": before / 2**20,
            "most": watcher.most / 2**20,
            "most resumed": again.most / 2**20,
            "ms a trial": 1e3 * (cost.cpu - made_up.seconds) / trials,
            "bytes": lines / trials,
            "resume": resumed.wall,
            "resume cpu": resumed.cpu,
        }
        (out / record.FILE).unlink()
    return found


def _drop_last_chunk(out: Path) -> None:
    with (out / record.FILE).open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 64 * 1500))
        rest = file.read()
        file.truncate(size - len(rest) + rest.index(b"\n") + 1)


def minute(folder: Path) -> dict[str, float]:
    """Seconds for 10,000 examples × 4 defenses × {λ, iDLG}: the held-out images of mnist5k ten times over."""
    import numpy as np

    from bench.cases import data

    own = data.load("mnist5k")
    images = own.images.permute(0, 2, 3, 1).numpy()
    path = folder / "mnist5k_ten_times.npz"  # a fifth is held out: 10,000 of 50,000
    np.savez(path, images=np.tile(images, (10, 1, 1, 1)), labels=np.tile(own.labels.numpy(), 10))
    plan = planned(folder, 10_000, DEFENSES, dataset=f"npz:{path}")
    started = time.perf_counter()
    with DaskEngine(2, None) as engine:
        ready = time.perf_counter()
        run.execute(plan, engine, folder / "minute", Silent())
    ended = time.perf_counter()
    return {"trials": plan.trials, "start": ready - started, "seconds": ended - started}


def report(found: dict[str, Any]) -> str:
    """The figures, and the cost model that follows from them."""
    over, speed, mem, minutes = (found[name] for name in ("overhead", "speedup", "memory", "minute"))
    own = over["engine wall"] - over["attacks wall"]
    own_cpu = over["engine cpu"] - over["attacks cpu"]
    large = max(mem, key=int)
    driver = mem[large]["ms a trial"]
    model = {
        "trials": f"{TRIALS:,}",
        "workers": f"{WORKERS:,}",
        "minutes": f"{TRIALS * over['engine cpu'] / 1e3 / WORKERS / 60:.0f}",
        "worker ms": f"{over['engine cpu']:.2f}",
        "driver ms": f"{driver:.3f}",
        "driver hours": f"{TRIALS * driver / 1e3 / 3600:.1f}",
        "fed": f"{over['engine cpu'] / driver:.0f}",
        "fed by seconds": f"{1e3 / driver:,.0f}",
        "disk": f"{TRIALS * over['bytes'] / 1e9:,.0f}",
        "memory": f"{TRIALS * 12 / 2**30:.1f}",
        "under way": f"{1 + AHEAD}",
    }
    measured_rows = [
        ("attacks alone, ms a trial (λ and iDLG, stacks of 64)", _both(over, "attacks"), ""),
        ("their clients, ms a trial", _both(over, "clients"), ""),
        ("engine with one worker, ms a trial", _both(over, "engine"), ""),
        ("**overhead**: engine less attacks, ms a trial", f"{own:.3f} wall, {own_cpu:.3f} CPU", "≤ 0.3"),
        (
            "of it, beside the clients' own work",
            f"{own - over['clients wall']:.3f} wall, {own_cpu - over['clients cpu']:.3f} CPU",
            "",
        ),
        (
            "**two workers** against one",
            f"{speed['ratio']:.2f} × ({speed['one']:.1f} s and {speed['two']:.1f} s)",
            "≥ 1.7",
        ),
        *(
            (
                f"**driver's memory** over {int(trials):,} synthetic trials, MiB",
                f"{one['most']:.0f} from nothing, {one['most resumed']:.0f} resumed",
                "flat",
            )
            for trials, one in mem.items()
        ),
        *(
            (
                f"**resume** of {int(trials):,} trials, s",
                f"{one['resume']:.1f} wall, {one['resume cpu']:.1f} CPU",
                "≤ 5" if int(trials) == 100_000 else "",
            )
            for trials, one in mem.items()
        ),
        ("driver, ms CPU a trial", f"{driver:.3f}", ""),
        ("bytes a trial, on the disk", f"{over['bytes']:.0f}", ""),
        (
            f"**{int(minutes['trials']):,} trials** (10,000 examples × 4 defenses × 2 attacks), 2 workers",
            f"{minutes['seconds']:.0f} s, of which {minutes['start']:.0f} s to start",
            "< 60 s",
        ),
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in measured_rows)
    return f"""# What the engine costs

Generated by `python -m bench.speed.scale` on {found["machine"]}; don't edit.

## Measured

| what | figure | aim |
| --- | --- | --- |
{table}

{MODEL.format(**model)}"""


MODEL = """## {trials} label trials on {workers} workers, by these constants

- **Workers**: {worker ms} ms of processor time a trial: {minutes} minutes, if the driver kept up.
- **Driver** (deals out, checks keys, writes): {driver ms} ms a trial, {driver hours} hours in all. So
  one driver keeps {fed} workers busy with trials as short as these, and {fed by seconds} where a trial
  takes a second.
- **Disk**: {disk} GB of records. They compress to about a tenth.
- **Driver's memory**: 12 bytes for each trial that is done when it starts, {memory} GiB for all; beside
  them only what is under way, {under way} tasks a worker of about a second each.
- A grid like this is therefore cut, by data set or model, into grids with a driver and a folder of their
  own; `leaderboard` takes several folders. Image attacks, which take seconds, need no such cut.

A run takes longer than that by its start (a worker imports torch twice), by training networks that aren't
cached, and at its end by at most one trial, or stack, for which all others wait.
"""


def _both(costs: dict[str, float], name: str) -> str:
    return f"{costs[f'{name} wall']:.3f} wall, {costs[f'{name} cpu']:.3f} CPU"


def main() -> None:
    """Measures what is asked for; writes SCALE.md where all of it was."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("only", nargs="*", help="overhead, speedup, memory, minute [all]")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--most", type=int, default=10**6, help="synthetic trials [1000000]")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    sizes = [size for size in (10**4, 10**5, 10**6) if size <= asked.most]
    parts: dict[str, Callable[[Path], Any]] = {
        "overhead": lambda folder: overhead(folder, asked.repeats),
        "speedup": lambda folder: speedup(folder, asked.repeats),
        "memory": lambda folder: memory(folder, sizes),
        "minute": minute,
    }
    found: dict[str, Any] = {"machine": f"{psutil.cpu_count()} cores, torch {torch.__version__}"}
    for name, measure in parts.items():
        if asked.only and name not in asked.only:
            continue
        with tempfile.TemporaryDirectory() as folder:
            found[name] = measure(Path(folder))
        print(name, json.dumps(found[name], indent=1), flush=True)
    if found.keys() >= parts.keys():
        OUT.write_text(report(found))
        print(OUT.read_text())


if __name__ == "__main__":
    main()
