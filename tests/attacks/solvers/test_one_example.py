"""One direction more than an example has, and noise, which has all of them."""

import pytest
import torch

from attacks.solvers.one_example import has_second_direction

M, K, D = 40, 10, 48


@pytest.fixture
def drawn():
    rng = torch.Generator(device="cpu").manual_seed(0)

    def drawn(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64, device="cpu")

    return drawn


def one(drawn):
    """(M, K, D) and the features (M, D)."""
    u, x = drawn(M, K), drawn(M, D)
    return torch.einsum("mk,md->mkd", u - u.mean(1, keepdim=True), x), x


@pytest.mark.parametrize("noise", [0.0, 1e-6, 1e-2, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_example_under_noise_has_none(drawn, noise, dtype):
    gradient, x = one(drawn)
    noisy = (gradient + noise * drawn(M, K, D)).to(dtype)
    assert not has_second_direction(noisy, x.to(dtype)).any()


@pytest.mark.parametrize("share", [0.01, 0.1, 1.0])
def test_a_second_example_has_one(drawn, share):
    gradient, x = one(drawn)
    assert has_second_direction(gradient + share * one(drawn)[0], x).all()


def test_of_few_classes_noise_looks_like_it_and_nothing_is_said(drawn):
    gradient, x = one(drawn)
    assert not has_second_direction(gradient[:, :3] + 0.1 * drawn(M, 3, D), x).any()


def test_zero_gradients_have_none(drawn):
    gradient, x = one(drawn)
    assert not has_second_direction(0 * gradient, 0 * x).any()
