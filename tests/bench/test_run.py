"""The grid: nothing is lost or doubled, nothing leaks, and whatever an attack does is a row."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import run
from bench.cases.scenario import load_grid, replaced
from bench.cluster import DaskEngine
from bench.errors import UserError
from bench.report import record

COMPARED = ("outcome", "reason", *record.METRICS)


class Silent(run.Progress):
    """Looks away."""


def execute(grid: Path, folder: Path, engine=None, **changes) -> list[dict]:
    full = load_grid(str(grid))
    planned = run.plan(full, replaced(full, **changes), None, "cpu")
    run.execute(planned, engine or run.InProcess(), folder, Silent())
    return list(record.read(folder).rows)


def results(rows: list[dict]) -> dict[str, tuple]:
    assert len({row["trial"] for row in rows}) == len(rows)
    return {row["trial"]: tuple(row[column] for column in COMPARED) for row in rows}


def test_every_cell_gets_its_samples(small, tmp_path):
    rows = execute(small, tmp_path / "out")
    assert len(rows) == 2 * 2 * 4 * 5
    skipped = {(row["attack"], row["model"]) for row in rows if row["outcome"] == "skipped"}
    model = "fcn(depth=2, width=24, activation='relu', bias=False)"
    assert skipped == {("bias_closed_form", model)}
    assert all(
        row["reason"] == "needs a last layer with a bias" for row in rows if row["outcome"] == "skipped"
    )


def test_lambda_finds_what_idlg_can_not(small, tmp_path):
    rows = execute(small, tmp_path / "out")

    def found(attack: str, defense: str) -> set[bool]:
        return {
            row["success"]
            for row in rows
            if row["attack"].startswith(attack) and row["defense"].startswith(defense)
        }

    assert found("idlg", "none") == {True}
    assert found("idlg", "label_smoothing") == {False}
    assert found("lambda_recovery", "none") == found("lambda_recovery", "label_smoothing") == {True}


def test_running_again_adds_nothing(small, tmp_path):
    execute(small, tmp_path / "out")
    before = (tmp_path / "out" / record.FILE).read_bytes()
    execute(small, tmp_path / "out")
    assert (tmp_path / "out" / record.FILE).read_bytes() == before


@pytest.mark.parametrize("share", [0.02, 0.3, 0.55, 0.8, 0.999])
def test_a_file_cut_anywhere_is_completed_to_the_same(small, tmp_path, share):
    whole = execute(small, tmp_path / "whole")
    content = (tmp_path / "whole" / record.FILE).read_bytes()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / record.FILE).write_bytes(content[: int(share * len(content))])
    assert results(execute(small, tmp_path / "cut")) == results(whole)


def test_samples_are_nested(small, tmp_path):
    few = results(execute(small, tmp_path / "few", samples=2))
    many = results(execute(small, tmp_path / "many", samples=5))
    assert len(few) == 2 * 2 * 4 * 2
    assert few.keys() < many.keys()


def test_a_run_is_extended_to_more_samples(small, tmp_path):
    few = results(execute(small, tmp_path / "out", samples=2))
    many = results(execute(small, tmp_path / "out", samples=5))
    assert len(many) == 80
    assert all(many[trial] == few[trial] for trial in few)
    assert set(record.read(tmp_path / "out").expected.values()) == {5}


def test_a_folder_holds_one_grid(small, tmp_path):
    execute(small, tmp_path / "out", samples=1)
    small.write_text(small.read_text().replace("seed = 3", "seed = 4"))
    with pytest.raises(UserError, match="holds another grid"):
        execute(small, tmp_path / "out", samples=1)


def test_rerun_gives_the_same_digits(small, tmp_path):
    for row in execute(small, tmp_path / "out")[::7]:
        before, again = run.rerun(tmp_path / "out", row["trial"], None)
        assert all(before[column] == getattr(again, column) for column in COMPARED)


def test_rerun_of_no_trial_says_so(small, tmp_path):
    execute(small, tmp_path / "out", samples=1)
    with pytest.raises(UserError, match="0 trials whose key begins with 'xyz'"):
        run.rerun(tmp_path / "out", "xyz", None)


@pytest.mark.parametrize(
    ("name", "outcome", "reason"),
    [
        ("Raises", "crashed", "RuntimeError: no idea at all"),
        ("Exits", "crashed", "SystemExit: 7"),
        ("OutOfMemory", "out_of_memory", "MemoryError: too much"),
        ("Misshapen", "crashed", "ValueError: returned soft_labels of shape (3,), expected (1, 10)"),
        ("NotFinite", "diverged", "soft_labels is not finite"),
        ("ReturnsNothing", "crashed", "TypeError: run returned NoneType, not a Reconstruction"),
    ],
)
def test_what_an_attack_does_wrong_is_a_row(small, misbehaving, tmp_path, name, outcome, reason):
    specs = [f"{misbehaving}:{name}", "lambda_recovery"]
    rows = execute(small, tmp_path / "out", attacks=specs, samples=2)
    wrong = [row for row in rows if row["attack"] == specs[0]]
    assert {(row["outcome"], row["reason"], row["success"]) for row in wrong} == {(outcome, reason, False)}
    assert all(row["success"] for row in rows if row["attack"].startswith("lambda_recovery"))


def test_a_vandal_harms_nobody_else(small, misbehaving, tmp_path):
    alone = execute(small, tmp_path / "alone", attacks=["lambda_recovery"])
    beside = execute(small, tmp_path / "beside", attacks=[f"{misbehaving}:Vandal", "lambda_recovery"])
    assert results(alone).items() <= results(beside).items()


def test_an_attack_is_told_what_is_granted_and_used_alone(small, misbehaving, tmp_path):
    small.write_text(small.read_text() + 'knowledge = ["soft_labels"]\n')
    rows = execute(small, tmp_path / "out", attacks=[f"{misbehaving}:Told", "lambda_recovery"], samples=2)
    told = {row["attack"]: row["knowledge"] for row in rows}
    assert told[f"{misbehaving}:Told"] == "soft_labels"
    assert told["lambda_recovery(search='exact')"] == ""
    assert all(row["success"] for row in rows if row["attack"].endswith("Told"))


def test_an_edited_attack_is_run_again(small, misbehaving, tmp_path):
    spec = f"{misbehaving}:Raises"
    before = execute(small, tmp_path / "out", attacks=[spec], samples=1)
    misbehaving.write_text(misbehaving.read_text().replace("no idea", "some idea"))
    after = execute(small, tmp_path / "out", attacks=[spec], samples=1)
    assert len([row for row in after if row["attack"] == spec]) == 2 * len(
        [row for row in before if row["attack"] == spec]
    )


def test_processes_of_attacks_hold_no_truth_and_may_die(small, misbehaving, tmp_path):
    specs = [f"{misbehaving}:Spy", f"{misbehaving}:Dies", "lambda_recovery"]
    small.write_text(small.read_text().replace(', "fcn(depth=2, width=24)"', ""))
    with DaskEngine(workers=1, scheduler=None) as engine:
        rows = execute(small, tmp_path / "dask", engine, attacks=specs, samples=2)
    by_attack = {spec: [row for row in rows if row["attack"].startswith(spec)] for spec in specs}
    assert {row["reason"] for row in by_attack[specs[0]]} == {"saw nothing"}
    assert {(row["outcome"], row["reason"]) for row in by_attack[specs[1]]} == {
        ("crashed", "the attack's process died")
    }
    assert all(row["isolated"] for row in rows)
    in_process = execute(small, tmp_path / "here", attacks=["lambda_recovery"], samples=2)
    assert not any(row["isolated"] for row in in_process)
    assert results(in_process).items() <= results(rows).items()


def test_a_killed_run_is_completed_to_that_of_an_unbroken_one(small, tmp_path):
    command = [sys.executable, "-m", "bench", "run", str(small), "--samples", "70", "--workers", "1"]
    broken = [*command, "--out", str(tmp_path / "broken")]
    file = tmp_path / "broken" / record.FILE
    process = subprocess.Popen(broken, start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if file.exists() and file.read_bytes().count(b"\n") > 100:
            break
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert 0 < len(record.read(tmp_path / "broken").rows) < 2 * 2 * 4 * 70
    subprocess.run(broken, check=True, stdout=subprocess.DEVNULL)
    unbroken = execute(small, tmp_path / "unbroken", samples=70)
    assert results(list(record.read(tmp_path / "broken").rows)) == results(unbroken)


def test_a_trial_of_an_earlier_command_in_the_same_folder_is_rerun(small, tmp_path):
    """The last header doesn't name its scenario."""
    rows = execute(small, tmp_path / "out", samples=1)
    execute(small, tmp_path / "out", samples=1, defenses=["none"])
    row = next(row for row in rows if row["defense"] != "none" and row["outcome"] == "ok")
    before, again = run.rerun(tmp_path / "out", row["trial"], None)
    assert all(before[column] == getattr(again, column) for column in COMPARED)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('reads: ClassVar[str] = "gradient"', "reads = 'gradient' is neither"),
        ('produces: ClassVar[frozenset] = frozenset({"labels"})', r"produces = \['labels'\] is not some of"),
        ("def skip(self, facts): return False", "skip returned False; give a reason"),
    ],
)
def test_an_attack_that_describes_itself_wrongly_is_one_line(small, tmp_path, line, said):
    path = tmp_path / "mine.py"
    path.write_text(f"""
from dataclasses import dataclass
from typing import ClassVar
from bench.threat import Attack

@dataclass(frozen=True)
class Mine(Attack):
    name: ClassVar[str] = "mine"
    title: ClassVar[str] = "mine"
    produces: ClassVar[frozenset] = frozenset({{"soft_labels"}})
    reads: ClassVar[str] = "head"
    {line}
    def run(self, observation, rng): ...
""")
    with pytest.raises(UserError, match=said):
        execute(small, tmp_path / "out", attacks=[f"{path}:Mine"])
