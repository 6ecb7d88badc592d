"""GradInversion: what its terms read, and that granted statistics draw the images."""

import pytest
import torch
from torch import nn

from attacks.images.gradinversion import GradInversion, known_statistics
from attacks.solvers.matching_closed_form import ClosedForm
from bench.threat import Knowledge


def attack(observed, **parameters):
    return GradInversion(**({"iterations": 5, "labels": "joint"} | parameters)).run(
        observed, torch.Generator()
    )


@pytest.fixture
def seen(observe, small_net, smooth_picture):
    return observe(small_net(nn.ReLU(), batch_norm=True).eval(), smooth_picture, torch.eye(4)[:1])


def test_it_sees_more_than_the_mean_colour(observe, small_net, smooth_picture):
    observed = observe(small_net(), smooth_picture, torch.eye(4)[:1])
    found = attack(observed, iterations=300, labels="idlg", matching=1.0, tv=1e-4)
    error = (found.images - smooth_picture).square().mean()
    assert error < 0.25 * smooth_picture.var(dim=(2, 3), correction=0).mean()


def test_granted_statistics_come_before_the_models(seen):
    assert torch.equal(known_statistics(seen)["between"][1], torch.ones(8))
    granted = {"between": (torch.zeros(8), torch.full((8,), 2.0))}
    other = type(seen)(seen.model, seen.update, "head", seen.facts, Knowledge(batch_norm=granted))
    assert torch.equal(known_statistics(other)["between"][1], torch.full((8,), 2.0))
    assert not torch.equal(attack(seen).images, attack(other).images)


def test_without_batch_norm_the_closed_form_serves(observe, small_net, smooth_picture):
    observed = observe(small_net(), smooth_picture, torch.eye(4)[:1])
    assert known_statistics(observed) == {}
    objective = GradInversion()._objective(observed, observed.update, None)
    assert isinstance(objective.gradients, ClosedForm)


def test_the_group_draws_its_candidates_together(seen):
    free, drawn = (
        attack(seen, restarts=2, group=weight, iterations=30).notes["loss"] for weight in (0.0, 50.0)
    )
    assert free < drawn


@pytest.mark.parametrize("name", ["matching", "tv", "norm", "batch_norm", "group", "lr"])
def test_a_weight_below_zero_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}=-1.* is not"):
        GradInversion(**{name: -1.0})
