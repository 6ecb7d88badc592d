"""The client's gradient against finite differences and against the closed form at the head."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

from bench.cases.client import EXAMPLES_AT_ONCE, FedSGDClient, soft_cross_entropy
from bench.cases.models import build, nonnegative_features, sha256
from bench.threat import Batch

K = 4
SHAPE = (1, 8, 8)
EPS = torch.finfo(torch.float64).eps
ROUNDING = 1e4 * EPS
"""No entry is the end of more than 10,000 operations on numbers of about 1."""


def batch(n, seed=0, shape=SHAPE):
    rng = torch.Generator(device="cpu").manual_seed(seed)
    images = torch.rand(n, *shape, generator=rng, dtype=torch.float64, device="cpu")
    shares = torch.rand(n, K, generator=rng, dtype=torch.float64, device="cpu")
    return Batch(images, shares / shares.sum(1, keepdim=True))


def stacked(batches):
    return torch.stack([b.images for b in batches]), torch.stack([b.soft_labels for b in batches])


def small(bias=True, activation="tanh"):
    spec = f"fcn(depth=2, width=6, bias={bias}, activation='{activation}')"
    return build(spec, SHAPE, K, seed=1).double()


def with_batch_norm():
    """A net whose statistics are not those of any batch here."""
    torch_rng = torch.Generator(device="cpu").manual_seed(3)
    net = nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(1, 3, 3, device="cpu"),
            norm=nn.BatchNorm2d(3, device="cpu"),
            activation=nn.ReLU(),
            flatten=nn.Flatten(),
            head=nn.Linear(3 * 36, K, device="cpu"),
        )
    ).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=torch_rng, dtype=torch.float64) - 0.5)
        net.norm.running_mean += 0.3
        net.norm.running_var *= 2
    return net.eval()


def agree(one, other, tolerance=ROUNDING):
    assert list(one) == list(other)
    for name in one:
        assert one[name].shape == other[name].shape
        scale = max(1.0, float(other[name].abs().max()))
        assert float((one[name] - other[name]).abs().max()) <= tolerance * scale, name
    return True


# --- the gradient


def test_the_loss_of_a_hard_label_is_cross_entropy():
    logits = torch.tensor([[1.0, -2.0, 0.5, 0.0], [0.0, 3.0, 0.0, 1.0]], dtype=torch.float64, device="cpu")
    labels = torch.tensor([2, 1], device="cpu")
    hard = torch.eye(K, dtype=torch.float64, device="cpu")[labels]
    expected = nn.functional.cross_entropy(logits, labels)
    assert float((soft_cross_entropy(logits, hard) - expected).abs()) <= 10 * EPS * float(expected)


@pytest.mark.parametrize("spec", ["fcn(depth=3, width=6, activation='tanh')", "lenet"])
@pytest.mark.parametrize("n", [1, 3])
def test_the_gradient_is_that_of_finite_differences(spec, n):
    """Central differences D(h) err by c h² + O(h⁴) and by rounding ε|L|/h; D(2h) - D(h) is 3 c h²."""
    model, given = build(spec, SHAPE, K, seed=0).double(), batch(n)
    gradient = FedSGDClient(model).gradient(given)
    rng = torch.Generator(device="cpu").manual_seed(0)
    h = 1e-3
    for _ in range(5):
        direction = {
            name: torch.randn(value.shape, generator=rng, dtype=torch.float64, device="cpu")
            for name, value in gradient.items()
        }
        norm = torch.stack([d.square().sum() for d in direction.values()]).sum().sqrt()
        direction = {name: d / norm for name, d in direction.items()}

        def loss(step, direction=direction):
            moved = copy.deepcopy(model)
            with torch.no_grad():
                for name, parameter in moved.named_parameters():
                    parameter += step * direction[name]
                return float(soft_cross_entropy(moved(given.images), given.soft_labels))

        near, far = ((loss(s) - loss(-s)) / (2 * s) for s in (h, 2 * h))
        exact = sum(float((gradient[name] * direction[name]).sum()) for name in gradient)
        assert abs(near - exact) <= abs(far - near) + 100 * EPS * abs(loss(0)) / h


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_the_heads_gradient_has_its_closed_form(bias, n):
    model, given = small(bias), batch(n)
    with torch.no_grad():
        x = model[:-1](given.images)
        u = model.head(x).softmax(1) - given.soft_labels
    gradient = FedSGDClient(model).gradient(given)
    expected = {"head.weight": u.T @ x / n} | ({"head.bias": u.mean(0)} if bias else {})
    assert agree({name: gradient[name] for name in expected}, expected)


def test_the_gradient_has_the_parameters_names_and_shapes():
    model = small()
    gradient = FedSGDClient(model).gradient(batch(2))
    assert {k: v.shape for k, v in gradient.items()} == {k: v.shape for k, v in model.named_parameters()}
    assert not any(value.requires_grad for value in gradient.values())
    assert all(parameter.grad is None for parameter in model.parameters())


class HalfUsed(nn.Module):
    """A layer of it leads nowhere."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(2, 2, dtype=torch.float64, device="cpu")
        self.used = small()

    def forward(self, images):
        return self.used(images)


def test_a_parameter_that_the_loss_does_not_reach_has_a_gradient_of_zero():
    client = FedSGDClient(HalfUsed())
    gradient = client.gradient(batch(2))
    assert torch.equal(gradient["unused.weight"], torch.zeros(2, 2, dtype=torch.float64, device="cpu"))
    assert client.head == "used.head"


def test_a_frozen_parameter_is_no_obstacle():
    """Fine-tuning: what isn't trained isn't sent, and the rest is what it was."""
    model, given = small(), batch(2)
    whole = FedSGDClient(model).gradient(given)
    model.linear1.weight.requires_grad_(False)
    gradient = FedSGDClient(model).gradient(given)
    gradient.pop("linear1.weight", None)
    assert agree(gradient, {name: whole[name] for name in whole if name != "linear1.weight"})


# --- one gradient an example


@pytest.mark.parametrize("n", [1, 3, EXAMPLES_AT_ONCE + 1])
@pytest.mark.parametrize("spec", ["fcn(depth=2, width=6)", "lenet(bias=False)"])
def test_the_mean_of_the_examples_gradients_is_the_gradient(spec, n):
    client, given = FedSGDClient(build(spec, SHAPE, K, seed=0).double()), batch(n)
    each = client.example_gradients(given)
    assert all(len(value) == n for value in each.values())
    assert agree({name: value.mean(0) for name, value in each.items()}, client.gradient(given))


def test_each_examples_gradient_is_that_of_a_batch_of_one():
    client, given = FedSGDClient(small()), batch(3)
    each = client.example_gradients(given)
    for n in range(3):
        alone = client.gradient(Batch(given.images[n : n + 1], given.soft_labels[n : n + 1]))
        assert agree({name: value[n] for name, value in each.items()}, alone)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_each_example_has_statistics_of_its_own(mode):
    client, given = FedSGDClient.with_batch_norm(with_batch_norm(), mode), batch(3)
    each = client.example_gradients(given)
    for n in range(3):
        alone = client.gradient(Batch(given.images[n : n + 1], given.soft_labels[n : n + 1]))
        assert agree({name: value[n] for name, value in each.items()}, alone)


# --- stacks


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("m", [1, 4])
def test_a_stacks_head_updates_are_those_of_each_batch(bias, n, m):
    client, batches = FedSGDClient(small(bias)), [batch(n, seed) for seed in range(m)]
    images, soft_labels = stacked(batches)
    updates = client.head_updates(client.features(images), soft_labels)
    assert set(updates) == ({"head.weight", "head.bias"} if bias else {"head.weight"})
    for index, one in enumerate(batches):
        gradient = client.gradient(one)
        assert agree({k: v[index] for k, v in updates.items()}, {k: gradient[k] for k in updates})


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("n", [1, 3])
def test_a_stacks_batches_keep_their_own_statistics(mode, n):
    client, batches = (
        FedSGDClient.with_batch_norm(with_batch_norm(), mode),
        [batch(n, seed) for seed in range(4)],
    )
    images, soft_labels = stacked(batches)
    updates = client.head_updates(client.features(images), soft_labels)
    for index, one in enumerate(batches):
        gradient = client.gradient(one)
        assert agree({k: v[index] for k, v in updates.items()}, {k: gradient[k] for k in updates})


def test_features_are_the_heads_inputs():
    model, batches = small(), [batch(2, seed) for seed in range(3)]
    images, _ = stacked(batches)
    features = FedSGDClient(model).features(images)
    assert features.shape == (3, 2, 6)
    with torch.no_grad():
        logits = model.head(features)
        expected = torch.stack([model(b.images) for b in batches])
    assert float((logits - expected).abs().max()) <= ROUNDING


def test_a_nested_head_is_found_and_taken_out():
    client = FedSGDClient(build("resnet18", (1, 8, 8), K, seed=0).double())
    images, soft_labels = stacked([batch(1, seed) for seed in range(2)])
    updates = client.head_updates(client.features(images), soft_labels)
    assert set(updates) == {"net.fc.weight", "net.fc.bias"}
    gradient = client.gradient(batch(1, 1))
    assert agree({k: v[1] for k, v in updates.items()}, {k: gradient[k] for k in updates})


# --- the public model


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_step_leaves_the_public_model_and_the_clients_own_as_they_were(mode):
    public, given = with_batch_norm(), batch(3)
    client = FedSGDClient.with_batch_norm(public, mode)
    before = sha256(public), sha256(client.model)
    first = client.gradient(given)
    client.example_gradients(given)
    client.features(given.images[None])
    assert (sha256(public), sha256(client.model)) == before
    assert not public.training
    assert agree(client.gradient(given), first, tolerance=0)


def test_train_mode_uses_the_batchs_statistics_and_eval_mode_the_stored_ones():
    public, given = with_batch_norm(), batch(3)
    with torch.no_grad():
        stored = public(given.images)
        own = copy.deepcopy(public).train()(given.images)
        assert torch.equal(FedSGDClient.with_batch_norm(public, "eval").model(given.images), stored)
        trained = FedSGDClient.with_batch_norm(public, "train").model(given.images)
    assert float((trained - own).abs().max()) <= ROUNDING
    assert float((own - stored).abs().max()) > 0.01


def test_a_model_in_train_mode_whose_maps_are_one_pixel_says_its_features_sign():
    """ResNet-18's last map is 1 × 1 on small images: in a batch of two it has statistics."""
    model = build("resnet18(stem='imagenet')", (1, 28, 28), K, seed=0)
    client = FedSGDClient.with_batch_norm(model, "train")
    assert client.features(torch.rand(1, 2, 1, 28, 28, device="cpu")).shape == (1, 2, 512)
    assert nonnegative_features(client.model, client.head, (1, 28, 28))


def test_dropout_stays_off_while_batch_norm_trains():
    model = nn.Sequential(with_batch_norm(), nn.Dropout(0.5), nn.Linear(5, 5))
    client = FedSGDClient.with_batch_norm(model, "train")
    assert client.model.training
    assert not client.model[1].training
