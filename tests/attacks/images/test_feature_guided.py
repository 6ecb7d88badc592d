"""Feature-guided matching: a stack of weights, and the rule that chooses among them."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from attacks.images.feature_guided import FeatureGuided
from attacks.images.inverting_gradients import InvertingGradients
from attacks.solvers.gradient_matching import DoubleBackward
from attacks.solvers.matching_objectives import Cosine
from bench.threat import Knowledge, Outcome


@pytest.fixture
def seen(observe, small_net, smooth_picture):
    soft_labels = torch.tensor([[0.7, 0.3, 0, 0]])
    return observe(small_net(nn.ReLU()), smooth_picture, soft_labels, Knowledge(soft_labels=soft_labels))


def attack(observed, **parameters):
    parameters = {"iterations": 40} | parameters
    return FeatureGuided(**parameters).run(observed, torch.Generator().manual_seed(1))


def test_of_all_weights_the_closest_gradient_wins(seen):
    alone = [attack(seen, weights=(weight,)) for weight in (0.0, 0.3, 30.0)]
    together = attack(seen, weights=(0.0, 0.3, 30.0))
    best = min(alone, key=lambda found: found.notes["distance"])
    torch.testing.assert_close(together.images, best.images)
    assert together.notes["distance"] == pytest.approx(best.notes["distance"], rel=1e-4)


def test_its_distance_is_that_of_gradients_alone(seen):
    found = attack(seen, weights=(1.0,))
    gradients = DoubleBackward(seen.model, "head", seen.update)
    distance = gradients(found.images[None], found.soft_labels[None], Cosine(), None).distance.item()
    assert found.notes["distance"] == pytest.approx(distance, rel=1e-3)
    assert found.notes["loss"] > found.notes["distance"]


def test_weight_zero_is_inverting_gradients(seen):
    plain = InvertingGradients(iterations=40, tv=0.01).run(seen, torch.Generator().manual_seed(1))
    torch.testing.assert_close(attack(seen, weights=(0.0,)).images, plain.images)


def test_a_feature_alone_is_followed_where_the_weight_is_large(seen, smooth_picture):
    body = seen.model[:-1]
    found = body(attack(seen, weights=(1e4,), iterations=200).images)
    assert torch.cosine_similarity(found, body(smooth_picture)).item() > 0.98


@pytest.mark.parametrize("labels", ["truth", "joint"])
def test_labels_may_come_from_elsewhere_than_features(seen, labels):
    assert attack(seen, labels=labels, iterations=3).images is not None
    assert "lambda_recovery" in FeatureGuided(labels=labels).builds_on


def test_batches_are_skipped_with_the_feature_attack_s_reason(seen):
    four = replace(seen.facts, batch_size=4)
    reason = FeatureGuided(labels="joint").skip(four)
    assert reason == "features='lambda_recovery': needs a batch of one, got 4"


def test_without_a_feature_there_is_no_image(seen):
    withheld = {name: value for name, value in seen.update.items() if not name.startswith("head")}
    found = attack(replace(seen, update=withheld), labels="joint")
    assert found.outcome is Outcome.UNIDENTIFIABLE
    assert found.images is None
    assert "features='lambda_recovery'" in found.notes["reason"]


def test_an_attack_that_finds_no_features_is_refused():
    with pytest.raises(ValueError, match="finds no features"):
        FeatureGuided(features="idlg")


@pytest.mark.parametrize("weights", [(), (-1.0,), (float("nan"),)])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(ValueError, match="weights="):
        FeatureGuided(weights=weights)
