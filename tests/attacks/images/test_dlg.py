"""DLG: torch's L-BFGS on the squared distance between gradients, as its authors run it."""

import pytest
import torch
from torch import nn

from attacks.images.dlg import DLG
from bench.threat import Facts, Knowledge, Outcome


def as_published(observed, images, logits, iterations):
    """Zhu et al.'s loop: one optimiser over images and label logits, gradients by double backward."""
    variables = [images.requires_grad_(), logits.requires_grad_()]
    optimizer = torch.optim.LBFGS(variables, max_iter=iterations, tolerance_grad=0, tolerance_change=0)
    parameters = list(observed.model.parameters())

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(observed.model(images), torch.softmax(logits, dim=-1))
        gradient = torch.autograd.grad(loss, parameters, create_graph=True)
        both = zip(gradient, observed.update.values(), strict=True)
        distance = sum((ours - theirs).square().sum() for ours, theirs in both)
        distance.backward(inputs=variables)
        return distance

    optimizer.step(closure)
    return images.detach()


def test_its_path_is_the_published_one(observe, small_net, smooth_picture):
    observed = observe(small_net().double(), smooth_picture.double(), torch.eye(4).double()[:1])
    rng = torch.Generator().manual_seed(3)
    torch.randint(2**62, (), generator=rng)  # what dropout would follow
    images = torch.rand(1, 3, 8, 8, generator=rng, dtype=torch.float64)
    logits = torch.randn(1, 4, generator=rng, dtype=torch.float64)
    theirs = as_published(observed, images, logits, 12)
    found = DLG(iterations=12).run(observed, torch.Generator().manual_seed(3))
    torch.testing.assert_close(found.images, theirs.clamp(0, 1), rtol=0, atol=1e-9)


@pytest.mark.parametrize("line_search", ["none", "wolfe"])
def test_image_and_label_come_back_from_a_smooth_net(observe, small_net, smooth_picture, line_search):
    observed = observe(small_net(), smooth_picture, torch.eye(4)[2:3])
    found = DLG(iterations=250, line_search=line_search, restarts=2).run(observed, torch.Generator())
    assert (found.images - smooth_picture).square().mean() < 1e-3
    assert found.soft_labels.argmax() == 2


def test_a_fedavg_update_is_skipped_unless_its_length_is_granted():
    facts = Facts(1, 4, (3, 8, 8), 512, False, False, "fedavg(steps=2, lr=0.1)")
    assert DLG().skip(facts) == "needs the gradient's length: grant knowledge = ['local_steps', 'local_lr']"
    assert DLG().uses == {"local_steps", "local_lr"}


def test_with_steps_and_rate_a_fedavg_update_has_the_gradient_s_length(observe, small_net, smooth_picture):
    observed = observe(small_net(), smooth_picture, torch.eye(4)[:1])
    facts = Facts(1, 4, (3, 8, 8), 512, False, False, "fedavg(steps=1, lr=0.25)")
    delta = {name: -0.25 * value for name, value in observed.update.items()}
    averaged = type(observed)(observed.model, delta, "head", facts, Knowledge(local_steps=1, local_lr=0.25))
    first, second = (DLG(iterations=5).run(each, torch.Generator()) for each in (observed, averaged))
    torch.testing.assert_close(first.images, second.images)


def test_a_gradient_that_is_not_finite_diverges(observe, small_net, smooth_picture):
    observed = observe(small_net(), smooth_picture, torch.eye(4)[:1])
    observed.update["conv.bias"][0] = torch.inf
    found = DLG(iterations=3).run(observed, torch.Generator())
    assert found.outcome is Outcome.DIVERGED
    assert found.notes["stopped"] == "not finite"
    assert found.images is None


def test_a_gradient_that_is_matched_ends_the_search(observe, small_net, smooth_picture):
    observed = observe(small_net().double(), smooth_picture.double(), torch.eye(4).double()[:1])
    found = DLG(iterations=2000, line_search="wolfe", restarts=2).run(observed, torch.Generator())
    assert found.outcome is Outcome.OK
    assert found.notes["stopped"] == "matched"
    assert found.notes["iterations"] < 2000
    assert (found.images - smooth_picture).square().mean() < 1e-6
