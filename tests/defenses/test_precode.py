"""PRECODE: a bottleneck before the head, whose noise and divergence are in the gradient."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from attacks.images.fcn_analytic import FCNAnalytic
from attacks.labels.bias_closed_form import BiasClosedForm
from bench.cases.client import FedSGDClient
from bench.cases.data import load
from bench.cases.models import build, find_head, nonnegative_features, train
from bench.cases.scenario import Block, Grid
from bench.run import InProcess, plan, weights_sha256
from bench.threat import Batch, Facts, Knowledge, Observation, Outcome
from defenses.precode import PRECODE, Sample, divergence

K, SHAPE = 4, (1, 8, 8)


def batch(n, rng, dtype=torch.float64):
    images = torch.rand(n, *SHAPE, generator=rng, dtype=dtype, device="cpu")
    return Batch(images, torch.eye(K, dtype=dtype, device="cpu")[torch.arange(n, device="cpu") % K])


@pytest.fixture
def prepared(seeded):
    def make(spec="lenet", defense=PRECODE(width=6), shape=SHAPE):  # noqa: B008
        return defense.prepare(build(spec, shape, K, seed=0).double(), seeded()).eval()

    return make


def written_out(model, given, noise, beta):
    """The authors' loss: cross-entropy + β KL in bits, summed over width, averaged over the batch."""
    *body, last = model.children()
    bottleneck, head = last.bottleneck, last.head
    moments = bottleneck.encoder(nn.Sequential(*body)(given.images))
    mean, std = moments[:, :6], F.softplus(moments[:, 6:])
    logits = head(bottleneck.decoder(mean + std * noise))
    divergence = -0.5 * (1 + 2 * std.log() - mean**2 - std**2).sum(1).mean() / math.log(2)
    entropy = -(given.soft_labels * logits.log_softmax(1)).sum(1).mean()
    return entropy + beta * divergence


@pytest.mark.parametrize("beta", [0.0, 1e-3, 2.0])
@pytest.mark.parametrize("n", [1, 3])
def test_the_gradient_is_that_of_the_authors_loss(n, beta, prepared, seeded):
    model, given, defense = prepared(defense=PRECODE(6, beta)), batch(n, seeded(1)), PRECODE(6, beta)
    sent = defense.gradient(FedSGDClient(model), given, seeded(5))
    noise = torch.randn(n, 6, generator=seeded(5), dtype=torch.float64, device="cpu")
    expected = torch.autograd.grad(written_out(model, given, noise, beta), list(model.parameters()))
    assert list(sent) == [name for name, _ in model.named_parameters()]
    for one, other in zip(sent.values(), expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-13)


def test_no_attack_takes_the_bottleneck_for_a_chain_of_layers(seeded):
    """It lies between linear layers as a module of its own: an analytic attack says that it can't undo it."""
    model = build("fcn(depth=2, width=32, bias=False)", SHAPE, K, seed=0)
    client = FedSGDClient(PRECODE(width=16).prepare(model, seeded()).eval())
    update = PRECODE(width=16).gradient(client, batch(1, seeded(1), torch.float32), seeded())
    facts = Facts(1, K, SHAPE, 32, head_bias=False, nonnegative_features=False)
    found = FCNAnalytic().run(Observation(client.model, update, client.head, facts, Knowledge()), seeded())
    assert found.outcome is Outcome.UNIDENTIFIABLE
    assert "Sample between layers" in found.notes["reason"]


def test_without_a_bottleneck_it_is_the_plain_gradient(seeded):
    client, given = FedSGDClient(build("lenet", SHAPE, K, seed=0).double()), batch(2, seeded(1))
    sent, plain = PRECODE().gradient(client, given, seeded()), client.gradient(given)
    assert all(torch.equal(sent[name], plain[name]) for name in plain)


def test_the_head_is_found_keeps_its_weights_and_ends_the_model(prepared, seeded):
    plain = build("lenet", SHAPE, K, seed=0).double()
    model = prepared()
    name = find_head(model)
    assert name == "head.head"
    assert torch.equal(model.get_submodule(name).weight, plain.head.weight)
    given, seen = batch(2, seeded()), []
    hook = model.get_submodule(name).register_forward_hook(lambda *called: seen.append(called[2]))
    logits = model(given.images)
    hook.remove()
    assert torch.equal(seen[0], logits)


@pytest.mark.parametrize("spec", ["resnet18", "convnet(width=2)", "fcn(depth=1)", "lenet(bias=False)"])
def test_it_fits_every_model_and_keeps_the_heads_bias_off(spec, seeded):
    plain = build(spec, (3, 8, 8), K, seed=0)
    biased = plain.get_submodule(find_head(plain)).bias is not None
    client = FedSGDClient(PRECODE(width=5).prepare(plain, seeded()).eval())
    assert (client.model.get_submodule(client.head).bias is not None) == biased
    images = torch.rand(2, 3, 8, 8, generator=seeded(), device="cpu")
    sent = PRECODE(width=5).gradient(client, Batch(images, torch.eye(K, device="cpu")[:2]), seeded())
    assert sent[f"{client.head}.weight"].shape[0] == K
    assert all(value.isfinite().all() for value in sent.values())
    assert not nonnegative_features(client.model, client.head, (3, 8, 8))  # the decoder is linear


def test_a_model_that_is_its_head_is_wrapped(seeded):
    model = PRECODE(width=3).prepare(nn.Linear(5, K), seeded())
    assert find_head(model) == "head"
    assert model(torch.ones(2, 5, device="cpu")).shape == (2, K)


def test_noise_is_the_clients_alone(prepared, seeded):
    """The same batch gives another gradient each time; the public model in eval mode has no noise."""
    model, given = prepared(), batch(2, seeded(1))
    client, rng = FedSGDClient(model), seeded()
    one, other = (PRECODE(width=6).gradient(client, given, rng) for _ in range(2))
    assert all(not torch.equal(one[name], other[name]) for name in one if name != "head.head.bias")
    assert torch.equal(model(given.images), model(given.images))
    again = PRECODE(width=6).gradient(client, given, seeded())
    assert all(torch.equal(one[name], again[name]) for name in one)


def test_noise_in_training_comes_from_torchs_generator(prepared, seeded):
    model, given = prepared().train(), batch(2, seeded(1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first, second = model(given.images), model(given.images)
        torch.manual_seed(1)
        again = model(given.images)
    assert not torch.equal(first, second)
    assert torch.equal(first, again)


def test_the_noise_moves_the_layers_before_it_by_more_than_a_batchs_digits(prepared, seeded):
    """What it claims to change: conv1's gradient varies by as much as it is long, and no scale undoes it."""
    client, given, rng = FedSGDClient(prepared()), batch(1, seeded(1)), seeded()
    drawn = torch.stack(
        [PRECODE(width=6).gradient(client, given, rng)["conv1.weight"].flatten() for _ in range(50)]
    )
    assert drawn.std(0).norm() > 0.3 * drawn.norm(dim=1).mean()


def test_the_label_stays_readable(prepared, seeded):
    client, given = FedSGDClient(prepared()), batch(1, seeded(1))
    update = PRECODE(width=6).gradient(client, given, seeded())
    width = client.model.get_submodule(client.head).in_features
    facts = Facts(1, K, SHAPE, width, head_bias=True, nonnegative_features=False)
    found = BiasClosedForm().run(Observation(client.model, update, client.head, facts, Knowledge()), seeded())
    assert torch.allclose(found.soft_labels, given.soft_labels, rtol=0, atol=1e-9)


def test_weights_come_from_the_generator_alone_in_pytorchs_range(seeded):
    def weights(seed, state):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(state)
            model = PRECODE(width=9).prepare(nn.Sequential(nn.Flatten(), nn.Linear(64, K)), seeded(seed))
            return model[1].bottleneck.state_dict()

    first, again, other = weights(1, 1), weights(1, 2), weights(2, 1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["encoder.weight"], other["encoder.weight"])
    assert first["encoder.weight"].abs().max() <= 1 / 8
    assert first["decoder.weight"].abs().max() <= 1 / 3
    assert first["encoder.weight"].shape == (18, 64)


def test_the_model_is_left_as_it_was(prepared, seeded):
    client, given = FedSGDClient(prepared()), batch(1, seeded(1))
    before = copy.deepcopy(client.model.state_dict())
    PRECODE(width=6).gradient(client, given, seeded())
    assert all(torch.equal(before[key], value) for key, value in client.model.state_dict().items())
    samples = [module for module in client.model.modules() if isinstance(module, Sample)]
    assert [(each.generator, len(each._forward_hooks)) for each in samples] == [(None, 0)]


@pytest.mark.parametrize(
    "parameters", [{"width": 0}, {"beta": -1.0}, {"beta": float("inf")}, {"beta": float("nan")}]
)
def test_what_is_out_of_range_is_refused(parameters):
    with pytest.raises(ValueError, match=r"is not at least 1|is not a number of at least 0"):
        PRECODE(**parameters)


def test_its_stages():
    assert PRECODE().stages() == {"prepare", "gradient"}
    assert PRECODE().privacy(1, 1.0, 1e-5) is None


def test_factories_name_their_device(seeded, strict_devices):
    model, given = build("lenet", SHAPE, K, seed=0), batch(1, seeded(), torch.float32)
    with strict_devices:
        client = FedSGDClient(PRECODE(width=6).prepare(model, seeded()).eval())
        PRECODE(width=6).gradient(client, given, seeded())


def test_the_features_that_count_as_true_have_the_clients_noise():
    """x = ∇W_r/∇b_r to the rounding, where the public model alone has z = μ."""
    block = Block(
        dataset=["mnist5k"],
        model=["fcn(depth=2, width=24)"],
        defense=["precode(width=8)"],
        attacks=["bias_closed_form"],
        samples=2,
    )
    grid = Grid(name="noise", blocks=[block])
    planned = plan(grid, grid, None, "cpu")
    weights = {network: weights_sha256(network, None) for network in planned.networks.values()}
    rows = [row for _, part in InProcess().rows(planned.chunks(weights), planned.context) for row in part]
    assert [row.outcome for row in rows] == ["ok", "ok"]
    assert max(row.feature_error for row in rows) < 1e-3


def test_networks_are_trained_with_the_divergence():
    """A weight of 10 on it pushes z towards N(0, 1), whatever it costs the labels."""
    data, left = load("mnist5k"), {}
    for beta in (0.0, 10.0):
        defense = PRECODE(width=8, beta=beta)
        model = defense.prepare(build("fcn(depth=2, width=24)", (1, 28, 28), 10, seed=0), seeded_now())
        train(model, data, 1, 0, defense)
        with torch.no_grad():
            moments = model.head.bottleneck.encoder(model[:-1](data.pixels(data.held_out)))
        left[beta] = float(divergence(moments))
    assert left[10.0] < left[0.0] / 10


def seeded_now():
    return torch.Generator(device="cpu").manual_seed(0)
