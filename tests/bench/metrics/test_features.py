"""Feature metrics against closed forms."""

import pytest
import torch

from bench.metrics.features import feature_cosine, feature_distances, feature_error

X = torch.tensor([[3.0, 4.0], [0.0, 2.0]])


def test_a_scaled_feature_has_the_scale_as_error_and_cosine_one():
    assert feature_error(1.25 * X, X) == pytest.approx(0.25)
    assert feature_cosine(1.25 * X, X) == pytest.approx(1)
    assert feature_cosine(-3 * X, X) == pytest.approx(-1)


@pytest.mark.parametrize("angle", [0.3, 1.0, 2.5])
def test_the_cosine_of_a_turned_feature_is_that_of_the_angle(angle):
    turned = torch.stack([torch.tensor(angle).cos(), torch.tensor(angle).sin()])[None] * 7
    assert feature_cosine(turned, torch.tensor([[1.0, 0.0]])) == pytest.approx(
        torch.tensor(angle).cos().item()
    )


def test_zero_features_recovered_as_zero_have_no_error():
    zero = torch.zeros(1, 3)
    assert feature_error(zero, zero) == 0
    assert feature_error(zero + 1, zero) == float("inf")
    assert feature_cosine(zero + 1, zero) == 0


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_broken_features_have_an_infinite_error_and_no_cosine(broken):
    predicted = X.clone()
    predicted[0, 0] = broken
    assert feature_error(predicted, X) == float("inf")
    assert feature_cosine(predicted, X) == pytest.approx(0.5)  # the other example's 1, halved


def test_distances_are_euclidean():
    assert torch.allclose(
        feature_distances(X, X), torch.tensor([[0, 13.0], [13.0, 0]], dtype=torch.float64).sqrt()
    )
