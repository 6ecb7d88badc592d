"""What a defense costs, on trainings of a few steps."""

import json

import pytest

from bench import registry, utility
from bench.cases import models
from bench.cases.data import load
from bench.cases.scenario import Block, Grid
from bench.errors import UserError
from bench.report import utility as rows
from bench.run import InProcess, Progress, execute, plan

MODEL = "fcn(depth=2, width=24)"


def asked(defense="none", seed=0):
    spec = registry.defenses.canonical(defense)
    return utility.Asked(
        "mnist5k",
        load("mnist5k").sha256,
        models.canonical(MODEL),
        seed,
        spec,
        registry.defenses.revision(spec),
    )


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setattr(utility, "STEPS", 4)


def test_training_learns():
    """Far above chance after 300 steps; digits are easy, so that nearest class means reach 0.8."""
    assert utility.measured(asked(), load("mnist5k")).accuracy > 0.75


def test_is_measured_once(few_steps, monkeypatch):
    first = utility.utility(asked(), None)
    monkeypatch.setattr(utility, "measured", None)
    assert utility.utility(asked(), None) == first


def test_is_measured_again_for_another_seed_or_revision(few_steps):
    import dataclasses

    keys = {asked().key, asked(seed=1).key, dataclasses.replace(asked(), defense_revision="2").key}
    assert len(keys) == 3


def test_the_accuracy_follows_from_the_key(few_steps):
    data = load("mnist5k")
    one, other = (utility.measured(asked("dp_gaussian"), data) for _ in range(2))
    assert one.accuracy == other.accuracy
    assert one.bytes == other.bytes


def test_signs_take_a_fraction_of_the_bytes(few_steps):
    """Three values, against float32 whose digits are noise."""
    data = load("mnist5k")
    plain, signs = (utility.measured(asked(name), data).bytes for name in ("none", "sign_sgd"))
    assert signs < plain / 8


def test_epsilon_is_that_of_this_training(few_steps):
    measured = utility.measured(asked("dp_gaussian"), load("mnist5k"))
    promised = registry.defenses.make("dp_gaussian").privacy(4, measured.sample_rate, measured.delta)
    assert (measured.epsilon, measured.delta) == promised
    assert measured.sample_rate == pytest.approx(32 / 4000, rel=0.01)
    assert utility.measured(asked("gradient_noise"), load("mnist5k")).epsilon is None


def grid():
    block = Block(
        dataset=["mnist5k"],
        model=[MODEL],
        defense=["none", "sign_sgd"],
        attacks=["idlg"],
        samples=1,
        utility=True,
    )
    return Grid(name="costs", blocks=[block])


def test_a_run_measures_what_its_grid_asks_for_and_resumes(few_steps, tmp_path, monkeypatch):
    planned = plan(grid(), grid(), None, "cpu")
    execute(planned, InProcess(), tmp_path, Quiet())
    found = rows.read(tmp_path)
    assert [row["defense"] for row in found] == ["none", "sign_sgd"]
    path = tmp_path / rows.FILE
    path.write_bytes(path.read_bytes()[:-9])  # the second line is torn
    assert len(rows.read(tmp_path)) == 1
    execute(planned, InProcess(), tmp_path, Quiet())
    assert rows.read(tmp_path) == found
    monkeypatch.setattr(utility, "utility", None)
    execute(planned, InProcess(), tmp_path, Quiet())


def test_the_command_ends_with_the_defense_board_and_gives_it_again(few_steps, leakbench, tmp_path):
    path = tmp_path / "costs.toml"
    path.write_text(
        f'name = "costs"\n[[blocks]]\ndataset = "mnist5k"\nmodel = "{MODEL}"\n'
        'defense = ["none", "sign_sgd"]\nattacks = ["idlg"]\nsamples = 2\nutility = true\n'
    )
    code, out, _ = leakbench("run", path, "--workers", 0, "--quiet", "--out", "run")
    assert code == 0
    assert "Defense leaderboard" in out
    code, out, _ = leakbench("leaderboard", "run", "--track", "defense", "--format", "json")
    board = {row["defense"]: row for row in json.loads(out)}
    assert board["sign_sgd"]["private_top1"] == 1
    assert board["sign_sgd"]["accuracy"] is not None
    assert board["none"]["accuracy_cost"] == 0


def test_a_grid_that_does_not_ask_gets_none():
    silent = grid().model_copy(update={"blocks": [grid().blocks[0].model_copy(update={"utility": False})]})
    assert plan(silent, silent, None, "cpu").utilities == ()


def test_a_line_that_is_no_measurement_is_named(tmp_path):
    (tmp_path / rows.FILE).write_text(json.dumps({"schema": 1}) + "\n")
    with pytest.raises(UserError, match="line 1 is no measurement"):
        rows.read(tmp_path)


class Quiet(Progress):
    """Looks away."""
