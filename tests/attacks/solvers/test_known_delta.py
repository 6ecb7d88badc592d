"""The residual at a known δ, and its solvers, against closed forms."""

import pytest
import torch
from torch import nn

from attacks.solvers.known_delta import (
    KnownDelta,
    Network,
    conjugate_gradients,
    descend,
    polish,
    total_variation,
)


def problem(side=8, seed=0, dtype=torch.float64):
    """A net of two convolutions with ReLU, and what one image leaves of it; δ from autograd."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, 1, 1),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 5),
    ).to(dtype)
    image = nn.functional.interpolate(torch.rand(1, 1, 3, 3, dtype=dtype), size=(side, side), mode="bilinear")
    z = model[:3](image)
    loss = nn.functional.cross_entropy(model[3:](z), torch.tensor([2]))
    delta, gradient = torch.autograd.grad(loss, [z, model[2].weight])
    features = model[:5](image)[0].detach()
    return KnownDelta(Network(model, "2", "5"), delta[0], gradient, features), image[0]


def test_nothing_is_left_at_the_image_itself():
    known, image = problem()
    assert float(known.residual(image).norm()) < 1e-12
    assert float(known.residual(torch.zeros_like(image)).norm()) > 0.1


def test_single_precision_leaves_rounding():
    known, image = problem()
    assert float(known.single().residual(image.float()).norm()) < 1e-5
    assert known.residual(image).dtype == torch.float64  # the first one is as it was


def test_descent_and_gauss_newton_end_in_the_image():
    known, image = problem()
    start = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(1))
    near = descend(known.single(), start, iterations=300, lr=0.03, tv=0.3, tv_end=0.001)
    assert near.min() >= 0
    assert near.max() <= 1
    with torch.no_grad():
        found = polish(known, near.double(), steps=40, enough=1e-9)
    assert found.misfit < 1e-8
    torch.testing.assert_close(found.image, image, atol=1e-6, rtol=0)


def test_conjugate_gradients_solve_least_squares():
    rng = torch.Generator().manual_seed(0)
    matrix = torch.randn(40, 12, generator=rng, dtype=torch.float64)
    right = torch.randn(40, generator=rng, dtype=torch.float64)
    x = torch.zeros(12, dtype=torch.float64)
    found = conjugate_gradients(lambda v: matrix @ v, lambda w: matrix.T @ w, right, x, enough=0.0)
    wanted = torch.linalg.lstsq(matrix, right[:, None]).solution[:, 0]
    assert (found - wanted).norm() < 0.1 * wanted.norm()  # to the forcing term


def test_conjugate_gradients_stop_at_the_noise():
    right = torch.ones(5, dtype=torch.float64)
    found = conjugate_gradients(lambda v: v, lambda w: w, right, torch.zeros_like(right), enough=10.0)
    assert torch.equal(found, torch.zeros_like(right))


@pytest.mark.parametrize("unit", [(0, 1, 1), (5, 2, 3)])
def test_a_unit_missing_from_delta_is_found(unit):
    known, image = problem()
    full = torch.ones_like(known.delta)
    gradient = known.gradient
    there = torch.zeros_like(known.delta)
    there[unit] = 1
    # ∇W with one unit's δ larger by 1: that unit alone explains it
    phi, _ = known.network(image[None])
    windows = nn.functional.unfold(phi, **known.network.windows)[0]
    more = gradient + (there.flatten(1) @ windows.T).reshape(gradient.shape)
    noise = 1e-6 * torch.randn(
        gradient.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    changed = KnownDelta(known.network, known.delta, more + noise, known.features)
    assert torch.equal(changed.switched(image, full, torch.ones_like(full, dtype=torch.bool)), there.bool())
    assert not changed.switched(image, full, torch.zeros_like(full, dtype=torch.bool)).any()


def test_total_variation_of_a_ramp():
    ramp = torch.arange(4.0).expand(1, 3, 4)
    assert float(total_variation(ramp)) == 1.0
