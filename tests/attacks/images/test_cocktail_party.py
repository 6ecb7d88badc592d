"""The cocktail party attack: what it separates, and what the bias' gradient adds to it."""

from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

from attacks.images.cocktail_party import CocktailParty
from attacks.solvers.independent_components import UnmixingWeights, log_cosh, unmix
from bench.cases import data
from bench.registry import attacks
from bench.threat import Outcome

K, SIZE = 5, 3 * 32 * 32


def fcn(bias=True, first=None):
    torch.manual_seed(0)
    return nn.Sequential(
        OrderedDict(
            normalize=first or nn.Identity(),
            flatten=nn.Flatten(),
            linear1=nn.Linear(SIZE, 64, bias=bias),
            activation=nn.ReLU(),
            head=nn.Linear(64, K, bias=bias),
        )
    )


def pictures(n):
    """Photographs: the prior is theirs."""
    return data.load("cifar10_samples", None).pixels(torch.arange(n))


def labels(n):
    return torch.eye(K)[torch.arange(n) % K]


def attack(observation, **parameters):
    return CocktailParty(**parameters).run(observation, torch.Generator().manual_seed(0))


def errors(found, images):
    distances = torch.cdist(images.flatten(1), found.flatten(1)).square() / images[0].numel()
    rows, columns = linear_sum_assignment(distances.numpy())
    return distances[rows, columns]


def test_half_of_a_batch_at_least_is_separated(observe):
    """Answering the batch's mean leaves the variance between its images."""
    images = pictures(4)
    found = attack(observe(fcn(), images, labels(4)))
    assert found.outcome is Outcome.STEP_LIMIT
    assert errors(found.images, images).median() < 0.25 * images.var(dim=0, correction=0).mean()


def test_independent_sources_come_back_with_sign_and_length():
    """Uniform noise and spikes, mixed: with negentropy alone it is plain ICA."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(2, 4000, generator=generator, dtype=torch.float64)
    sources = torch.stack([noise[0] - 0.5, 3 * (noise[1] > 0.9)])
    mixing = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    weights = UnmixingWeights(negentropy=0.0, variation=1.0, apart=0.5, sharpness=5.0)
    found = unmix(
        mixing @ sources, mixing.sum(dim=1), 2, lambda inputs: inputs.abs().mean(), weights, 500, 0.01
    )
    order = torch.cdist(sources, found.inputs).argmin(dim=1)
    cosines = torch.cosine_similarity(found.inputs[order], sources)
    assert found.scaled
    assert cosines.min() > 0.95


def test_without_a_bias_signs_are_guessed_and_it_says_so(observe):
    found = attack(observe(fcn(bias=False), pictures(3), labels(3)), iterations=20)
    assert "guessed" in found.notes["signs"]
    assert found.images.amin(dim=(1, 2, 3)).tolist() == [0, 0, 0]
    assert found.images.amax(dim=(1, 2, 3)).tolist() == [1, 1, 1]


def test_another_first_layer_or_a_low_rank_is_unidentifiable(observe):
    found = attack(observe(fcn(first=nn.Conv2d(3, 3, 1)), pictures(2), labels(2)))
    assert "is not fully connected" in found.notes["reason"]
    seen = observe(fcn(), pictures(2), labels(2))
    found = attack(replace(seen, facts=replace(seen.facts, batch_size=3)))
    assert found.outcome is Outcome.UNIDENTIFIABLE
    assert found.notes["reason"] == "the gradient's rank is below 3"


def test_what_was_not_sent_and_what_is_not_finite(observe):
    seen = observe(fcn(), pictures(2), labels(2))
    withheld = {name: value for name, value in seen.update.items() if name != "linear1.weight"}
    assert attack(replace(seen, update=withheld)).outcome is Outcome.UNIDENTIFIABLE
    seen.update["linear1.weight"][0, 0] = torch.nan
    assert attack(seen).outcome is Outcome.DIVERGED


def test_log_cosh_is_as_defined_and_does_not_overflow():
    values = torch.linspace(-20, 20, 11, dtype=torch.float64)
    torch.testing.assert_close(log_cosh(values), torch.log(torch.cosh(values)))
    assert log_cosh(torch.tensor(1e4)).isfinite()


def test_ranges_names_and_reasons(observe):
    facts = observe(fcn(), pictures(2), labels(2)).facts
    assert attacks.make("cocktail_party") == CocktailParty()
    assert CocktailParty().skip(facts) is None
    assert CocktailParty().skip(replace(facts, batch_size=1)) == "needs a batch of two at least, got 1"
    for parameters in ({"iterations": 0}, {"lr": 0.0}, {"tv": -1.0}):
        with pytest.raises(ValueError, match="is not"):
            CocktailParty(**parameters)
