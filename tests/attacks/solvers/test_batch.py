"""Batches: written-down gradients ∇W = (1/n) (P - Y)ᵀ X, whose labels and features are known."""

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from attacks.solvers import batch_zeros
from attacks.solvers.batch import factorise, recover_soft_labels_of_batch

WITHIN = 0.01
FORMATS = ("hard", "smoothing", "mixup", "smoothed_mixup")


class Batch:
    """n examples, a head with weights from U(±scale); `zeros` of the features are zero, the rest positive."""

    def __init__(
        self,
        n,
        num_classes,
        label_format,
        seed=0,
        zeros=0.5,
        width=128,
        dtype=torch.float64,
        scale=0.2,
        bias=False,
    ):
        rng = torch.Generator().manual_seed(seed)
        draw = {"generator": rng, "dtype": torch.float64}
        weight = scale * (2 * torch.rand(num_classes, width, **draw) - 1)
        b = torch.rand(num_classes, **draw) - 0.5 if bias else None
        x = torch.randn(n, width, **draw).abs()
        x[torch.rand(n, width, **draw) < zeros] = 0
        kinds = FORMATS if label_format == "any" else (label_format,)
        y = torch.stack([self.label(num_classes, kinds[i % len(kinds)], rng) for i in range(n)])
        self.n, self.weight, self.x, self.y = n, weight.to(dtype), x.to(dtype), y.to(dtype)
        self.bias = None if b is None else b.to(dtype)
        logits = self.x @ self.weight.T + (0 if b is None else self.bias)
        u = torch.softmax(logits, dim=1) - self.y
        self.weight_gradient = u.T @ self.x / n
        self.bias_gradient = u.mean(dim=0) if bias else None

    @staticmethod
    def label(num_classes, label_format, rng):
        y = torch.zeros(num_classes, dtype=torch.float64)
        first, second = torch.randperm(num_classes, generator=rng)[:2].tolist()
        share = 0.2 + 0.6 * float(torch.rand((), generator=rng)) if "mixup" in label_format else 1.0
        y[first], y[second] = share, 1 - share
        epsilon = 0.3 if label_format.startswith("smooth") else 0.0
        return (1 - epsilon) * y + epsilon / num_classes

    def recover(self, **keywords):
        keywords.setdefault("nonnegative_features", True)
        return recover_soft_labels_of_batch(
            self.weight_gradient, self.weight, self.n, self.bias, self.bias_gradient, **keywords
        )

    def errors(self, found):
        """The worst entry of each label, and each feature's relative error, in the order of the truth."""
        costs = (found.soft_labels[:, None] - self.y).abs().amax(dim=2).double()
        order = linear_sum_assignment(costs.numpy())[0][linear_sum_assignment(costs.numpy())[1].argsort()]
        labels = (found.soft_labels[order] - self.y).abs().amax(dim=1)
        off = torch.linalg.vector_norm(found.features[order] - self.x, dim=1)
        return float(labels.max()), float((off / torch.linalg.vector_norm(self.x, dim=1)).max())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("n", "num_classes"), [(2, 10), (4, 10), (8, 10), (8, 40)])
def test_zeros_tell_the_directions_and_each_has_its_own_scalar(n, num_classes, bias):
    batch = Batch(n, num_classes, "any", bias=bias)
    found = batch.recover()
    assert found.outcome == "ok"
    assert found.by_zeros == n
    assert max(batch.errors(found)) < 1e-6
    assert found.residual < 1e-12


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("label_format", FORMATS)
def test_dense_features_are_searched_one_example_at_a_time(label_format, bias):
    batch = Batch(3, 20, label_format, zeros=0.0, bias=bias)
    found = batch.recover()
    assert found.outcome == "ok"
    assert found.by_zeros == 0
    assert max(batch.errors(found)) < 1e-6
    assert set(found.label_format) == {label_format}


def test_examples_that_their_own_equations_leave_open_are_told_by_their_agreement():
    """K - n - 3 + 1 equations in n unknowns, K = 10 and n = 4: as many, and nothing to check a root by."""
    batch = Batch(4, 10, "smoothed_mixup", zeros=0.0)
    found = batch.recover()
    assert found.outcome == "ok"
    assert found.by_zeros == 0
    assert max(batch.errors(found)) < 1e-6


def test_a_direction_that_is_known_leaves_the_length_alone():
    """Dense examples alone could not be found, K < 2n: seven with zeros leave the eighth."""
    batch = Batch(8, 10, "any")
    batch.x[0] = batch.x[0].abs() + 0.1
    u = torch.softmax(batch.x @ batch.weight.T, dim=1) - batch.y
    batch.weight_gradient = u.T @ batch.x / 8
    found = batch.recover()
    assert found.outcome == "ok"
    assert found.by_zeros == 7
    assert max(batch.errors(found)) < 1e-6


def test_features_of_either_sign_need_no_zeros():
    batch = Batch(3, 20, "any", zeros=0.0)
    flipped = Batch(3, 20, "any", zeros=0.0)
    flipped.x = batch.x * torch.where(
        torch.rand(batch.x.shape, generator=torch.Generator().manual_seed(3)) < 0.5, -1, 1
    )
    u = torch.softmax(flipped.x @ flipped.weight.T, dim=1) - flipped.y
    flipped.weight_gradient = u.T @ flipped.x / 3
    found = flipped.recover(nonnegative_features=False)
    assert found.outcome == "ok"
    assert max(flipped.errors(found)) < 1e-6


def test_a_single_precision_gradient_is_enough():
    batch = Batch(4, 20, "any", dtype=torch.float32)
    found = batch.recover()
    assert found.outcome == "ok"
    assert found.soft_labels.dtype == found.features.dtype == torch.float32
    assert batch.errors(found)[0] < WITHIN


def test_with_zeros_and_the_bias_gradient_labels_need_no_structure():
    batch = Batch(4, 10, "hard", bias=True)
    batch.y = torch.softmax(
        torch.randn(4, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64), 1
    )
    u = torch.softmax(batch.x @ batch.weight.T + batch.bias, dim=1) - batch.y
    batch.weight_gradient, batch.bias_gradient = u.T @ batch.x / 4, u.mean(dim=0)
    found = batch.recover()
    assert found.outcome == "ok"
    assert found.label_format == ("any",) * 4
    assert max(batch.errors(found)) < 1e-6


def test_labels_without_structure_are_not_guessed_without_the_bias_gradient():
    batch = Batch(3, 10, "hard")
    batch.y = torch.softmax(
        torch.randn(3, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64), 1
    )
    u = torch.softmax(batch.x @ batch.weight.T, dim=1) - batch.y
    batch.weight_gradient = u.T @ batch.x / 3
    found = batch.recover()
    assert found.outcome != "ok"
    assert found.reason


def test_coinciding_examples_leave_no_rank():
    batch = Batch(2, 10, "hard")
    batch.weight_gradient = batch.weight_gradient[:, :1] * torch.ones_like(batch.weight)
    found = batch.recover()
    assert found.outcome == "unidentifiable"
    assert "rank" in found.reason
    assert found.found == 0


def test_noise_beyond_the_tolerance_is_no_answer():
    batch = Batch(4, 10, "hard")
    noise = torch.randn(batch.weight.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    batch.weight_gradient = batch.weight_gradient + 0.02 * batch.weight_gradient.abs().mean() * noise
    found = batch.recover(attempts=1)
    assert found.outcome != "ok" or batch.errors(found)[0] < WITHIN


def test_a_batch_of_one_is_the_single_solvers():
    batch = Batch(1, 10, "smoothing")
    found = batch.recover()
    assert found.outcome == "ok"
    assert max(batch.errors(found)) < 1e-6


def test_the_same_generator_gives_the_same_answer():
    batch = Batch(3, 20, "mixup", zeros=0.0)
    one, other = (batch.recover(rng=torch.Generator().manual_seed(9)) for _ in range(2))
    assert torch.equal(one.soft_labels, other.soft_labels)


def test_every_factory_call_names_its_device(device_discipline):
    sparse, dense = Batch(3, 20, "any", bias=True), Batch(3, 20, "any", zeros=0.0)
    with device_discipline:
        sparse.recover(rng=torch.Generator(device="cpu").manual_seed(0))
        dense.recover(rng=torch.Generator(device="cpu").manual_seed(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"weight_gradient": torch.zeros(3, 3)}, "weight_gradient must be"),
        ({"bias": torch.zeros(3)}, "bias must be"),
        ({"weight_gradient": torch.full((4, 8), torch.nan)}, "NaN"),
        ({"label_format": "smooth"}, "unknown label_format"),
    ],
)
def test_misuse_is_said(change, message):
    given = {"weight_gradient": torch.ones(4, 8), "weight": torch.ones(4, 8), "batch_size": 2}
    with pytest.raises(ValueError, match=message):
        recover_soft_labels_of_batch(**(given | change))


class TestRays:
    def test_every_example_with_zeros_is_an_extreme_ray(self):
        batch = Batch(6, 20, "hard")
        factors = factorise(batch.weight_gradient, 6)
        rays = batch_zeros.directions_from_zeros(factors, 2048, torch.Generator().manual_seed(0))
        true = batch.x @ factors.right.T
        cosine = rays.directions @ (true / torch.linalg.vector_norm(true, dim=1, keepdim=True)).T
        assert len(rays.directions) == 6
        assert torch.allclose(cosine.amax(dim=1), torch.ones(6, dtype=torch.float64), atol=1e-9)
        order = cosine.argmax(dim=1)
        assert sorted(order.tolist()) == list(range(6))
        live = (batch.x > 0).any(dim=0)
        assert torch.equal(rays.zeros, (batch.x[order] == 0) & live)

    def test_features_without_zeros_tell_no_direction(self):
        batch = Batch(4, 20, "hard", zeros=0.0)
        factors = factorise(batch.weight_gradient, 4)
        rays = batch_zeros.directions_from_zeros(factors, 2048, torch.Generator().manual_seed(0))
        assert len(rays.directions) == 0

    def test_the_inside_of_a_cone_is_found_or_missed_rightly(self):
        columns = torch.tensor([[1.0, -0.9, 0.0], [0.1, 1.0, 1.0]], dtype=torch.float64)
        inside = batch_zeros.interior_point(columns)
        assert bool(((inside @ columns) > 0).all())
        opposite = torch.cat([columns, -columns], dim=1)
        assert batch_zeros.interior_point(opposite) is None
