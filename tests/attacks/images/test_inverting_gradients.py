"""Inverting Gradients on small nets: where its labels come from, what it leaves alone, what it hands back."""

from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from torch import nn

from attacks.images.inverting_gradients import InvertingGradients
from attacks.solvers.gradient_matching import DoubleBackward, Objective
from attacks.solvers.matching_objectives import Cosine, TotalVariation
from bench.errors import UserError
from bench.registry import attacks
from bench.threat import Knowledge, Outcome

K = 4
SHAPE = (3, 8, 8)


def convnet(shape=SHAPE, between=None, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(shape[0], 8, 3, padding=1),
            between=between or nn.Identity(),
            activation=nn.ReLU(),
            flatten=nn.Flatten(),
            head=nn.Linear(8 * shape[1] * shape[2], K, bias=False),
        )
    )


def pictures(n=1, shape=SHAPE):
    """Smooth ones: a dark and a bright half, each on a slope."""
    across, down = torch.linspace(0, 1, shape[2]), torch.linspace(0, 1, shape[1])[:, None]
    picture = 0.3 * across + 0.2 * down + 0.4 * (across > down)
    return torch.stack([torch.stack([picture.roll(i + 2 * c, 1) for c in range(shape[0])]) for i in range(n)])


def labels(n=1):
    return torch.eye(K)[torch.arange(n) % K]


def attack(observation, seed=0, **parameters):
    parameters = {"iterations": 5, "tv": 0.01} | parameters
    return InvertingGradients(**parameters).run(observation, torch.Generator().manual_seed(seed))


@pytest.fixture
def seen(observe):
    return observe(convnet(), pictures(), labels())


@pytest.fixture
def informed(observe):
    return observe(convnet(), pictures(), labels(), Knowledge(soft_labels=labels()))


def test_it_sees_more_than_the_picture_s_mean_colour(informed):
    """A constant image's best mean squared error is the picture's variance."""
    found = attack(informed, labels="truth", iterations=150)
    error = (found.images - pictures()).square().mean()
    assert error < 0.25 * pictures().var(dim=(2, 3), correction=0).mean()
    assert found.outcome is Outcome.STEP_LIMIT


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 6)])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("kind", ["truth", "joint"])
def test_batches_grey_and_colour_come_back_in_their_shape(observe, kind, n, shape):
    observed = observe(convnet(shape), pictures(n, shape), labels(n), Knowledge(soft_labels=labels(n)))
    found = attack(observed, labels=kind)
    assert found.images.shape == (n, *shape)
    assert found.images.min() >= 0
    assert found.images.max() <= 1


@pytest.mark.parametrize("restarts", [1, 3])
def test_the_loss_in_its_notes_is_that_of_its_images(informed, restarts):
    found = attack(informed, labels="truth", restarts=restarts)
    gradients = DoubleBackward(informed.model, "head", informed.update)
    objective = Objective(gradients, Cosine(), (TotalVariation(0.01),))
    loss = objective(found.images[None], labels()[None]).total.item()
    assert loss == pytest.approx(found.notes["loss"], abs=1e-5)


def test_of_several_starts_the_lowest_loss_wins(informed):
    one, more = (attack(informed, labels="truth", restarts=n).notes["loss"] for n in (1, 6))
    assert more < one


@pytest.mark.parametrize("kind", ["truth", "joint", "lambda_recovery"])
def test_its_generator_decides_alone(informed, kind):
    torch.manual_seed(1)
    first = attack(informed, seed=3, labels=kind)
    torch.manual_seed(2)
    assert torch.equal(attack(informed, seed=3, labels=kind).images, first.images)
    assert not torch.equal(attack(informed, seed=4, labels=kind).images, first.images)


def test_dropout_follows_the_generator_and_leaves_the_global_one_alone(observe):
    observed = observe(convnet(between=nn.Dropout(0.5)).train(), pictures(), labels())
    torch.manual_seed(1)
    first, state = attack(observed, labels="joint"), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(attack(observed, labels="joint").images, first.images)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(observe, is_left_as_it_was, training):
    model = convnet(between=nn.BatchNorm2d(8)).train(training)
    observed = observe(model, pictures(2), labels(2), Knowledge(soft_labels=labels(2)))
    unchanged = is_left_as_it_was(model)
    attack(observed, labels="truth")
    assert unchanged()


@pytest.mark.parametrize("kind", ["truth", "joint", "idlg", "lambda_recovery"])
def test_every_factory_call_names_its_device(informed, every_factory_names_its_device, kind):
    with every_factory_names_its_device:
        assert attack(informed, labels=kind).outcome is Outcome.STEP_LIMIT


# --- labels -----------------------------------------------------------------------------------------------


def test_a_label_attack_s_labels_are_used_and_handed_back(observe):
    soft_labels = 0.6 * labels() + 0.4 * labels(2)[1:]
    found = attack(observe(convnet(), pictures(), soft_labels), labels="lambda_recovery")
    torch.testing.assert_close(found.soft_labels, soft_labels, atol=0.01, rtol=0)
    assert found.notes["label_format"] == "mixup"


def test_the_right_label_reaches_the_images_of_the_granted_one(informed):
    granted, found = attack(informed, labels="truth"), attack(informed, labels="idlg")
    assert torch.equal(granted.images, found.images)


def test_joint_labels_are_a_distribution_that_moved(seen):
    found = [attack(seen, labels="joint", iterations=n).soft_labels for n in (1, 60)]
    torch.testing.assert_close(found[1].sum(dim=1), torch.ones(1))
    assert not torch.equal(*found)


def test_granted_labels_are_used_and_not_handed_back(informed, seen):
    found = attack(informed, labels="truth")
    assert found.soft_labels is None
    assert InvertingGradients(labels="truth").produces == {"images"}
    assert InvertingGradients().produces == {"images", "soft_labels"}
    with pytest.raises(ValueError, match="grant knowledge"):
        attack(seen, labels="truth")


def test_true_labels_that_are_not_granted_are_skipped_with_the_reason(seen):
    guided = InvertingGradients(labels="truth")
    assert guided.skip(seen.facts) == "needs the true labels: grant knowledge = ['soft_labels']"
    assert guided.skip(replace(seen.facts, granted=frozenset({"soft_labels"}))) is None


def test_a_label_attack_s_reason_to_skip_is_passed_on(seen):
    four = replace(seen.facts, batch_size=4)
    assert InvertingGradients(labels="idlg").skip(four) == "labels='idlg': needs a batch of one, got 4"
    assert InvertingGradients(labels="joint").skip(four) is None


def test_it_uses_what_its_labels_use():
    assert InvertingGradients(labels="joint").uses == frozenset()
    assert InvertingGradients(labels="truth").uses == {"soft_labels"}
    assert InvertingGradients(labels="idlg").uses == attacks.make("idlg").uses
    assert InvertingGradients().uses == attacks.make("lambda_recovery").uses


LABEL_ATTACK = """
from dataclasses import dataclass
import torch
from bench.threat import Outcome, Reconstruction

@dataclass(frozen=True)
class Curious:
    name = "curious"
    produces = frozenset({produces!r})
    reads = "head"
    uses = frozenset({{"label_format"}})

    def run(self, observation, rng):
        assert set(observation.update) == {{"head.weight"}}
        assert observation.knowledge.label_format == "hard"
        assert observation.knowledge.soft_labels is None
        return Reconstruction(Outcome.{outcome}, soft_labels={soft_labels}, notes={{"reason": "{reason}"}})
"""


@pytest.fixture
def label_attack(tmp_path):
    def spec(outcome, soft_labels, reason="", produces=("soft_labels",)):
        path = tmp_path / "curious.py"
        path.write_text(
            LABEL_ATTACK.format(
                outcome=outcome, soft_labels=soft_labels, reason=reason, produces=set(produces)
            )
        )
        return f"{path}:Curious"

    return spec


GRANTED = Knowledge(label_format="hard", soft_labels=labels())


def test_a_label_attack_sees_only_what_it_reads_and_uses(seen, label_attack):
    spec = label_attack("OK", "torch.eye(4)[:1]")
    assert attack(replace(seen, knowledge=GRANTED), labels=spec).outcome is Outcome.STEP_LIMIT


def test_a_doubtful_label_is_used_and_its_reason_kept(seen, label_attack):
    spec = label_attack("UNIDENTIFIABLE", "torch.eye(4)[:1]", "two labels fit")
    found = attack(replace(seen, knowledge=GRANTED), labels=spec)
    assert found.images is not None
    assert "two labels fit" in found.notes["reason"]


def test_without_a_label_there_is_no_image_and_the_reason_is_passed_on(seen, label_attack):
    spec = label_attack("UNIDENTIFIABLE", "None", "two labels fit")
    found = attack(replace(seen, knowledge=GRANTED), labels=spec)
    assert found.outcome is Outcome.UNIDENTIFIABLE
    assert found.images is None
    assert "two labels fit" in found.notes["reason"]


def test_an_attack_that_finds_no_labels_is_refused(label_attack):
    with pytest.raises(ValueError, match="finds no labels"):
        InvertingGradients(labels=label_attack("OK", "None", produces=("images",)))


def test_a_misspelt_label_attack_is_named():
    with pytest.raises(UserError, match="did you mean idlg"):
        attacks.make("inverting_gradients(labels='idgl')")


# --- updates ----------------------------------------------------------------------------------------------


def test_a_fedavg_update_is_followed_against_its_direction(informed):
    against = {name: -0.25 * value for name, value in informed.update.items()}
    facts = replace(informed.facts, protocol="fedavg(steps=1, lr=0.25)")
    averaged = replace(informed, update=against, facts=facts)
    first, second = (attack(observed, labels="truth") for observed in (informed, averaged))
    assert torch.equal(first.images, second.images)  # a power of two loses no digit


@pytest.mark.parametrize("kind", ["truth", "lambda_recovery"])
def test_an_update_of_zeros_is_unidentifiable(informed, kind):
    zero = {name: torch.zeros_like(value) for name, value in informed.update.items()}
    found = attack(replace(informed, update=zero), labels=kind)
    assert found.outcome is Outcome.UNIDENTIFIABLE
    assert found.images is None


def test_an_update_that_is_not_finite_diverges(informed):
    informed.update["conv.weight"][0] = torch.nan
    found = attack(informed, labels="truth", restarts=2)
    assert found.outcome is Outcome.DIVERGED
    assert found.images is None


@pytest.mark.parametrize(
    "parameters",
    [
        {"iterations": 0},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"tv": -1.0},
        {"tv": float("inf")},
        {"restarts": 0},
    ],
)
def test_a_parameter_out_of_range_is_refused(parameters):
    (name,) = parameters
    with pytest.raises(ValueError, match=f"{name}=.* is not"):
        InvertingGradients(**parameters)
