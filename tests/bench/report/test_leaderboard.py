"""Leaderboards of records written in the test: what counts, what is shown, who is first."""

import dataclasses
import json
import math

import pandas as pd
import pytest

from bench import metrics
from bench.errors import UserError
from bench.report import record
from bench.report.leaderboard import EXACT_PSNR, FAILED, TRACKS, WORST, leaderboard, tracks
from bench.report.record import METRICS, SCENARIO, Header, Record
from bench.report.statistics import wilson
from bench.report.tables import render

FOUND = {"success": True, "label_error": 1e-7, "label_l1": 1e-7, "top1": 1.0, "class_existence": 1.0,
         "class_counts": 1.0}  # fmt: skip
MISSED = {"success": False, "label_error": 0.4, "label_l1": 0.8, "top1": 0.0, "class_existence": 0.0,
          "class_counts": 0.0}  # fmt: skip
AXES = {"dataset": "mnist5k", "model": "fcn(bias=True)", "weights": "untrained", "weight_seed": 0,
        "batch_norm": "eval", "members": "held_out", "batch_size": 1, "classes": "turns",
        "protocol": "fedsgd", "defense": "none"}  # fmt: skip


def image(psnr):
    return {"mse": 10 ** (-psnr / 10), "psnr": psnr, "ssim": 0.5}


def cell(attack, answers, **given):
    """One record for each answer: metrics, or an outcome's name."""
    axes = AXES | {name: given.pop(name) for name in list(given) if name in AXES}
    scenario = "/".join(str(value) for value in axes.values()).replace(" ", "")
    shared = {"grid": "quick", "scenario": scenario, "knowledge": "", "defense_revision": "1",
              "attack_revision": "1", "reason": "", "weights_sha256": axes["model"]}  # fmt: skip
    rows = []
    for sample, answer in enumerate(answers):
        named = {"outcome": answer} if isinstance(answer, str) else {"outcome": "ok"} | answer
        values = shared | axes | {"attack": attack, "sample": sample} | named | given
        identity = (values["scenario"], attack, sample, values["attack_revision"], values["weights_sha256"])
        rows.append(Record(trial=repr(identity), **values))
    return rows


@pytest.fixture
def ran(tmp_path):
    """A run as it is read back from its folder; `asked` adds to, or replaces, what the header expects."""

    def ran(*cells, asked=None, folder="run"):
        rows = [row for cell in cells for row in cell]
        counts, scenarios = {}, {}
        for row in rows:
            counts.setdefault(f"{row.scenario} {row.attack}", set()).add(row.sample)
            scenarios[row.scenario] = {name: getattr(row, name) for name in SCENARIO}
        expected = {name: len(samples) for name, samples in counts.items()} | (asked or {})
        with record.writing(tmp_path / folder) as writer:
            writer.header(Header("quick", "hash", "a test", expected, scenarios))
            writer.rows(rows)
        return record.read(tmp_path / folder)

    return ran


def row_of(board, attack, **axes):
    chosen = board[board["attack"] == attack]
    for name, value in axes.items():
        chosen = chosen[chosen[name] == value]
    assert len(chosen) == 1
    return chosen.iloc[0]


def test_a_row_has_the_mean_of_each_metric_and_wilsons_interval_of_the_rate(ran):
    board = leaderboard([ran(cell("idlg", [FOUND] * 7 + [MISSED] * 3))], "label")
    row = row_of(board, "idlg")
    assert (row["n"], row["expected"], row["failed"], row["success"]) == (10, 10, 0, 0.7)
    assert (row["success_low"], row["success_high"]) == wilson(7, 10)
    assert row["label_error"] == pytest.approx(0.7 * 1e-7 + 0.3 * 0.4)
    assert row["top1"] == pytest.approx(0.7)


def test_the_board_has_the_columns_of_the_contract(ran):
    board = leaderboard([ran(cell("idlg", [FOUND]))], "label")
    needed = {"rank", "attack", "defense", *SCENARIO, "knowledge", "grid", "scenario", "n", *METRICS,
              "success_low", "success_high", "skipped", "failed"}  # fmt: skip
    assert needed <= set(board.columns)


@pytest.mark.parametrize("outcome", FAILED)
def test_a_failed_trial_counts_as_not_recovered(ran, outcome):
    row = row_of(leaderboard([ran(cell("idlg", [FOUND, FOUND, FOUND, outcome]))], "label"), "idlg")
    assert (row["n"], row["failed"], row["success"], row["top1"]) == (4, 1, 0.75, 0.75)
    assert row["label_l1"] == pytest.approx((3 * 1e-7 + WORST["label_l1"]) / 4)


def test_a_guess_of_an_attack_that_gives_up_is_no_success(ran):
    guess = FOUND | {"outcome": "unidentifiable"}
    row = row_of(leaderboard([ran(cell("idlg", [FOUND, guess]))], "label"), "idlg")
    assert (row["success"], row["top1"], row["failed"]) == (0.5, 1.0, 1)


def test_the_best_answer_at_the_step_limit_counts(ran):
    row = row_of(leaderboard([ran(cell("idlg", [FOUND | {"outcome": "step_limit"}]))], "label"), "idlg")
    assert (row["success"], row["failed"]) == (1.0, 0)


def test_an_answer_that_lacks_its_labels_is_not_recovered(ran):
    row = row_of(leaderboard([ran(cell("idlg", [FOUND, {}]))], "label"), "idlg")
    assert (row["n"], row["success"]) == (2, 0.5)


def test_an_attack_that_always_fails_is_there_with_nothing_recovered(ran):
    board = leaderboard([ran(cell("idlg", [FOUND] * 3), cell("gone", ["crashed"] * 3))], "label")
    row = row_of(board, "gone")
    assert (row["n"], row["failed"], row["success"], row["label_error"]) == (3, 3, 0.0, 1.0)


def test_an_attack_that_fails_in_one_cell_is_judged_by_what_it_gives_in_others(ran):
    run = ran(
        cell("inverter", [image(20.0)] * 3),
        cell("inverter", ["timeout"] * 3, defense="mixup"),
        cell("idlg", [FOUND] * 3),
    )
    assert set(leaderboard([run], "label")["attack"]) == {"idlg"}
    assert row_of(leaderboard([run], "image"), "inverter", defense="mixup")["psnr"] == 0.0


def test_lambdas_error_is_the_mean_over_those_who_gave_one(ran):
    run = ran(cell("lam", [FOUND | {"lam_error": 0.1, "format_found": True}, "crashed"]))
    row = row_of(leaderboard([run], "label"), "lam")
    assert row["lam_error"] == pytest.approx(0.1)
    assert row["format_found"] == 0.5


def test_a_metric_that_an_attack_never_has_stays_empty(ran):
    row = row_of(leaderboard([ran(cell("idlg", [FOUND, "crashed"]))], "label"), "idlg")
    assert math.isnan(row["format_found"])
    assert math.isnan(row["psnr"])


def test_a_skipped_cell_is_shown_with_its_reason_and_without_a_rank(ran):
    skipped = {"outcome": "skipped", "reason": "needs a bias"}
    board = leaderboard([ran(cell("idlg", [FOUND] * 2), cell("closed", [skipped] * 2))], "label")
    row = row_of(board, "closed")
    assert (row["n"], row["failed"], row["skipped"]) == (0, 0, "needs a bias")
    assert pd.isna(row["rank"])
    assert math.isnan(row["success"])
    assert pd.isna(row_of(board, "idlg")["skipped"])


def test_a_cell_with_trials_missing_has_no_rank_and_its_partial_n(ran):
    whole, part = cell("idlg", [FOUND] * 4), cell("slow", [FOUND] * 3)
    board = leaderboard([ran(whole, part, asked={f"{part[0].scenario} slow": 4})], "label")
    row = row_of(board, "slow")
    assert pd.isna(row["rank"])
    assert (row["n"], row["expected"]) == (3, 4)
    assert row_of(board, "idlg")["rank"] == 1


def test_a_cell_that_has_not_begun_is_there_with_no_trials(ran):
    begun = cell("idlg", [FOUND] * 4), cell("idlg", [FOUND] * 4, defense="mixup")[:0]
    later = cell("idlg", [FOUND], defense="mixup")[0]
    run = ran(*begun, asked={f"{later.scenario} idlg": 4})
    header = dataclasses.replace(run.headers[0], scenarios={later.scenario: AXES | {"defense": "mixup"}})
    board = leaderboard([dataclasses.replace(run, headers=(header,))], "label")
    row = row_of(board, "idlg", defense="mixup")
    assert (row["n"], row["expected"]) == (0, 4)
    assert pd.isna(row["rank"])


def test_ranks_are_given_within_a_scenario_and_ties_share_them(ran):
    run = ran(
        cell("idlg", [FOUND] * 30),
        cell("lam", [FOUND] * 30),
        cell("random_labels", [MISSED] * 30),
        cell("idlg", [MISSED] * 30, defense="mixup"),
        cell("lam", [FOUND] * 30, defense="mixup"),
        cell("random_labels", [MISSED] * 30, defense="mixup"),
    )
    board = leaderboard([run], "label")
    got = {(row["defense"], row["attack"]): row["rank"] for _, row in board.iterrows()}
    assert got == {
        ("none", "idlg"): 1, ("none", "lam"): 1, ("none", "random_labels"): 3,
        ("mixup", "lam"): 1, ("mixup", "idlg"): 2, ("mixup", "random_labels"): 2,
    }  # fmt: skip


def test_what_an_attack_is_told_does_not_part_it_from_its_rivals(ran):
    run = ran(cell("lam", [FOUND] * 30, knowledge="label_format"), cell("idlg", [MISSED] * 30))
    board = leaderboard([run], "label")
    assert [row_of(board, attack)["rank"] for attack in ("lam", "idlg")] == [1, 2]


def test_the_same_trial_in_two_folders_counts_once(ran):
    first, second = ran(cell("idlg", [FOUND] * 5)), ran(cell("idlg", [FOUND] * 8), folder="longer")
    assert row_of(leaderboard([first, second], "label"), "idlg")["n"] == 8


def test_an_older_revisions_trials_do_not_mix_with_the_newer_ones(ran):
    old, new = cell("idlg", [MISSED] * 4), cell("idlg", [FOUND] * 3, attack_revision="2")
    row = row_of(leaderboard([ran(old, new)], "label"), "idlg")
    assert (row["n"], row["expected"], row["success"]) == (3, 4, 1.0)
    assert pd.isna(row["rank"])


def test_trials_of_an_older_protocol_are_not_compared_with_newer_ones(ran):
    old, new = cell("idlg", [FOUND] * 3, protocol_version=1), cell("lam", [FOUND] * 3, protocol_version=2)
    board = leaderboard([ran(old, new)], "label")
    assert row_of(board, "lam")["n"] == 3
    assert "idlg" not in set(board["attack"]) or row_of(board, "idlg")["n"] == 0


def test_a_board_on_which_everything_is_skipped_is_still_shown(ran):
    run = ran(cell("closed", [{"outcome": "skipped", "reason": "needs a bias"}] * 2))
    board = leaderboard([run], "label")
    assert row_of(board, "closed")["skipped"] == "needs a bias"
    assert "needs a bias" in render(board, "label", "table")


def test_an_exact_image_counts_as_200_decibels(ran):
    exact = {"mse": 0.0, "psnr": None, "ssim": 1.0}
    row = row_of(leaderboard([ran(cell("fcn_analytic", [exact, image(100.0)]))], "image"), "fcn_analytic")
    assert row["psnr"] == pytest.approx(150.0)
    assert row["psnr_low"] == pytest.approx(100.0)
    assert row["psnr_high"] == pytest.approx(200.0)


def test_lpips_stays_empty_where_its_trunk_was_not_there(ran):
    run = ran(cell("inverter", [image(20.0), "crashed"]))
    board = leaderboard([run], "image")
    assert math.isnan(row_of(board, "inverter")["lpips"])
    assert "LPIPS: run `leakbench data lpips` first" in render(board, "image", "table")


def test_a_failed_trial_has_the_worst_lpips_where_the_trunk_was_there(ran):
    run = ran(cell("inverter", [image(20.0) | {"lpips": 0.2}, "crashed"]))
    board = leaderboard([run], "image")
    assert row_of(board, "inverter")["lpips"] == pytest.approx(0.6)
    assert "data lpips" not in render(board, "image", "table")


def test_images_rank_by_psnr(ran):
    lower = cell("blurry", [image(15.0 + sample / 10) for sample in range(20)])
    higher = cell("sharp", [image(25.0 + sample / 7) for sample in range(20)])
    board = leaderboard([ran(lower, higher)], "image")
    assert list(zip(board["rank"], board["attack"], strict=True)) == [(1, "sharp"), (2, "blurry")]


def test_tracks_are_those_that_something_was_produced_for(ran):
    assert tracks([ran(cell("idlg", [FOUND]))]) == ["label"]
    features = {"feature_error": 0.1, "feature_cosine": 0.9}
    both = ran(cell("lam", [FOUND | features]), cell("inverter", [image(9.0)]), folder="b")
    assert tracks([both]) == list(TRACKS)
    assert row_of(leaderboard([both], "feature"), "lam")["feature_cosine"] == pytest.approx(0.9)


def test_a_track_that_is_not_there_is_one_line_with_those_that_are(ran):
    run = ran(cell("idlg", [FOUND]))
    with pytest.raises(UserError, match=r"no 'defense' leaderboard; known: feature, image, label$"):
        leaderboard([run], "defense")
    with pytest.raises(UserError, match="produces images; tracks with something to show: label"):
        leaderboard([run], "image")


def test_a_run_without_records_says_how_to_go_on(ran):
    empty = ran(asked={"scenario idlg": 5})
    assert tracks([empty]) == []
    with pytest.raises(UserError, match="no records yet in quick; the `leakbench run`"):
        leaderboard([empty], "label")


def test_an_unknown_format_is_one_line_with_the_known_ones(ran):
    with pytest.raises(UserError, match="csv, json, md, table"):
        render(leaderboard([ran(cell("idlg", [FOUND]))], "label"), "label", "xml")


def test_json_is_a_list_of_objects_with_null_for_what_is_not_there(ran):
    skipped = {"outcome": "skipped", "reason": "needs a bias"}
    run = ran(cell("idlg", [FOUND] * 2), cell("closed", [skipped] * 2))
    first, second = json.loads(render(leaderboard([run], "label"), "label", "json"))
    assert (first["attack"], first["rank"], first["n"], first["psnr"]) == ("idlg", 1, 2, None)
    assert (second["attack"], second["rank"], second["skipped"]) == ("closed", None, "needs a bias")


def test_csv_reads_back_as_the_board(ran):
    board = leaderboard([ran(cell("idlg", [FOUND] * 3 + [MISSED]))], "label")
    text = render(board, "label", "csv")
    header, values = (line.split(",") for line in text.splitlines())
    assert header == list(board.columns)
    assert float(values[header.index("success")]) == 0.75


def test_markdown_has_a_line_a_row_with_the_interval(ran):
    run = ran(cell("idlg", [FOUND] * 10), cell("slow|odd", [FOUND] * 10))
    lines = render(leaderboard([run], "label"), "label", "md").splitlines()
    assert len(lines) == 4
    assert "| 1 | idlg | none (hard labels) | fcn(bias=True) | untrained | 10 | 100% [72–100] |" in lines[2]
    assert "slow\\|odd" in lines[3]


@pytest.fixture
def table(ran, monkeypatch):
    """The label board for people, on a terminal so many columns wide."""

    def table(width, *cells, asked=None):
        monkeypatch.setenv("COLUMNS", str(width))
        return render(leaderboard([ran(*cells, asked=asked)], "label"), "label", "table")

    return table


def test_people_read_one_row_an_attack_and_one_column_a_defense(table):
    text = table(
        110,
        cell("random_labels", [MISSED] * 50),
        cell("random_labels", [MISSED | {"top1": 0.1}] * 50, defense="mixup(alpha=1.0)"),
        cell("idlg", [FOUND] * 50),
        cell("idlg", [MISSED | {"top1": 1.0}] * 50, defense="mixup(alpha=1.0)"),
    )
    lines = text.splitlines()
    rule = next(at for at, line in enumerate(lines) if line.startswith("─"))
    assert lines[rule + 1].split() == ["idlg", "100%", "[93–100]", "0%", "[0–7]"]
    assert lines[rule + 2].split() == ["top-1", "100%"]
    assert lines[rule + 3].split()[0] == "random_labels"
    assert "mnist5k, fcn(bias=True), untrained" in text


def test_of_a_batch_people_read_the_share_of_counts_that_are_right(table):
    text = table(110, cell("llg", [MISSED | {"class_counts": 0.75}] * 4, batch_size=8))
    assert "counts 75%" in text
    assert "top-1" not in text


def test_people_see_why_a_cell_is_skipped_and_what_is_missing(table):
    part = cell("slow", [FOUND] * 3)
    skipped = {"outcome": "skipped", "reason": "needs a bias"}
    text = table(
        110, part, cell("closed", [skipped] * 3), cell("frail", [FOUND, "crashed"]),
        asked={f"{part[0].scenario} slow": 9},
    )  # fmt: skip
    assert "–¹" in text
    assert "¹ skipped: needs a bias" in text
    assert "— 3/9" in text
    assert "1 failed" in text


def test_a_network_is_named_by_what_tells_it_from_the_others(table):
    text = table(110, cell("idlg", [FOUND]), cell("idlg", [FOUND], model="lenet"))
    assert text.splitlines().count("lenet") == 1
    assert text.count("mnist5k") == 1


def test_weight_seeds_are_pooled_and_named(ran):
    cells = [cell("idlg", [FOUND] * 3 + [MISSED] * seed, weight_seed=seed) for seed in (0, 1, 2)]
    row = row_of(leaderboard([ran(*cells)], "label"), "idlg")
    assert (row["n"], row["expected"], row["weight_seed"], row["rank"]) == (12, 12, "0,1,2", 1)
    assert row["success"] == 9 / 12


def test_what_is_granted_to_others_makes_no_second_row(ran):
    plain, told = cell("idlg", [FOUND] * 3), cell("idlg", [FOUND] * 3, scenario="told")
    row = row_of(leaderboard([ran(plain, told)], "label"), "idlg")
    assert (row["n"], row["expected"], row["rank"]) == (3, 3, 1)


def test_a_weight_seed_that_is_missing_leaves_the_row_without_a_rank(ran):
    cells = [cell("idlg", [FOUND] * 3, weight_seed=seed) for seed in (0, 1)]
    board = leaderboard([ran(*cells, asked={f"{cells[1][0].scenario} idlg": 5})], "label")
    row = row_of(board, "idlg")
    assert (row["n"], row["expected"]) == (6, 8)
    assert pd.isna(row["rank"])


@pytest.mark.parametrize("width", [60, 80, 110, 200])
def test_the_table_keeps_to_the_terminals_width(table, width):
    specs = [
        "none",
        "mixup(alpha=1.0)",
        "label_smoothing(epsilon=0.3)",
        "dp_gaussian(clip=1.0)",
        "a",
        "b",
        "c",
    ]
    text = table(width, *(cell("idlg", [FOUND] * 5, defense=spec) for spec in specs))
    assert max(map(len, text.splitlines())) <= width
    assert text.count("100% [57–100]") == len(specs)


@pytest.mark.parametrize("width", [70, 110])
def test_the_image_table_keeps_to_the_terminals_width(ran, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    run = ran(cell("inverting(labels='lambda', steps=1000)", [image(18.0) | FOUND] * 4))
    text = render(leaderboard([run], "image"), "image", "table")
    assert max(map(len, text.splitlines())) <= width
    assert "18.0 [18.0–18.0]" in text


def test_a_rate_short_of_all_is_not_shown_as_all(table):
    assert ">99% [" in table(110, cell("idlg", [FOUND] * 399 + [MISSED]))


def test_text_for_a_pipe_has_no_colour(table, monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    assert "\x1b" not in table(110, cell("idlg", [FOUND] * 3))


def test_a_terminal_gets_colour(table, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[32m100%" in table(110, cell("idlg", [FOUND] * 3))


def test_a_spec_that_is_known_is_shown_short(table):
    spec = "dp_gaussian(clip=1.0, noise_multiplier=5.0)"
    text = table(110, cell("idlg", [FOUND], defense=spec), cell("idlg", [FOUND]))
    assert "clip" not in text
    assert "(noise_multiplier=5.0)" in text


def test_an_attack_from_a_path_is_not_run_to_show_it(ran, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    run = ran(cell("mine.py:Mine", ["crashed"] * 2), cell("idlg", [FOUND] * 2))
    assert "mine.py:Mine" in render(leaderboard([run], "label"), "label", "table")


def test_what_tells_two_of_one_name_apart_is_shown_though_it_is_a_default(table):
    text = table(
        110,
        cell("lambda_recovery(search='exact')", [FOUND]),
        cell("lambda_recovery(search='pso')", [FOUND]),
    )
    assert "'exact'" in text
    assert "'pso'" in text


def test_an_exact_image_counts_the_same_alone_and_in_a_batch():
    assert EXACT_PSNR == metrics.EXACT_PSNR


def test_what_a_failed_trial_answers_beside_ranks_nowhere(ran):
    """Images looked up, and handed in as `unidentifiable`, would score where nothing verifies them."""
    exact = {"mse": 0.0, "psnr": None, "ssim": 1.0}
    runs = [
        ran(
            cell("lookup", [exact | {"outcome": "unidentifiable"}] * 6),
            cell("honest", [image(20.0)] * 6),
        )
    ]
    board = leaderboard(runs, "image").set_index("attack")
    assert board.loc["lookup", "psnr"] == WORST["psnr"]
    assert board.loc["honest", "rank"] == 1
    assert board.loc["lookup", "rank"] == 2
