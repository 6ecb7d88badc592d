"""The closed form of a head with a bias: x = ∇Wᵀ∇b/‖∇b‖², y = softmax(W x + b) - ∇b, for any label."""

from dataclasses import replace

import pytest
import torch

from attacks.labels.bias_closed_form import BiasClosedForm
from bench.threat import Facts, Outcome, mask

K, D = 6, 9


def head(rng, dtype=torch.float64):
    draw = {"generator": rng, "dtype": torch.float64, "device": "cpu"}
    weight, bias = torch.rand(K, D, **draw) - 0.5, torch.rand(K, **draw) - 0.5
    x = torch.randn(D, **draw)
    return weight.to(dtype), bias.to(dtype), x.to(dtype)


def any_label(rng):
    shares = torch.rand(K, generator=rng, dtype=torch.float64, device="cpu")
    return shares / shares.sum()


def bound(weight, bias, x):
    """What rounding of ∇W and ∇b does to y: each x_d is off by a few roundings of itself, hence the logits by
    that of Σ|w x|, and softmax is 1/2-Lipschitz in them; p - y adds one of 1."""
    eps = torch.finfo(weight.dtype).eps
    return 8 * eps * (1 + float((weight.abs() @ x.abs() + bias.abs()).max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("label_format", ["hard", "smoothing", "mixup", "smoothed_mixup", "any"])
@pytest.mark.parametrize("seed", range(3))
def test_recovers_any_label_and_the_feature(observe, seeded, label, label_format, dtype, seed):
    rng = seeded(seed)
    weight, bias, x = head(rng, dtype)
    y = (any_label(rng) if label_format == "any" else label(K, label_format)).to(dtype)
    p = torch.softmax(weight @ x + bias, 0)
    found = BiasClosedForm().run(observe(weight, bias, p - y, x), rng)
    eps = torch.finfo(dtype).eps
    assert found.outcome is Outcome.OK
    assert found.soft_labels.shape == (1, K)
    assert found.features.shape == (1, D)
    assert found.soft_labels.dtype == found.features.dtype == dtype
    assert float((found.soft_labels[0] - y).abs().max()) <= bound(weight, bias, x)
    assert torch.allclose(found.features[0], x, rtol=8 * eps, atol=0)


def test_lam_is_the_papers_scalar_of_the_largest_row(observe, seeded):
    weight, bias, x = head(seeded())
    u = torch.tensor([0.1, 0.2, -0.6, 0.1, 0.1, 0.1], dtype=torch.float64, device="cpu")
    notes = BiasClosedForm().run(observe(weight, bias, u, x), seeded()).notes
    assert notes["row"] == 2
    assert notes["lam"] == pytest.approx(1 / -0.6)


@pytest.mark.parametrize("scale", [1e-30, 1e-100, 1e-200])
def test_a_bias_gradient_whose_square_underflows_gives_the_feature(observe, seeded, scale):
    weight, bias, x = head(seeded())
    u = scale * torch.tensor([1.0, -1.0, 0, 0, 0, 0], dtype=torch.float64, device="cpu")
    found = BiasClosedForm().run(observe(weight, bias, u, x), seeded())
    eps = torch.finfo(torch.float64).eps
    assert found.outcome is Outcome.OK
    assert torch.allclose(found.features[0], x, rtol=8 * eps, atol=0)
    p = torch.softmax(weight @ x + bias, 0)
    assert float((found.soft_labels[0] - p).abs().max()) <= bound(weight, bias, x)  # y = p but for u


def test_a_feature_of_zero_is_found(observe, seeded, label):
    weight, bias, x = head(seeded())
    y = label(K, "mixup")
    found = BiasClosedForm().run(observe(weight, bias, torch.softmax(bias, 0) - y, 0 * x), seeded())
    assert found.outcome is Outcome.OK
    assert torch.equal(found.features[0], 0 * x)
    assert float((found.soft_labels[0] - y).abs().max()) <= bound(weight, bias, x)


def test_a_bias_gradient_of_zero_says_only_that_y_is_p(observe, seeded):
    weight, bias, x = head(seeded())
    found = BiasClosedForm().run(observe(weight, bias, 0 * bias, x), seeded())
    assert found.outcome is Outcome.UNIDENTIFIABLE
    assert found.soft_labels is None
    assert found.features is None
    assert "p = y" in found.notes["reason"]


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("entry", ["head.weight", "head.bias"])
def test_a_gradient_that_is_not_finite_diverges(observe, seeded, broken, entry):
    weight, bias, x = head(seeded())
    seen = observe(weight, bias, torch.softmax(weight @ x + bias, 0), x)
    seen.update[entry].view(-1)[0] = broken
    found = BiasClosedForm().run(seen, seeded())
    assert found.outcome is Outcome.DIVERGED
    assert found.soft_labels is None


@pytest.mark.parametrize("entry", ["head.weight", "head.bias"])
def test_what_was_withheld_is_unidentifiable(observe, seeded, entry):
    weight, bias, x = head(seeded())
    seen = observe(weight, bias, bias, x)
    found = BiasClosedForm().run(
        replace(seen, update={k: v for k, v in seen.update.items() if k != entry}), seeded()
    )
    assert found.outcome is Outcome.UNIDENTIFIABLE
    assert "not sent" in found.notes["reason"]


def test_it_reads_the_head_alone(observe, seeded, label):
    weight, bias, x = head(seeded())
    u = torch.softmax(weight @ x + bias, 0) - label(K, "hard")
    seen = observe(weight, bias, u, x, beside={"body.weight": torch.ones(2, device="cpu")})
    masked = replace(seen, update=mask(seen.update, seen.head, BiasClosedForm.reads))
    assert len(masked.update) == 2
    whole, part = (BiasClosedForm().run(one, seeded()).soft_labels for one in (seen, masked))
    assert torch.equal(whole, part)


def test_it_is_skipped_with_the_reason(facts):
    assert BiasClosedForm().skip(facts(head_bias=True)) is None
    assert BiasClosedForm().skip(facts(head_bias=True, nonnegative_features=False)) is None
    assert BiasClosedForm().skip(facts(head_bias=True, batch_size=3)) == "needs a batch of one, got 3"
    assert BiasClosedForm().skip(facts()) == "needs a last layer with a bias"


def test_factories_name_their_device(observe, seeded, label, strict_devices):
    weight, bias, x = head(seeded())
    seen = observe(weight, bias, torch.softmax(weight @ x + bias, 0) - label(K, "hard"), x)
    with strict_devices:
        BiasClosedForm().run(seen, seeded())


def test_a_gradient_of_unknown_scale_is_skipped():
    facts = Facts(1, 10, (1, 8, 8), 16, True, True, "fedavg")
    assert "learning rate" in BiasClosedForm().skip(facts)
    granted = frozenset({"local_steps", "local_lr"})
    assert BiasClosedForm().skip(replace(facts, granted=granted)) is None
