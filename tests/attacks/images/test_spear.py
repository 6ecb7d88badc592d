"""SPEAR on nets whose inputs are known: exact, in batches of up to twenty, whatever the labels."""

from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

from attacks.images.spear import SPEAR
from attacks.solvers.sparse_directions import factorise, sparse_directions
from bench.registry import attacks
from bench.threat import Outcome

K, SHAPE = 10, (3, 8, 8)


class Centred(nn.Module):
    def forward(self, images):
        return (images - 0.5) / 0.25


def fcn(width=128, depth=3, bias=True, activation=nn.ReLU):
    torch.manual_seed(0)
    layers, inputs = [("normalize", Centred()), ("flatten", nn.Flatten())], 192
    for index in range(1, depth):
        layers += [(f"linear{index}", nn.Linear(inputs, width, bias=bias)), (f"act{index}", activation())]
        inputs = width
    return nn.Sequential(OrderedDict([*layers, ("head", nn.Linear(inputs, K, bias=bias))]))


def pictures(n, seed=0):
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(seed))


def labels(n):
    generator = torch.Generator().manual_seed(5)
    return torch.softmax(3 * torch.randn(n, K, generator=generator), dim=1)


def attack(observation, seed=0, **parameters):
    return SPEAR(**parameters).run(observation, torch.Generator().manual_seed(seed))


def matched(found, images):
    order = linear_sum_assignment(torch.cdist(images.flatten(1), found.images.flatten(1)).numpy())[1]
    return found.images[order], found.soft_labels[order]


@pytest.mark.parametrize("n", [1, 2, 8, 20])
def test_batches_come_back_exactly(observe, n):
    """The paper's b up to 25; 8-bit pixels are told apart at 48 dB, float32 leaves above 100."""
    images = pictures(n)
    found = attack(observe(fcn(width=256), images, labels(n)))
    assert found.outcome is Outcome.OK, found.notes
    error = (matched(found, images)[0].double() - images.double()).square().mean(dim=(1, 2, 3))
    assert float(-10 * error.max().log10()) > 100


def test_soft_labels_and_features_come_along(observe):
    model, images = fcn(depth=4), pictures(6)
    found = attack(observe(model, images, labels(6)))
    torch.testing.assert_close(matched(found, images)[1], labels(6), atol=1e-3, rtol=0)
    torch.testing.assert_close(found.features, model[:-1](found.images), atol=1e-4, rtol=1e-4)


def test_without_the_head_s_gradient_images_come_without_labels(observe):
    seen, images = observe(fcn(), pictures(4), labels(4)), pictures(4)
    update = {name: value for name, value in seen.update.items() if not name.startswith("head")}
    found = attack(replace(seen, update=update))
    assert found.outcome is Outcome.OK
    assert found.soft_labels is None
    distances = torch.cdist(images.flatten(1), found.images.flatten(1))
    assert float(distances.amin(dim=1).max()) < 1e-3


def test_sparse_rows_are_found_in_their_span():
    """Against the definition: half of a random matrix is zero, and what is given is a mixture of its rows."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(8, 240, generator=generator, dtype=torch.float64)
    rows = rows * (torch.rand(8, 240, generator=generator) < 0.5)
    gradient = rows.T @ torch.randn(8, 50, generator=generator, dtype=torch.float64)
    factors = factorise(gradient, 8)
    found = sparse_directions(factors, 500, generator) @ factors.right
    cosines = nn.functional.normalize(found, dim=1) @ nn.functional.normalize(rows, dim=1).T
    assert found.shape == (8, 240)
    torch.testing.assert_close(cosines.abs().amax(dim=0), torch.ones(8, dtype=torch.float64))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (fcn(bias=False), "it needs both"),
        (fcn(activation=nn.Sigmoid), "a ReLU after it"),
        (nn.Sequential(OrderedDict(flatten=nn.Flatten(), head=nn.Linear(192, K))), "a ReLU after it"),
    ],
)
def test_another_net_is_unidentifiable_with_the_reason(observe, model, reason):
    found = attack(observe(model, pictures(2), labels(2)))
    assert found.outcome is Outcome.UNIDENTIFIABLE
    assert reason in found.notes["reason"]


def test_too_few_units_end_at_the_limit_or_in_a_contradiction(observe):
    found = attack(observe(fcn(width=12), pictures(8), labels(8)), starts=64)
    assert found.outcome in (Outcome.STEP_LIMIT, Outcome.UNIDENTIFIABLE)
    assert found.notes["reason"]


def test_more_examples_than_the_gradient_s_rank_are_said(observe):
    seen = observe(fcn(), pictures(2), labels(2))
    found = attack(replace(seen, facts=replace(seen.facts, batch_size=4)))
    assert found.outcome is Outcome.UNIDENTIFIABLE


def test_noise_does_not_pass_for_an_answer(observe):
    seen = observe(fcn(), pictures(4), labels(4))
    generator = torch.Generator().manual_seed(1)
    noisy = {
        name: value + value.std() * torch.randn(value.shape, generator=generator)
        for name, value in seen.update.items()
    }
    assert attack(replace(seen, update=noisy), starts=64).outcome is not Outcome.OK


def test_a_gradient_that_is_not_finite_has_diverged(observe):
    seen = observe(fcn(), pictures(2), labels(2))
    seen.update["linear1.bias"][0] = torch.nan
    assert attack(seen).outcome is Outcome.DIVERGED


def test_it_follows_its_generator(observe):
    seen = observe(fcn(), pictures(6), labels(6))
    assert torch.equal(attack(seen, seed=1).images, attack(seen, seed=1).images)


def test_ranges_and_names():
    assert attacks.make("spear") == SPEAR()
    for parameters in ({"starts": 0}, {"consistency": 0.5}):
        with pytest.raises(ValueError, match="is not"):
            SPEAR(**parameters)


def test_local_steps_are_skipped_with_the_reason(observe):
    facts = observe(fcn(), pictures(2), labels(2)).facts
    assert SPEAR().skip(facts) is None
    assert SPEAR().skip(replace(facts, protocol="fedavg")) == "needs the gradient of one step, got fedavg"
