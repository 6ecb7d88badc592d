"""Kills workers and drivers at random moments, and compares: `python -m bench.speed.faults`.

A grid of at least 2,000 trials is run by the command itself. Every now and then SIGKILL goes to a random
worker or to the driver, which is then started again with the same command. (An attack's own process isn't
killed: an attack that dies has crashed, and its row says so.) In the end the folder must be whole
(`leakbench check`), and its records must be those of a run that nobody disturbed: none lost, none doubled,
the same outcomes and metrics to the last digit.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from bench.report import record

GRID = """
name = "faults"
seed = 11

[[blocks]]
dataset = "mnist5k"
model = ["fcn(depth=2, width=64, bias=False)", "fcn(depth=2, width=64)", "convnet(width=4)"]
defense = ["none", "label_smoothing(epsilon=(0.1, 0.5))", "mixup(low=0.1, high=0.9)"]
attacks = ["idlg", "lambda_recovery", "lambda_recovery(search='paper')", "random_labels"]
samples = {samples}

[[blocks]]
dataset = "mnist5k"
model = "convnet(width=4)"
defense = ["none", "mixup(low=0.1, high=0.9)"]
attacks = "inverting_gradients(iterations=20)"
samples = {samples}
"""
PER_SAMPLE = 3 * 3 * 4 + 2
COMPARED = ("outcome", "reason", *record.METRICS)


def results(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Trial -> what it gave."""
    return {row["trial"]: tuple(row[column] for column in COMPARED) for row in record.read(folder).rows}


def report(found: dict[str, tuple[Any, ...]], unbroken: dict[str, tuple[Any, ...]]) -> bool:
    """Prints what was lost, added or became something else; whether nothing was."""
    differing = [trial for trial in unbroken.keys() & found.keys() if found[trial] != unbroken[trial]]
    lost, foreign = len(unbroken.keys() - found.keys()), len(found.keys() - unbroken.keys())
    print(f"lost: {lost}, foreign: {foreign}, differing: {len(differing)}", flush=True)
    for trial in differing[:10]:
        pairs = zip(COMPARED, unbroken[trial], found[trial], strict=True)
        changes = [f"{column} {was} became {now}" for column, was, now in pairs if was != now]
        print(f"  {trial}: {', '.join(changes)}")
    return not differing and not lost and not foreign


def start(grid: Path, out: Path, workers: int) -> subprocess.Popen[bytes]:
    """The command, in a session of its own."""
    command = [sys.executable, "-m", "bench", "run", str(grid), "--out", str(out), "--quiet"]
    return subprocess.Popen(
        [*command, "--workers", str(workers)], stdout=subprocess.DEVNULL, start_new_session=True
    )


def victim(driver: subprocess.Popen[bytes], rng: random.Random) -> tuple[str, psutil.Process]:
    """The driver, one time in four, or a worker."""
    leader = psutil.Process(driver.pid)
    workers = [one for one in leader.children() if "spawn_main" in " ".join(one.cmdline())]
    return ("driver", leader) if not workers or rng.random() < 0.25 else ("worker", rng.choice(workers))


def disturbed(grid: Path, out: Path, kills: int, pause: float, seed: int) -> Counter[str]:
    """Runs the grid to its end; returns how many processes of each kind were killed on the way."""
    rng, killed, driver = random.Random(seed), Counter[str](), start(grid, out, workers=2)
    while True:
        try:
            code = driver.wait(rng.uniform(0, 2 * pause) if killed.total() < kills else None)
        except subprocess.TimeoutExpired:
            try:
                kind, process = victim(driver, rng)
                process.kill()
                killed[kind] += 1
            except psutil.Error:  # it ended by itself meanwhile
                pass
            continue
        if code in (0, 3):
            return killed
        driver = start(grid, out, workers=2)


def main() -> None:
    """Prints what was killed and whether anything was lost; exits with 1 where it was."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=2_000, help="at least so many [2000]")
    parser.add_argument("--kills", type=int, default=50, help="at least so many [50]")
    parser.add_argument("--pause", type=float, default=4.0, help="mean seconds between two kills [4]")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        grid = Path(folder) / "faults.toml"
        grid.write_text(GRID.format(samples=-(-asked.trials // PER_SAMPLE)))
        started = time.monotonic()
        whole = start(grid, Path(folder) / "unbroken", workers=2).wait()
        unbroken = results(Path(folder) / "unbroken")
        print(f"unbroken: {len(unbroken)} trials, {time.monotonic() - started:.0f} s, exit code {whole}")
        started, killed, out = time.monotonic(), Counter[str](), Path(folder) / "disturbed"
        while killed.total() < asked.kills:  # done before enough were killed: once more, from nothing
            if out.exists():
                print(f"  done after {killed.total()} kills; again, from nothing. ", end="")
                if not report(results(out), unbroken):
                    sys.exit(1)
                (out / record.FILE).unlink()
            killed += disturbed(grid, out, asked.kills - killed.total(), asked.pause, asked.seed)
        kinds, seconds = ", ".join(f"{n} {kind}" for kind, n in killed.items()), time.monotonic() - started
        print(f"disturbed: {killed.total()} kills ({kinds}), {seconds:.0f} s; ", end="")
        same, faults = report(results(out), unbroken), record.faults(out)
        print(f"faults of the file: {len(faults)}", *faults[:10], sep="\n")
        sys.exit(0 if same and not faults else 1)


if __name__ == "__main__":
    main()
