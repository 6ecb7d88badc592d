"""The least squares of one layer against explicit matrices."""

import pytest
import torch
from torch import nn
from torch.func import jacrev

from attacks.solvers.layers import Activation, Layer, NotInvertibleError, trace
from attacks.solvers.layerwise import (
    SentGradient,
    correlate,
    correlate_transpose,
    missing_equations,
    normal_parts,
    relative_noise,
    solve,
    taps_by_offset,
)

TANH = Activation("Tanh", torch.tanh, lambda a: 1 - a.square(), torch.atanh, (-1.0, 1.0))


def layer(shape=(2, 6, 6), outputs=3, kernel=3, stride=1, padding=1, dilation=1, seed=0):
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, shape[0], kernel, kernel, generator=rng, dtype=torch.float64)
    convolution = {"stride": (stride,) * 2, "padding": (padding,) * 2, "dilation": (dilation,) * 2}
    out = nn.functional.conv2d(torch.zeros(1, *shape, dtype=torch.float64), weight, **convolution).shape[1:]
    ones = torch.ones(outputs, dtype=torch.float64)
    return Layer("layer", weight, 0 * ones, ones, convolution, shape, tuple(out), TANH)


GEOMETRIES = [
    {},
    {"stride": 2},
    {"kernel": 5, "stride": 2, "padding": 2},
    {"kernel": 3, "padding": 0},
    {"kernel": 2, "dilation": 2, "padding": 1},
    {"kernel": 2, "stride": 3, "padding": 0, "shape": (2, 7, 7)},
]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_normal_matrix_is_that_of_the_explicit_equations(geometry):
    one = layer(**geometry)
    rng = torch.Generator().manual_seed(1)
    delta = torch.randn(one.output_shape, generator=rng, dtype=torch.float64)
    weights = torch.rand(one.output_shape, generator=rng, dtype=torch.float64)
    a = torch.zeros(one.input_shape, dtype=torch.float64)
    forward = jacrev(lambda a: one.forward(a[None])[0].flatten())(a).flatten(1)
    backward = jacrev(lambda a: correlate(one, delta, a).flatten())(a).flatten(1)
    outer, gram = normal_parts(one, delta, weights)
    torch.testing.assert_close(outer, forward.T @ (weights.flatten()[:, None] * forward))
    per_channel = torch.block_diag(*[gram] * one.input_shape[0])
    torch.testing.assert_close(per_channel, backward.T @ backward)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_transpose_is_the_transpose(geometry):
    one = layer(**geometry)
    rng = torch.Generator().manual_seed(1)
    delta = torch.randn(one.output_shape, generator=rng, dtype=torch.float64)
    a = torch.randn(one.input_shape, generator=rng, dtype=torch.float64)
    g = torch.randn(one.weight.shape, generator=rng, dtype=torch.float64)
    torch.testing.assert_close(
        (correlate(one, delta, a) * g).sum(), (a * correlate_transpose(one, delta, g)).sum()
    )


@pytest.mark.parametrize("geometry", [*GEOMETRIES, {"outputs": 1, "stride": 2}, {"outputs": 2, "stride": 3}])
def test_counting_equations_agrees_with_the_rank(geometry):
    """Counting by places under the stride gives the rank that random weights and gradients have."""
    one = layer(**geometry)
    rng = torch.Generator().manual_seed(1)
    delta = torch.randn(one.output_shape, generator=rng, dtype=torch.float64)
    a = torch.zeros(one.input_shape, dtype=torch.float64)
    forward = jacrev(lambda a: one.forward(a[None])[0].flatten())(a).flatten(1)
    backward = jacrev(lambda a: correlate(one, delta, a).flatten())(a).flatten(1)
    rank = int(torch.linalg.matrix_rank(torch.cat([forward, backward])))
    assert missing_equations(one) == a.numel() - rank


def test_lenets_second_layer_is_determined_at_32_pixels_and_not_at_64():
    for side, missing in ((32, 0), (64, 5760)):
        one = layer((12, side // 2, side // 2), outputs=12, kernel=5, stride=2, padding=2)
        assert missing_equations(one) == missing
    # 256 numbers of a channel: a quarter each is met by 3 · 3, 3 · 2, 2 · 3 and 2 · 2 taps
    one = layer((12, 16, 16), outputs=12, kernel=5, stride=2, padding=2)
    assert sorted(taps_by_offset(one)) == [(64, 4), (64, 6), (64, 6), (64, 9)]


def test_noise_is_the_share_that_is_not_of_rank_one():
    rng = torch.Generator().manual_seed(0)
    u, x = (torch.randn(n, generator=rng, dtype=torch.float64) for n in (10, 200))
    noise = torch.randn(10, 200, generator=rng, dtype=torch.float64)
    clean = torch.outer(u, x)
    level = 1e-3 * clean.square().mean().sqrt()
    assert relative_noise(SentGradient(clean + level * noise, None), x) == pytest.approx(1e-3, rel=0.1)
    assert relative_noise(SentGradient(clean, None), x) < 1e-5


def small_net():
    torch.manual_seed(0)
    parts = [nn.Conv2d(1, 6, 3, 1, 1), nn.Tanh(), nn.Conv2d(6, 16, 3, 2, 1), nn.Tanh(), nn.Flatten()]
    return nn.Sequential(*parts, nn.Linear(256, 10)).double()


def test_an_input_comes_back_from_exact_gradients():
    model, image = small_net(), torch.rand(1, 1, 8, 8, dtype=torch.float64)
    loss = nn.functional.cross_entropy(model(image), torch.tensor([3]))
    update = torch.autograd.grad(loss, list(model.parameters()))
    row = trace(model, "5", (1, 8, 8), torch.Generator().manual_seed(0))
    gradients = [SentGradient(update[i], update[i + 1]) for i in (0, 2, 4)]
    found, misfit = solve(row, gradients, model[:-1](image)[0].detach())
    assert misfit < 1e-6
    torch.testing.assert_close(found, image[0], atol=1e-6, rtol=0)


def test_a_row_gives_the_networks_scale_and_layers():
    row = trace(small_net(), "5", (1, 8, 8), torch.Generator().manual_seed(0))
    assert [one.name for one in row.layers] == ["0", "2", "5"]
    assert [one.activation.name for one in row.layers] == ["Tanh", "Tanh", "Identity"]
    torch.testing.assert_close(row.scale, torch.ones(1, 8, 8, dtype=torch.float64))


def test_a_zero_gradient_is_refused():
    model = small_net()
    row = trace(model, "5", (1, 8, 8), torch.Generator().manual_seed(0))
    zeros = [SentGradient(torch.zeros_like(one.weight), None) for one in row.layers]
    with pytest.raises(NotInvertibleError, match="no gradient at 5"):
        solve(row, zeros, torch.ones(256, dtype=torch.float64))
