"""The command line. What a command needs is imported when it runs: `--help` answers at once."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bench.errors import UserError, nearest

if TYPE_CHECKING:
    from bench.report.record import Record, Run
    from bench.run import Engine

app = typer.Typer(
    name="leakbench",
    help="What does a federated-learning update give away, and which defenses stop it?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

UNFINISHED = {"crashed", "timeout", "out_of_memory"}
"""Outcomes that end a run with exit code 3: something to look at."""

DataOption = Annotated[Path | None, typer.Option("--data", help="Where data sets lie [LEAKBENCH_DATA].")]


@app.command()
def run(
    grid: Annotated[str, typer.Argument(help="A grid's name, or a TOML file.")] = "quick",
    out: Annotated[Path | None, typer.Option(help="The run's folder [runs/GRID].")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, … [a GPU where there is one].")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes; 0 runs in this one [one a core, or a GPU].")
    ] = None,
    scheduler: Annotated[str | None, typer.Option(help="A Dask cluster that is already there.")] = None,
    attack: Annotated[list[str] | None, typer.Option(help="Replaces the grid's attacks; repeatable.")] = None,
    defense: Annotated[list[str] | None, typer.Option(help="Replaces its defenses; repeatable.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Samples a cell, instead of the grid's.")] = None,
    data: DataOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No cost, no progress.")] = False,
) -> None:
    """Run a grid of scenarios and attacks, and show its leaderboards. Killed, it goes on where it was."""
    if workers is not None and scheduler is not None:
        raise UserError("--workers starts processes here, --scheduler takes a cluster's: give one of them")
    from bench import run as runner
    from bench.cases.scenario import load_grid, replaced
    from bench.watcher import Watcher, stoppable

    full = load_grid(grid)
    wanted = replaced(full, attack or [], defense or [], samples)
    folder = out or Path("runs") / full.name
    planned = runner.plan(full, wanted, data, device or _default_device())
    count = _default_workers(planned.context.device) if workers is None else workers
    watcher = Watcher(folder, quiet)
    watcher.cost(planned, count, scheduler)
    with (
        _stopped_by_hand(folder),
        stoppable(),
        watcher,
        _engine(count, scheduler, planned.context.device) as engine,
    ):
        runner.execute(planned, engine, folder, watcher)
    from bench.report import leaderboard as boards

    recorded = _read([folder])[0]
    made = boards.tracks([recorded])
    _show([recorded], [name for name in ("label", "image") if name in made] or made, "table")
    if planned.utilities:
        _show_defenses([recorded], [folder], "table")
    if shortfall := recorded.headers[-1].shortfall:
        print(f"\n{shortfall}")
    print(f"\nRecords: {folder / 'records.jsonl'} ({len(recorded.rows)} trials). Any of them again: ", end="")
    print(f"leakbench rerun {folder} TRIAL\nA page of it: leakbench report {folder}")
    _exit_if_unfinished(recorded.rows)


@app.command()
def leaderboard(
    runs: Annotated[list[Path], typer.Argument(help="Folders that `leakbench run` wrote.")],
    track: Annotated[
        str | None,
        typer.Option(help="label, feature, image or defense [all but that; csv, json: the first]."),
    ] = None,
    format: Annotated[str, typer.Option(help="table, csv, json or md.")] = "table",
) -> None:
    """Rank the attacks of one or more runs."""
    from bench.report import leaderboard as boards

    recorded = _read(runs)
    if track == "defense":
        _show_defenses(recorded, runs, format)
        return
    tracks = [track] if track else boards.tracks(recorded) or ["label"]
    _show(recorded, tracks[:1] if format in ("csv", "json") else tracks, format)
    for shortfall in dict.fromkeys(run.headers[-1].shortfall for run in recorded):
        if shortfall and format == "table":
            print(f"\n{shortfall}")


@app.command("list")
def list_(
    kind: Annotated[str, typer.Argument(help="attacks, defenses, datasets, models or grids.")],
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list of objects with a name.")] = False,
) -> None:
    """List what can be named."""
    kinds = {
        "attacks": _list_attacks,
        "defenses": _list_defenses,
        "datasets": _list_datasets,
        "models": _list_models,
        "grids": _list_grids,
    }
    if kind not in kinds:
        raise UserError(f"nothing is listed as {kind!r}{nearest(kind, kinds)}")
    entries = kinds[kind]()
    if as_json:
        print(json.dumps(entries, indent=2, ensure_ascii=False))
        return
    width = max(len(entry["name"]) for entry in entries)
    for entry in entries:
        print(f"{entry['name']:<{width}}  {entry['title']}")


@app.command()
def status(folder: Annotated[Path, typer.Argument(help="A run's folder.")]) -> None:
    """Say how far a run got, and whether it still goes on."""
    from bench.report import record
    from bench.watcher import STATE

    so_far = record.counted(folder)
    done = sum(so_far.outcomes.values())
    print(f"{so_far.grid}: {done} of {so_far.wanted} trials")
    for outcome, count in so_far.outcomes.most_common():
        print(f"  {count:>7}  {outcome}")
    if record.is_written(folder):
        state = folder / STATE
        print(f"running: {state.read_text() if state.exists() else ' its networks are being made ready'}")
    elif done < so_far.wanted:
        print("not running: the same `leakbench run` goes on")


@app.command()
def check(folder: Annotated[Path, typer.Argument(help="A run's folder.")]) -> None:
    """Say whether a run is whole: no line damaged, no trial doubled or missing. One line a fault."""
    from bench.report import record

    faults = record.faults(folder)
    for fault in faults:
        print(fault)
    if faults:
        raise UserError(f"{folder} is not whole: {len(faults)} fault{'s' * (len(faults) > 1)}")
    print(f"whole: {sum(record.counted(folder).outcomes.values())} trials")


@app.command()
def rerun(
    folder: Annotated[Path, typer.Argument(help="A run's folder.")],
    trial: Annotated[str, typer.Argument(help="A trial's key, or its beginning.")],
    data: DataOption = None,
) -> None:
    """Repeat one recorded trial and compare its metrics, digit by digit."""
    from bench import run as runner
    from bench.report.record import METRICS

    row, again = runner.rerun(folder, trial, data)
    print(f"{row['attack']} on {row['dataset']}, {row['model']}, {row['weights']}, {row['defense']}")
    differing = _print_comparison(row, again, ("outcome", *METRICS))
    if differing:
        raise UserError(f"{', '.join(differing)} differ from the record; it was made by {_provenance(row)}")
    print("The same, digit by digit.")


@app.command()
def report(
    place: Annotated[Path, typer.Argument(help="A run's folder, or one of published records.")],
    out: Annotated[Path | None, typer.Option(help="The page [report.html in the run's folder].")] = None,
    data: DataOption = None,
) -> None:
    """Make one HTML page of a run: boards, curves, images; it needs no network."""
    from bench import exhibits
    from bench.registry import ROOT
    from bench.report import load, manifests, page, record

    results = load(place)
    is_run = (place / record.FILE).is_file()  # published records get no page among them
    target = out or (place if is_run else Path()) / "report.html"
    shown = page.render(
        results.runs,
        str(place),
        exhibits.exhibits(results.runs, data),
        results.costs,
        ROOT / "results" / "speed",
        manifests(place),
    )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(shown, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{target} can't be written: {error.strerror}; choose another --out") from error
    print(f"{target}: open it in a browser ({len(shown) // 1024} KiB)")


@app.command()
def submit(
    attack: Annotated[str, typer.Argument(help="FILE.py:CLASS, with parameters if you like.")],
    grid: Annotated[
        str | None, typer.Option(help="A grid's name or file [that of the attack's track].")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="At most so many samples a cell: a submission in part.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where records go.")] = Path("results/records"),
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, … [a GPU where there is one].")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes [one a core].")] = None,
    data: DataOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No cost, no progress.")] = False,
) -> None:
    """Run one attack from a file on a whole grid, isolated, and write what a pull request needs."""
    from bench import run as runner
    from bench import sandbox, submission
    from bench.report import leaderboard as boards
    from bench.report import record
    from bench.watcher import Watcher, stoppable

    path, spec = submission.parsed(attack)
    with submission.alone(path, path.name) as copy:
        wanted = grid or submission.ask(copy, spec, str(path), [])[0].grid
        full, grid_file = submission.grid_of(wanted)
        mine, planned = submission.plan(
            copy, spec, str(path), full, samples, data, device or _default_device()
        )
        folder = Path("runs") / "submissions" / f"{full.name}-{mine.label}-{mine.sha256[:12]}"
        watcher = Watcher(folder, quiet)
        count = workers or _default_workers(planned.context.device)
        watcher.cost(planned, count, None)
        engine = submission.engine(count, planned.context)
        with _stopped_by_hand(folder), stoppable(), watcher, engine:
            runner.execute(planned, engine, folder, watcher)
    ran = submission.first_samples(record.read(folder), samples)
    kept = "tight" if sandbox.is_tight() else "loose"
    header = submission.whole_header(mine, full, planned)
    written = submission.publish(mine, full, grid_file, samples, planned, ran, out, kept, header)
    beside = submission.references(full, out, written, samples)
    tracks = [name for name in boards.tracks([ran]) if boards.track_named(name).produces in mine.produces]
    _show([ran, *beside], tracks, "table")
    track = "images" if "images" in mine.produces else "labels"
    print(f"\nRecords: {written}; how they were made: {written.with_suffix('.json').name}")
    print(f"Check them: leakbench verify {written}")
    print(f"A pull request holds both, {path.name} as attacks/{track}/{mine.name}.py, and its test.")
    if samples is not None:
        print(f"This is a part, of at most {samples} samples a cell: ranking needs all of them.")
    _exit_if_unfinished([row for row in ran.rows if row["attack"] == mine.spec])


@app.command()
def verify(
    records: Annotated[Path, typer.Argument(help="The rN.jsonl that `leakbench submit` wrote.")],
    salt: Annotated[
        str, typer.Option(envvar="LEAKBENCH_SALT", help="A secret: compare on fresh, changed examples too.")
    ] = "",
    workers: Annotated[int | None, typer.Option(min=1, help="Processes [one a core].")] = None,
    data: DataOption = None,
) -> None:
    """Check a submission: run its trials again and compare. 0: it agrees; 1: it is refused, and why."""
    from bench import sandbox, verification

    os.environ.pop("LEAKBENCH_SALT", None)
    if salt and not sandbox.is_tight():
        print(
            "leakbench: no namespaces on this machine: Python alone keeps data and network away",
            file=sys.stderr,
        )
    for line in verification.verify(records, salt, data, workers or _cores()):
        print(line)


@app.command()
def new(
    kind: Annotated[str, typer.Argument(help="attack or defense.")],
    name: Annotated[str, typer.Argument(help="Its name, as in my_attack; the file is NAME.py.")],
) -> None:
    """Write a commented attack or defense to start from, and its test, into this folder."""
    from bench import authoring

    source, test, class_name = authoring.write(kind, name, Path())
    print(f"{source} and {test}: complete as they are; edit both. Then:")
    print(f"  python -m pytest {test}")
    print(f"  leakbench run --{kind} {source}:{class_name} --samples 20 --out runs/{name}")
    if kind == "attack":
        print(f"  leakbench submit {source}:{class_name}")


@app.command()
def data(
    name: Annotated[str, typer.Argument(help="A data set, or lpips (the metric's network).")],
    data: DataOption = None,
) -> None:
    """Download a data set, or LPIPS's network. No other command downloads."""
    from bench import downloads

    print(downloads.fetch(name, data))


@app.command()
def info() -> None:
    """Say what is installed, and where things are kept."""
    import importlib.metadata

    import torch

    from bench.cache import cache_folder, lpips_trunk_file
    from bench.cases.data import data_folder
    from bench.run import commit
    from bench.work import PROTOCOL_VERSION

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    trunk = lpips_trunk_file()
    facts = {
        "leakbench": importlib.metadata.version("leakbench"),
        "commit": commit() or "no clone",
        "protocol": PROTOCOL_VERSION,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "GPU": ", ".join(gpus) or "none",
        "cores": _cores(),
        "cache": cache_folder(),
        "data": data_folder(None),
        "LPIPS": trunk if trunk.exists() else "not there: leakbench data lpips",
    }
    for name, value in facts.items():
        print(f"{name:<10} {value}")


def _list_attacks() -> list[dict[str, Any]]:
    from bench.registry import attacks

    return [
        {
            "name": name,
            "title": cls.title,
            "spec": attacks.canonical(name),
            "revision": cls.revision,
            "paper": cls.paper,
            "threat_model": cls.threat_model,
            "produces": sorted(cls.produces),
            "reads": cls.reads,
        }
        for name in attacks.names()
        for cls in [attacks.find(name)]
    ]


def _list_defenses() -> list[dict[str, Any]]:
    from bench.registry import defenses

    return [
        {
            "name": name,
            "title": cls.title,
            "spec": defenses.canonical(name),
            "revision": cls.revision,
            "paper": cls.paper,
        }
        for name in defenses.names()
        for cls in [defenses.find(name)]
    ]


def _list_datasets() -> list[dict[str, Any]]:
    from bench.cases import data as sets

    return [{"name": name, "title": title} for name, title in sets.descriptions().items()]


def _list_models() -> list[dict[str, Any]]:
    from bench.cases import models

    return [
        {"name": name, "title": (builder.__doc__ or "").split("\n")[0], "spec": models.canonical(name)}
        for name, builder in models.BUILDERS.items()
    ]


def _list_grids() -> list[dict[str, Any]]:
    from bench.cases.scenario import grid_names, load_grid

    return [{"name": name, "title": load_grid(name).title} for name in grid_names()]


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _default_workers(device: str) -> int:
    """One for each core; one for each GPU where that is what computes, `cuda:1` being one."""
    if not device.startswith("cuda"):
        return _cores()
    import torch

    return max(1, torch.cuda.device_count()) if device == "cuda" else 1


def _gpus() -> list[str]:
    """The GPUs that this process sees, under the names that they have outside."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(gpu) for gpu in range(torch.cuda.device_count())]


def _engine(workers: int, scheduler: str | None, device: str) -> Any:
    if workers == 0:
        from bench.run import InProcess

        in_process: Engine = InProcess()
        return contextlib.nullcontext(in_process)
    from bench.cluster import DaskEngine

    return DaskEngine(workers, scheduler, _gpus() if device == "cuda" else ())


@contextlib.contextmanager
def _stopped_by_hand(folder: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print(
            f"\nStopped. The same command goes on; `leakbench status {folder}` says how far it got.",
            file=sys.stderr,
        )
        raise typer.Exit(130) from None


def _exit_if_unfinished(rows: Iterable[dict[str, Any]]) -> None:
    """Ends with 3 where trials crashed or ran out of time or memory."""
    failed = [row for row in rows if row["outcome"] in UNFINISHED]
    if not failed:
        return
    reason = failed[0]["reason"] or failed[0]["outcome"]
    print(
        f"leakbench: {len(failed)} trials crashed, ran out of time or memory; "
        f"the first: {failed[0]['attack']}, trial {failed[0]['trial']}: {reason}",
        file=sys.stderr,
    )
    raise typer.Exit(3)


def _read(folders: Sequence[Path]) -> list[Run]:
    from bench.report import record

    files = [file for folder in folders for file in record.files(folder)]
    recorded = [record.read(file) for file in files]
    for file, one in zip(files, recorded, strict=True):
        if one.damaged:
            print(
                f"leakbench: {file}, line {one.damaged[0]} is not as it was written "
                f"({len(one.damaged)} such): see leakbench check {file}",
                file=sys.stderr,
            )
    return recorded


def _show(recorded: Sequence[Run], tracks: Sequence[str], format: str) -> None:
    from bench.report import tables
    from bench.report.leaderboard import leaderboard

    print("\n".join(tables.render(leaderboard(recorded, name), name, format) for name in tracks), end="")


def _show_defenses(recorded: Sequence[Run], folders: Sequence[Path], format: str) -> None:
    """What the strongest attacker gets of each defense, and what that costs where it was measured."""
    from bench.report import defenses, utility

    costs = [row for folder in folders for row in utility.read(folder)]
    print(defenses.render(defenses.defense_board(recorded, costs), format), end="")


def _print_comparison(row: dict[str, Any], again: Record, columns: Sequence[str]) -> list[str]:
    """Prints what either has of each column; returns the columns that differ."""
    differing = []
    for column in columns:
        before, now = row[column], getattr(again, column)
        if before is None and now is None:
            continue
        differing += [column] if before != now else []
        print(f"  {column:<18} {before!r:<24} {'=' if before == now else '≠'} {now!r}")
    return differing


def _provenance(row: dict[str, Any]) -> str:
    return f"commit {row['commit'][:10] or 'unknown'} with torch {row['torch']} on {row['device']}"


def _refuse_shadowed() -> None:
    """The three packages are the suite's own, and not another project's of the same name."""
    root = Path(__file__).resolve().parent.parent
    for name in ("bench", "attacks", "defenses"):
        found = importlib.util.find_spec(name)
        places = (
            [Path(place).resolve() for place in (found.submodule_search_locations or [])] if found else []
        )
        if root / name not in places:
            other = places[0] if places else "nothing"
            raise UserError(f"package {name!r} is {other}, not LeakBench's {root / name}; leave that folder")


def main() -> None:
    """`leakbench`: 0 done, 1 a user's error, 2 usage, 3 finished with crashed trials."""
    try:
        _refuse_shadowed()
        app()
    except UserError as error:
        print(f"leakbench: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # `leakbench … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


if __name__ == "__main__":
    main()
