"""Whole counts from estimates, against every other choice, and LLG's choice against its loop."""

import itertools

import pytest
import torch

from attacks.solvers.class_counts import (
    class_weights,
    counts_by_impact,
    hard_labels,
    impact_and_offsets,
    nearest_counts,
)


def random_normal(*shape, seed=0):
    rng = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64, device="cpu")


@pytest.mark.parametrize("num_classes", [1, 2, 3, 4])
@pytest.mark.parametrize("total", [0, 1, 5])
def test_no_other_counts_are_nearer(num_classes, total):
    every = itertools.product(range(total + 1), repeat=num_classes)
    every = torch.tensor([k for k in every if sum(k) == total], device="cpu")
    for estimate in total * random_normal(50, num_classes):
        counts = nearest_counts(estimate, total)
        assert counts.sum() == total
        assert (counts >= 0).all()
        nearest = (every - estimate).square().sum(1).min()
        assert (counts - estimate).square().sum() <= nearest + 1e-9


def test_a_stack_gives_what_each_gives_alone():
    estimates = 10 * random_normal(20, 7)
    alone = torch.stack([nearest_counts(estimate, 12) for estimate in estimates])
    assert torch.equal(nearest_counts(estimates, 12), alone)


def test_whole_numbers_stay_as_they_are():
    assert nearest_counts(torch.tensor([0.0, 4096.0, 3.0], device="cpu"), 4099).tolist() == [0, 4096, 3]


def taken_in_turn(row_sums, impact, offsets, total):
    """The loop of LLG's algorithm, one example at a time."""
    left, counts = row_sums - offsets, [0] * len(row_sums)
    for i in range(len(row_sums)):
        if row_sums[i] < 0:
            counts[i] += 1
            left[i] -= impact
    while sum(counts) < total:
        i = int(left.argmin())
        counts[i] += 1
        left[i] -= impact
    return counts


@pytest.mark.parametrize("seed", range(20))
def test_llgs_choice_is_that_of_its_loop(seed):
    row_sums, offsets = random_normal(10, seed=seed), 0.2 * random_normal(10, seed=100 + seed)
    impact = -random_normal(1, seed=200 + seed).abs()[0]
    total = int((row_sums < 0).sum()) + seed
    expected = taken_in_turn(row_sums, impact, offsets, total)
    assert counts_by_impact(row_sums, impact, offsets, total).tolist() == expected


def test_of_more_classes_below_zero_than_examples_the_least_are_taken():
    row_sums = torch.tensor([-1.0, -3.0, -2.0, 0.5], device="cpu")
    impact = torch.tensor(-1.0, device="cpu")
    assert counts_by_impact(row_sums, impact, torch.zeros_like(row_sums), 2).tolist() == [0, 1, 1, 0]


def test_impact_and_offsets_of_equal_images_are_known():
    """p uniform and Σx = 6: a batch of N from class i has s_i = (1/K - 1) 6 and s_j = 6/K."""
    features = torch.full((5, 3), 2.0, dtype=torch.float64, device="cpu")
    p = torch.full((5, 4), 0.25, dtype=torch.float64, device="cpu")
    classes = torch.eye(4, dtype=torch.float64, device="cpu")[[0, 1, 2, 2, 2]]  # none of class 3
    impact, offsets = impact_and_offsets(features, p, classes, total=10)
    assert float(impact) == pytest.approx(-0.75 * 6 / 10 * 1.25)
    assert offsets.tolist() == pytest.approx([1.5] * 4)


def test_an_offset_is_the_mean_over_the_other_classes_alone():
    features = torch.ones(2, 1, dtype=torch.float64, device="cpu")
    p = torch.tensor([[0.9, 0.1], [0.4, 0.6]], dtype=torch.float64, device="cpu")
    impact, offsets = impact_and_offsets(features, p, torch.eye(2, device="cpu"), total=1)
    assert offsets.tolist() == pytest.approx([0.4, 0.1])
    assert float(impact) == pytest.approx((-0.1 - 0.4) / 2 * 1.5)


def test_they_are_what_gradients_of_dummy_batches_give():
    """As the authors measure them: a batch of every class in turn, its gradient by autograd."""
    features, num_classes, total = random_normal(8, 5).abs(), 4, 6
    weight = random_normal(num_classes, 5, seed=1).requires_grad_()
    impact, offsets = 0.0, torch.zeros(num_classes, dtype=torch.float64, device="cpu")
    for i in range(num_classes):
        labels = torch.full((8,), i, device="cpu")
        loss = torch.nn.functional.cross_entropy(features @ weight.T, labels)
        row_sums = torch.autograd.grad(loss, weight)[0].sum(1)
        impact += row_sums[i] / num_classes / total * (1 + 1 / num_classes)
        row_sums[i] = 0
        offsets += row_sums / (num_classes - 1)
    p = (features @ weight.detach().T).softmax(1)
    ours = impact_and_offsets(features, p, torch.ones_like(p), total)
    assert torch.allclose(ours[0], impact)
    assert torch.allclose(ours[1], offsets)


def test_a_class_without_an_image_gets_the_mean_of_all():
    weights = class_weights(torch.eye(3, device="cpu")[[0, 0, 1]])
    assert weights.tolist() == [[0.5, 0.5, 0], [0, 0, 1], [pytest.approx(1 / 3)] * 3]


def test_hard_labels_repeat_their_class():
    rows = hard_labels(
        torch.tensor([2, 0, 1], device="cpu"), torch.zeros(1, dtype=torch.float64, device="cpu")
    )
    assert rows.tolist() == [[1, 0, 0], [1, 0, 0], [0, 0, 1]]
    assert rows.dtype == torch.float64


def test_a_large_estimate_keeps_its_digits():
    assert nearest_counts(torch.tensor([1e17, 0.0, 0.0, 0.0], device="cpu"), 4).tolist() == [4, 0, 0, 0]
