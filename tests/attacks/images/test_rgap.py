"""R-GAP on nets whose input is known: exact where its rank analysis says so, for hard labels alone."""

from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from torch import nn

from attacks.images.rgap import RGAP
from attacks.solvers.recursive import head_input
from bench.registry import attacks
from bench.threat import Outcome

K, SHAPE = 6, (3, 8, 8)


def net(activation=None, stride=1, width=12, bias=False, seed=0):
    """As the paper's CNNs: convolutions without bias, LeakyReLU, one fully connected layer."""
    torch.manual_seed(seed)
    side = 8 // stride
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, width, 3, stride=stride, padding=1, bias=False),
            activation1=activation or nn.LeakyReLU(0.2),
            conv2=nn.Conv2d(width, width, 3, padding=1, bias=False),
            activation2=activation or nn.LeakyReLU(0.2),
            flatten=nn.Flatten(),
            head=nn.Linear(width * side * side, K, bias=bias),
        )
    )


def picture(seed=0):
    return torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(seed))


def attack(observation):
    return RGAP().run(observation, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("label", [0, 3])
def test_an_image_comes_back_in_its_8_bits(observe, label, bias):
    image = (picture() * 255).round() / 255
    found = attack(observe(net(bias=bias), image, torch.eye(K)[[label]]))
    assert found.outcome is Outcome.OK, found.notes
    assert found.soft_labels.argmax() == label
    assert torch.equal((found.images * 255).round(), (image * 255).round())


def test_the_head_s_input_follows_from_one_equation():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(K, 20, generator=generator, dtype=torch.float64)
    x = torch.rand(20, generator=generator, dtype=torch.float64)
    bias = torch.zeros(K, dtype=torch.float64)
    u = torch.softmax(weight @ x, dim=0) - torch.eye(K, dtype=torch.float64)[2]
    found, label = head_input(torch.outer(u, x), weight, bias)
    assert label == 2
    torch.testing.assert_close(found, x)


def test_too_few_equations_are_said_before_anything_is_solved(observe):
    found = attack(observe(net(width=1, stride=2), picture(), torch.eye(K)[[1]]))
    assert found.outcome is Outcome.UNIDENTIFIABLE
    assert "equations too few" in found.notes["reason"]


def test_relus_have_no_inverse(observe):
    found = attack(observe(net(nn.ReLU()), picture(), torch.eye(K)[[1]]))
    assert "no inverse" in found.notes["reason"]


def test_what_is_not_finite_or_zero(observe):
    seen = observe(net(), picture(), torch.eye(K)[[1]])
    zeros = {name: torch.zeros_like(value) for name, value in seen.update.items()}
    assert attack(replace(seen, update=zeros)).outcome is Outcome.UNIDENTIFIABLE
    seen.update["conv1.weight"][0] = torch.nan
    assert attack(seen).outcome is Outcome.DIVERGED


def test_reasons_and_name(observe):
    facts = observe(net(), picture(), torch.eye(K)[[1]]).facts
    assert attacks.make("rgap") == RGAP()
    assert RGAP().skip(facts) is None
    assert RGAP().skip(replace(facts, batch_size=2)) == "needs a batch of one, got 2"


@pytest.mark.parametrize("share", [0.6, 0.8])
def test_a_mixed_label_is_no_hard_one(observe, share):
    """A smoothed one, where the net is near uniform, has a gradient of the same direction: it passes."""
    mixed = share * torch.eye(K)[[1]] + (1 - share) * torch.eye(K)[[4]]
    found = attack(observe(net(), picture(), mixed))
    assert found.outcome is Outcome.UNIDENTIFIABLE
    assert "no hard label" in found.notes["reason"]
