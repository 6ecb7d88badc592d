"""The matching engine against finite differences, and against breaching."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from attacks.solvers.gradient_matching import (
    BatchNormStatistics,
    DoubleBackward,
    LocalSteps,
    Objective,
    gradients_of,
)
from attacks.solvers.matching_objectives import Cosine, FeaturePull, Norm, TotalVariation, relative
from attacks.solvers.matching_optimisers import SignedAdam, Value, descend
from bench.torchvision_ops import ensure_importable

K = 5


def convnet(batch_norm=False, channels=3):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, padding=1),
        nn.BatchNorm2d(4) if batch_norm else nn.Identity(),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(4 * 6 * 6, K),
    )


def batch(n=2, channels=3, dtype=torch.float32):
    rng = torch.Generator().manual_seed(1)
    images = torch.rand(n, channels, 6, 6, generator=rng, dtype=dtype)
    return images, torch.softmax(torch.randn(n, K, generator=rng, dtype=dtype), dim=1)


def gradient(model, images, soft_labels):
    loss = nn.functional.cross_entropy(model(images), soft_labels)
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def objective_of(model, target, tv=0.0, head="4"):
    return Objective(DoubleBackward(model, head, target), Cosine(), (TotalVariation(tv),))


def total(objective, images, soft_labels):
    return objective(images[None], soft_labels[None]).total.item()


@pytest.mark.parametrize("kind", [DoubleBackward, lambda *of: gradients_of(*of, batch()[0])])
def test_the_objective_is_zero_at_the_private_batch_and_counts_its_penalties(kind):
    model, (images, soft_labels) = convnet(), batch()
    target = gradient(model, images, soft_labels)
    gradients = kind(model, "4", target)
    assert total(Objective(gradients, Cosine()), images, soft_labels) == pytest.approx(0, abs=1e-6)
    penalties = TotalVariation(0.5), Norm(2.0)
    wanted = sum(penalty(images[None])[0].item() for penalty in penalties)
    assert total(Objective(gradients, Cosine(), penalties), images, soft_labels) == pytest.approx(
        wanted, abs=1e-6
    )


def test_only_what_was_observed_is_matched():
    model, (images, soft_labels) = convnet(), batch()
    target = {"4.bias": gradient(model, images, soft_labels)["4.bias"]}
    assert total(objective_of(model, target), images, soft_labels) == pytest.approx(0, abs=1e-6)


def test_a_parameter_that_the_model_does_not_use_changes_nothing():
    model, (images, soft_labels) = convnet(), batch()
    target = gradient(model, images, soft_labels)
    without = objective_of(model, target)(images[None] / 2, soft_labels[None])
    model.unused = nn.Parameter(torch.ones(3))
    target = target | {"unused": torch.zeros(3)}
    found = objective_of(model, target)(images[None] / 2, soft_labels[None])
    for one, other in zip(found, without, strict=True):
        torch.testing.assert_close(one, other)


def slopes_are_derivatives(objective):
    images, soft_labels = batch(dtype=torch.float64)
    images, soft_labels = (0.5 * images + 0.2)[None], (0.5 * soft_labels + 0.1)[None]
    found = objective(images, soft_labels)
    rng = torch.Generator().manual_seed(5)
    for slope, at in ((found.images_slope, "images"), (found.labels_slope, "soft_labels")):
        way = torch.randn(slope.shape, generator=rng, dtype=torch.float64)
        ahead, behind = (
            objective(
                images + step * way if at == "images" else images,
                soft_labels + step * way if at == "soft_labels" else soft_labels,
            ).total.item()
            for step in (1e-6, -1e-6)
        )
        assert (slope * way).sum().item() == pytest.approx((ahead - behind) / 2e-6, rel=1e-4)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_its_slopes_agree_with_finite_differences(batch_norm):
    model, (images, soft_labels) = convnet(batch_norm).double().train(), batch(dtype=torch.float64)
    target = gradient(model, images, soft_labels)
    pull = FeaturePull(torch.ones(2, 144, dtype=torch.float64), torch.tensor([0.3], dtype=torch.float64))
    for distance in (Cosine(), relative(target.values())):
        gradients = gradients_of(model, "4", target, images)
        slopes_are_derivatives(Objective(gradients, distance, (TotalVariation(0.1),), pull))


def test_local_steps_are_simulated_with_their_slopes():
    """-Δ / (lr · steps) of plain SGD, as a FedAvg client sends it."""
    model, (images, soft_labels) = convnet().double(), batch(dtype=torch.float64)
    moved, sent = copy.deepcopy(model), {}
    for _ in range(3):
        for name, value in gradient(moved, images, soft_labels).items():
            moved.get_parameter(name).data -= 0.4 * value
    for (name, before), after in zip(model.named_parameters(), moved.parameters(), strict=True):
        sent[name] = (before - after).detach() / (3 * 0.4)
    unrolled = DoubleBackward(model, "4", sent, LocalSteps(3, 0.4))
    assert total(Objective(unrolled, relative(sent.values())), images, soft_labels) < 1e-20
    assert (
        total(Objective(DoubleBackward(model, "4", sent), relative(sent.values())), images, soft_labels)
        > 1e-4
    )
    slopes_are_derivatives(Objective(unrolled, Cosine()))
    partly = {"0.weight": sent["0.weight"]}  # the other parameters move all the same
    only = Objective(DoubleBackward(model, "4", partly, LocalSteps(3, 0.4)), relative(partly.values()))
    assert total(only, images, soft_labels) < 1e-20


@pytest.mark.parametrize("training", [False, True])
def test_batch_norm_statistics_are_missed_by_nothing_at_the_private_batch(training):
    model, (images, soft_labels) = (
        convnet(batch_norm=True).double().train(training),
        batch(dtype=torch.float64),
    )
    target = gradient(model, images, soft_labels)
    inputs = model[0](images).transpose(0, 1).flatten(1)
    known = {"1": (inputs.mean(dim=1).detach(), inputs.var(dim=1, correction=0).detach())}
    gradients = DoubleBackward(model, "4", target, statistics=BatchNormStatistics(0.1, known))
    assert total(Objective(gradients, Cosine()), images, soft_labels) == pytest.approx(0, abs=1e-12)
    other = {"1": (known["1"][0] + 3, known["1"][1])}
    gradients = DoubleBackward(model, "4", target, statistics=BatchNormStatistics(0.1, other))
    assert total(Objective(gradients, Cosine()), images, soft_labels) == pytest.approx(0.1 * 3 * 4**0.5)
    slopes_are_derivatives(Objective(gradients, Cosine()))


@pytest.mark.parametrize("training", [False, True])
def test_the_model_keeps_its_gradients_mode_and_running_statistics(training):
    model, (images, soft_labels) = convnet(batch_norm=True).train(training), batch()
    target = gradient(model, images, soft_labels)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    objective = Objective(gradients_of(model, "4", target, images), Cosine())
    assert total(objective, images, soft_labels) == pytest.approx(0, abs=1e-6)

    def function(variables):
        matched = objective(variables[0], soft_labels[None])
        return Value(matched.total, matched.distance, (matched.images_slope,))

    descend(function, (images[None],), SignedAdam(0.1), 2, boxed=True)
    assert model.training == training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_model_with_frozen_parameters_will_do():
    model, (images, soft_labels) = convnet(), batch()
    target = gradient(model, images, soft_labels)
    objective = objective_of(model.requires_grad_(False), target)
    assert total(objective, images, soft_labels) == pytest.approx(0, abs=1e-6)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", [DoubleBackward, lambda *of: gradients_of(*of, batch()[0])])
def test_the_loss_is_breachings_where_the_borders_that_it_takes_for_black_are_black(kind):
    ensure_importable()  # torchvision, which breaching imports
    objectives = pytest.importorskip("breaching.attacks.auxiliaries.objectives")
    regularizers = pytest.importorskip("breaching.attacks.auxiliaries.regularizers")
    model, (images, soft_labels) = convnet(), batch(n=1)
    target = {name: value + 0.01 for name, value in gradient(model, images, soft_labels).items()}
    candidate = images.flip(0, 1, 2).clone()
    candidate[..., -1, :] = candidate[..., -1] = 0
    candidate.requires_grad_()

    cosine = objectives.CosineSimilarity()
    cosine.initialize(nn.CrossEntropyLoss(), SimpleNamespace(mixed_precision=False))
    variation = regularizers.TotalVariation(
        {"dtype": torch.float32, "device": torch.device("cpu")}, scale=0.2
    )
    theirs = cosine(model, list(target.values()), candidate, soft_labels)[0] + variation(candidate)
    (their_slope,) = torch.autograd.grad(theirs.sum(), candidate)
    objective = Objective(kind(model, "4", target), Cosine(), (TotalVariation(0.2),))
    ours = objective(candidate.detach()[None], soft_labels[None])
    torch.testing.assert_close(ours.total[0], theirs.squeeze().detach(), rtol=1e-6, atol=1e-6)
    inside = (..., slice(0, -1), slice(0, -1))  # where no border is a neighbour
    torch.testing.assert_close(ours.images_slope[0][inside], their_slope[inside], rtol=1e-4, atol=1e-6)
