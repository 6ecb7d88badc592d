"""The curve and its seeds, checked by plugging the truth back in."""

import pytest
import torch

from attacks.solvers import curve, seeds
from attacks.solvers.exact import make_problem
from attacks.solvers.label_models import Model, as_frame
from attacks.solvers.reduction import reduce

FORMATS = {"hard": (1, False), "smoothing": (1, True), "mixup": (2, False), "smoothed_mixup": (2, True)}


def reduced(c):
    reduction = reduce(c.weight_gradient[None], c.weight, None)
    return make_problem(reduction, c.weight, c.bias, 0.0, 1e-7), reduction


def true_t(c, reduction):
    return torch.dot(c.x, reduction.direction[0])[None, None]


@pytest.mark.parametrize("label_format", FORMATS)
def test_the_true_t_fits_its_format_to_the_rounding_and_no_other_t_does(case, label_format):
    c = case(label_format=label_format)
    problem, reduction = reduced(c)
    t = true_t(c, reduction)
    frame = as_frame([Model(*FORMATS[label_format])], problem)
    chi2 = [float(curve.fit(problem, t * factor, frame).chi2) for factor in (1, 1.001, 0.999, -1, 1e3)]
    assert chi2[0] < 10
    assert min(chi2[1:]) > 1e6


def test_y_on_the_curve_is_the_label(case):
    c = case(label_format="smoothing", has_bias=True)
    problem, reduction = reduced(c)
    t = true_t(c, reduction)
    y = curve.probabilities(problem, t)[0, 0] - problem.s[0, 0] / t
    assert torch.allclose(y[0], c.y)


def test_the_gauss_newton_step_lands_on_the_root(case):
    c = case(label_format="smoothed_mixup")
    problem, reduction = reduced(c)
    t = true_t(c, reduction)
    frame = as_frame([Model(2, True)], problem)
    for start in (1 - 1e-4, 1 + 1e-4):
        step = curve.fit(problem, t * start, frame).step
        assert torch.isclose(t * start * torch.exp(step), t, rtol=1e-6).all()


def test_the_curvature_is_the_inverse_variance_of_log_t(case):
    """Over noise of a known level the fitted log t scatters as its error bar says."""
    c = case(10, 128, "smoothing", scale=0.1)
    errors, bars = [], []
    for seed in range(60):
        rng = torch.Generator().manual_seed(seed)
        noise = 1e-5 * torch.randn(c.weight.shape, generator=rng, dtype=torch.float64)
        reduction = reduce((c.weight_gradient + noise)[None], c.weight, 1e-5)
        problem = make_problem(reduction, c.weight, None, 0.0, 1e-7)
        t = torch.dot(c.x, reduction.direction[0])[None, None]
        frame = as_frame([Model(1, True)], problem)
        root = t
        for _ in range(5):
            fit = curve.fit(problem, root, frame)
            root = root * torch.exp(fit.step)
        errors.append(float(torch.log(root / t)))
        bars.append(float(fit.curvature) ** -0.5)
    scatter = torch.tensor(errors).square().mean().sqrt() / torch.tensor(bars).mean()
    assert 0.6 < scatter < 1.5


@pytest.mark.parametrize("has_bias", [False, True])
def test_pairs_off_the_spike_tell_t_of_a_hard_label(case, has_bias):
    c = case(label_format="hard", has_bias=has_bias)
    problem, reduction = reduced(c)
    found = seeds.densest(seeds.slopes(problem), 1)
    assert torch.isclose(found, true_t(c, reduction), rtol=1e-6).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_triples_off_the_spike_tell_t_of_a_smoothed_label_with_its_sign(case, sign):
    c = case(label_format="smoothing")
    c = c._replace(x=sign * c.x)
    problem, reduction = reduced(c)
    found = seeds.densest(seeds.triples(problem), 1)
    assert torch.isclose(found, true_t(c, reduction), rtol=1e-6).all()


@pytest.mark.parametrize("num_classes", [3, 4, 9, 10, 16, 100, 1000])
@pytest.mark.parametrize("count", [9, 15])
def test_anchors_are_distinct_ranks_with_both_ends(num_classes, count):
    ranks = seeds.anchor_ranks(num_classes, count)
    assert ranks == sorted(set(ranks))
    assert ranks[0] == 0
    assert ranks[-1] == num_classes - 1
    assert len(ranks) == min(num_classes, count)


def test_the_grid_keeps_the_bound_and_reaches_the_logits_asked_for(case):
    problem, _ = reduced(case())
    grid = seeds.grid(problem, 50, 100.0)
    least = problem.s.abs().sum() / 2
    spread = problem.a.max() - problem.a.min()
    assert torch.isclose(grid.abs().min(), least)
    assert torch.isclose(grid.abs().max() * spread, torch.tensor(100.0, dtype=torch.float64))
    assert torch.equal(grid[0, :50], -grid[0, 50:])


def test_rounding_is_not_taken_for_noise_and_noise_is_seen(case):
    for dtype in (torch.float32, torch.float64):
        c = case(10, 700, "smoothing", dtype=dtype)
        gradient = c.weight_gradient
        assert reduce(gradient[None], c.weight, None).additive_noise == 0
        std = 1e-4
        noise = std * torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
        estimate = reduce((gradient + noise)[None], c.weight, None).additive_noise
        assert torch.isclose(estimate, torch.tensor(std, dtype=torch.float64), rtol=0.1).all()


def test_gradients_whose_squares_underflow_are_scaled(case):
    c = case(dtype=torch.float32)
    tiny = c.weight_gradient * 2.0**-100
    plain, scaled = reduce(c.weight_gradient[None], c.weight, None), reduce(tiny[None], c.weight, None)
    assert torch.allclose(scaled.s * 2.0**100, plain.s, rtol=1e-5)
    assert torch.allclose(scaled.lam_per_t, plain.lam_per_t * 2.0**100, rtol=1e-5)
