"""The pages PAPER.md and PEERS.md: from committed files alone, without an empty cell."""

import re

import pandas as pd
import pytest

from bench import paper, peers
from bench.evidence import Claim, Evidence, MissingError, by_kind, one, rate, table
from bench.registry import ROOT

REPORTED = "attack,paper,dataset,setting,metric,relation,value,read_in\n"
LENET = "lenet(activation='sigmoid', bias=False, init='uniform')"


@pytest.fixture
def results(tmp_path):
    """A folder with one board, one study and one reported figure."""
    (tmp_path / "reported.csv").write_text(
        REPORTED
        + "idlg,https://arxiv.org/abs/2001.02610,MNIST,one example,label accuracy,>,0.95,its abstract\n"
        + 'fcn_analytic,https://arxiv.org/abs/2402.03124,Flowers-17,FCN-4,"PSNR, dB",=,51.17,a notebook\n'
    )
    (tmp_path / "leaderboards").mkdir()
    row = {"attack": "idlg", "model": LENET, "weight_seed": "0,1,2", "expected": 60, "n": 60}
    kinds = {"none": 1.0, "label_smoothing(epsilon=(0.1, 0.5))": 0.0}
    board = [row | {"defense": defense, "success": success} for defense, success in kinds.items()]
    board.append(row | {"defense": "none", "attack": "random_labels", "n": 0})
    pd.DataFrame(board).to_csv(tmp_path / "leaderboards" / "tiny-v1-label.csv", index=False)
    (tmp_path / "solver").mkdir()
    pd.DataFrame({"level": [0.1, 0.2], "within": [1.0, 0.5]}).to_csv(tmp_path / "solver" / "noise.csv")
    return tmp_path


def test_a_claim_has_what_is_reported_ours_with_interval_and_its_command(results):
    claim = Claim(
        "the class is found",
        lambda e: e.reported("idlg", "label accuracy"),
        lambda e: by_kind(e, "tiny-v1-label", "success", ("hard", "smoothed"), attack="idlg"),
        "a reason",
    )
    text, said, ours, command, why = claim.cells(Evidence(results))
    assert (
        said
        == "label accuracy: > 95 %; MNIST; one example ([its abstract](https://arxiv.org/abs/2001.02610))"
    )
    assert ours == "hard 100 % [94, 100], smoothed 0 % [0, 6.02]; n = 60 each"
    assert command == "`leakbench run tiny-v1 --samples 20`"
    assert (text, why) == ("the class is found", "a reason")


def test_what_is_no_rate_is_reported_as_it_stands(results):
    assert Evidence(results).reported("fcn_analytic", "PSNR").startswith("PSNR, dB: 51.17; Flowers-17")


def test_specs_need_not_be_canonical(results):
    rows = Evidence(results).board("tiny-v1-label", model="lenet(bias=False)", attack="idlg", defense="none")
    assert one(rows).success == 1


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("tiny-v1-label", {"attack": "random_labels"}),
        ("tiny-v1-label", {"attack": "llg"}),
        ("none-v1-label", {}),
    ],
)
def test_what_was_not_run_is_said_with_the_command_that_runs_it(results, name, columns):
    claim = Claim("c", "r", lambda e: str(e.board(name, **columns)), "why")
    _, _, ours, command, _ = claim.cells(Evidence(results))
    assert ours.startswith(f"not run: `leakbench run {name.removesuffix('-label')}")
    assert command == "the same"


def test_a_study_that_was_not_run_names_its_module(results):
    evidence = Evidence(results)
    assert len(evidence.study("solver/noise.csv", level=[0.1])) == 1
    with pytest.raises(MissingError, match=r"python -m bench\.studies\.losses"):
        evidence.study("solver/losses.csv")


def test_a_figure_that_no_paper_reports_is_refused(results):
    with pytest.raises(ValueError, match=r"reported\.csv has no 'SSIM' of idlg"):
        Evidence(results).reported("idlg", "SSIM")


def test_an_empty_cell_is_refused():
    with pytest.raises(ValueError, match="an empty cell"):
        table(("a", "b"), [("1", " ")])
    assert table(("a", "b"), [("1", "x | y")]) == "| a | b |\n| --- | --- |\n| 1 | x \\| y |\n"


def test_rates_have_wilsons_interval():
    assert rate(9, 10) == "90 % [59.6, 98.2]"  # Newcombe 1998's method 3


def test_without_any_result_every_row_says_what_to_run(tmp_path):
    (tmp_path / "reported.csv").write_bytes((ROOT / "results" / "reported.csv").read_bytes())
    pages = [path.read_text() for path in paper.write(tmp_path)]
    assert pages[0].count("not run: `") >= sum(map(len, paper.THEMES.values())) - 1
    assert "Not run: `leakbench run labels-v1`" in pages[1]


def test_commands_of_studies_are_modules_that_exist():
    from bench.evidence import STUDIES

    for command in STUDIES.values():
        module = command.split()[2]
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), command


def test_the_committed_pages_are_what_the_committed_files_make():
    evidence = Evidence(ROOT / "results")
    for name, page in (("PAPER.md", paper.page(evidence)), ("PEERS.md", peers.page(evidence))):
        path = ROOT / "results" / name
        assert path.read_text(encoding="utf-8") == page, f"{name}: run python -m bench.paper, commit it"
        assert not re.search(r"\|[ \t]*\|", page), name
        assert "nan" not in re.split(r"\W+", page.lower()), name
