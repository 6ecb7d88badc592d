"""The solver's speed, label error and memory side by side: run with --benchmark-enable to see the figures."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from bench.speed.solver import SINGLES, STACKS, LambdaSolver, cost, label_error, problem, solve

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("search", ["exact", "paper"])
@pytest.mark.parametrize("width", [64, 2048])
@pytest.mark.parametrize("num_classes", [10, 100, 1000])
def test_search(benchmark, num_classes, width, search, stack):
    if benchmark.disabled and (num_classes * width > 10_000 or search == "paper"):
        pytest.skip("takes seconds, and nothing is timed: --benchmark-enable")
    torch.set_num_threads(1)
    posed = problem(num_classes, width, max(stack, SINGLES))
    found = benchmark(solve, posed, search, stack)
    benchmark.extra_info["label_error"] = label_error(posed, found)
    benchmark.extra_info |= cost(lambda: solve(posed, search, stack))._asdict()
    assert label_error(posed, found) < 0.01


def test_a_problem_is_of_rank_one_and_its_labels_take_turns():
    posed = problem(10, 32, 6)
    gradient, labels = posed.weight_gradients.double(), posed.soft_labels.double()
    singular = torch.linalg.svdvals(gradient)
    assert (singular[:, 1] < 1e-6 * singular[:, 0]).all()
    assert (gradient.sum(dim=1).abs() < 1e-6).all()  # p and y both sum to one
    assert torch.allclose(labels.sum(dim=1), torch.ones(6, dtype=torch.float64))
    assert labels[::3].amax(dim=1).eq(1).all()  # hard
    assert labels[1::3].amin(dim=1).gt(0).all()  # smoothed
    assert labels[2::3].gt(0).sum(dim=1).eq(2).all()  # mixed


def test_no_answer_counts_as_a_label_error_of_one():
    posed = problem(4, 8, 2)
    found = posed.soft_labels.clone()
    assert label_error(posed, found) == 1e-6
    found[1] = torch.nan
    assert label_error(posed, found) == 1


def test_the_peak_is_what_tensors_hold_at_a_time():
    def three_of_which_two_at_a_time():
        first = torch.zeros(1 << 18, dtype=torch.float32)
        second = first + 1
        del first
        return second * 2

    assert cost(three_of_which_two_at_a_time).peak_bytes == pytest.approx(
        2 << 20, rel=1e-3
    )  # and a few scalars


def test_operations_are_counted_alike_in_every_run():
    posed = problem(10, 16, 3)
    first, again, twice = (
        cost(lambda: [solve(posed, "exact", 3) for _ in range(times)]).operations  # noqa: B023
        for times in (1, 1, 2)
    )
    assert again == first
    assert twice == 2 * first


def test_asv_finds_its_benchmarks_keeps_its_results_and_git_ignores_its_page():
    settings = json.loads((ROOT / "asv.conf.json").read_text())
    assert (ROOT / settings["benchmark_dir"] / "solver.py").exists()
    kinds = {name.split("_")[0] for name in vars(LambdaSolver)}
    assert {"time", "track"} <= kinds
    for folder, code in (("results_dir", 1), ("html_dir", 0)):
        ignored = subprocess.run(["git", "check-ignore", "-q", settings[folder] + "/x"], cwd=ROOT)
        assert ignored.returncode == code, settings[folder]
