"""What a person sees of a run while it runs; on stderr."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from bench.cases.models import Network
from bench.report.utility import Utility
from bench.run import Plan
from bench.work import Finished

STATE = ".progress"
"""The file in a run's folder with the last line of its progress, for `leakbench status`."""

WRITTEN = 1.0
"""Seconds between two writings of it."""

SAID = 60.0
"""Seconds after which a line is due where the output is no terminal, though no tenth is full."""


class Watcher:
    """Says what a run costs and how far it is: a bar on a terminal, a line every tenth elsewhere."""

    def __init__(self, folder: Path, quiet: bool) -> None:
        self._folder, self._quiet = folder, quiet
        self._console = Console(stderr=True, highlight=False)
        self._bar = Progress(
            BarColumn(bar_width=30),
            TextColumn("{task.description}"),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=None)
        self._done = self._there = self._total = self._failures = self._tenths = 0
        self._started = self._said = self._written = time.monotonic()

    def __enter__(self) -> Watcher:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        with contextlib.suppress(OSError):
            (self._folder / STATE).unlink(missing_ok=True)

    def cost(self, planned: Plan, workers: int, scheduler: str | None) -> None:
        """What a run will do, before it starts."""
        if self._quiet:
            return
        where = f"{workers} worker{'s' * (workers != 1)}" if workers else "in this process"
        where = f"the workers of {scheduler}" if scheduler else where
        scenarios = {scenario for scenario, _ in planned.cells}
        lines = [f"{planned.grid.name}: {planned.grid.title}"] if planned.grid.title else []
        count = f"{planned.trials} trials in {len(scenarios)} scenarios"
        training = f"{len(planned.to_train)} networks to train"
        if planned.utilities:
            training += f", {len(planned.utilities)} trainings with a defense"
        lines.append(f"{count}, {training}; on {planned.context.device}, {where}, into {self._folder}")
        if planned.cpu_seconds is not None and scheduler is None:
            minutes = planned.cpu_seconds / max(workers, 1) / 60
            lines.append(f"whole, this grid takes about {max(minutes, 0.1):.1f} minutes on {where}")
        for line in lines:
            self._console.print(line, soft_wrap=True)

    def trained(self, network: Network) -> None:
        """A network is ready."""
        self._bar.update(
            self._task, description=f"weights: {network.model.partition('(')[0]}, {network.weights}"
        )

    def started(self, done: int, total: int) -> None:
        """All weights are ready: so many trials are done already."""
        self._done = self._there = done
        self._total = total
        self._tenths = 10 * done // max(total, 1)
        self._started = self._said = time.monotonic()
        self._bar.update(self._task, completed=done, total=total)
        if done and not self._quiet:
            self._console.print(f"{done} of {total} trials are there already")

    def measured(self, cost: Utility) -> None:
        """What one defense costs."""
        self._bar.update(self._task, description=f"trained with {cost.defense.partition('(')[0]}")

    def advanced(self, part: Finished, workers: int) -> None:
        """Some trials more."""
        self._done += len(part.lines)
        self._failures += part.failures
        now = time.monotonic()
        line = self._line(now, workers, part.doing)
        self._bar.update(self._task, completed=self._done, description=line)
        if now - self._written > WRITTEN:
            self._written = now
            with contextlib.suppress(OSError):
                (self._folder / STATE).write_text(line)
        tenths = 10 * self._done // max(self._total, 1)
        due = tenths > self._tenths or now - self._said > SAID
        if due and not self._quiet and not self._console.is_terminal:
            self._tenths, self._said = tenths, now
            self._console.print(line, soft_wrap=True)

    def _line(self, now: float, workers: int, doing: str) -> str:
        """Trials done, per cent, rate, time left, workers, failures."""
        percent = 100 * self._done // max(self._total, 1)
        new, lacking = self._done - self._there, self._total - self._there
        rate = new / max(now - self._started, 1e-3)
        left = f"{duration((lacking - new) / rate)} left" if lacking / 100 <= new < lacking else ""
        parts = [
            f"{percent:>3} %",
            f"{self._done} of {self._total} trials",
            f"{rate:.3g}/s" if rate < 100 else f"{rate:.0f}/s",
            left,
            f"{workers} worker{'s' * (workers != 1)}" if workers else "",
            f"{self._failures} failed" if self._failures else "",
            doing,
        ]
        return "  ".join(part for part in parts if part)


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `5.0 h`, `3.1 days`."""
    for limit, unit, name in ((100, 1, "s"), (6000, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.{int(name == 'h')}f} {name}"
    return f"{seconds / 86400:.1f} days"


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """The first Ctrl-C raises KeyboardInterrupt and lets everything close; the second ends at once.

    Whatever is on the disk then is whole but for its last line, and every other process follows this one.
    """
    asked = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            sys.stderr.write("\x1b[?25h\n" * sys.stderr.isatty())  # a bar had hidden the cursor
            sys.stderr.flush()
            os._exit(130)
        asked = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
