"""The layer-by-layer attack against convolutional nets whose input is known."""

from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from torch import nn

from attacks.images.layerwise import Layerwise
from bench.registry import attacks
from bench.threat import Outcome

K = 10
ACTIVATIONS = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "leaky_relu": lambda: nn.LeakyReLU(0.2)}
LABELS = {
    "hard": torch.eye(K)[None, 3],
    "smoothed": 0.7 * torch.eye(K)[None, 3] + 0.3 / K,
    "mixed": 0.6 * torch.eye(K)[None, 3] + 0.4 * torch.eye(K)[None, 8],
}


class PerChannel(nn.Module):
    def forward(self, images):
        return (images - 0.45) / 0.25


def lenet(activation="sigmoid", side=12, bias=False, seed=0, between=None):
    """A small LeNet as DLG draws it: 5 × 5 kernels, the first with stride 2."""
    torch.manual_seed(seed)
    act = ACTIVATIONS[activation]
    layers = [
        ("normalize", PerChannel()),
        ("conv1", nn.Conv2d(3, 12, 5, stride=2, padding=2)),
        ("between", between or nn.Identity()),
        ("activation1", act()),
        ("conv2", nn.Conv2d(12, 12, 5, padding=2)),
        ("activation2", act()),
        ("flatten", nn.Flatten()),
        ("head", nn.Linear(12 * (-(-side // 2)) ** 2, K, bias=bias)),
    ]
    net = nn.Sequential(OrderedDict(layers))
    if activation == "sigmoid":
        for parameter in net.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5)
    return net.eval()


def picture(side=12, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (1, 3, side, side), generator=rng) / 255


def attack(observation, **parameters):
    return Layerwise(**parameters).run(observation, torch.Generator().manual_seed(0))


def psnr(images, truth):
    return float(-10 * torch.log10((images.double() - truth.double()).square().mean()))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("label", LABELS)
def test_a_picture_comes_back_at_80_db_whatever_the_label(observe, label, activation):
    image = picture()
    found = attack(observe(lenet(activation), image, LABELS[label]))
    assert found.outcome is Outcome.OK, found.notes
    assert psnr(found.images, image) >= 80
    assert torch.equal((found.images * 255).round(), (image * 255).round())
    torch.testing.assert_close(found.soft_labels, LABELS[label], atol=0.01, rtol=0)


def test_a_bias_of_the_head_is_used(observe):
    image = picture()
    any_label = torch.softmax(torch.arange(K) / 3, dim=0)[None]
    found = attack(observe(lenet(bias=True), image, any_label))
    assert found.outcome is Outcome.OK, found.notes
    assert psnr(found.images, image) >= 80


def test_a_batch_norm_in_eval_mode_is_folded_in(observe):
    norm = nn.BatchNorm2d(12)
    norm.running_mean.copy_(torch.linspace(-1, 1, 12))
    norm.running_var.copy_(torch.linspace(0.5, 2, 12))
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.6, 1.4, 12))
        norm.bias.copy_(torch.linspace(-0.3, 0.3, 12))
    model, image = lenet("tanh", between=norm), picture()
    found = attack(observe(model, image, LABELS["smoothed"]))
    assert found.outcome is Outcome.OK, found.notes
    assert psnr(found.images, image) >= 80


def test_linear_layers_above_the_convolutions_are_walked_down(observe):
    image = picture()
    parts = [*list(lenet("tanh").named_children())[:-1]]
    parts += [("hidden", nn.Linear(432, 64)), ("relu", nn.ReLU()), ("head", nn.Linear(64, K, bias=False))]
    model = nn.Sequential(OrderedDict(parts)).eval()
    found = attack(observe(model, image, LABELS["mixed"]))
    assert found.outcome is Outcome.OK, found.notes
    assert psnr(found.images, image) >= 80


def noisy(seen, level):
    rng = torch.Generator().manual_seed(0)
    update = {
        name: sent + level * sent.square().mean().sqrt() * torch.randn(sent.shape, generator=rng)
        for name, sent in seen.update.items()
    }
    return replace(seen, update=update)


def test_noise_costs_its_decibels_and_no_more(observe):
    image = picture()
    seen = observe(lenet(), image, LABELS["hard"])
    exact, little, more = (psnr(attack(noisy(seen, n)).images, image) for n in (0, 1e-5, 1e-3))
    assert exact > little > more
    assert little >= 40


def test_two_examples_contradict_themselves(observe):
    images = torch.cat([picture(seed=0), picture(seed=1)])
    two = observe(lenet(bias=True), images, torch.cat([LABELS["hard"], LABELS["mixed"]]))
    found = attack(replace(two, facts=replace(two.facts, batch_size=1)))
    assert found.outcome is Outcome.UNIDENTIFIABLE
    assert found.notes["reason"]
    assert found.images.shape == (1, 3, 12, 12)


def changed(name, module):
    model = lenet("tanh")
    model.set_submodule(name, module)
    return model


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (changed("activation1", nn.ReLU()), "ReLU after conv1 has no inverse"),
        (changed("activation1", nn.GELU()), "GELU between layers"),
        (changed("between", nn.Dropout(0.5)).train(), "drops units at random"),
        (changed("between", nn.BatchNorm2d(12)).train(), "takes its statistics from the batch"),
        (changed("activation1", nn.Sequential(nn.Tanh(), nn.AvgPool2d(3, 1, 1))), "Tanh, AvgPool2d between"),
        (changed("conv2", nn.Conv2d(12, 12, 5, padding=2, groups=2)), "conv2 has groups"),
    ],
)
def test_what_is_no_such_net_says_so_before_anything_is_solved(observe, model, reason):
    found = attack(observe(model, picture(), LABELS["hard"]))
    assert found.outcome is Outcome.UNIDENTIFIABLE
    assert reason in found.notes["reason"]
    assert found.images is None


def test_too_few_equations_are_counted_in_advance(observe):
    model = lenet("tanh", side=12)
    model.conv1 = nn.Conv2d(3, 4, 3, stride=3)  # 16 numbers of a channel at each place, met by 4 equations
    model.conv2 = nn.Conv2d(4, 4, 3, stride=2, padding=1)
    model.head = nn.Linear(4 * 2 * 2, K, bias=False)
    found = attack(observe(model, picture(), LABELS["hard"]))
    assert found.outcome is Outcome.UNIDENTIFIABLE
    assert "equations too few" in found.notes["reason"]


def test_a_gradient_that_is_not_finite_has_diverged(observe):
    seen = observe(lenet(), picture(), LABELS["hard"])
    seen.update["conv1.weight"][0, 0, 0, 0] = torch.nan
    found = attack(seen)
    assert found.outcome is Outcome.DIVERGED
    assert found.notes["reason"] == "the gradient of conv1.weight is not finite"


def test_a_layer_that_was_not_sent_is_said(observe):
    seen = observe(lenet(), picture(), LABELS["hard"])
    found = attack(replace(seen, update={n: g for n, g in seen.update.items() if n != "conv1.weight"}))
    assert found.outcome is Outcome.UNIDENTIFIABLE
    assert found.notes["reason"] == "the gradient of conv1.weight was not sent"


def test_the_model_is_left_as_it_was(observe, is_left_as_it_was):
    model = lenet()
    unchanged = is_left_as_it_was(model)
    attack(observe(model, picture(), LABELS["hard"]))
    assert unchanged()


def test_every_factory_call_names_its_device(observe, every_factory_names_its_device):
    seen = observe(lenet(), picture(), LABELS["smoothed"])
    with every_factory_names_its_device:
        assert attack(seen).outcome is Outcome.OK


def test_batches_local_steps_and_a_withheld_head_are_skipped(observe):
    facts = observe(lenet(), picture(), LABELS["hard"]).facts
    assert Layerwise().skip(facts) is None
    assert Layerwise().skip(replace(facts, batch_size=4)) == "needs a batch of one, got 4"
    for protocol in ("fedavg(steps=5, lr=0.01)", "head_withheld"):
        reason = Layerwise().skip(replace(facts, protocol=protocol))
        assert reason == f"needs the whole gradient of one step, got {protocol}"


@pytest.mark.parametrize("tolerance", [0.0, -1.0, float("nan"), float("inf")])
def test_a_tolerance_out_of_range_is_refused(tolerance):
    with pytest.raises(ValueError, match="is not a number above 0"):
        Layerwise(tolerance=tolerance)


def test_its_revision_follows_that_of_lambda_recovery():
    assert attacks.make("layerwise") == Layerwise()
    assert attacks.revision("layerwise") == f"1/{attacks.revision('lambda_recovery')}"
