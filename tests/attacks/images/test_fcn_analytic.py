"""The analytic attack against nets whose input is known."""

from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from torch import nn

from attacks.images.fcn_analytic import FCNAnalytic
from bench.registry import attacks
from bench.threat import Outcome

K = 10
SHAPE = (1, 28, 28)
ACTIVATIONS = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
}
LABELS = {
    "hard": torch.eye(K)[None, 3],
    "smoothed": 0.7 * torch.eye(K)[None, 3] + 0.3 / K,
    "mixed": 0.6 * torch.eye(K)[None, 3] + 0.4 * torch.eye(K)[None, 8],
}


class PerChannel(nn.Module):
    """Normalisation, as an affine map of each channel."""

    def __init__(self, mean=0.13, std=0.31):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(-1, 1, 1))

    def forward(self, images):
        return (images - self.mean) / self.std


def fcn(activation="relu", depth=3, bias=False, width=48, shape=SHAPE, first=None, seed=0):
    torch.manual_seed(seed)
    layers = [("normalize", first or PerChannel()), ("flatten", nn.Flatten())]
    inputs = shape[0] * shape[1] * shape[2]
    for index in range(1, depth):
        layers += [(f"linear{index}", nn.Linear(inputs, width, bias=bias))]
        layers += [(f"activation{index}", ACTIVATIONS[activation]())]
        inputs = width
    return nn.Sequential(OrderedDict([*layers, ("head", nn.Linear(inputs, K, bias=bias))]))


def digit(shape=SHAPE, seed=0):
    """A picture like a digit's: mostly black, the rest 8-bit grey levels."""
    rng = torch.Generator().manual_seed(seed)
    ink = torch.rand(1, *shape, generator=rng) < 0.2
    return ink * torch.randint(0, 256, (1, *shape), generator=rng) / 255


def attack(observation, **parameters):
    return FCNAnalytic(**parameters).run(observation, torch.Generator().manual_seed(0))


def psnr(images, truth):
    return float(-10 * torch.log10((images.double() - truth.double()).square().mean()))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("label", LABELS)
def test_an_image_comes_back_at_80_db_whatever_the_label(observe, label, activation, bias):
    image = digit()
    found = attack(observe(fcn(activation, bias=bias), image, LABELS[label]))
    assert found.outcome is Outcome.OK, found.notes
    assert psnr(found.images, image) >= 80


@pytest.mark.parametrize("depth", [1, 2, 4, 5, 6])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_depth_does_not_matter(observe, activation, depth):
    image = digit()
    found = attack(observe(fcn(activation, depth), image, LABELS["smoothed"]))
    assert found.outcome is Outcome.OK, found.notes
    assert psnr(found.images, image) >= 80


def test_a_colour_image_normalised_by_channel_comes_back(observe):
    shape, first = (3, 8, 8), PerChannel(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25))
    image = digit(shape)
    found = attack(observe(fcn(shape=shape, first=first), image, LABELS["mixed"]))
    assert psnr(found.images, image) >= 80


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("label", LABELS)
def test_label_and_features_come_along(observe, label, bias):
    model, image = fcn(bias=bias), digit()
    found = attack(observe(model, image, LABELS[label]))
    torch.testing.assert_close(found.soft_labels, LABELS[label], atol=0.01, rtol=0)
    torch.testing.assert_close(found.features, model[:-1](image), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("with_bias", ["linear1", "linear2", "head"])
def test_a_bias_anywhere_is_used_and_the_rest_walked_down(observe, with_bias):
    model, image = fcn("sigmoid"), digit()
    layer = model.get_submodule(with_bias)
    layer.bias = nn.Parameter(torch.linspace(-1, 1, layer.out_features))
    found = attack(observe(model, image, LABELS["hard"]))
    assert found.outcome is Outcome.OK, found.notes
    assert psnr(found.images, image) >= 80


def test_with_a_bias_any_label_will_do(observe):
    image = digit()
    soft_labels = torch.softmax(torch.arange(K) / 3, dim=0)[None]
    found = attack(observe(fcn("sigmoid", bias=True), image, soft_labels))
    assert found.outcome is Outcome.OK, found.notes
    assert psnr(found.images, image) >= 80


def test_a_net_all_of_whose_relus_are_dead_is_unidentifiable(observe):
    model = fcn(first=nn.Identity())
    with torch.no_grad():
        model.linear1.weight.copy_(-model.linear1.weight.abs())
    found = attack(observe(model, digit(), LABELS["hard"]))
    assert found.outcome is Outcome.UNIDENTIFIABLE
    assert found.notes["reason"] == "the label: the weight gradient is zero: x = 0 or p = y"
    assert found.images is None


def test_a_dead_relu_layer_with_biases_leaves_the_label_and_says_which_layer(observe):
    model = fcn(bias=True)
    with torch.no_grad():
        model.linear2.bias.fill_(-1000)
    found = attack(observe(model, digit(), LABELS["smoothed"]))
    assert found.outcome is Outcome.UNIDENTIFIABLE
    assert found.notes["reason"] == "no gradient at linear2: a layer is dead for this input, or p = y"
    assert found.images is None
    torch.testing.assert_close(found.soft_labels, LABELS["smoothed"], atol=1e-5, rtol=0)


def test_an_undetermined_label_is_said_and_the_best_guess_handed_over(observe):
    soft_labels = torch.softmax(torch.arange(K) / 3, dim=0)[None]  # no structure, and no bias
    found = attack(observe(fcn("sigmoid"), digit(), soft_labels))
    assert found.outcome is Outcome.UNIDENTIFIABLE
    assert "label" in found.notes["reason"]


def test_a_gradient_of_two_examples_fails_the_self_check_with_the_guess_handed_over(observe):
    images = torch.cat([digit(seed=0), digit(seed=1)])
    two = observe(fcn(bias=True), images, torch.cat([LABELS["hard"], LABELS["mixed"]]))
    found = attack(replace(two, facts=replace(two.facts, batch_size=1)))
    assert found.outcome is Outcome.UNIDENTIFIABLE
    assert found.images.shape == (1, *SHAPE)


def test_noise_on_the_gradient_fails_the_self_check(observe):
    seen = observe(fcn(bias=True), digit(), LABELS["hard"])
    rng = torch.Generator().manual_seed(0)
    noisy = {n: g + g.std() * torch.randn(g.shape, generator=rng) for n, g in seen.update.items()}
    assert attack(replace(seen, update=noisy)).outcome is Outcome.UNIDENTIFIABLE


class WithFunctionalActivation(nn.Sequential):
    def forward(self, images):
        hidden = self.linear1(self.flatten(images))
        return self.head(torch.relu(hidden))


def replaced(name, module):
    model = fcn()
    if isinstance(module, nn.ReplicationPad2d):
        model.linear1 = nn.Linear(30 * 30, 48)
    model.set_submodule(name, module)
    return model


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (replaced("normalize", nn.Conv2d(1, 1, 3, padding=1)), "normalize is a convolution"),
        (replaced("activation1", nn.BatchNorm1d(48)), "BatchNorm1d"),
        (replaced("activation1", nn.GELU()), "GELU"),
        (replaced("activation1", nn.Sequential(nn.Tanh(), nn.ReLU())), "Tanh, ReLU"),
        (replaced("normalize", nn.AvgPool2d(3, 1, 1)), "single pixels"),
        (replaced("normalize", nn.ReplicationPad2d(1)), "each pixel once"),
        (replaced("normalize", nn.Softmax(dim=-1)), "pixels"),
        (nn.Sequential(OrderedDict([*fcn().named_children(), ("last", nn.Tanh())])), "no label"),
        (WithFunctionalActivation(OrderedDict(fcn(depth=2).named_children())), "in a row"),
    ],
)
def test_what_is_no_such_net_is_unidentifiable_with_the_reason(observe, model, reason):
    found = attack(observe(model.eval(), digit(), LABELS["hard"]))
    assert found.outcome is Outcome.UNIDENTIFIABLE
    assert reason in found.notes["reason"]


def test_dropout_stands_in_the_way_in_train_mode_alone(observe):
    model, image = fcn(), digit()
    model.activation1 = nn.Sequential(nn.ReLU(), nn.Dropout(0.5))
    assert psnr(attack(observe(model.eval(), image, LABELS["hard"])).images, image) >= 80
    found = attack(observe(model.train(), image, LABELS["hard"]))
    assert found.outcome is Outcome.UNIDENTIFIABLE
    assert found.notes["reason"] == "the model drops units at random, in activation1.1"


def test_a_head_that_was_withheld_is_said(observe):
    seen = observe(fcn(), digit(), LABELS["hard"])
    found = attack(replace(seen, update={n: g for n, g in seen.update.items() if not n.startswith("head")}))
    assert found.outcome is Outcome.UNIDENTIFIABLE
    assert found.notes["reason"] == "the head's gradient was not sent"


def test_a_gradient_that_is_not_finite_has_diverged(observe):
    seen = observe(fcn(), digit(), LABELS["hard"])
    seen.update["linear1.weight"][0, 0] = torch.nan
    found = attack(seen)
    assert found.outcome is Outcome.DIVERGED
    assert found.notes["reason"] == "the gradient of linear1.weight is not finite"


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(observe, is_left_as_it_was, training):
    model = fcn(bias=True).train(training)
    unchanged = is_left_as_it_was(model)
    attack(observe(model, digit(), LABELS["hard"]))
    assert unchanged()


def test_the_generator_does_not_change_the_answer(observe):
    seen = observe(fcn(), digit(), LABELS["mixed"])
    first, second = (FCNAnalytic().run(seen, torch.Generator().manual_seed(s)) for s in (0, 1))
    assert torch.equal(first.images, second.images)


def test_every_factory_call_names_its_device(observe, every_factory_names_its_device):
    seen = observe(fcn(), digit(), LABELS["smoothed"])
    with every_factory_names_its_device:
        assert attack(seen).outcome is Outcome.OK


def test_a_batch_of_four_and_local_steps_are_skipped_with_the_reason(observe):
    facts = observe(fcn(), digit(), LABELS["hard"]).facts
    assert FCNAnalytic().skip(facts) is None
    assert FCNAnalytic().skip(replace(facts, batch_size=4)) == "needs a batch of one, got 4"
    several = replace(facts, protocol="fedavg(steps=5, lr=0.01)")
    assert FCNAnalytic().skip(several) == "needs the whole gradient of one step, got fedavg(steps=5, lr=0.01)"


@pytest.mark.parametrize("tolerance", [0.0, -1.0, float("nan"), float("inf")])
def test_a_tolerance_out_of_range_is_refused(tolerance):
    with pytest.raises(ValueError, match="is not a number above 0"):
        FCNAnalytic(tolerance=tolerance)


def test_it_is_registered_under_its_name():
    assert attacks.make("fcn_analytic") == FCNAnalytic()
