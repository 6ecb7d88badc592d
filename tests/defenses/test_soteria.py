"""Soteria: the head's columns with the smallest ‖∂r_i/∂x‖ / |r_i| are masked, and nothing else."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from attacks.labels.bias_closed_form import BiasClosedForm
from attacks.labels.lambda_recovery import LambdaRecovery
from bench.cases.client import FedSGDClient
from bench.cases.models import build
from bench.threat import Batch, Facts, Knowledge, Observation, Outcome, mask
from defenses.soteria import Soteria

K = 4


def batch(n, rng, dtype=torch.float64):
    images = torch.rand(n, 1, 8, 8, generator=rng, dtype=dtype, device="cpu")
    return Batch(images, torch.eye(K, dtype=dtype, device="cpu")[torch.arange(n, device="cpu") % K])


def masked(update):
    return (update["head.weight"] == 0).all(0).nonzero()[:, 0].tolist()


@pytest.fixture
def client():
    return FedSGDClient(build("lenet", (1, 8, 8), K, seed=0).double())  # sigmoids: every feature is on


def ratios(model, images):
    """Feature by feature, as the authors' code does."""
    body = nn.Sequential(*list(model.children())[:-1])
    x = images.clone().requires_grad_()
    features = body(x)
    each = []
    for i in range(features.shape[1]):
        (moved,) = torch.autograd.grad(features[:, i].sum(), x, retain_graph=True)
        each.append(moved.flatten(1).norm(dim=1).sum() / features[:, i].abs().sum())
    return torch.stack(each).detach()


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_the_columns_with_the_smallest_ratio_are_masked(n, share, client, seeded):
    given = batch(n, seeded())
    expected = ratios(client.model, given.images).argsort()[: round(share * 48)]
    assert masked(Soteria(share).gradient(client, given, seeded())) == sorted(expected.tolist())


def test_of_one_linear_layer_the_ratio_is_in_closed_form(seeded):
    """r = A x: ‖∂r_i/∂x‖ / |r_i| = ‖A_i‖ / |A_i x|."""
    layers = OrderedDict(flatten=nn.Flatten(), a=nn.Linear(64, 70, bias=False), head=nn.Linear(70, K))
    model = nn.Sequential(layers).double()
    given = batch(1, seeded())
    a = model.a.weight.detach()
    ratio = a.norm(dim=1) / (a @ given.images.flatten()).abs()
    update = Soteria(0.3).gradient(FedSGDClient(model), given, seeded())
    assert masked(update) == sorted(ratio.argsort()[:21].tolist())


def test_all_else_stays_exact(client, seeded):
    given = batch(2, seeded())
    plain, sent = client.gradient(given), Soteria(0.4).gradient(client, given, seeded())
    assert list(sent) == list(plain)
    hidden = masked(sent)
    assert all(torch.equal(sent[name], plain[name]) for name in plain if name != "head.weight")
    kept = [i for i in range(48) if i not in hidden]
    assert torch.equal(sent["head.weight"][:, kept], plain["head.weight"][:, kept])


def test_features_that_are_off_have_nothing_to_mask(seeded):
    """With ReLUs the share is one of the features that are on."""
    model = build("fcn(depth=2, width=60)", (1, 8, 8), K, seed=1).double()
    client, given = FedSGDClient(model), batch(1, seeded())
    on = set((client.gradient(given)["head.weight"] != 0).any(0).nonzero()[:, 0].tolist())
    assert 0 < len(on) < 60
    left = (Soteria(0.5).gradient(client, given, seeded())["head.weight"] != 0).any(0)
    assert int(left.sum()) == len(on) - round(0.5 * len(on))


def test_the_label_is_as_readable_as_before(client, seeded):
    """The bias gradient is untouched, and the masked rows still give an input that is parallel enough."""
    given = batch(1, seeded())
    update = Soteria(0.0).gradient(client, given, seeded())
    hidden = Soteria(0.5).gradient(client, given, seeded())
    assert torch.equal(hidden["head.bias"], update["head.bias"])
    facts = Facts(1, K, (1, 8, 8), 48, head_bias=True, nonnegative_features=True)
    observation = Observation(client.model, hidden, "head", facts, Knowledge())
    found = BiasClosedForm().run(observation, seeded()).soft_labels
    assert found.argmax() == given.soft_labels.argmax()


@pytest.mark.parametrize("model", ["lenet", "fcn(depth=2, width=60)"])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_masked_feature_is_not_taken_for_one_that_is_off(model, share, seeded):
    """∇b is exact and W x isn't: λ-recovery says that it doesn't know. Without the mask it does."""
    client = FedSGDClient(build(model, (1, 8, 8), 10, seed=0).double())
    facts = Facts(1, 10, (1, 8, 8), client.model.head.in_features, head_bias=True, nonnegative_features=True)
    for seed in range(5):
        images = torch.rand(1, 1, 8, 8, generator=seeded(seed), dtype=torch.float64, device="cpu")
        given = Batch(images, torch.eye(10, dtype=torch.float64, device="cpu")[seed : seed + 1])
        outcomes = []
        for update in (Soteria(share).gradient(client, given, seeded()), client.gradient(given)):
            observation = Observation(client.model, mask(update, "head", "head"), "head", facts, Knowledge())
            outcomes.append(LambdaRecovery().run(observation, seeded()).outcome)
        assert outcomes == [Outcome.UNIDENTIFIABLE, Outcome.OK]


def test_a_chunk_of_features_is_no_different_from_all(client, seeded, monkeypatch):
    given = batch(2, seeded())
    whole = Soteria(0.3).gradient(client, given, seeded())
    monkeypatch.setattr("defenses.soteria.AT_ONCE", 7)
    assert masked(Soteria(0.3).gradient(client, given, seeded())) == masked(whole)


def test_it_leaves_batch_and_model_as_they_were(client, seeded):
    given = batch(1, seeded())
    Soteria().gradient(client, given, seeded())
    assert not given.images.requires_grad
    assert not client.model.head._forward_pre_hooks
    assert all(parameter.grad is None for parameter in client.model.parameters())


def with_batch_norm():
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(24, K))


@pytest.mark.parametrize(
    "model",
    [
        with_batch_norm(),
        build("convnet(width=4, bias=False)", (3, 8, 8), K, seed=0),
        build("fcn(depth=1)", (3, 8, 8), K, seed=0),
    ],
    ids=["batch_norm", "convnet", "one_layer"],
)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_it_works_on_every_kind_of_model(model, mode, seeded):
    client = FedSGDClient.with_batch_norm(model.eval(), mode)
    images = torch.rand(2, 3, 8, 8, generator=seeded(), device="cpu")
    given, weight = Batch(images, torch.eye(K, device="cpu")[:2]), f"{client.head}.weight"
    plain, sent = client.gradient(given), Soteria(0.5).gradient(client, given, seeded())
    on, left = ((update[weight] != 0).any(0).sum() for update in (plain, sent))
    assert int(left) == int(on) - round(0.5 * int(on))


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_what_is_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match=r"share=.* is not in \[0, 1\]"):
        Soteria(share)


def test_it_replaces_the_gradient_alone():
    assert Soteria().stages() == {"gradient"}
    assert Soteria().privacy(1, 1.0, 1e-5) is None


def test_factories_name_their_device(client, seeded, strict_devices):
    given = batch(1, seeded())
    with strict_devices:
        Soteria().gradient(client, given, seeded())
