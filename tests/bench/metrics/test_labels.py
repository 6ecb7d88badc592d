"""Label metrics against closed forms, and on predictions that are no labels at all."""

import doctest

import pytest
import torch

from bench.metrics import features, images, labels
from bench.metrics.labels import (
    class_counts,
    class_counts_exact,
    class_existence,
    label_distances,
    label_error,
    label_errors,
    label_l1,
    lam_error,
    match,
    success,
    top1,
)


def simplex(n, k, seed=0):
    weights = torch.rand(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return weights / weights.sum(dim=1, keepdim=True)


def one_hot(classes, k):
    return torch.eye(k)[classes]


@pytest.mark.parametrize("module", [labels, features, images])
def test_the_examples_in_the_docstrings_hold(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("seed", range(5))
def test_matching_undoes_a_shuffle(seed):
    true = simplex(8, 5, seed)
    shuffle = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(true[shuffle][match(label_distances(true[shuffle], true))], true)


def test_matching_has_the_least_total_distance():
    # greedily, example 0 would take prediction 0 and leave 10 to example 1
    assert match(torch.tensor([[0.0, 1.0], [1.0, 10.0]])).tolist() == [1, 0]


def test_more_predictions_than_examples_leave_the_worst_out():
    assert match(torch.tensor([[3.0, 1.0], [9.0, 9.0], [0.0, 2.0]])).tolist() == [2, 0]


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_prediction_is_matched_last_and_fails_alone(broken):
    true = one_hot([0, 1, 2], 3)
    predicted = torch.stack([torch.full((3,), broken), true[2], true[0]])
    order = match(label_distances(predicted, true))
    assert order.tolist() == [2, 0, 1]
    ordered = predicted[order]
    assert label_errors(ordered, true).tolist() == [0, float("inf"), 0]
    assert label_error(ordered, true) == float("inf")
    assert label_l1(ordered, true) == float("inf")
    assert not success(ordered, true)
    assert top1(ordered, true) == pytest.approx(2 / 3)
    assert class_existence(ordered, true) == pytest.approx(2 / 3)
    assert class_counts(ordered, true) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("shift", "succeeds"), [(0.0, True), (0.0099, True), (-0.0099, True), (0.0101, False)]
)
def test_success_is_every_entry_within_a_hundredth(shift, succeeds):
    true = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]], dtype=torch.float64)
    predicted = true.clone()
    predicted[1] += torch.tensor([shift, -shift, 0.0], dtype=torch.float64)
    assert bool(success(predicted, true)) is succeeds
    assert label_error(predicted, true) == pytest.approx(abs(shift), abs=1e-12)
    assert label_l1(predicted, true) == pytest.approx(
        abs(shift), abs=1e-12
    )  # 2 |shift| in one of two examples


@pytest.mark.parametrize("k", [2, 10, 1000])
def test_a_uniform_guess_has_the_top1_of_chance(k):
    assert top1(torch.full((1, k), 1 / k), one_hot([k - 1], k)) == pytest.approx(1 / k)


@pytest.mark.parametrize("tilt", [-1e-3, -1e-8, 0.0, 1e-8, 1e-3])
def test_either_class_of_an_even_mix_is_right(tilt):
    mix = torch.tensor([[0.0, 0.5, 0.5]], dtype=torch.float64)
    predicted = mix + torch.tensor([0.0, tilt, -tilt], dtype=torch.float64)
    assert top1(predicted, mix) == 1


def test_an_even_mix_recovered_up_to_rounding_names_the_class_of_the_truth():
    mix = torch.tensor([[0.0, 0.5, 0.5]], dtype=torch.float64)
    predicted = mix + torch.tensor([0.0, -1e-8, 1e-8])
    assert class_existence(predicted, mix) == 1
    assert class_counts(predicted, mix) == 1


def test_existence_and_counts_of_a_batch_written_out():
    true = one_hot([0, 0, 1, 2], 5)
    predicted = one_hot([0, 1, 1, 4], 5)
    # presence: 0 and 1 are right, 2 is missed, 3 rightly absent, 4 invented; counts: min(1, 2) + min(2, 1)
    assert class_existence(predicted, true) == pytest.approx(3 / 5)
    assert class_counts(predicted, true) == pytest.approx(2 / 4)
    assert class_counts_exact(predicted, true) == pytest.approx(1 / 5)  # of class 3 there are rightly none


def test_counts_do_not_depend_on_the_order_of_examples():
    true, predicted = one_hot([0, 1, 2, 2], 4), one_hot([2, 2, 1, 0], 4)
    assert class_counts(predicted, true) == 1
    assert top1(predicted, true) == 0


@pytest.mark.parametrize(
    ("found", "true", "error"), [(2.0, -2.0, 2.0), (-1.5, -1.5, 0.0), (float("nan"), 1, None)]
)
def test_the_error_of_lambda_is_relative(found, true, error):
    assert lam_error(found, true) == (float("inf") if error is None else error)
