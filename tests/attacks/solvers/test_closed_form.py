"""With the bias gradient: ∇b = u, x = ∇Wᵀu/‖u‖², y = softmax(W x + b) - u, for any label."""

import pytest
import torch

from attacks.solvers import recover_soft_label, recover_soft_labels
from attacks.solvers.closed_form import may_have_structure

FORMATS = ("hard", "smoothing", "mixup", "smoothed_mixup", "k_mix")


def solve(c, **granted):
    return recover_soft_label(c.weight_gradient, c.weight, c.bias, c.bias_gradient, **granted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_classes", [5, 10, 100])
@pytest.mark.parametrize("label_format", FORMATS)
def test_is_exact_and_names_the_format(case, label_format, num_classes, dtype):
    c = case(num_classes, 64, label_format, dtype=dtype, has_bias=True)
    solution = solve(c)
    assert solution.outcome == "ok"
    assert solution.label_format == label_format
    assert c.label_error(solution) < (1e-5 if dtype == torch.float32 else 1e-12)
    assert torch.allclose(solution.features, c.x, rtol=1e-4, atol=1e-6)
    assert torch.isclose(solution.lam, 1 / c.bias_gradient[solution.row])


def without_structure(c):
    """The case with a label in which no two classes share a value."""
    y = torch.rand(len(c.y), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return c._replace(y=(y / y.sum()).to(c.y))


def test_needs_no_structure_in_the_label(case):
    c = without_structure(case(has_bias=True))
    solution = solve(c)
    assert solution.outcome == "ok"
    assert solution.label_format == "any"
    assert c.label_error(solution) < 1e-12


@pytest.mark.parametrize("label_format", ["hard", "smoothing"])
def test_two_classes_are_enough(case, label_format):
    c = case(2, 8, label_format, has_bias=True)
    assert c.label_error(solve(c)) < 1e-12


def test_a_stack_agrees_with_its_examples(case):
    first, second = case(has_bias=True), case(label_format="mixup", seed=3)
    second = second._replace(weight=first.weight, bias=first.bias)
    stack = recover_soft_labels(
        torch.stack([first.weight_gradient, second.weight_gradient]),
        first.weight,
        first.bias,
        torch.stack([first.bias_gradient, second.bias_gradient]),
    )
    for index, c in enumerate((first, second)):
        assert torch.allclose(stack.soft_labels[index], solve(c).soft_labels)
        assert torch.allclose(stack.features[index], solve(c).features)


def test_noise_widens_the_error_bar_until_the_label_is_open(case):
    c = case(10, 256, "smoothing", has_bias=True, scale=0.06)
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(10, 256, generator=rng, dtype=torch.float64)
    outcomes = []
    for std in (1e-5, 1e-3, 1e-1, 10.0):
        solution = recover_soft_label(
            c.weight_gradient + std * noise, c.weight, c.bias, c.bias_gradient + std * noise[:, 0]
        )
        outcomes.append(solution.outcome)
    assert outcomes[0] == "ok"
    assert outcomes[-1] == "unidentifiable"


@pytest.mark.parametrize("label_format", FORMATS)
def test_under_noise_every_column_is_a_look_at_u(case, label_format):
    """∇b alone is off by the noise in every entry; ∇W has ‖x‖² times the information about their ratios."""
    std, plain, ours = 3e-3, [], []
    for seed in range(20):
        c = case(10, 256, label_format, seed, has_bias=True, scale=0.03)
        rng = torch.Generator().manual_seed(seed + 1000)
        noise = std * torch.randn(10, 257, generator=rng, dtype=torch.float64)
        sent, u = c.weight_gradient + noise[:, 1:], c.bias_gradient + noise[:, 0]
        x = sent.T @ u / u.square().sum()
        plain.append((torch.softmax(c.weight @ x + c.bias, 0) - u - c.y).abs().max())
        solution = recover_soft_label(sent, c.weight, c.bias, u)
        ours.append(c.label_error(solution))
        assert ours[-1] < 5 * solution.label_std
    assert torch.tensor(ours).median() < 0.8 * torch.stack(plain).median()


def pruned(tensor, share):
    least = tensor.abs().flatten().topk(int(share * tensor.numel())).values[-1]
    return torch.where(tensor.abs() >= least, tensor, torch.zeros_like(tensor))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [0.9, 0.6, 0.3])
@pytest.mark.parametrize("label_format", ["hard", "mixup"])
def test_what_pruning_left_gives_what_it_took(case, label_format, share, dtype):
    """Each entry that was sent is exact: rank one gives the others, and ∇b the length."""
    c = case(10, 256, label_format, dtype=dtype, has_bias=True, scale=0.1)
    found = recover_soft_label(
        pruned(c.weight_gradient, share), c.weight, c.bias, pruned(c.bias_gradient, 0.7)
    )
    assert c.label_error(found) < 0.02
    assert c.label_error(found) < 5 * found.label_std + 1e-6
    if share >= 0.6:
        assert found.outcome == "ok"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("label_format", ["hard", "mixup"])
@pytest.mark.parametrize("scale", [0.1, 0.01])
@pytest.mark.parametrize("seed", range(3))
def test_a_scaled_gradient_is_not_taken_for_a_label_without_structure(case, label_format, scale, dtype, seed):
    """As clipping scales it, or a learning rate that isn't known: ∇b is not u then, and λ is searched for."""
    c = case(label_format=label_format, dtype=dtype, has_bias=True, seed=seed)
    solution = recover_soft_label(scale * c.weight_gradient, c.weight, c.bias, scale * c.bias_gradient)
    assert (solution.outcome, solution.label_format) == ("ok", label_format)
    assert c.label_error(solution) < 1e-5
    assert torch.allclose(solution.features, c.x, rtol=1e-3, atol=1e-4)


def test_in_a_stack_only_the_scaled_ones_are_searched_for(case):
    plain, scaled = case(has_bias=True), case(label_format="mixup", seed=3, has_bias=True)
    scaled = scaled._replace(weight=plain.weight, bias=plain.bias)
    loose = without_structure(plain)
    both = [(1.0, plain), (0.1, scaled), (1.0, loose)]
    stack = recover_soft_labels(
        torch.stack([scale * c.weight_gradient for scale, c in both]),
        plain.weight,
        plain.bias,
        torch.stack([scale * c.bias_gradient for scale, c in both]),
    )
    assert stack.outcome == ["ok"] * 3
    assert stack.label_format == ["hard", "mixup", "any"]
    for index, (_, c) in enumerate(both):
        assert float((stack.soft_labels[index] - c.y).abs().max()) < 1e-6


def masked(c, share, seed):
    """∇W with a share of the columns of features that are on set to zero, as Soteria sends it."""
    on = (c.x != 0).nonzero()[:, 0]
    order = torch.randperm(len(on), generator=torch.Generator().manual_seed(seed))
    return c.weight_gradient.index_fill(1, on[order[: round(share * len(on))]], 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [0.1, 0.5])
@pytest.mark.parametrize("label_format", FORMATS)
def test_masked_columns_never_pass_for_features_that_are_off(case, label_format, share, dtype):
    """∇b is exact and W x isn't: p - ∇b is no label of any format."""
    for seed in range(5):
        for scale in (0.05, 0.5):
            c = case(10, 64, label_format, seed, dtype, scale, has_bias=True)
            solution = recover_soft_label(masked(c, share, seed), c.weight, c.bias, c.bias_gradient)
            assert solution.outcome == "unidentifiable"
            assert "masked" in solution.reason
            assert c.label_error(solution) < 3 * solution.label_std


def test_a_masked_gradient_with_noise_is_not_believed_either(case):
    c = case(10, 64, "mixup", has_bias=True)
    noise = 1e-5 * torch.randn(10, 65, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sent, u = masked(c, 0.3, 0) + noise[:, 1:], c.bias_gradient + noise[:, 0]
    assert recover_soft_label(sent, c.weight, c.bias, u).outcome == "unidentifiable"
    plain = recover_soft_label(c.weight_gradient + noise[:, 1:], c.weight, c.bias, u)
    assert (plain.outcome, plain.label_format) == ("ok", "mixup")


def test_features_that_are_off_leave_a_label_open_that_is_nearly_one_class(case):
    """They may have been masked as well, and the label be hard; what is given is right if they are off."""
    c = without_structure(case(has_bias=True, scale=0.05))
    c = c._replace(y=0.2 * c.y + 0.8 * (torch.arange(10) == 3))
    solution = solve(c)
    assert solution.outcome == "unidentifiable"
    assert "masked" in solution.reason
    assert c.label_error(solution) < 1e-12
    shown = solve(c._replace(x=c.x + 0.1))
    assert (shown.outcome, shown.label_format) == ("ok", "any")


@pytest.mark.parametrize("num_classes", [10, 100])
def test_where_u_leaves_no_structure_features_that_are_off_are_believed(case, num_classes):
    """y ≥ -∇b for any p: classes that all differ are no mix of two."""
    c = without_structure(case(num_classes, has_bias=True))
    solution = solve(c)
    assert (solution.outcome, solution.label_format) == ("ok", "any")
    assert c.label_error(solution) < 1e-12


@pytest.mark.parametrize("label_format", ["hard", "smoothing", "mixup", "smoothed_mixup"])
def test_of_a_usual_label_u_never_says_that_it_has_no_structure(case, label_format):
    for num_classes in (2, 3, 10, 100) if label_format in ("hard", "smoothing") else (3, 10, 100):
        c = case(num_classes, 64, label_format, has_bias=True)
        tolerance = torch.tensor([1e-12], dtype=torch.float64)
        assert bool(may_have_structure(c.bias_gradient[None], tolerance))


def test_a_label_below_zero_is_none(case):
    """Three times a gradient, of a label without structure: no scale can be found."""
    c = without_structure(case(has_bias=True))
    c = c._replace(x=c.x + 0.1)
    solution = recover_soft_label(3 * c.weight_gradient, c.weight, c.bias, 3 * c.bias_gradient)
    assert solution.outcome == "unidentifiable"
    assert "below zero" in solution.reason
