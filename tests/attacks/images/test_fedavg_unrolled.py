"""FedAvg, unrolled: better than one gradient's matching where steps are long."""

from dataclasses import replace

import pytest
import torch

from attacks.images.fedavg_unrolled import FedAvgUnrolled
from attacks.images.inverting_gradients import InvertingGradients
from bench.cases import protocol
from bench.cases.client import FedSGDClient
from bench.registry import defenses
from bench.threat import Batch, Facts, Knowledge

SPEC = "fedavg(steps=4, lr=0.01)"


@pytest.fixture
def averaged(observe, small_net, smooth_picture):
    model, labels = small_net(), torch.eye(4)[:1]
    batch = Batch(smooth_picture, labels)
    (delta,) = protocol.make(SPEC).updates(
        FedSGDClient(model), defenses.make("none"), [batch], torch.Generator()
    )
    seen = observe(model, smooth_picture, labels)
    knowledge = Knowledge(local_steps=4, local_lr=0.01, soft_labels=labels)
    return replace(seen, update=delta, facts=replace(seen.facts, protocol=SPEC), knowledge=knowledge)


def test_it_sees_what_a_single_gradient_misses(averaged, smooth_picture):
    errors = []
    for attack in (FedAvgUnrolled, InvertingGradients):
        found = attack(labels="truth", iterations=200, tv=0.0).run(averaged, torch.Generator())
        errors.append((found.images - smooth_picture).square().mean())
    assert errors[0] < 0.7 * errors[1]


def test_a_single_gradient_is_one_step(observe, small_net, smooth_picture):
    seen = observe(small_net(), smooth_picture, torch.eye(4)[:1], Knowledge(soft_labels=torch.eye(4)[:1]))
    ours, plain = (
        attack(labels="truth", iterations=5, tv=0.01).run(seen, torch.Generator())
        for attack in (FedAvgUnrolled, InvertingGradients)
    )
    torch.testing.assert_close(ours.images, plain.images)


def test_steps_and_rate_have_to_be_granted(averaged):
    facts = Facts(1, 4, (3, 8, 8), 512, False, False, SPEC)
    reason = "needs the client's steps: grant knowledge = ['local_steps', 'local_lr']"
    assert FedAvgUnrolled(labels="joint").skip(facts) == reason
    granted = replace(facts, granted=frozenset({"local_steps", "local_lr"}))
    assert FedAvgUnrolled(labels="joint").skip(granted) is None
    with pytest.raises(ValueError, match="grant knowledge"):
        FedAvgUnrolled(labels="joint").run(replace(averaged, knowledge=Knowledge()), torch.Generator())
