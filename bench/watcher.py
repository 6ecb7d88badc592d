"""What a person sees of a run while it runs; on stderr."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bench.cases.models import Network
from bench.report.record import Record
from bench.report.utility import Utility
from bench.run import Plan
from bench.work import Chunk


class Watcher:
    """Says what a run costs and how far it is: a bar on a terminal, a line every tenth elsewhere."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._console = Console(stderr=True, highlight=False)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=None)
        self._done, self._total, self._said = 0, 0, 0

    def __enter__(self) -> Watcher:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def cost(self, planned: Plan, workers: int, folder: Path) -> None:
        """What a run will do, before it starts."""
        if self._quiet:
            return
        scenarios = {scenario for scenario, _ in planned.cells}
        lines = [f"{planned.grid.name}: {planned.grid.title}"] if planned.grid.title else []
        where = f"{workers} worker{'s' * (workers != 1)}" if workers else "in this process"
        count = f"{planned.trials} trials in {len(scenarios)} scenarios"
        training = f"{len(planned.to_train)} networks to train"
        if planned.utilities:
            training += f", {len(planned.utilities)} trainings with a defense"
        lines.append(f"{count}, {training}; on {planned.context.device}, {where}, into {folder}")
        if planned.cpu_seconds is not None:
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
        self._done, self._total = done, total
        self._bar.update(self._task, completed=done, total=total)
        if done and not self._quiet:
            self._console.print(f"{done} of {total} trials are there already")

    def measured(self, cost: Utility) -> None:
        """What one defense costs."""
        self._bar.update(self._task, description=f"trained with {cost.defense.partition('(')[0]}")

    def advanced(self, chunk: Chunk, rows: list[Record]) -> None:
        """Some trials more."""
        self._done += len(rows)
        scenario = chunk.scenario
        doing = " | ".join(
            spec.partition("(")[0] for spec in (rows[0].attack, scenario.model, scenario.defense)
        )
        self._bar.update(self._task, completed=self._done, description=doing)
        tenth = 10 * self._done // max(self._total, 1)
        if tenth > self._said and not self._quiet and not self._console.is_terminal:
            self._said = tenth
            self._console.print(
                f"{10 * tenth:>3} %  {self._done} of {self._total} trials  {doing}", soft_wrap=True
            )
