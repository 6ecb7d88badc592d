"""`leakbench verify`: an honest submission agrees; one in which anything was changed is refused."""

import dataclasses
import hashlib
import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from bench import sandbox, submission, verification, work
from bench.cases.scenario import load_grid
from bench.errors import UserError
from bench.registry import ROOT
from bench.report import record
from bench.report.record import Record
from bench.run import InProcess, plan

GRID = """
name = "tiny"
seed = 3

[[blocks]]
dataset = "mnist5k"
model = "fcn(depth=2, width=24, bias=BIAS)"
defense = ["none", "label_smoothing(epsilon=(0.1, 0.5))"]
attacks = ["idlg", "random_labels"]
samples = 6
"""

MEMORISED = '''
"""Its answers were computed beforehand, from public data and seeds."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from bench.threat import Attack, Outcome, Reconstruction

ANSWERS = {answers}


@dataclass(frozen=True)
class Memorised(Attack):
    name: ClassVar[str] = "memorised"
    title: ClassVar[str] = "memorised"
    produces: ClassVar[frozenset] = frozenset({{"soft_labels"}})
    reads: ClassVar[str] = "head"

    def run(self, observation, rng):
        answer = ANSWERS.get(f"{{observation.head_weight_gradient.abs().sum():.4e}}", [0.1] * 10)
        return Reconstruction(Outcome.OK, soft_labels=torch.tensor([answer], device="cpu"))
'''


@pytest.fixture(scope="module", autouse=True)
def described_once():
    """An attack's file is asked in a sandbox once, and not again as long as it is the same."""
    asked, known = sandbox.described, {}

    def described(code, facts, hidden):
        path, _, rest = code.partition(".py:")
        key = (Path(f"{path}.py").read_bytes(), rest, tuple(facts))
        if key not in known:
            known[key] = asked(code, facts, hidden)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "described", described)
        yield


@pytest.fixture(scope="module")
def honest(tmp_path_factory) -> Path:
    """A folder in which an attack from the template was submitted."""
    from bench import authoring
    from bench.__main__ import main

    folder = tmp_path_factory.mktemp("honest")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        authoring.write("attack", "my_own", Path())
        Path("tiny.toml").write_text(GRID.replace("BIAS", "False"))
        arguments = "submit my_own.py:MyOwn --grid tiny.toml --workers 1 --quiet"
        patch.setattr("sys.argv", ["leakbench", *arguments.split()])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
    return folder


@pytest.fixture
def submitted(honest, leakbench, tmp_path) -> Path:
    """The records of a copy of it, in the folder where the command runs."""
    shutil.copytree(honest, tmp_path, dirs_exist_ok=True)
    return Path("results/records/tiny/my_own/r1.jsonl")


def lines_of(records: Path) -> list[str]:
    return records.read_text().splitlines()


def rewrite(records: Path, lines: list[str]) -> None:
    """As somebody who knows how it is checked would: the manifest's hash is that of the new content."""
    content = "".join(f"{line}\n" for line in lines).encode()
    records.write_bytes(content)
    change_manifest(records, records_sha256=hashlib.sha256(content).hexdigest())


def change_manifest(records: Path, **changes: object) -> None:
    manifest = records.with_suffix(".json")
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | changes))


def edited(line: str, **changes: object) -> str:
    row = {name: value for name, value in json.loads(line).items() if name in record.COLUMNS}
    return record.line(Record(**(row | changes)))


def test_an_honest_submission_agrees_and_holds_on_fresh_examples(leakbench, submitted):
    code, out, err = leakbench("verify", submitted, "--salt", "a secret", "--workers", 1)
    assert (code, err) == (0, "")
    assert "12 trials, 12 of them run again: they agree" in out
    assert "fresh examples: success" in out
    assert "a secret" not in out
    assert "ranking needs a grid of the suite" in out


def edit_a_score(records: Path) -> str:
    head, *rows = lines_of(records)
    at = next(at for at, line in enumerate(rows) if not json.loads(line)["success"])
    rows[at] = edited(rows[at], success=True, label_error=0.001)
    rewrite(records, [head, *rows])
    return "success is True in the records, and False when run again"


def edit_a_secondary_score(records: Path) -> str:
    head, *rows = lines_of(records)
    rows[-1] = edited(rows[-1], label_l1=json.loads(rows[-1])["label_l1"] * 0.95)
    rewrite(records, [head, *rows])
    return "label_l1 is "


def edit_carelessly(records: Path) -> str:
    records.write_text(records.read_text().replace('"success": false', '"success": true', 1))
    return "its checksum differs"


def turn_a_failure_into_a_success(records: Path) -> str:
    head, *rows = lines_of(records)
    rows[0] = edited(rows[0], outcome="unidentifiable")
    rewrite(records, [head, *rows])
    return "outcome is 'unidentifiable' in the records, and 'ok' when run again"


def delete_a_row(records: Path) -> str:
    rewrite(records, lines_of(records)[:-1])
    return "lacks 1 of 12 trials; the first: mnist5k, fcn(depth=2, width=24, activation='relu', bias=False)"


def double_a_row(records: Path) -> str:
    rewrite(records, [*lines_of(records), lines_of(records)[-1]])
    return "line 14 repeats trial"


def double_a_row_under_another_key(records: Path) -> str:
    rewrite(records, [*lines_of(records), edited(lines_of(records)[-1], trial="f" * 24)])
    return "trial is 'ffffffffffffffffffffffff', expected"


def move_a_row_to_another_defense(records: Path) -> str:
    head, *rows = lines_of(records)
    rows[-1] = edited(rows[-1], defense="none")
    rewrite(records, [head, *rows])
    return "defense is 'none', expected 'label_smoothing"


def not_isolated(records: Path) -> str:
    head, *rows = lines_of(records)
    rewrite(records, [head, *(edited(row, isolated=False) for row in rows)])
    return "isolated is False, expected True"


def skip_a_trial(records: Path) -> str:
    head, *rows = lines_of(records)
    rows[-1] = edited(rows[-1], outcome="skipped", reason="too hard")
    rewrite(records, [head, *rows])
    return "'too hard', expected ''"


def another_grid(records: Path) -> str:
    Path("tiny.toml").write_text(GRID.replace("BIAS", "True"))
    return "was made on another version of tiny"


def other_code(records: Path) -> str:
    Path("my_own.py").write_text(Path("my_own.py").read_text() + "\n# better now\n")
    return "was made by other code: my_own.py has SHA-256"


def other_code_that_is_owned_up_to(records: Path) -> str:
    source = Path("my_own.py").read_text().replace("norms.argmax()", "norms.argmin()")
    Path("my_own.py").write_text(source)
    change_manifest(records, code_sha256=hashlib.sha256(source.encode()).hexdigest())
    return "success is True in the records, and False when run again"


def no_code(records: Path) -> str:
    Path("my_own.py").unlink()
    return "the code that made it is not there; looked for attacks/labels/my_own.py"


def no_manifest(records: Path) -> str:
    records.with_suffix(".json").unlink()
    return "r1.json is missing"


def a_strange_manifest(records: Path) -> str:
    change_manifest(records, torch=["<script>"])
    return "r1.json is no manifest: torch is ['<script>']"


def another_protocol(records: Path) -> str:
    change_manifest(records, protocol_version=work.PROTOCOL_VERSION + 1)
    return "was made by protocol"


def another_threat_model(records: Path) -> str:
    change_manifest(records, threat_model="B")
    return "its manifest says threat_model = 'B', its code 'A'"


def a_part_that_is_called_the_whole(records: Path) -> str:
    head, *rows = lines_of(records)
    rewrite(records, [head, *(row for row in rows if json.loads(row)["sample"] < 3)])
    return "lacks 6 of 12 trials"


@pytest.mark.parametrize(
    "change",
    [
        edit_a_score, edit_a_secondary_score, edit_carelessly, turn_a_failure_into_a_success, delete_a_row,
        double_a_row, double_a_row_under_another_key, move_a_row_to_another_defense, not_isolated,
        skip_a_trial, another_grid, other_code, other_code_that_is_owned_up_to, no_code, no_manifest,
        a_strange_manifest, another_protocol, another_threat_model, a_part_that_is_called_the_whole,
    ],
)  # fmt: skip
def test_what_was_changed_is_refused_in_one_line_that_names_it(leakbench, submitted, change):
    said = change(submitted)
    code, out, err = leakbench("verify", submitted, "--workers", 1)
    assert (code, out) == (1, "")
    assert said in err
    assert err.count("\n") == 1


STRANGE = (None, -1, 0, "", "x" * 5000, "../../etc/passwd", "\0", "a\nb", [], {}, [{}], 1e400, True)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(submission.Manifest)])
def test_whatever_a_manifest_says_it_is_refused_in_a_line_or_makes_no_difference(
    submitted, monkeypatch, field
):
    def stop(*_):
        raise UserError("went on to the code")

    monkeypatch.setattr(submission, "plan", stop)
    for value in STRANGE:
        change_manifest(submitted, **{field: value})
        with pytest.raises(UserError) as error:
            verification.verify(submitted, "", None, 1)
        assert "\n" not in str(error.value)


def test_a_part_agrees_and_is_told_what_ranking_needs(leakbench, submitted):
    leakbench("submit", "my_own.py:MyOwn", "--grid", "tiny.toml", "--samples", 2, "--workers", 1, "--quiet")
    code, out, _ = leakbench("verify", submitted, "--workers", 1)
    assert code == 0
    assert "4 trials, 4 of them run again: they agree" in out
    assert "ranking needs all samples of each cell, not 2" in out
    assert "and fresh examples (verify --salt SECRET)" in out


@pytest.mark.parametrize(
    ("samples", "grid_file", "salt", "tight", "said"),
    [
        (None, None, "x", True, "it can be ranked"),
        (None, None, "x", False, "ranking needs a sandbox that is tight (Linux with user namespaces)"),
        (None, None, "", True, "ranking needs fresh examples (verify --salt SECRET)"),
        (None, "own.toml", "x", True, "ranking needs a grid of the suite"),
    ],
)
def test_what_ranking_needs(monkeypatch, samples, grid_file, salt, tight, said):
    fields = {field.name: "" for field in dataclasses.fields(submission.Manifest)}
    manifest = submission.Manifest(**(fields | {"samples": samples, "grid_file": grid_file}))
    monkeypatch.setattr(sandbox, "is_tight", lambda: tight)
    assert verification._rankable(manifest, salt) == [said]


def test_answers_computed_from_public_data_agree_but_fail_on_fresh_examples(leakbench, tmp_path):
    Path("tiny.toml").write_text(GRID.replace("BIAS", "False"))
    grid = load_grid("tiny.toml")
    planned = plan(grid, grid, None, "cpu")
    answers = {}
    for chunk in planned.chunks(dict(InProcess().weights(list(planned.networks.values()), None))):
        observed = work.observe(chunk, planned.context)
        for seen, truth in zip(observed.observations, observed.truths, strict=True):
            looked_up = f"{seen.head_weight_gradient.abs().sum():.4e}"
            answers[looked_up] = truth.released.soft_labels[0].tolist()
    Path("memorised.py").write_text(MEMORISED.format(answers=answers))
    leakbench("submit", "memorised.py:Memorised", "--grid", "tiny.toml", "--workers", 1, "--quiet")
    records = Path("results/records/tiny/memorised/r1.jsonl")
    assert all(row["success"] for row in record.read(records).rows)
    assert leakbench("verify", records, "--workers", 1)[0] == 0
    code, _, err = leakbench("verify", records, "--workers", 1, "--salt", "a secret")
    assert code == 1
    assert "on fresh examples success is 0 (n = " in err


def test_an_image_attack_of_the_suite_agrees_until_a_picture_is_improved(leakbench, tmp_path):
    Path("tiny.toml").write_text(GRID.replace("BIAS", "False").replace("samples = 6", "samples = 3"))
    shutil.copy(ROOT / "attacks" / "images" / "fcn_analytic.py", tmp_path)
    leakbench("submit", "fcn_analytic.py:FCNAnalytic", "--grid", "tiny.toml", "--workers", 2, "--quiet")
    (records,) = Path("results/records/tiny").glob("*/r*.jsonl")
    assert all(row["isolated"] and row["psnr"] > 60 for row in record.read(records).rows)
    assert leakbench("verify", records, "--workers", 1)[0] == 0
    head, *rows = lines_of(records)
    rows[2] = edited(rows[2], psnr=json.loads(rows[2])["psnr"] + 20)
    rewrite(records, [head, *rows])
    code, _, err = leakbench("verify", records, "--workers", 1)
    assert code == 1
    assert "psnr is " in err


# --- images -----------------------------------------------------------------------------------------------


def image_rows(count: int) -> list[Record]:
    rng = random.Random(0)
    axes = {"grid": "g", "scenario": "s", "dataset": "d", "model": "m", "weights": "w", "weight_seed": 0,
            "batch_norm": "eval", "members": "held_out", "batch_size": 1, "classes": "turns",
            "protocol": "fedsgd", "knowledge": "", "defense": "none", "defense_revision": "1", "attack": "a",
            "attack_revision": "1", "outcome": "ok", "reason": ""}  # fmt: skip
    return [
        Record(
            trial=str(at), sample=at, mse=10 ** (-psnr / 10), psnr=psnr, ssim=0.5, weights_sha256="w", **axes
        )
        for at in range(count)
        for psnr in [rng.gauss(18, 3)]
    ]


def image_submission(rows: list[Record], machine: str) -> verification.Submission:
    fields = {field.name: "" for field in dataclasses.fields(submission.Manifest)}
    manifest = submission.Manifest(
        **(fields | {"produces": ["images"], "machine": machine, "torch": torch.__version__, "device": "cpu"})
    )
    ran = record.Run((), tuple(map(vars, rows)))
    return verification.Submission(Path("r1.jsonl"), manifest, ran, Path("a.py"))


def better(row: Record, decibels: float) -> Record:
    assert row.psnr is not None
    psnr = row.psnr + decibels
    return dataclasses.replace(row, psnr=psnr, mse=10 ** (-psnr / 10))


@pytest.mark.parametrize("machine", [submission.machine(), "another"])
def test_edits_in_one_per_cent_of_image_rows_are_found_by_the_sample(machine):
    truth = image_rows(3000)
    found = 0
    for draw in range(40):
        rng = random.Random(draw)
        forged = set(rng.sample(range(3000), 30))
        handed_in = [better(row, 6.0) if at in forged else row for at, row in enumerate(truth)]
        again = rng.sample(list(map(vars, truth)), verification.SAMPLE)
        try:
            verification.compare(image_submission(handed_in, machine), again)
        except UserError:
            found += 1
    assert found >= 33  # 95 % of 40 are 38, and 33 is 3.6 standard deviations below


def test_searches_that_end_elsewhere_on_another_machine_agree():
    rng = random.Random(1)
    truth = image_rows(299)
    again = [vars(better(row, rng.gauss(0, 0.5))) for row in truth]
    verification.compare(image_submission(truth, "another"), again)
    with pytest.raises(UserError, match="in the records"):
        verification.compare(image_submission(truth, submission.machine()), again)  # here digits are the same


def test_a_small_gain_in_every_image_is_found_by_the_paired_interval():
    rng = random.Random(1)
    truth = image_rows(299)
    again = [vars(better(row, rng.gauss(-0.3, 0.5))) for row in truth]
    with pytest.raises(UserError, match="recorded images are better than repeated ones: psnr by "):
        verification.compare(image_submission(truth, "another"), again)


def test_a_sample_is_drawn_where_images_are_made_and_everything_else_is_run_again():
    grid = load_grid("quick")
    planned = plan(grid, grid, None, "cpu")
    chunks = list(planned.chunks(dict.fromkeys(planned.networks.values(), "")))
    one_each = [
        dataclasses.replace(chunk, entrants=(entrant,))
        for chunk in chunks
        for entrant in chunk.entrants
        if entrant.skip is None
    ]

    @dataclasses.dataclass
    class Mine:
        produces: tuple[str, ...]

    def count(produces):
        drawn = verification.drawn(Mine((produces,)), one_each, random.Random(0))
        return sum(len(chunk.samples) for chunk in drawn)

    everything = sum(len(chunk.samples) for chunk in one_each)
    assert count("soft_labels") == everything
    assert verification.SAMPLE <= count("images") < verification.SAMPLE + 64 < everything


def test_images_of_a_trial_that_ran_out_of_time_are_refused():
    """Such a row may differ from its repetition, but it can't have measured anything."""
    truth = image_rows(299)
    claim = dataclasses.replace(truth[0], outcome="timeout", mse=0.0, psnr=None, ssim=1.0)
    for machine in (submission.machine(), "another"):
        with pytest.raises(UserError, match=r"timeout, but|is 0\.0 in the records"):
            verification.compare(image_submission([claim, *truth[1:]], machine), list(map(vars, truth)))
    lost = dataclasses.replace(truth[0], outcome="timeout", mse=None, psnr=None, ssim=None, identified=0.0)
    verification.compare(image_submission([lost, *truth[1:]], submission.machine()), list(map(vars, truth)))


@pytest.mark.parametrize(("metric", "forged"), [("ssim", 0.99), ("lpips", 0.01), ("label_error", 0.0)])
def test_on_another_machine_no_other_metric_is_better_either(metric, forged):
    truth = [dataclasses.replace(row, lpips=0.5, label_error=0.4) for row in image_rows(299)]
    handed_in = [dataclasses.replace(row, **{metric: forged}) for row in truth]
    with pytest.raises(UserError, match=f"recorded images are better than repeated ones: {metric} by"):
        verification.compare(image_submission(handed_in, "another"), list(map(vars, truth)))


def test_a_refused_guess_that_is_right_agrees_with_its_repetition():
    """Its success is recorded, and counts on no board."""
    row = dataclasses.replace(image_rows(1)[0], outcome="unidentifiable", success=True, label_error=0.001)
    handed_in = image_submission([row], submission.machine())
    verification.compare(handed_in, [vars(row)])
    with pytest.raises(UserError, match="success is True in the records, and False"):
        verification.compare(handed_in, [vars(row) | {"success": False, "label_error": 0.4}])
