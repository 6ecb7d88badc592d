"""The R-operator against double backward, to rounding in float64, and which nets it is there for."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from attacks.solvers.gradient_matching import DoubleBackward, gradients_of
from attacks.solvers.matching_closed_form import ClosedForm, chain_of
from attacks.solvers.matching_objectives import Cosine, FeaturePull, relative, relative_by_tensor
from bench.cases import models

K, SHAPE = 4, (3, 9, 10)
COVERED = [
    f"{net}(activation={activation!r}, bias={bias}{more})"
    for net, more in (("fcn", ", depth=3, width=7"), ("lenet", ""), ("convnet", ", width=3"))
    for activation in models.ACTIVATIONS
    for bias in (False, True)
] + ["fcn(depth=1)"]


def some(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sent(model, n=2):
    images, soft_labels = some(n, *SHAPE), torch.softmax(some(n, K, seed=1), dim=1)
    loss = -(soft_labels * torch.log_softmax(model(images), dim=1)).sum(dim=1).mean()
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def agree(model, target, rows=2, n=2, head="head"):
    chain = chain_of(model, some(2, *SHAPE))
    assert chain is not None
    assert chain.names[-1] == head
    ours, theirs = ClosedForm(model, chain, target), DoubleBackward(model, head, target)
    images, soft_labels = some(rows, n, *SHAPE, seed=2), 1.3 * torch.softmax(some(rows, n, K, seed=3), dim=2)
    known = some(n, model.get_submodule(head).in_features, seed=4)
    pull = FeaturePull(known, some(rows, seed=5))
    for distance in (Cosine(), relative(target.values()), relative_by_tensor(target.values())):
        for feature in (None, pull):
            both = zip(
                *[each(images, soft_labels, distance, feature) for each in (ours, theirs)], strict=True
            )
            for found, wanted in both:
                torch.testing.assert_close(found, wanted, rtol=1e-9, atol=float(1e-12 * wanted.abs().max()))


@pytest.mark.parametrize("spec", COVERED)
def test_it_is_double_backward_to_rounding(spec):
    model = models.build(spec, SHAPE, K, seed=0).double()
    agree(model, sent(model))


@pytest.mark.parametrize(("rows", "n"), [(1, 1), (1, 3), (3, 1), (4, 3)])
def test_for_one_candidate_and_many_one_image_and_many(rows, n):
    model = models.build("lenet(activation='tanh')", SHAPE, K, seed=0).double()
    agree(model, sent(model, n), rows, n)


@pytest.mark.parametrize("withheld", ["head.weight", "head", "conv1", "conv2.bias"])
def test_what_was_not_observed_is_not_matched(withheld):
    model = models.build("lenet", SHAPE, K, seed=0).double()
    agree(model, {name: value for name, value in sent(model).items() if not name.startswith(withheld)})


def test_whatever_the_order_in_which_the_update_lists_its_tensors():
    model = models.build("lenet", SHAPE, K, seed=0).double()
    agree(model, dict(reversed(sent(model).items())))


class Functional(nn.Module):
    """Flattens as a function, has dropout that does nothing in eval mode, and asymmetric kernels."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, (3, 2), stride=(2, 3), padding=(0, 1))
        self.activation, self.dropout, self.head = nn.Tanh(), nn.Dropout(), nn.Linear(4 * 4 * 4, K)

    def forward(self, images):
        return self.head(
            self.dropout(self.activation(self.conv(2 * images - 1 if self.scaled else images)).flatten(1))
        )

    scaled = False


def test_flattening_may_be_a_function_and_kernels_of_any_shape():
    torch.manual_seed(0)
    model = Functional().double().eval()
    agree(model, sent(model))


def hidden_function():
    model = Functional()
    model.scaled = True
    return model


def twice():
    shared = nn.Linear(270, 270)
    return nn.Sequential(OrderedDict(flatten=nn.Flatten(), one=shared, two=shared, head=nn.Linear(270, K)))


def chain(*between):
    return nn.Sequential(
        OrderedDict(conv=nn.Conv2d(3, 4, 3), **dict(between), flatten=nn.Flatten(), head=nn.Linear(224, K))
    )


@pytest.mark.parametrize(
    "model",
    [
        hidden_function(),
        twice(),
        chain(("norm", nn.BatchNorm2d(4))),
        chain(("dropout", nn.Dropout())).train(),
        chain(("activation", nn.GELU())),
        chain(("grouped", nn.Conv2d(4, 4, 1, groups=2))),
        chain(("circular", nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"))),
        chain(("dilated", nn.Conv2d(4, 4, 3, padding=2, dilation=2))),
        chain(("same", nn.Conv2d(4, 4, 3, padding="same"))),
    ],
)
def test_other_nets_go_through_double_backward(model):
    model = model.double() if model.training else model.double().eval()
    assert chain_of(model, some(2, *SHAPE)) is None
    names = dict(model.named_parameters())
    assert isinstance(gradients_of(model, "head", names, some(2, *SHAPE)), DoubleBackward)


def test_a_residual_net_goes_through_double_backward():
    assert chain_of(models.build("resnet18", SHAPE, K, seed=0), some(2, *SHAPE).float()) is None
