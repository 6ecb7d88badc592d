"""The head's input and u against a gradient written down in closed form: ∇W = (p - y) xᵀ."""

import pytest
import torch

from attacks.solvers.head import recover_head
from attacks.solvers.layers import NotInvertibleError

K, D = 6, 40
Y = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64)


def closed_form():
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(K, D, generator=rng, dtype=torch.float64) / D**0.5
    x = torch.rand(D, generator=rng, dtype=torch.float64)
    u = torch.softmax(weight @ x, dim=0) - Y
    return weight, x, u


@pytest.mark.parametrize("bias", [None, torch.zeros(K, dtype=torch.float64)])
def test_input_and_u_are_those_of_the_closed_form(bias):
    weight, x, u = closed_form()
    head = recover_head(torch.outer(u, x), weight, bias, None if bias is None else u, None)
    torch.testing.assert_close(head.features, x, atol=1e-6, rtol=0)
    torch.testing.assert_close(head.u, u, atol=1e-6, rtol=0)
    assert head.noise < 1e-6
    assert head.doubt == ""


def test_noise_is_its_share():
    weight, x, u = closed_form()
    clean = torch.outer(u, x)
    noise = torch.randn(K, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    head = recover_head(clean + 1e-4 * clean.square().mean().sqrt() * noise, weight, None, None, None)
    assert head.noise == pytest.approx(1e-4, rel=0.2)


def test_what_was_not_sent_and_zeros_are_refused():
    weight, _, _ = closed_form()
    with pytest.raises(NotInvertibleError, match="was not sent"):
        recover_head(None, weight, None, None, None)
    with pytest.raises(NotInvertibleError):
        recover_head(torch.zeros_like(weight), weight, None, None, None)
