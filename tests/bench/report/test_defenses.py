"""The defense board, of records written in the test: the worst case, and who is to be believed."""

import dataclasses
import json

import pytest

from bench.errors import UserError
from bench.report import record
from bench.report.defenses import COLUMNS, defense_board, render
from bench.report.record import SCENARIO, Header, Record
from bench.report.statistics import wilson
from bench.report.utility import Utility

AXES = {"dataset": "mnist5k", "model": "fcn()", "weights": "untrained", "weight_seed": 0,
        "batch_norm": "eval", "members": "held_out", "batch_size": 1, "classes": "turns",
        "protocol": "fedsgd", "defense": "none"}  # fmt: skip


def labels(attack, right, of=10, knowledge="", **given):
    """So many trials of an attack, the first of which find the private class."""
    axes = AXES | {name: given.pop(name) for name in list(given) if name in AXES}
    scenario = "/".join(str(value) for value in axes.values()).replace(" ", "")
    shared = {"grid": "quick", "scenario": scenario, "knowledge": knowledge, "defense_revision": "1",
              "attack_revision": "1", "reason": "", "weights_sha256": "w", "outcome": "ok"}  # fmt: skip
    rows = []
    for sample in range(of):
        found = {"success": sample < right, "private_top1": float(sample < right), "top1": 1.0}
        values = shared | axes | found | {"attack": attack, "sample": sample} | given
        rows.append(Record(trial=repr((scenario, attack, sample)), **values))
    return rows


def images(attack, private_mse, private_lpips=None, of=4, **given):
    found = {"mse": 0.01, "psnr": 20.0, "private_mse": private_mse, "private_ssim": 0.5,
             "lpips": private_lpips, "private_lpips": private_lpips}  # fmt: skip
    return [
        dataclasses.replace(row, success=None, private_top1=None, top1=None, **found)
        for row in labels(attack, 0, of, **given)
    ]


@pytest.fixture
def ran(tmp_path):
    def ran(*cells, asked=None):
        rows = [row for cell in cells for row in cell]
        counts = {}
        for row in rows:
            counts.setdefault(f"{row.scenario} {row.attack}", set()).add(row.sample)
        expected = {name: len(samples) for name, samples in counts.items()} | (asked or {})
        scenarios = {row.scenario: {name: getattr(row, name) for name in SCENARIO} for row in rows}
        with record.writing(tmp_path / "run") as writer:
            writer.header(Header("quick", "hash", "a test", expected, scenarios))
            writer.rows(rows)
        return [record.read(tmp_path / "run")]

    return ran


def only(board):
    (row,) = json.loads(render(board, "json"))
    return row


def cost(defense, accuracy, seconds=1.0, **given):
    values = {"key": f"{defense}{given}", "dataset": "mnist5k", "model": "fcn()", "weight_seed": 0,
              "defense_revision": "1", "steps": 300, "batch_size": 32, "bytes": 1000, "epsilon": None,
              "delta": 1e-5, "sample_rate": 0.008, "torch": "2"}  # fmt: skip
    return dataclasses.asdict(Utility(defense=defense, accuracy=accuracy, seconds=seconds, **values | given))


def test_the_strongest_attack_counts_and_not_the_mean(ran):
    row = only(defense_board(ran(labels("idlg", 3), labels("llg", 9), labels("random_labels", 1))))
    assert (row["attack"], row["private_top1"], row["n"], row["attacks"]) == ("llg", 0.9, 10, 3)
    assert (row["private_top1_low"], row["private_top1_high"]) == pytest.approx(wilson(9, 10))
    assert row["chance"] == 0.1


def test_an_attack_that_was_told_stands_beside_the_best_that_was_not(ran):
    row = only(defense_board(ran(labels("idlg", 1, 40), labels("lambda", 38, 40, knowledge="defense"))))
    assert (row["attack"], row["told"]) == ("lambda", True)
    assert (row["untold_attack"], row["untold_private_top1"]) == ("idlg", 0.025)
    assert row["falls_only_when_told"] == "classes, labels"


def test_a_difference_within_the_intervals_is_none(ran):
    row = only(defense_board(ran(labels("idlg", 8), labels("lambda", 9, knowledge="defense"))))
    assert row["falls_only_when_told"] is None


def test_of_equals_the_attack_that_needs_less_is_named(ran):
    row = only(defense_board(ran(labels("a", 5, knowledge="defense"), labels("b", 5))))
    assert (row["attack"], row["told"]) == ("b", False)


def test_who_is_given_the_truth_is_no_attacker(ran):
    runs = ran(labels("idlg", 3), labels("oracle", 10, knowledge="soft_labels"))
    assert only(defense_board(runs))["attack"] == "idlg"


def test_skipped_failed_and_unfinished_attacks_are_said(ran):
    skipped = [dataclasses.replace(row, outcome="skipped", reason="needs a bias", success=None,
                                   private_top1=None) for row in labels("ilrg", 0)]  # fmt: skip
    crashed = [dataclasses.replace(row, outcome="crashed") for row in labels("llg", 0, 2)]
    begun = labels("rlg", 5, 5)
    runs = ran(labels("idlg", 3), skipped, crashed, begun, asked={f"{begun[0].scenario} rlg": 10})
    row = only(defense_board(runs))
    assert row["skipped"] == "ilrg: needs a bias"
    assert row["failed"] == 2
    assert row["unfinished"] == "rlg"
    assert row["attack"] == "idlg"  # rlg's half is better, and not the whole
    assert "1 attack skipped" in render(defense_board(runs), "table")


def test_images_are_ranked_by_lpips_else_by_their_error(ran):
    by_error = only(defense_board(ran(images("a", 0.1), images("b", 0.02, knowledge="defense"))))
    assert (by_error["image_attack"], by_error["image_told"], by_error["private_ssim"]) == ("b", True, 0.5)
    assert by_error["untold_private_mse"] == pytest.approx(0.1)
    assert by_error["falls_only_when_told"] == "images"


def test_lpips_comes_first(ran):
    row = only(defense_board(ran(images("a", 0.1, 0.2), images("b", 0.02, 0.6))))
    assert (row["image_attack"], row["private_lpips"]) == ("a", 0.2)


def test_protocols_and_batch_sizes_are_rows_and_the_least_leak_is_first(ran):
    board = defense_board(
        ran(
            labels("idlg", 10),
            labels("idlg", 4, defense="mixup()"),
            labels("idlg", 2, protocol="head_withheld"),
            labels("idlg", 4, batch_size=8),
        )
    )
    assert list(board["rank"]) == [1, 2, 2, 4]
    assert board["protocol"].iloc[0] == "head_withheld"
    assert tuple(board.columns) == COLUMNS


def test_costs_are_beside_each_defense(ran):
    runs = ran(labels("idlg", 10), labels("idlg", 1, defense="dp_gaussian()"))
    costs = [
        cost("none", 0.9),
        cost("dp_gaussian()", 0.5, seconds=3.0, epsilon=2.0),
        cost("dp_gaussian()", 0.7, seconds=3.0, epsilon=2.0, weight_seed=1),
    ]
    rows = {row["defense"]: row for row in json.loads(render(defense_board(runs, costs), "json"))}
    defended = rows["dp_gaussian()"]
    assert defended["accuracy"] == pytest.approx(0.6)
    assert defended["accuracy_cost"] == pytest.approx(0.3)
    assert defended["seconds_factor"] == pytest.approx(3)
    assert (defended["epsilon"], defended["rounds"], defended["sample_rate"]) == (2.0, 300, 0.008)
    assert rows["none"]["epsilon"] is None
    assert "no ε" in render(defense_board(runs, costs), "md")


def test_no_records_are_an_error(ran):
    with pytest.raises(UserError, match="no records"):
        defense_board(ran(asked={"s idlg": 3}))


def test_another_format_is_an_error(ran):
    with pytest.raises(UserError, match="no format"):
        render(defense_board(ran(labels("idlg", 1))), "xml")
