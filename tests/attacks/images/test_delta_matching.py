"""δ-matching against ReLU nets whose input is known."""

from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from torch import nn

from attacks.images.delta_matching import DeltaMatching
from bench.registry import attacks
from bench.threat import Outcome

K = 10
LABELS = {
    "hard": torch.eye(K)[None, 3],
    "smoothed": 0.7 * torch.eye(K)[None, 3] + 0.3 / K,
    "mixed": 0.6 * torch.eye(K)[None, 3] + 0.4 * torch.eye(K)[None, 8],
}


def convnet(side=8, bias=False, seed=0, **replaced):
    torch.manual_seed(seed)
    layers = {
        "conv1": nn.Conv2d(1, 8, 3, padding=1),
        "activation1": nn.ReLU(),
        "conv2": nn.Conv2d(8, 16, 3, stride=2, padding=1),
        "between": nn.Identity(),
        "activation2": nn.ReLU(),
        "pool": nn.Identity(),
        "flatten": nn.Flatten(),
        "head": nn.Linear(16 * (side // 2) ** 2, K, bias=bias),
    }
    return nn.Sequential(OrderedDict(layers | replaced)).eval()


def fully_connected():
    parts = {"flatten": nn.Flatten(), "hidden": nn.Linear(64, 9), "act": nn.ReLU(), "head": nn.Linear(9, K)}
    return nn.Sequential(OrderedDict(parts))


class Residual(nn.Module):
    """Two convolutions with batch norm, a shortcut with a convolution of its own, and a ReLU."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.shortcut, self.relu = nn.Conv2d(8, 16, 1, 2, bias=False), nn.ReLU(inplace=True)

    def forward(self, x):
        inner = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        inner += self.shortcut(x)
        return self.relu(inner)


def picture(side=8, seed=0):
    """Smooth, with 8-bit levels."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 1, 4, 4, generator=rng)
    smooth = nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    return (smooth * 255).round() / 255


def attack(observation, seed=0, **parameters):
    parameters = {"iterations": 150, **parameters}
    return DeltaMatching(**parameters).run(observation, torch.Generator().manual_seed(seed))


def psnr(images, truth):
    return float(-10 * torch.log10((images.double() - truth.double()).square().mean()))


@pytest.mark.parametrize("label", LABELS)
def test_a_picture_comes_back_exactly_from_a_relu_net(observe, label):
    image = picture()
    found = attack(observe(convnet(), image, LABELS[label]))
    assert found.outcome is Outcome.OK, found.notes
    assert psnr(found.images, image) >= 70
    assert torch.equal((found.images * 255).round(), (image * 255).round())
    torch.testing.assert_close(found.soft_labels, LABELS[label], atol=0.01, rtol=0)


@pytest.mark.parametrize(
    "replaced",
    [
        {"activation2": nn.LeakyReLU(0.2)},
        {"activation1": nn.Tanh(), "activation2": nn.Tanh()},
        {"between": nn.BatchNorm2d(16)},
        {"activation1": nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 1, 1))},
        {"activation1": nn.Sequential(nn.ReLU(), nn.AvgPool2d(3, 1, 1))},
    ],
)
def test_any_activation_pooling_and_batch_norm_below_the_last_relu_will_do(observe, replaced):
    image = picture()
    found = attack(observe(convnet(**replaced), image, LABELS["hard"]))
    assert found.outcome is Outcome.OK, found.notes
    assert psnr(found.images, image) >= 60


def test_a_residual_block_at_the_end_will_do(observe):
    torch.manual_seed(0)
    parts = {
        "conv1": nn.Conv2d(1, 8, 3, padding=1),
        "activation1": nn.ReLU(),
        "block": Residual(),
        "flatten": nn.Flatten(),
        "head": nn.Linear(16 * 16, K, bias=False),
    }
    model, image = nn.Sequential(OrderedDict(parts)).eval(), picture()
    found = attack(observe(model, image, LABELS["smoothed"]), iterations=400)
    assert found.outcome is Outcome.OK, found.notes
    assert psnr(found.images, image) >= 50


def test_a_start_that_got_stuck_says_step_limit_with_its_best(observe):
    seen = observe(convnet(), picture(), LABELS["hard"])
    found = attack(seen, iterations=1, steps=0, restarts=2)
    assert found.outcome is Outcome.STEP_LIMIT
    assert "is not explained" in found.notes["reason"]
    assert found.notes["starts"] == 2
    assert found.images.shape == (1, 1, 8, 8)


def test_noise_is_told_from_features_of_no_unit(observe):
    """At 1e-3 the head's noise would wake every dead unit; each one taken for alive costs 20 dB."""
    image = picture()
    seen = observe(convnet(), image, LABELS["hard"])
    rng = torch.Generator().manual_seed(0)
    update = {
        name: sent + 1e-3 * sent.square().mean().sqrt() * torch.randn(sent.shape, generator=rng)
        for name, sent in seen.update.items()
    }
    found = attack(replace(seen, update=update))
    assert psnr(found.images, image) >= 25


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (convnet(pool=nn.AdaptiveAvgPool2d(1), head=nn.Linear(16, K)), "δ is hidden"),
        (convnet(activation2=nn.GELU(), activation1=nn.GELU()), "no sigmoid, tanh, ReLU"),
        (convnet(between=nn.Dropout(0.5)).train(), "drops units at random"),
        (convnet(between=nn.BatchNorm2d(16)).train(), "is not linear"),
        (fully_connected(), "no plain convolution"),
    ],
)  # fmt: skip
def test_what_hides_delta_says_so_at_once(observe, model, reason):
    found = attack(observe(model, picture(), LABELS["hard"]))
    assert found.outcome is Outcome.UNIDENTIFIABLE
    assert reason in found.notes["reason"]
    assert found.images is None


def test_fewer_equations_than_pixels_are_said(observe):
    model = convnet(conv2=nn.Conv2d(8, 1, 3, 4, 1), between=nn.Identity(), head=nn.Linear(36, K, bias=False))
    found = attack(observe(model, torch.rand(1, 1, 24, 24), LABELS["hard"]))
    assert found.notes["reason"] == "108 equations for 576 pixels"


def test_a_gradient_that_is_not_finite_has_diverged(observe):
    seen = observe(convnet(), picture(), LABELS["hard"])
    seen.update["conv1.weight"][0, 0, 0, 0] = torch.inf
    assert attack(seen).outcome is Outcome.DIVERGED


def test_the_last_convolution_has_to_be_sent(observe):
    seen = observe(convnet(), picture(), LABELS["hard"])
    found = attack(replace(seen, update={n: g for n, g in seen.update.items() if n != "conv2.weight"}))
    assert found.outcome is Outcome.UNIDENTIFIABLE
    assert found.notes["reason"] == "the gradient of conv2.weight was not sent"


def test_the_model_is_left_as_it_was(observe, is_left_as_it_was):
    model = convnet()
    unchanged = is_left_as_it_was(model)
    attack(observe(model, picture(), LABELS["hard"]), iterations=2)
    assert unchanged()


def test_the_answer_follows_from_the_generator(observe):
    seen = observe(convnet(), picture(), LABELS["hard"])
    first, again, other = (attack(seen, seed, iterations=2, steps=0).images for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_every_factory_call_names_its_device(observe, every_factory_names_its_device):
    seen = observe(convnet(), picture(), LABELS["smoothed"])
    with every_factory_names_its_device:
        attack(seen, iterations=2, steps=1)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"iterations": 0}, {"lr": 0.0}, {"lr": 2.0}, {"tv": 0.0}),
        *({"tv_end": 1.0}, {"steps": -1}, {"restarts": 0}, {"tolerance": 0.0}),
    ],
)
def test_parameters_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DeltaMatching(**wrong)


def test_batches_local_steps_and_a_withheld_head_are_skipped(observe):
    facts = observe(convnet(), picture(), LABELS["hard"]).facts
    assert DeltaMatching().skip(facts) is None
    assert DeltaMatching().skip(replace(facts, batch_size=4)) == "needs a batch of one, got 4"
    assert "head_withheld" in DeltaMatching().skip(replace(facts, protocol="head_withheld"))


def test_its_revision_follows_that_of_lambda_recovery():
    assert attacks.make("delta_matching") == DeltaMatching()
    assert attacks.revision("delta_matching") == f"1/{attacks.revision('lambda_recovery')}"
