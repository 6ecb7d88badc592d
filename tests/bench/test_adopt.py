"""The suite's own attacks: their records come out of one run of a grid."""

import json

import pytest

from bench import adopt, publish, registry, submission
from bench.cases.scenario import load_grid
from bench.errors import UserError
from bench.registry import ROOT, Spec
from bench.report import record

GRID = """
name = "tiny"

[[blocks]]
dataset = "mnist5k"
model = "fcn(depth=2, width=24, bias=False)"
defense = ["none", "mixup(low=0.1, high=0.9)"]
attacks = ["lambda_recovery(search='paper')", "random_labels"]
samples = 4

[[blocks]]
dataset = "mnist5k"
model = "fcn(depth=2, width=24, bias=True)"
attacks = ["bias_closed_form", "random_labels"]
samples = 4
"""


@pytest.fixture
def run(leakbench, tmp_path, monkeypatch):
    """Runs the grid, as if it were the suite's and all were committed."""
    path = tmp_path / "tiny.toml"
    path.write_text(GRID)
    monkeypatch.setattr(submission, "grid_of", lambda name: (load_grid(str(path)), str(path)))
    monkeypatch.setattr("bench.run.commit", lambda: "c" * 40)

    def ran(*options):
        assert leakbench("run", "tiny.toml", "--out", "ran", "--workers", 1, "--quiet", *options)[0] == 0
        return tmp_path / "ran"

    return ran


def test_each_attack_gets_its_own_records_that_verify(run, tmp_path, leakbench):
    written = list(adopt.adopt(run(), tmp_path / "records"))
    assert [str(path.relative_to(tmp_path / "records")) for path in written] == [
        "tiny/bias_closed_form/r1.jsonl",
        "tiny/lambda_recovery-search=paper/r3.jsonl",
        "tiny/random_labels/r1.jsonl",
    ]
    assert [len(record.read(path).rows) for path in written] == [4, 8, 12]  # where the grid has them
    manifest = json.loads(written[1].with_suffix(".json").read_text())
    assert (manifest["attack"], manifest["commit"]) == ("lambda_recovery(search='paper')", "c" * 40)
    assert (manifest["file"], manifest["samples"]) == ("attacks/labels/lambda_recovery.py", None)
    code, out, _ = leakbench("verify", written[1], "--workers", 1)
    assert (code, "8 trials, 8 of them run again: they agree" in out) == (0, True)
    publish.publish(tmp_path)
    assert (tmp_path / "leaderboards" / "tiny-label.md").is_file()


def test_a_part_says_that_it_is_one(run, tmp_path):
    written = list(adopt.adopt(run("--samples", 2), tmp_path / "records"))
    assert {json.loads(path.with_suffix(".json").read_text())["samples"] for path in written} == {2}
    publish.publish(tmp_path)
    board = (tmp_path / "leaderboards" / "tiny-label.md").read_text()
    assert "**A part of tiny: at most 2 samples a cell, where the grid has up to 4.**" in board
    assert "| 1 | lambda_recovery(search='paper') |" in board


def test_what_an_earlier_revision_left_in_the_folder_stays_out(run, tmp_path, monkeypatch):
    with monkeypatch.context() as earlier:
        earlier.setattr(registry.attacks.find("random_labels"), "revision", 7)
        run()
    folder = run()
    assert len(record.read(folder).rows) == 24 + 12
    written = list(adopt.adopt(folder, tmp_path / "records"))
    assert [path.name for path in written] == ["r1.jsonl", "r3.jsonl", "r1.jsonl"]
    assert [len(record.read(path).rows) for path in written] == [4, 8, 12]


def test_what_cannot_be_published_is_one_line(run, tmp_path, monkeypatch):
    folder = run()
    lines = (folder / record.FILE).read_text().splitlines(keepends=True)
    (folder / record.FILE).write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match=r"is not whole: .* missing; the same run goes on"):
        list(adopt.adopt(folder, tmp_path / "records"))
    (folder / record.FILE).unlink()
    monkeypatch.setattr("bench.run.commit", lambda: "c" * 40 + "+")
    with pytest.raises(UserError, match="which nobody has; run a clone"):
        list(adopt.adopt(run(), tmp_path / "records"))


def test_a_grid_that_measures_costs_keeps_its_name_and_hash(tmp_path):
    """A submission measures no costs; its records are of the grid all the same."""
    path = tmp_path / "tiny.toml"
    path.write_text(GRID.replace("samples = 4", "samples = 4\nutility = true"))
    grid, file = load_grid(str(path)), ROOT / "attacks" / "labels" / "random_labels.py"
    with submission.alone(file, file.name) as copy:
        _, planned = submission.plan(copy, Spec("RandomLabels", {}), str(file), grid, 2, None, "cpu")
    assert planned.context.grid_hash == grid.hash
    assert not planned.utilities
