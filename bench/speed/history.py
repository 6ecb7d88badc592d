"""The solver's speed over its commits: `python -m bench.speed.history`; then `asv publish` makes the page.

Every commit at which the λ solver changed is checked out beside this tree, and today's benchmarks
(bench/speed/solver.py) are put to it by asv, in the environment that is there: no torch is built. What is in
results/speed already isn't measured again. A commit takes two minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOLVER = ("exact", "curve", "seeds", "verdict", "reduction")
RESULTS = ROOT / "results" / "speed"


def git(*arguments: str) -> str:
    """What git says."""
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()


def commits() -> list[str]:
    """The commits that changed the solver, the oldest first, and the last one of all."""
    changed = git("log", "--reverse", "--format=%H", "--", *(f"attacks/solvers/{name}.py" for name in SOLVER))
    return list(dict.fromkeys([*changed.split(), git("rev-parse", "HEAD")]))


def measure(commit: str, machine: str, only: str) -> int:
    """Runs the benchmarks on that commit's solver; asv's exit status."""
    with tempfile.TemporaryDirectory() as folder:
        tree, alone = Path(folder) / "tree", Path(folder) / "benchmarks"
        alone.mkdir()  # asv imports all files beside a benchmark, and some need what older commits lack
        shutil.copy(ROOT / "bench" / "speed" / "solver.py", alone)
        (alone / "__init__.py").touch()
        settings = json.loads((ROOT / "asv.conf.json").read_text())
        places = {"repo": str(ROOT), "benchmark_dir": str(alone), "results_dir": str(RESULTS)}
        config = Path(folder) / "asv.conf.json"
        config.write_text(json.dumps(settings | places))
        git("worktree", "add", "--detach", str(tree), commit)
        try:
            run = [sys.executable, "-m", "asv", "run", "--launch-method", "forkserver"]
            which = [
                "--config",
                str(config),
                "--machine",
                machine,
                "--set-commit-hash",
                commit,
                "--bench",
                only,
            ]
            return subprocess.run(
                [*run, *which],
                cwd=ROOT,
                env=os.environ | {"ASV_PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"},
                check=False,
            ).returncode
        finally:
            git("worktree", "remove", "--force", str(tree))


def main() -> None:
    """Measures what isn't measured yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--machine", required=True, help="as `asv machine` knows it: results lie in a folder")
    parser.add_argument("--bench", default="exact", help="a pattern [exact]: not the published search")
    asked = parser.parse_args()
    for commit in commits():
        if any((RESULTS / asked.machine).glob(f"{commit[:8]}*")):
            continue
        print(git("log", "-1", "--format=%h %s", commit), flush=True)
        if code := measure(commit, asked.machine, asked.bench):
            sys.exit(code)


if __name__ == "__main__":
    main()
