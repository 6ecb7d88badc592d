"""breaching's presets through the adapter: beside breaching called its own way, and what is mended."""

import importlib
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from torch import nn

from attacks.images.breaching import UNITS, Breaching
from bench.registry import attacks
from bench.threat import Knowledge, Outcome
from bench.torchvision_ops import ensure_importable

K, SHAPE = 4, (3, 8, 8)
JOINT = ("deepleakage", "tag")
PRESETS = (
    *("invertinggradients", "legacy", "modern", "clsattack", "seethroughgradients"),
    *("beyondinfering", "wei", *JOINT),
)


class Normalize(nn.Module):
    def __init__(self, channels):
        super().__init__()
        for name, value in zip(("mean", "std"), UNITS[channels], strict=True):
            self.register_buffer(name, torch.tensor(value)[:, None, None])

    def forward(self, images):
        return (images - self.mean) / self.std


def convnet(shape=SHAPE, between=None, bias=True, first=None):
    torch.manual_seed(0)
    return nn.Sequential(
        OrderedDict(
            normalize=first or Normalize(shape[0]),
            conv=nn.Conv2d(shape[0], 6, 3, padding=1),
            between=between or nn.Identity(),
            activation=nn.Sigmoid(),
            flatten=nn.Flatten(),
            head=nn.Linear(6 * shape[1] * shape[2], K, bias=bias),
        )
    ).eval()


def pictures(n=1, shape=SHAPE):
    ramp = torch.linspace(0.2, 0.8, shape[2]) + torch.linspace(-0.1, 0.1, shape[1])[:, None]
    return torch.stack([torch.stack([ramp.roll(2 * i + c, 1) for c in range(shape[0])]) for i in range(n)])


def labels(n=1):
    return torch.eye(K)[torch.arange(1, n + 1) % K]


def attack(observation, seed=0, **parameters):
    source = "joint" if parameters.get("preset") in JOINT else "truth"
    parameters = {"iterations": 3, "labels": source} | parameters
    return Breaching(**parameters).run(observation, torch.Generator().manual_seed(seed))


@pytest.fixture
def seen(observe):
    def informed(n=1, shape=SHAPE, **parameters):
        return observe(
            convnet(shape, **parameters), pictures(n, shape), labels(n), Knowledge(soft_labels=labels(n))
        )

    return informed


def called_its_own_way(observation, preset, iterations):
    """breaching's API with hydra's configuration, on the network behind its normalisation."""
    ensure_importable()
    breaching = importlib.import_module("breaching")
    hydra = importlib.import_module("hydra")
    overrides = [f"optim.max_iterations={iterations}", "optim.warmup=0"]
    with hydra.initialize_config_module("breaching.config.attack", version_base=None):
        configuration = hydra.compose(config_name=preset, overrides=overrides)
    body = observation.model[1:]
    setup = {"device": torch.device("cpu"), "dtype": torch.float32}
    attacker = breaching.attacks.prepare_attack(body, nn.CrossEntropyLoss(), configuration, setup)
    mean, std = UNITS[3]

    class Constants(dict):
        __getattr__ = dict.__getitem__

    metadata = Constants(shape=SHAPE, mean=mean, std=std, modality="vision", task="classification", classes=K)
    server = {"parameters": list(body.parameters()), "buffers": list(body.buffers()), "metadata": metadata}
    user = {
        "gradients": [observation.update[name].clone() for name, _ in observation.model.named_parameters()],
        "buffers": None,
        "metadata": {"num_data_points": 1, "labels": torch.tensor([1]), "local_hyperparams": None},
    }
    answer, _ = attacker.reconstruct([server], [user], server_secrets={})
    mean, std = (torch.tensor(value)[:, None, None] for value in (mean, std))
    return (answer["data"] * std + mean).clamp(0, 1)


@pytest.mark.parametrize("preset", ["invertinggradients", "modern", "beyondinfering"])
def test_it_gives_what_breaching_gives(seen, preset):
    observation, iterations = seen(), 5
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
    theirs = called_its_own_way(observation, preset, iterations)
    ours = attack(observation, preset=preset, iterations=iterations).images
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("shape", [SHAPE, (1, 8, 6)])
def test_every_preset_runs_on_batches_grey_and_colour(seen, preset, shape):
    found = attack(seen(2, shape), preset=preset)
    assert found.outcome is Outcome.STEP_LIMIT
    assert found.images.shape == (2, *shape)
    assert 0 <= found.images.min() <= found.images.max() <= 1


def test_it_sees_the_picture(seen):
    """A constant image's best mean squared error is the picture's variance."""
    error = (attack(seen(), preset="wei", iterations=30).images - pictures()).square().mean()
    assert error < 0.1 * pictures().var(correction=0)


@pytest.mark.parametrize("preset", JOINT)
def test_joint_labels_are_those_that_were_moved(seen, preset):
    found = attack(seen(), preset=preset, iterations=30)
    torch.testing.assert_close(found.soft_labels.sum(dim=1), torch.ones(1))
    assert found.soft_labels.argmax() == labels().argmax()


def test_of_several_joint_starts_the_best_one_s_labels_come_along(seen):
    observation = seen()
    runs = [attack(observation, preset="tag", restarts=n, iterations=20) for n in (1, 4)]
    assert runs[1].notes["loss"] <= runs[0].notes["loss"]


def test_a_label_attack_s_labels_are_used_and_handed_back(seen):
    observation = seen()
    found = attack(observation, labels="bias_closed_form")
    torch.testing.assert_close(found.soft_labels, labels(), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.images, attack(observation).images, atol=1e-4, rtol=0)


def test_local_steps_are_unrolled(observe):
    """The weights' difference after two steps: the true images match it to rounding, as its loss says."""
    model, images, steps, lr = convnet(), pictures(), 2, 0.1
    moved = {name: value.clone() for name, value in model.named_parameters()}
    for _ in range(steps):
        loss = nn.functional.cross_entropy(torch.func.functional_call(model, moved, images), labels())
        gradients = torch.autograd.grad(loss, list(moved.values()))
        moved = {name: value - lr * g for (name, value), g in zip(moved.items(), gradients, strict=True)}
    delta = {name: (moved[name] - value).detach() for name, value in model.named_parameters()}
    informed = observe(
        model, images, labels(), Knowledge(soft_labels=labels(), local_steps=steps, local_lr=lr)
    )
    granted = frozenset({"soft_labels", "local_steps", "local_lr"})
    facts = replace(informed.facts, protocol="fedavg", granted=granted)
    found = attack(replace(informed, update=delta, facts=facts), preset="wei", iterations=20)
    assert found.notes["loss"] < 1e-4 * sum(float(value.square().sum()) for value in delta.values())


@pytest.mark.parametrize("training", [False, True])
def test_batch_norm_in_either_mode_leaves_the_model_as_it_was(seen, is_left_as_it_was, training):
    observation = seen(2, between=nn.BatchNorm2d(6))
    observation.model.train(training)
    unchanged = is_left_as_it_was(observation.model)
    found = attack(observation, preset="seethroughgradients")
    assert found.images is not None
    assert unchanged()


def test_float64_stays_float64(observe):
    knowledge = Knowledge(soft_labels=labels().double())
    model = convnet().double()
    assert (
        attack(observe(model, pictures().double(), labels().double(), knowledge)).images.dtype
        == torch.float64
    )


def test_it_follows_its_generator_and_leaves_the_global_one_alone(seen):
    observation, state = seen(), torch.get_rng_state()
    first, same, other = (attack(observation, seed=seed).images for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_update_is_not_divided_in_place(seen):
    observation = seen()
    before = {name: value.clone() for name, value in observation.update.items()}
    attack(observation, preset="modern")
    assert all(torch.equal(before[name], value) for name, value in observation.update.items())


def test_what_was_not_sent_gives_no_image_and_nan_diverges(seen):
    observation = seen()
    withheld = {name: value for name, value in observation.update.items() if name != "conv.bias"}
    found = attack(replace(observation, update=withheld))
    assert found.notes["reason"] == "the gradient of conv.bias was not sent"
    broken = observation.update | {"conv.bias": torch.full((6,), torch.nan)}
    found = attack(replace(observation, update=broken))
    assert found.outcome is Outcome.DIVERGED
    assert found.images is None


def test_it_is_skipped_with_the_reason(seen):
    facts = replace(seen().facts, granted=frozenset({"soft_labels"}))
    assert Breaching(labels="truth").skip(facts) is None
    assert "bias" in Breaching(preset="modern").skip(replace(facts, head_bias=False))
    assert "every parameter" in Breaching().skip(replace(facts, protocol="head_withheld"))
    assert "local_steps" in Breaching(labels="truth").skip(replace(facts, protocol="fedavg"))
    assert "grant knowledge" in Breaching(labels="truth").skip(replace(facts, granted=frozenset()))
    assert Breaching(labels="idlg").skip(replace(facts, batch_size=2)).startswith("labels='idlg': ")


@pytest.mark.parametrize(
    "parameters",
    [
        {"iterations": 0},
        {"restarts": 0},
        {"preset": "deepleakage"},
        {"labels": "joint"},
    ],
)
def test_what_makes_no_sense_is_refused(parameters):
    with pytest.raises(ValueError, match=r"is not at least 1|no other does"):
        Breaching(**parameters)


def test_it_uses_what_its_labels_use_and_is_registered():
    assert Breaching(labels="truth").uses == {"soft_labels", "local_steps", "local_lr"}
    assert "soft_labels" not in Breaching(labels="truth").produces
    assert attacks.make("breaching") == Breaching()
    assert Breaching(labels="idlg").builds_on == ("idlg",)
