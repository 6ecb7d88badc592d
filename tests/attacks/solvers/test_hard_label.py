"""The class of a hard label, from gradients written down and disturbed."""

import pytest
import torch

from attacks.solvers.hard_label import hard_class, posterior_of_class

K, D = 6, 40


def gradients(count, seed=0, positive=True):
    """∇W = (p - y) xᵀ of `count` examples, their classes, and the features' distribution."""
    rng = torch.Generator(device="cpu").manual_seed(seed)
    p = torch.rand(count, K, generator=rng, dtype=torch.float64, device="cpu").softmax(1)
    classes = torch.randint(K, (count,), generator=rng, device="cpu")
    x = torch.randn(count, D, generator=rng, dtype=torch.float64, device="cpu") * 0.3 + 1
    x = x.abs() if positive else x - 1
    u = p - torch.nn.functional.one_hot(classes, K)
    return torch.einsum("mk,md->mkd", u, x), classes, x


@pytest.mark.parametrize("disturbed", [lambda g: g, lambda g: 1e-6 * g, torch.sign, lambda g: g + 0.3])
@pytest.mark.parametrize("positive", [True, False])
def test_scale_signs_and_a_common_shift_do_not_hide_the_class(disturbed, positive):
    gradient, classes, _ = gradients(50, positive=positive)
    assert hard_class(disturbed(gradient)).classes.equal(classes)


def test_noise_alone_does_not_stand_out():
    rng = torch.Generator(device="cpu").manual_seed(0)
    noise = 0.1 * torch.randn(200, K, D, generator=rng, device="cpu")
    found = hard_class(noise)
    assert (found.lead == 0).double().mean() > 0.98
    assert float(found.noise.mean()) == pytest.approx(0.1, rel=0.1)


def test_public_features_tell_the_class_where_noise_drowns_the_singular_vector():
    """Row k is u_k x + noise: σ√D is above ‖u‖‖x‖ here, yet the sum over a row is u_k Σx ± σ√D."""
    gradient, classes, x = gradients(300)
    rng = torch.Generator(device="cpu").manual_seed(1)
    std = 2.0
    noisy = gradient + std * torch.randn(gradient.shape, generator=rng, dtype=torch.float64, device="cpu")
    chances = posterior_of_class(noisy, torch.full((300,), std, dtype=torch.float64, device="cpu"), x)
    by_vector, right, row_sums = (
        float((found == classes).double().mean())
        for found in (hard_class(noisy).classes, chances.argmax(1), noisy.sum(2).argmin(1))
    )
    assert right > by_vector + 0.2
    assert right > row_sums - 0.03
    assert 1 / K < float(chances.amax(1).mean()) < right + 0.05  # no surer than it may be
