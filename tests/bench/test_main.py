"""The command line as a person meets it: what it prints, how it ends, and one line for each mistake."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from bench.report import record

ROOT = Path(__file__).parents[2]


@pytest.fixture
def finished(leakbench, small, tmp_path):
    """The folder of a small run."""
    code, *_ = leakbench("run", small, "--workers", 0, "--out", tmp_path / "finished", "--quiet")
    assert code == 0
    return tmp_path / "finished"


def test_a_run_says_its_cost_its_progress_its_boards_and_where_the_records_are(leakbench, small):
    code, out, err = leakbench("run", small, "--workers", 0)
    assert code == 0
    assert "80 trials in 4 scenarios, 0 networks to train; on cpu, in this process, into runs/small" in err
    assert "100 %  80 of 80 trials" in err
    assert out.startswith("Label leaderboard")
    assert "Records: runs/small/records.jsonl (80 trials)" in out
    assert "A part of" not in out
    assert Path("runs/small/records.jsonl").exists()


def test_quiet_says_no_cost_and_no_progress(leakbench, small):
    _, out, err = leakbench("run", small, "--workers", 0, "--quiet")
    assert err == ""
    assert out.startswith("Label leaderboard")


def test_attacks_and_defenses_are_replaced_and_their_baselines_stay(leakbench, small, tmp_path):
    leakbench(
        "run", small, "--workers", 0, "--out", tmp_path / "out", "--samples", 1,
        "--attack", "idlg", "--defense", "mixup",
    )  # fmt: skip
    rows = record.read(tmp_path / "out").rows
    assert {row["attack"] for row in rows} == {"idlg", "random_labels"}
    assert {row["defense"].split("(")[0] for row in rows} == {"mixup", "none"}


def test_a_run_with_a_crash_ends_with_3_and_says_which(leakbench, small, misbehaving):
    code, out, err = leakbench("run", small, "--workers", 0, "--attack", f"{misbehaving}:Raises", "--quiet")
    assert code == 3
    assert out.startswith("Label leaderboard")
    assert re.search(r"20 trials crashed.*Raises, trial \w{24}: RuntimeError: no idea at all", err)


def test_wrong_usage_ends_with_2(leakbench):
    assert leakbench("run", "--nonsense")[0] == 2
    assert leakbench("frobnicate")[0] == 2
    assert leakbench("run", "--samples", "0")[0] == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("run qick", "no grid is named 'qick'; did you mean quick?"),
        ("run there.toml", "there.toml is not there"),
        ("run SMALL --attack idgl", "no attack is named 'idgl'; did you mean idlg?"),
        ("run SMALL --attack gone.py:Mine", "gone.py"),
        ("run SMALL --attack lambda_recovery(serch='pso')", "no parameter 'serch'; did you mean search?"),
        ("run SMALL --attack lambda_recovery(search='psi')", "search='psi' should be"),
        ("run SMALL --attack inverting_gradients(iterations=0)", "iterations=0 is not a number of at"),
        ("run SMALL --attack idlg(__import__('os'))", "parameters need their names"),
        ("run SMALL --attack idlg(a=open('x'))", "is no literal"),
        ("run SMALL --defense mixop", "no defense is named 'mixop'; did you mean mixup?"),
        ("run SMALL --defense mixup(alpha=-1.0)", "alpha=-1.0 is not above 0"),
        ("run SMALL --defense label_smoothing(epsilon=2.0)", "epsilon"),
        ("run SMALL --device tpu9", "device 'tpu9' is not there; use --device cpu"),
        ("run SMALL --device cuda:99", "device 'cuda:99' is not there; use --device cpu"),
        ("run SMALL --samples 100000", "mnist5k has 1000 held-out examples"),
        ("run SMALL --scheduler tcp://127.0.0.1:1 --workers 1", "give one of them"),
        ("leaderboard nowhere", "nowhere holds no records.jsonl"),
        ("leaderboard FINISHED --track lable", "no 'lable' leaderboard; did you mean label?"),
        ("leaderboard FINISHED --track image", "no attack here produces images"),
        ("leaderboard FINISHED --format xml", "no format is named 'xml'"),
        ("status nowhere", "nowhere holds no records.jsonl"),
        ("rerun nowhere abc", "nowhere holds no records.jsonl"),
        ("rerun FINISHED nosuchtrial", "0 trials whose key begins with 'nosuchtrial'"),
        ("list attack", "nothing is listed as 'attack'; did you mean attacks?"),
        ("data nothing", "nothing to download is named 'nothing'"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_says_what_is_wrong(leakbench, small, finished, arguments, said):
    words = [{"SMALL": small, "FINISHED": finished}.get(word, word) for word in arguments.split()]
    code, _, err = leakbench(*words)
    assert code == 1
    assert said in err
    assert re.fullmatch(r"leakbench: [^\n]+\n", err)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("name = ", "is no TOML"),
        ("name = 'x'", "blocks: field required"),
        ("name = 'x'\nblocks = []", "blocks"),
        ("GRID\nsampels = 3", "unknown key 'blocks.0.sampels'; did you mean samples?"),
        ("GRID\nbatch_size = 'one'", "blocks.0.batch_size"),
        ("GRID\nbatch_size = 0", "blocks.0.batch_size"),
        ("GRID\nweights = 'epochs=two'", "epochs=two"),
        ("GRID\nprotocol = 'fedsdg'", "no protocol is named 'fedsdg'"),
        ("GRID\nknowledge = ['labels']", "knowledge can't grant 'labels'"),
    ],
)
def test_a_wrong_grid_file_is_one_line(leakbench, small, written, said):
    small.write_text(written.replace("GRID", small.read_text()))
    code, _, err = leakbench("run", small, "--workers", 0)
    assert code == 1
    assert said in err
    assert err.count("\n") == 1


def images(**changes) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    good = {"images": rng.integers(0, 256, (40, 8, 8, 1), dtype=np.uint8), "labels": np.arange(40) % 4}
    return good | changes


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        (images(images=np.full((40, 8, 8, 1), np.nan)), "NaN"),
        (images(images=np.zeros((40, 8))), "they must be (M, H, W, C)"),
        (images(labels=np.full(40, -1)), "label"),
        (images(images=np.zeros((0, 8, 8, 1), np.uint8), labels=np.zeros(0, int)), "no images"),
    ],
)
def test_a_wrong_data_file_is_one_line(leakbench, small, tmp_path, arrays, said):
    np.savez(tmp_path / "own.npz", **arrays)
    small.write_text(small.read_text().replace("mnist5k", f"npz:{tmp_path / 'own.npz'}"))
    code, _, err = leakbench("run", small, "--workers", 0)
    assert code == 1
    assert said in err
    assert err.count("\n") == 1


def test_an_attack_from_a_file_runs_on_data_from_a_file(leakbench, small, misbehaving, tmp_path):
    np.savez(tmp_path / "own.npz", **images())
    small.write_text(small.read_text().replace("mnist5k", f"npz:{tmp_path / 'own.npz'}"))
    code, out, _ = leakbench("run", small, "--workers", 0, "--samples", 2, "--attack", "lambda_recovery")
    assert code == 0
    assert "own.npz" in out
    assert re.search(r"A part of small: 2 of \d+ samples a cell", out)
    _, board, _ = leakbench("leaderboard", "runs/small")
    assert re.search(r"A part of small: 2 of \d+ samples a cell", board)


def test_a_folder_of_another_grid_is_refused(leakbench, small, finished):
    small.write_text(small.read_text().replace("seed = 3", "seed = 4"))
    code, _, err = leakbench("run", small, "--workers", 0, "--out", finished)
    assert code == 1
    assert "holds another grid" in err


@pytest.mark.parametrize("kind", ["attacks", "defenses", "datasets", "models", "grids"])
def test_list_names_what_there_is(leakbench, kind):
    code, out, _ = leakbench("list", kind, "--json")
    entries = json.loads(out)
    assert code == 0
    assert all(entry["name"] and entry["title"] for entry in entries)
    known = {"attacks": "idlg", "defenses": "none", "datasets": "mnist5k", "models": "fcn", "grids": "quick"}
    assert known[kind] in {entry["name"] for entry in entries}
    assert leakbench("list", kind)[1].count("\n") == len(entries)


def test_leaderboards_come_as_csv_and_json(leakbench, finished):
    _, as_json, _ = leakbench("leaderboard", finished, "--track", "label", "--format", "json")
    _, as_csv, _ = leakbench("leaderboard", finished, "--track", "label", "--format", "csv")
    rows = json.loads(as_json)
    assert len(rows) == as_csv.count("\n") - 1 == 16
    columns = {"rank", "attack", "defense", "n", "success", "success_low", "success_high", "model", "top1"}
    assert columns <= rows[0].keys()


def test_status_counts_outcomes(leakbench, finished):
    _, out, _ = leakbench("status", finished)
    assert out.startswith("small: 80 of 80 trials\n")
    assert re.search(r"70  ok\n +10  skipped", out)


def test_status_says_whether_anybody_writes(leakbench, finished):
    assert "running" not in leakbench("status", finished)[1]
    lines = (finished / record.FILE).read_bytes().splitlines(keepends=True)
    (finished / record.FILE).write_bytes(b"".join(lines[:50]))
    _, out, _ = leakbench("status", finished)
    assert out.startswith("small: 49 of 80 trials\n")
    assert out.endswith("not running: the same `leakbench run` goes on\n")
    with record.writing(finished):
        (finished / ".progress").write_text(" 61 %  49 of 80 trials  3/s")
        assert leakbench("status", finished)[1].endswith("running:  61 %  49 of 80 trials  3/s\n")


def test_check_says_that_a_run_is_whole_or_why_it_is_not(leakbench, finished):
    assert leakbench("check", finished) == (0, "whole: 80 trials\n", "")
    file = finished / record.FILE
    file.write_bytes(file.read_bytes()[:-100])
    code, out, err = leakbench("check", finished)
    assert code == 1
    assert out.splitlines()[0] == "line 81 is torn: the same run drops it"
    assert re.search(r"^random_labels on mnist5k, fcn.*: sample 4 of 5 missing$", out, re.MULTILINE)
    assert err == f"leakbench: {finished} is not whole: 2 faults\n"


def test_a_damaged_row_is_pointed_out_beside_the_board(leakbench, finished):
    file = finished / record.FILE
    file.write_bytes(file.read_bytes().replace(b'"outcome": "ok"', b'"outcome": "no"', 1))
    code, _, err = leakbench("leaderboard", finished)
    assert code == 0
    assert re.search(r"line \d+ is not as it was written", err)
    assert leakbench("run", "x.toml")[0] == 1


def test_rerun_compares_digit_by_digit(leakbench, finished):
    trial = record.read(finished).rows[-1]["trial"]
    code, out, _ = leakbench("rerun", finished, trial[:12])
    assert code == 0
    assert out.endswith("The same, digit by digit.\n")


def test_rerun_of_an_edited_record_says_what_differs(leakbench, finished):
    file = finished / record.FILE
    *lines, last = file.read_text().splitlines()
    row = json.loads(last) | {"label_error": 0.123}
    file.write_text("\n".join([*lines, json.dumps(row)]) + "\n")
    code, out, err = leakbench("rerun", finished, row["trial"])
    assert code == 1
    assert "label_error" in err
    assert "0.123" in out


def test_info_says_what_is_installed_and_where(leakbench):
    code, out, _ = leakbench("info")
    assert code == 0
    assert {"leakbench", "torch", "GPU", "cores", "cache", "data", "LPIPS"} <= {
        line.split()[0] for line in out.splitlines()
    }


def test_stopped_by_hand_the_same_command_goes_on(small, tmp_path):
    command = [sys.executable, "-m", "bench", "run", str(small), "--samples", "70", "--workers", "1"]
    command += ["--out", str(tmp_path / "out")]
    file = tmp_path / "out" / record.FILE
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if file.exists() and file.read_bytes().count(b"\n") > 100:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Stopped. The same command goes on" in err
    assert "Traceback" not in err
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert len(record.read(tmp_path / "out").rows) == 2 * 2 * 4 * 70


def test_ctrl_c_twice_ends_at_once_and_leaves_no_process(small, tmp_path):
    command = [sys.executable, "-m", "bench", "run", str(small), "--samples", "70", "--workers", "1"]
    command += ["--out", str(tmp_path / "out")]
    file = tmp_path / "out" / record.FILE
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if file.exists() and file.read_bytes().count(b"\n") > 100:
            break
        time.sleep(0.02)
    children = psutil.Process(process.pid).children(recursive=True)
    for _ in range(2):  # as a terminal does it: to all processes in the foreground
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.05)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    _, alive = psutil.wait_procs(children, timeout=30)
    assert alive == []
    assert record.read(tmp_path / "out").damaged == ()


def test_a_package_of_the_same_name_in_front_is_refused(tmp_path):
    (tmp_path / "attacks").mkdir()
    (tmp_path / "attacks" / "__init__.py").write_text("")
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from bench.__main__ import main; "
    script += f"sys.path.insert(0, {str(tmp_path)!r}); sys.argv = ['leakbench', 'list', 'grids']; main()"
    ended = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.startswith("leakbench: package 'attacks' is ")
    assert ended.stderr.count("\n") == 1


@pytest.mark.skipif(shutil.which("head") is None, reason="needs head")
def test_a_closed_pipe_is_no_error(finished):
    shown = subprocess.run(
        f"{sys.executable} -m bench leaderboard {finished} --format json | head -n 1",
        shell=True, capture_output=True, text=True, cwd=ROOT, env=os.environ,
    )  # fmt: skip
    assert shown.stdout == "[\n"
    assert shown.stderr == ""
