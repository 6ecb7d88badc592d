"""Pruned and quantised gradients: what is there is used as it is, what is missing as a bound."""

import pytest
import torch

from attacks.solvers import missing, recover_soft_label


def pruned(gradient, share):
    least = gradient.abs().flatten().topk(int(share * gradient.numel())).values[-1]
    return torch.where(gradient.abs() >= least, gradient, torch.zeros_like(gradient))


def quantised(gradient, bits):
    spacing = gradient.abs().max() / (2 ** (bits - 1) - 1)
    return (gradient / spacing).round() * spacing


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [0.9, 0.7, 0.5])
def test_the_entries_that_are_there_give_the_others(case, share, dtype):
    c = case(10, 256, "smoothing", dtype=dtype, scale=0.1)
    sent = pruned(c.weight_gradient, share)
    row = sent[sent.norm(dim=1).argmax()]
    found = missing.complete(sent[None], (row / row.norm())[None])
    rows, columns = ((sent != 0).any(dim=d) for d in (1, 0))
    whole = torch.outer(found.s[0], found.direction[0])[rows][:, columns]
    close = 1e-4 if dtype == torch.float32 else 1e-10
    assert torch.allclose(whole, c.weight_gradient[rows][:, columns].double(), rtol=close)
    assert found.misfit[0] < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("label_format", ["hard", "smoothing", "mixup", "smoothed_mixup"])
def test_half_of_the_entries_are_enough(case, label_format, dtype):
    right = 0
    for seed in range(5):
        c = case(10, 256, label_format, seed, dtype, scale=0.1)
        solution = recover_soft_label(pruned(c.weight_gradient, 0.6), c.weight)
        assert solution.outcome != "ok" or c.label_error(solution) < 0.01
        right += c.label_error(solution) < 0.01
    assert right >= 4


def test_what_too_few_entries_leave_open_is_not_made_up(case):
    for label_format in ("smoothing", "mixup", "smoothed_mixup"):
        for seed in range(5):
            c = case(10, 256, label_format, seed, torch.float32, scale=0.1)
            for share in (0.2, 0.05):
                solution = recover_soft_label(pruned(c.weight_gradient, share), c.weight)
                assert solution.outcome != "ok" or c.label_error(solution) < 0.01


def test_dead_features_and_underflow_are_not_taken_for_pruning(case):
    c = case(10, 256, "smoothing", dtype=torch.float32)
    c = c._replace(x=torch.where(torch.arange(256) % 2 == 0, c.x, torch.zeros_like(c.x)))
    gradient = c.weight_gradient[None]
    direction = (c.x / c.x.norm())[None]
    assert not missing.is_pruned(gradient, direction)
    tiny = gradient * 1e-38 * torch.logspace(0, -5, 10)[:, None]
    assert not missing.is_pruned(tiny, direction)
    assert missing.is_pruned(pruned(gradient, 0.1), direction)


@pytest.mark.parametrize("bits", [10, 8, 4])
def test_the_spacing_of_a_lattice_is_found_and_nothing_else_has_one(case, bits):
    c = case(10, 256, "smoothing", dtype=torch.float32)
    sent = quantised(c.weight_gradient, bits)
    spacing = missing.lattice_spacing(torch.stack([sent, c.weight_gradient]))
    assert torch.isclose(spacing[0], sent.abs().max().double() / (2 ** (bits - 1) - 1), rtol=1e-4)
    assert spacing[1] == 0


def test_eight_bits_are_enough_and_four_are_not_believed(case):
    for seed in range(5):
        c = case(10, 512, "smoothing", seed, torch.float32, scale=0.1)
        assert c.label_error(recover_soft_label(quantised(c.weight_gradient, 8), c.weight)) < 0.01
        rough = recover_soft_label(quantised(c.weight_gradient, 4), c.weight)
        assert rough.outcome != "ok" or c.label_error(rough) < 0.01


def test_a_whole_row_that_is_missing_may_be_a_spike(case):
    """The row of a mixed class with p near y is small: the label's sum gives it back, or leaves a doubt."""
    for seed in range(5):
        c = case(10, 128, "mixup", seed, torch.float32, scale=0.05)
        second = c.y.argsort()[-2]
        p = torch.softmax(c.weight @ c.x, 0)
        y = torch.zeros_like(c.y)
        y[second], y[c.y.argmax()] = p[second] + 0.01, 1 - p[second] - 0.01
        c = c._replace(y=y)
        sent = c.weight_gradient.clone()
        sent[second] = 0
        sent = torch.where(sent.abs() >= c.weight_gradient[second].abs().max(), sent, torch.zeros_like(sent))
        solution = recover_soft_label(sent, c.weight)
        assert solution.outcome != "ok" or c.label_error(solution) < 0.01


def test_a_row_that_cancels_to_zero_is_no_missing_one(case):
    """Where p rounds to one at a hard label, p - y is zero there, and every other row is tiny."""
    for seed in range(10):
        c = case(10, 64, "hard", seed, torch.float32)
        target = c.y.argmax()
        weight = c.weight.clone()
        weight[target] += 25 * c.x / c.x.dot(c.x)
        c = c._replace(weight=weight)
        solution = recover_soft_label(c.weight_gradient, c.weight)
        assert solution.label_format == "hard"
        assert solution.soft_labels.argmax() == target
