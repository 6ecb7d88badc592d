"""Published boards: from records alone, the same bytes every time."""

import gzip
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from bench import publish
from bench.registry import ROOT, attacks

GRID = """
name = "tiny"
title = "Who wins?"

[[blocks]]
dataset = "mnist5k"
model = "fcn(depth=2, width=24, bias=False)"
defense = ["none", "mixup(low=0.1, high=0.9)"]
attacks = ["idlg", "random_labels"]
samples = 4
"""


@pytest.fixture
def results(leakbench, tmp_path) -> Path:
    (tmp_path / "tiny.toml").write_text(GRID)
    for file, name in (("idlg", "IDLG"), ("random_labels", "RandomLabels")):
        shutil.copy(ROOT / "attacks" / "labels" / f"{file}.py", tmp_path)
        leakbench("submit", f"{file}.py:{name}", "--grid", "tiny.toml", "--workers", 1, "--quiet")
    return tmp_path / "results"


def contents(results: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(results)): path.read_bytes() for path in results.rglob("*") if path.is_file()
    }


def test_boards_are_written_from_packed_records_and_again_the_same(results, leakbench):
    plain = (results / "records" / "tiny" / "idlg" / "r1.jsonl").read_bytes()
    publish.publish(results)
    once = contents(results)
    assert set(once) == {
        "records/tiny/idlg/r1.jsonl.gz", "records/tiny/idlg/r1.json",
        "records/tiny/random_labels/r1.jsonl.gz", "records/tiny/random_labels/r1.json",
        "leaderboards/tiny-label.md", "leaderboards/tiny-label.csv",
        "leaderboards/tiny-defense.md", "leaderboards/tiny-defense.csv", "leaderboards/README.md",
    }  # fmt: skip
    assert gzip.decompress(once["records/tiny/idlg/r1.jsonl.gz"]) == plain
    (results / "leaderboards" / "gone-label.md").write_text("of a grid that is gone")
    publish.publish(results)
    assert contents(results) == once

    board = pd.read_csv(results / "leaderboards" / "tiny-label.csv")
    assert sorted(board["attack"]) == sorted(["idlg", "random_labels"] * 2)
    assert {"protocol_version", "grid", "n", "skipped", "knowledge"} <= set(board.columns)
    shown = (results / "leaderboards" / "tiny-label.md").read_text()
    assert shown.startswith("# tiny: label leaderboard\n\nWho wins?")
    assert "protocol 1" in shown
    index = (results / "leaderboards" / "README.md").read_text()
    assert "| tiny | Who wins? | 16 | [label](tiny-label.md)" in index

    code, out, _ = leakbench("verify", results / "records" / "tiny" / "idlg" / "r1.jsonl.gz", "--workers", 1)
    assert code == 0
    assert "8 trials, 8 of them run again: they agree" in out


def test_what_is_committed_was_made_by_this_command(tmp_path):
    if not (ROOT / "results" / "records").is_dir():
        pytest.skip("no records are committed yet")
    for part in ("records", "leaderboards", "defenses"):
        shutil.copytree(ROOT / "results" / part, tmp_path / part)
    before = contents(tmp_path)
    publish.publish(tmp_path)
    assert contents(tmp_path) == before


def test_what_papers_report_names_known_attacks_and_its_source():
    reported = pd.read_csv(ROOT / "results" / "reported.csv")
    assert reported.notna().all().all()
    known = set(attacks.names())
    assert {name.partition("(")[0] for name in reported["attack"]} - known <= {"dlg"}
    assert reported["paper"].str.match(r"https://").all()
    assert set(reported["relation"]) <= {"=", ">", "<"}


def test_an_edited_line_is_not_packed(results):
    path = results / "records" / "tiny" / "idlg" / "r1.jsonl"
    path.write_text(path.read_text().replace('"success": true', '"success": false', 1))
    with pytest.raises(ValueError, match="is not as it was written"):
        publish.publish(results)
    assert path.exists()
    assert json.loads(path.with_suffix(".json").read_text())["attack"] == "idlg"
