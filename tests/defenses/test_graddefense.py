"""GradDefense: slices of equal sensitivity, some of which get noise."""

import dataclasses
from collections import OrderedDict

import pytest
import scipy.stats
import torch
from torch import nn

from bench.cases.client import FedSGDClient
from bench.cases.models import build
from bench.threat import Batch
from defenses.graddefense import GradDefense, _sensitivity

K = 4


def batch(n, rng, dtype=torch.float64):
    images = torch.rand(n, 1, 8, 8, generator=rng, dtype=dtype, device="cpu")
    return Batch(images, torch.eye(K, dtype=dtype, device="cpu")[torch.arange(n, device="cpu") % K])


@pytest.fixture
def client():
    return FedSGDClient(build("lenet", (1, 8, 8), K, seed=0).double())


def flat(update):
    return torch.cat([value.flatten() for value in update.values()])


def test_sensitivity_of_one_linear_layer_is_in_closed_form(seeded):
    """A head's ∇W = (p - y) xᵀ and ∇b = p - y sum to zero whatever the image, and W₁ᵀ(p - y) of the other is
    what moves: Σ∇W₀ = (1ᵀ W₁ᵀ (p - y)) Σx, whose derivative by a pixel has two terms.
    """
    layers = OrderedDict(flatten=nn.Flatten(), first=nn.Linear(64, 5, bias=False), head=nn.Linear(5, K))
    model, given = nn.Sequential(layers).double(), batch(1, seeded())
    found = _sensitivity(FedSGDClient(model), given)
    x, w, v = given.images.flatten(), model.first.weight.detach(), model.head.weight.detach()
    p = (v @ w @ x + model.head.bias.detach()).softmax(0)
    inner = v.T @ (p - given.soft_labels[0])
    jacobian = v.T @ (p.diag() - p.outer(p)) @ v @ w  # of W₁ᵀ(p - y) by x
    slope = inner.sum() + jacobian.sum(0) * x.sum()
    assert float(found[0]) == pytest.approx(float(slope.norm()), rel=1e-9)
    assert (found[1:] < 1e-12 * found[0]).all()


def test_the_head_lies_whole_in_the_last_slice(client, seeded):
    """It has no sensitivity: it gets noise in perturbed / slices of all updates, and then on every entry."""
    given, rng, n = batch(1, seeded()), seeded(), 200
    plain, counts = client.gradient(given), []
    for _ in range(n):
        sent = GradDefense(10, 5, 1.0).gradient(client, given, rng)
        changed = (sent["head.weight"] != plain["head.weight"]).double().mean()
        counts.append(float(changed))
    assert set(counts) == {0.0, 1.0}
    assert scipy.stats.binomtest(int(sum(counts)), n, 0.5).pvalue > 1e-4


def test_sensitivity_is_the_derivative_of_each_tensors_sum(client, seeded):
    """Against central differences of Σ ∇_l, pixel by pixel, for one image."""
    given = batch(1, seeded())
    found, names = _sensitivity(client, given), [name for name, _ in client.model.named_parameters()]

    def sums(images):
        return torch.stack(
            [value.sum() for value in client.gradient(Batch(images, given.soft_labels)).values()]
        )

    step, slopes = 1e-5, torch.zeros(len(names), dtype=torch.float64, device="cpu")
    for pixel in torch.eye(64, dtype=torch.float64, device="cpu").view(64, 1, 1, 8, 8):
        slopes += ((sums(given.images + step * pixel) - sums(given.images - step * pixel)) / (2 * step)) ** 2
    assert torch.allclose(found, slopes.sqrt(), rtol=1e-5, atol=1e-8)


def test_it_is_averaged_over_images_one_by_one(client, seeded):
    """Of a mean loss each image has 1/N: the batch's is the mean of the images' own, over N."""
    given = batch(3, seeded())
    alone = [
        _sensitivity(client, Batch(given.images[n : n + 1], given.soft_labels[n : n + 1])) for n in range(3)
    ]
    assert torch.allclose(_sensitivity(client, given), torch.stack(alone).mean(0) / 3, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(("slices", "perturbed"), [(10, 5), (4, 1), (1, 1), (7, 7)])
def test_the_slices_drawn_hold_their_share_of_the_sensitivity(slices, perturbed, client, seeded):
    given = batch(1, seeded())
    plain = client.gradient(given)
    sent = GradDefense(slices, perturbed, 1.0).gradient(client, given, seeded(3))
    noisy = flat(sent) != flat(plain)
    sensitivity = _sensitivity(client, given)
    each = torch.cat(
        [
            (s / value.numel()).expand(value.numel())
            for s, value in zip(sensitivity, plain.values(), strict=True)
        ]
    )
    held = float(each[noisy].sum() / each.sum())
    assert abs(held - perturbed / slices) <= 2 * perturbed * float(each.max() / each.sum())  # a cut entry
    edges = int(noisy.long().diff().abs().sum())
    assert edges <= 2 * perturbed  # whole runs of entries


def test_noise_has_its_standard_deviation_on_every_entry_of_a_slice(client, seeded):
    given = batch(1, seeded())
    noise = flat(GradDefense(1, 1, 0.3).gradient(client, given, seeded())) - flat(client.gradient(given))
    assert scipy.stats.kstest(noise.numpy(), scipy.stats.norm(scale=0.3).cdf).pvalue > 1e-4


def test_entries_outside_the_slices_are_exact(client, seeded):
    given = batch(1, seeded())
    plain, sent = flat(client.gradient(given)), flat(GradDefense(std=1.0).gradient(client, given, seeded()))
    assert 0 < int((plain == sent).sum()) < len(plain)
    untouched = GradDefense(10, 0).gradient(client, given, seeded())
    assert torch.equal(flat(untouched), plain)


def test_every_slice_is_as_likely(client, seeded):
    given, rng, n = batch(1, seeded()), seeded(), 120
    plain, counts = flat(client.gradient(given)), torch.zeros(4, device="cpu")
    starts = [0, len(plain) - 1]  # the first slice holds the first entry, the last slice the last
    for _ in range(n):
        noisy = flat(GradDefense(4, 1, 1.0).gradient(client, given, rng)) != plain
        counts[:2] += noisy[starts]
    assert all(scipy.stats.binomtest(int(count), n, 1 / 4).pvalue > 1e-4 for count in counts[:2])


def test_the_generator_decides_and_the_batch_stays_as_it_was(client, seeded):
    given = batch(2, seeded())
    first, again, other = (flat(GradDefense().gradient(client, given, seeded(seed))) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not given.images.requires_grad


@pytest.mark.parametrize(
    "parameters",
    [
        *({"slices": 0}, {"perturbed": -1}, {"perturbed": 11}, {"std": -1.0}),
        *({"std": float("inf")}, {"std": float("nan")}),
    ],
)
def test_what_is_out_of_range_is_refused(parameters):
    (name,) = parameters
    with pytest.raises(ValueError, match=f"{name}=.* is not"):
        GradDefense(**parameters)


def test_slices_are_cut_on_the_clients_other_data(client, seeded):
    """As the authors' are on a public set: what is drawn doesn't depend on the batch."""
    one, other, pool = (batch(n, seeded(seed)) for n, seed in ((1, 0), (1, 1), (3, 2)))
    holder = dataclasses.replace(client, pool=pool)

    def noisy(client, given):
        return flat(GradDefense(std=1.0).gradient(client, given, seeded())) != flat(client.gradient(given))

    assert torch.equal(noisy(holder, one), noisy(holder, other))
    assert torch.equal(noisy(holder, one), noisy(client, pool))
    assert not torch.equal(noisy(client, one), noisy(client, other))


def test_it_replaces_the_gradient_alone():
    assert GradDefense().stages() == {"gradient"}
    assert GradDefense().privacy(1, 1.0, 1e-5) is None


def test_factories_name_their_device(client, seeded, strict_devices):
    given = batch(1, seeded())
    with strict_devices:
        GradDefense().gradient(client, given, seeded())
