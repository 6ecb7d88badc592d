"""Distances and penalties against closed forms, their slopes against finite differences."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from attacks.solvers.matching_objectives import (
    Cosine,
    FeaturePull,
    GroupConsistency,
    Norm,
    TotalVariation,
    relative,
    relative_by_tensor,
)

G = torch.tensor([3.0, 0.0, 4.0])


def distance(measure, gradient, target):
    return measure(gradient[None].clone(), target)[0].item()


def some(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def slope_by_differences(function, at, step=1e-6):
    """Of the sum over candidates, each entry of which moves its own candidate alone."""
    slope = torch.empty_like(at)
    for index in range(at.numel()):
        ahead, behind = at.clone(), at.clone()
        ahead.view(-1)[index] += step
        behind.view(-1)[index] -= step
        slope.view(-1)[index] = (function(ahead) - function(behind)).sum() / (2 * step)
    return slope


def test_cosine_is_0_along_1_across_and_2_against_whatever_the_length():
    assert distance(Cosine(), 7 * G, G) == pytest.approx(0, abs=1e-6)
    assert distance(Cosine(), torch.tensor([4.0, 9.0, -3.0]), G) == pytest.approx(1)
    assert distance(Cosine(), -G, G) == pytest.approx(2)


@pytest.mark.parametrize(("gradient", "target"), [(0 * G, G), (G, 0 * G), (0 * G, 0 * G)])
def test_cosine_from_and_to_zero_is_one_and_has_a_finite_slope(gradient, target):
    found, slope = Cosine()(gradient[None].clone(), target)
    assert found == 1
    assert slope.isfinite().all()


def test_relative_distances_are_one_from_zero_and_nothing_from_the_target():
    target = [G, torch.tensor([[0.1]]), torch.zeros(2)]
    flat = torch.cat([value.flatten() for value in target])
    for measure in (relative(target), relative_by_tensor(target)):
        assert distance(measure, flat, flat) == 0
        assert distance(measure, 0 * flat, flat) == pytest.approx(1)
        assert distance(measure, 3 * flat, flat) == pytest.approx(4)


def test_by_tensor_a_small_one_counts_as_much_as_a_large_one():
    target = [100 * G, G / 100]
    flat = torch.cat(target)
    first, second = flat.clone(), flat.clone()
    first[:3], second[3:] = 0, 0
    measure = relative_by_tensor(target)
    assert distance(measure, first, flat) == pytest.approx(0.5)
    assert distance(measure, second, flat) == pytest.approx(0.5)
    assert distance(relative(target), second, flat) < 1e-7


def test_slopes_of_distances_are_their_derivatives():
    target = some(9) - 0.5
    at = torch.stack([some(9), 2 * some(9).flip(0)])
    for measure in (Cosine(), relative(target.split(3)), relative_by_tensor(target.split(3))):

        def function(gradient, measure=measure):
            return measure(gradient.clone(), target)[0]

        slope = measure(at.clone(), target)[1]
        torch.testing.assert_close(slope, slope_by_differences(function, at), rtol=1e-5, atol=1e-8)


def test_total_variation_of_a_ramp_is_its_slope_times_the_share_of_pixels_with_a_neighbour():
    across = torch.arange(8.0).expand(1, 2, 3, 5, 8)
    for ramp in (across, across.transpose(3, 4)):
        found, _ = TotalVariation(0.5)(2 * ramp)
        torch.testing.assert_close(found, torch.tensor([2 * 7 / 8 / 2]))


def test_a_bright_image_has_no_total_variation_and_nowhere_to_go():
    found, slope = TotalVariation(1.0)(torch.ones(1, 1, 1, 4, 4))
    assert found == 0
    assert (slope == 0).all()


def test_the_norm_is_the_mean_square():
    assert Norm(3.0)(torch.full((1, 2, 3, 4, 4), 2.0))[0] == pytest.approx(12)


def test_a_group_is_drawn_to_its_mean_and_one_alone_nowhere():
    images = torch.stack([torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)])
    found, slope = GroupConsistency(4.0)(images)
    torch.testing.assert_close(found, torch.ones(2))
    assert (slope[0] < 0).all()
    assert (slope[1] > 0).all()
    assert (GroupConsistency(4.0)(images[1:])[1] == 0).all()


def test_shifted_copies_agree_on_one_of_them():
    image = some(2, 3, 8, 8)
    copies = torch.stack([image.roll(shift, dims=(2, 3)) for shift in [(0, 0), (0, 3), (-2, 1)]])
    consensus = GroupConsistency(1.0).consensus(copies)
    for found, of_each in zip(consensus, copies.transpose(0, 1), strict=True):
        assert min((found - one).abs().max() for one in of_each) < 1e-12


@pytest.mark.parametrize("penalty", [TotalVariation(0.3), Norm(0.3)])
def test_slopes_of_penalties_are_their_derivatives(penalty):
    images = some(2, 2, 1, 4, 3)
    found = slope_by_differences(lambda at: penalty(at)[0], images)
    torch.testing.assert_close(penalty(images)[1], found, rtol=1e-5, atol=1e-8)


def test_the_pull_is_zero_along_the_feature_and_its_slope_its_derivative():
    known, weights = some(3, 5) - 0.5, torch.tensor([0.5, 2.0], dtype=torch.float64)
    pull = FeaturePull(known, weights)
    assert pull(torch.stack([3 * known, known / 2]))[0].abs().max() < 1e-12
    torch.testing.assert_close(pull(-torch.stack([known, known]))[0], 2 * weights)
    at = some(2, 3, 5)
    found = slope_by_differences(lambda features: pull(features)[0], at)
    torch.testing.assert_close(pull(at)[1], found, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(pull.of(1)(at[1:])[0], pull(at)[0][1:])


def test_all_terms_stay_on_their_inputs_device():
    """Mixing in a tensor of the CPU would raise."""
    with FakeTensorMode():
        images, target = torch.empty(2, 1, 3, 6, 6, device="cuda"), torch.empty(5, device="cuda")
        terms = [term(images) for term in (TotalVariation(1.0), Norm(1.0), GroupConsistency(1.0))]
        terms += [
            measure(torch.empty(2, 5, device="cuda"), target) for measure in (Cosine(), relative([target]))
        ]
    assert all(value.device.type == "cuda" for term in terms for value in term)
