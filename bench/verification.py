"""`leakbench verify`: whether a submission's records are what its code gives, and not only on public data.

First what can be seen without running anything: the manifest, the grid's version, the code's hash, every row
there once. Then trials are run again in sandboxes and compared: all of them, or, where an attack makes
images, a random sample of `SAMPLE`, which meets one of 1 % edited rows in 95 of 100 cases. Under a salt the
same cells are run on fresh, privately changed examples, which nobody can have looked up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import json
import math
import random
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from bench import registry, run, sandbox, submission, work
from bench.cases.scenario import Scenario, grid_names, load_grid
from bench.errors import UserError
from bench.isolation import Attempt
from bench.metrics import UNANSWERED
from bench.report import record, statistics
from bench.report.leaderboard import EXACT_PSNR, FAILED, RANKS_BY, WORST
from bench.report.record import METRICS, Record, Run
from bench.run import Plan
from bench.submission import Manifest, Submitted
from bench.threat import Outcome, Reconstruction
from bench.work import Chunk, Context

SAMPLE = 299
"""0.99²⁹⁹ = 0.05: so many rows, drawn after the records came in, miss 1 % edited ones once in twenty."""

ABSOLUTE, RELATIVE = 1e-4, 1e-2
"""How far a metric may be from its record, |a - b| ≤ ABSOLUTE + RELATIVE |a|: rounding on another machine."""

LARGEST_GAIN = 3.0
"""In dB: how much better than its repetition on another machine a single recorded image may be."""

MARGINS = {"success": 0.1, "psnr": 2.0, "feature_cosine": 0.05}
"""The metric that ranks -> how much worse than recorded an attack may be on fresh examples."""

SIGNIFICANCE = 0.01
"""How often chance alone may refuse an honest submission under a salt, over all its cells."""

_LENIENT = ("timeout", "out_of_memory")
"""Recorded on a smaller machine, such a trial may end well on this one: it counted as failed."""

_MEASURED = {
    "outcome", "reason", "seconds", "stack", "threads", "peak_bytes", "commit", "torch", "device", *METRICS,
}  # fmt: skip
IDENTITY = tuple(column for column in record.COLUMNS if column not in _MEASURED)
"""The columns that follow from the grid, the attack and the suite."""


@dataclass(frozen=True)
class Submission:
    """Records, their manifest and the code that is said to have made them."""

    path: Path
    manifest: Manifest
    run: Run
    code: Path

    @property
    def rows(self) -> tuple[dict[str, Any], ...]:
        """The trials."""
        return self.run.rows


# --- without running anything -----------------------------------------------------------------------------


def read(path: Path) -> Submission:
    """A submission whose files belong together and whose code is at hand.

    Raises:
        UserError: a file is missing or not as it was written, a row is there twice, the code is another.
    """
    manifest = _manifest(path)
    _no_duplicates(path)
    ran = record.read(path)
    for header in ran.headers:
        if (header.grid, header.grid_hash) != (manifest.grid, manifest.grid_hash):
            raise UserError(
                f"{path}: its header says {header.grid}, {header.grid_hash[:8]}, its manifest another"
            )
    code = _code(path, manifest)
    if (found := hashlib.sha256(code.read_bytes()).hexdigest()) != manifest.code_sha256:
        raise UserError(
            f"{path} was made by other code: {code} has SHA-256 {found[:12]}…, the manifest says "
            f"{manifest.code_sha256[:12]}…; raise the revision and submit again"
        )
    if ran.damaged:
        raise UserError(f"{path}, line {ran.damaged[0]} was edited: its checksum differs")
    return Submission(path, manifest, ran, code)


_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "list[str]": (list,),
    "list[int]": (list,),
    "str | None": (str, type(None)),
    "int | None": (int, type(None)),
}
"""The types of a manifest's entries, as its class says them."""


def _manifest(path: Path) -> Manifest:
    if not path.is_file() or not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise UserError(f"{path} holds no records; give the rN.jsonl that `leakbench submit` wrote")
    beside = path.with_name(f"{path.name.partition('.')[0]}.json")
    if not beside.is_file():
        raise UserError(f"{beside} is missing: the manifest that `leakbench submit` wrote beside the records")
    try:
        said = json.loads(beside.read_text(encoding="utf-8"))
        manifest = Manifest(**said)
        for field in dataclasses.fields(Manifest):
            value = getattr(manifest, field.name)
            if not isinstance(value, _KINDS[str(field.type)]):
                raise TypeError(f"{field.name} is {value!r}")
        if manifest.samples is not None and manifest.samples < 1:
            raise ValueError(f"samples is {manifest.samples}")
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{beside} is no manifest: {' '.join(str(error).split())[:200]}") from None
    if manifest.schema != submission.SCHEMA:
        raise UserError(f"{beside} has schema {manifest.schema}, not {submission.SCHEMA}: submit again")
    return manifest


def _content(path: Path) -> bytes:
    """The records' lines, unpacked.

    Raises:
        UserError: they can't be.
    """
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} can't be unpacked: {error}") from None


def _no_duplicates(path: Path) -> None:
    """Raises a UserError where a trial is there twice; `record.read` would keep the last."""
    seen: dict[str, int] = {}
    for number, line in enumerate(_content(path).split(b"\n"), start=1):
        try:
            trial = json.loads(line).get("trial") if line.strip() else None
        except (ValueError, AttributeError, RecursionError):
            raise UserError(f"{path}, line {number} is no record") from None
        if trial is not None and (first := seen.setdefault(str(trial), number)) != number:
            raise UserError(f"{path}, line {number} repeats trial {trial} of line {first}")


def _code(path: Path, manifest: Manifest) -> Path:
    """The attack's file: in `attacks/`, else where it lay, else beside the records."""
    if not submission.NAME.fullmatch(manifest.name):
        raise UserError(f"{path}: its manifest says name = {manifest.name[:80]!r}, which no attack can have")
    built_in = submission.built_in(manifest.name)
    given = Path(manifest.file)
    with contextlib.suppress(OSError, ValueError):  # too long a name, a NUL
        for place in (built_in, given, path.parent / given.name):
            if place is not None and place.is_file() and place.suffix == ".py":
                return place
    raise UserError(
        f"{path}: the code that made it is not there; looked for attacks/labels/{manifest.name}.py, "
        f"attacks/images/{manifest.name}.py, {given} and {path.parent / given.name}"
    )


def planned(submitted: Submission, copy: Path, data_root: Path | None) -> tuple[Submitted, Plan]:
    """The submission's attack, and what its grid now asks of it.

    Raises:
        UserError: the grid has another version, the code says another attack, the suite is another.
    """
    manifest, path = submitted.manifest, submitted.path
    try:
        grid = load_grid(manifest.grid if manifest.grid_file is None else manifest.grid_file)
    except UserError as error:
        raise UserError(f"{path}: its grid: {error}") from None
    if grid.name in grid_names() and manifest.grid_file is not None:
        raise UserError(f"{path}: {manifest.grid_file} has the name of the suite's grid {grid.name}")
    if (grid.name, grid.hash) != (manifest.grid, manifest.grid_hash):
        raise UserError(
            f"{path} was made on another version of {manifest.grid}: {manifest.grid_hash[:8]}, "
            f"which is {grid.hash[:8]} here; submit again on this one"
        )
    if manifest.protocol_version != work.PROTOCOL_VERSION:
        raise UserError(
            f"{path} was made by protocol {manifest.protocol_version}, this is {work.PROTOCOL_VERSION}: "
            "submit again"
        )
    spec = registry.Spec(manifest.class_name, registry.parse(manifest.attack).parameters)
    mine, plan = submission.plan(
        copy, spec, str(submitted.code), grid, manifest.samples, data_root, _device(manifest.device)
    )
    says = {
        "attack": mine.spec, "name": mine.name, "revision": mine.revision, "reads": mine.reads,
        "produces": list(mine.produces), "uses": list(mine.uses), "threat_model": mine.threat_model,
    }  # fmt: skip
    for name, value in says.items():
        if getattr(manifest, name) != value:
            raise UserError(
                f"{path}: its manifest says {name} = {getattr(manifest, name)!r}, its code {value!r}"
            )
    return mine, plan


def _device(recorded: str) -> str:
    """The device of the records where it is there, else the processor."""
    try:
        run.check_device(recorded)
    except UserError:
        return "cpu"
    return recorded


def check_rows(submitted: Submission, mine: Submitted, plan: Plan, chunks: Sequence[Chunk]) -> None:
    """Raises a UserError unless there is every trial that is asked for, once, under its own name."""
    path = submitted.path
    expected = {row.trial: row for chunk in chunks for row in _skeleton(chunk, plan)}
    by_place = {(row.scenario, row.sample): row for row in expected.values()}
    for row in submitted.rows:
        wanted = expected.get(row["trial"])
        if wanted is None:
            place = by_place.get((row["scenario"], row["sample"]))
            if place is None:
                raise UserError(f"{path}: nobody asked for trial {row['trial']} ({_where(row)})")
            wanted = place
        for column in IDENTITY:
            if row[column] != getattr(wanted, column):
                raise UserError(
                    f"{path}, trial {row['trial']} ({_where(row)}): {column} is {row[column]!r}, "
                    f"expected {getattr(wanted, column)!r}"
                )
        skipped = wanted.outcome == "skipped"
        if (row["outcome"] == "skipped") != skipped or (skipped and row["reason"] != wanted.reason):
            said = row["reason"] or row["outcome"]
            raise UserError(
                f"{path}, trial {row['trial']} ({_where(row)}): {said!r}, expected {wanted.reason!r}"
            )
    there = submitted.run.keys
    missing = [row for trial, row in expected.items() if trial not in there]
    if missing:
        raise UserError(
            f"{path} lacks {len(missing)} of {len(expected)} trials; the first: "
            f"{_where(vars(missing[0]))}; submit again"
        )
    if hashlib.sha256(_content(path)).hexdigest() != submitted.manifest.records_sha256:
        raise UserError(f"{path} was edited: its SHA-256 is not the manifest's")


def _skeleton(chunk: Chunk, plan: Plan) -> list[Record]:
    """A chunk's rows as far as they follow from the grid."""
    return [
        row
        for entrant in chunk.entrants
        for row in work.judge(
            chunk,
            plan.context,
            entrant,
            [Attempt(Reconstruction(_OUTCOME[entrant.skip is None]), entrant.skip or "")]
            * len(chunk.attacked),
            None,
            isolated=True,
        )
    ]


_OUTCOME = {True: Outcome.OK, False: Outcome.SKIPPED}


def _where(row: dict[str, Any]) -> str:
    return f"{row['dataset']}, {row['model']}, {row['weights']}, {row['defense']}, sample {row['sample']}"


# --- again ------------------------------------------------------------------------------------------------


def chunks_of(mine: Submitted, plan: Plan, weights: dict[Any, str]) -> list[Chunk]:
    """The plan's chunks with the submitted attack alone."""
    own = [
        replace(chunk, entrants=tuple(one for one in chunk.entrants if one.spec == mine.spec))
        for chunk in plan.chunks(weights)
    ]
    return [chunk for chunk in own if chunk.entrants]


def drawn(mine: Submitted, chunks: Sequence[Chunk], rng: random.Random) -> list[Chunk]:
    """What is run again: everything, or a random sample of at least `SAMPLE` trials."""
    running = [chunk for chunk in chunks if chunk.entrants[0].skip is None]
    if "images" not in mine.produces:
        return running
    rng.shuffle(running)
    chosen: list[Chunk] = []
    while running and sum(chunk.trials for chunk in chosen) < SAMPLE:
        chosen.append(running.pop())
    return chosen


def repeated(engine: Any, chunks: Sequence[Chunk], context: Context) -> list[dict[str, Any]]:
    """The rows that chunks give now."""
    return [
        json.loads(line) for part in engine.finish(iter(chunks), len(chunks), context) for line in part.lines
    ]


def compare(submitted: Submission, again: Sequence[dict[str, Any]]) -> None:
    """Raises a UserError where the records are not what the code gives, within the tolerances above."""
    recorded = {row["trial"]: row for row in submitted.rows}
    pairs = [(recorded[row["trial"]], row) for row in again]
    manifest = submitted.manifest
    here = (submission.machine(), torch.__version__, _device(manifest.device))
    same_machine = (manifest.machine, manifest.torch, manifest.device) == here
    if "images" in manifest.produces and not same_machine:
        _compare_images(submitted.path, pairs)
        return
    for row, now in pairs:
        differing = _differing(row, now)
        if differing:
            raise UserError(
                f"{submitted.path}, trial {row['trial']} ({_where(row)}): {differing} is "
                f"{row[differing]!r} in the records, and {now[differing]!r} when run again"
            )


def _differing(row: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The first column that is not as recorded."""
    if row["outcome"] in _LENIENT and (claimed := _claimed(row)):
        return claimed
    if row["outcome"] != now["outcome"]:
        return None if row["outcome"] in _LENIENT else "outcome"
    return next((metric for metric in METRICS if not _alike(metric, row, now)), None)


def _claimed(row: dict[str, Any]) -> str | None:
    """The first column of a trial that didn't end in which it has more than nothing."""
    nothing = {metric: value for part in UNANSWERED.values() for metric, value in part.items()}
    return next((metric for metric in METRICS if row[metric] not in (None, nothing.get(metric))), None)


def _alike(metric: str, row: dict[str, Any], now: dict[str, Any]) -> bool:
    before, after = row[metric], now[metric]
    if before is None or after is None:
        return before is after
    if isinstance(after, bool):
        at_the_threshold = (
            metric == "success" and _near(row["label_error"], 0.01) and _near(now["label_error"], 0.01)
        )
        return before is after or at_the_threshold
    return type(before) in (int, float) and _near(before, after)


def _near(a: float | None, b: float | None) -> bool:
    if a is None or b is None:
        return a is b
    return math.isfinite(a) and abs(a - b) <= ABSOLUTE + RELATIVE * abs(b)


def _compare_images(path: Path, pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """On another machine a search ends elsewhere: no image much better, nor the mean of the differences."""
    for row, now in pairs:
        if row["outcome"] in _LENIENT and (claimed := _claimed(row)):
            raise UserError(
                f"{path}, trial {row['trial']} ({_where(row)}): {row['outcome']}, "
                f"but {claimed} = {row[claimed]}"
            )
        if (row["outcome"] == "ok") and now["outcome"] not in ("ok", "step_limit"):
            raise UserError(f"{path}, trial {row['trial']} ({_where(row)}): was ok, is {now['outcome']} here")
    gains = np.array([_psnr(row) - _psnr(now) for row, now in pairs])
    spread = 1.4826 * float(np.median(np.abs(gains - np.median(gains))))
    worst = int(gains.argmax())
    if gains[worst] > max(LARGEST_GAIN, 6 * spread):
        row = pairs[worst][0]
        raise UserError(
            f"{path}, trial {row['trial']} ({_where(row)}): {_psnr(row):.1f} dB in the records, "
            f"{gains[worst]:.1f} dB more than when run again"
        )
    for metric in ("psnr", *(one for one in METRICS if one in WORST and one != "psnr")):
        gains = np.array([_gain(metric, row, now) for row, now in pairs])
        low, high = statistics.clustered_bootstrap(gains, [row["weights_sha256"] for row, _ in pairs])
        if low > 0 and gains.mean() > ABSOLUTE:
            raise UserError(
                f"{path}: recorded images are better than repeated ones: {metric} by {gains.mean():.2g} "
                f"(95 % interval {low:.2g} to {high:.2g}, {len(gains)} pairs)"
            )


def _gain(metric: str, row: dict[str, Any], now: dict[str, Any]) -> float:
    """By how much a record is better than its repetition; nothing where either wasn't measured."""
    if metric == "psnr":
        return _psnr(row) - _psnr(now)
    if row[metric] is None or now[metric] is None:
        return 0.0
    better = 1.0 if WORST[metric] == 0 else -1.0  # an error's worst is above its best
    return better * (float(row[metric]) - float(now[metric]))


def _psnr(row: dict[str, Any]) -> float:
    if row["outcome"] in FAILED:
        return WORST["psnr"]
    return EXACT_PSNR if row["mse"] == 0 else min(float(row["psnr"] or WORST["psnr"]), EXACT_PSNR)


# --- on fresh examples ------------------------------------------------------------------------------------


def compare_fresh(submitted: Submission, plan: Plan, fresh: Sequence[dict[str, Any]]) -> str:
    """Says how the attack does on examples that nobody has seen.

    Raises:
        UserError: it is worse than recorded by more than its margin, beyond chance.
    """
    groups = _groups(plan)
    tests = []
    for metric in (RANKS_BY[part] for part in RANKS_BY if part in submitted.manifest.produces):
        before = _by_group(submitted.rows, metric, groups)
        after = _by_group(fresh, metric, groups)
        cells = [cell for cell in after if cell in before]
        old, new = (np.concatenate([found[cell] for cell in cells]) for found in (before, after))
        tests += [("all cells together", metric, old, new)]
        tests += [(cell, metric, before[cell], after[cell]) for cell in cells]
    p_values = statistics.holm([_worse(metric, old, new) for _, metric, old, new in tests])
    for (cell, metric, old, new), p in zip(tests, p_values, strict=True):
        if p < SIGNIFICANCE:
            raise UserError(
                f"{submitted.path}: on fresh examples {metric} is {new.mean():.3g} (n = {len(new)}), where "
                f"the records say {old.mean():.3g} (n = {len(old)}): {cell}; such records aren't ranked"
            )
    found = ", ".join(
        f"{metric} {new.mean():.3g} (n = {len(new)}), recorded {old.mean():.3g} (n = {len(old)})"
        for cell, metric, old, new in tests
        if cell == "all cells together"
    )
    return f"fresh examples: {found}; margins {MARGINS}, p < {SIGNIFICANCE} would refuse"


def _groups(plan: Plan) -> dict[str, str]:
    """Scenario's key -> what is compared together: all its weight seeds."""

    def named(scenario: Scenario) -> str:
        axes = dataclasses.asdict(scenario) | {"weight_seed": ""}
        return ", ".join(str(value) for value in axes.values() if value not in ("", ()))

    return {scenario.key: named(scenario) for scenario, _ in plan.cells}


def _by_group(
    rows: Iterable[dict[str, Any]], metric: str, groups: dict[str, str]
) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["outcome"] != "skipped":
            found.setdefault(groups[row["scenario"]], []).append(_score(row, metric))
    return {group: np.array(values, dtype=np.float64) for group, values in found.items()}


def _score(row: dict[str, Any], metric: str) -> float:
    if metric == "psnr":
        return _psnr(row)
    return float(WORST[metric] if row["outcome"] in FAILED or row[metric] is None else row[metric])


def _worse(metric: str, before: Any, after: Any) -> float:
    """The p-value that the attack is no more than its margin worse on fresh examples."""
    excess = before.mean() - after.mean() - MARGINS[metric]
    if excess <= 0:
        return 1.0
    if metric == "success":  # Agresti and Caffo: one success and one failure more on either side
        rates = [(values.sum() + 1) / (len(values) + 2) for values in (before, after)]
        variances = [rate * (1 - rate) / (len(v) + 2) for rate, v in zip(rates, (before, after), strict=True)]
        excess = rates[0] - rates[1] - MARGINS[metric]
    else:
        variances = [
            np.var(values, ddof=1) / len(values) if len(values) > 1 else 1.0 for values in (before, after)
        ]
    return float(stats.norm.sf(excess / math.sqrt(max(sum(variances), 1e-12))))


# --- all of it --------------------------------------------------------------------------------------------


def inspect(path: Path, data_root: Path | None) -> None:
    """Raises a UserError where records are not all that their grid asks for; runs no trial."""
    submitted = read(path)
    with submission.alone(submitted.code, submitted.code.name) as copy:
        mine, plan = planned(submitted, copy, data_root)
    networks = dict.fromkeys(plan.networks.values())
    weights = {network: work.weights_sha256(network, data_root) for network in networks}
    check_rows(submitted, mine, plan, chunks_of(mine, plan, weights))


def verify(path: Path, salt: str, data_root: Path | None, workers: int) -> list[str]:
    """What was found, in lines for people.

    Raises:
        UserError: why the submission is refused.
    """
    submitted = read(path)
    manifest = submitted.manifest
    with submission.alone(submitted.code, submitted.code.name) as copy:
        mine, plan = planned(submitted, copy, data_root)
        with submission.engine(workers, plan.context) as engine:
            networks = list(dict.fromkeys(plan.networks.values()))
            weights = dict(engine.weights(networks, data_root))
            chunks = chunks_of(mine, plan, weights)
            check_rows(submitted, mine, plan, chunks)
            chosen = drawn(mine, chunks, random.SystemRandom())
            if not chosen:
                raise UserError(f"{path}: the attack skips every scenario; there is nothing to verify")
            again = repeated(engine, chosen, plan.context)
            compare(submitted, again)
            lines = [f"{len(submitted.rows)} trials, {len(again)} of them run again: they agree"]
            if salt:
                secret = submission.salted(plan, salt)
                fresh = repeated(engine, chosen, secret.context)
                lines.append(compare_fresh(submitted, plan, fresh))
    return [*lines, *_rankable(manifest, salt)]


def _rankable(manifest: Manifest, salt: str) -> list[str]:
    """What ranking still needs."""
    needs = []
    if manifest.samples is not None:
        needs.append(f"all samples of each cell, not {manifest.samples} (submit again without --samples)")
    if manifest.grid_file is not None:
        needs.append("a grid of the suite")
    if not salt:
        needs.append("fresh examples (verify --salt SECRET)")
    elif not sandbox.is_tight():
        needs.append("a sandbox that is tight (Linux with user namespaces)")
    return [f"ranking needs {', and '.join(needs)}"] if needs else ["it can be ranked"]
