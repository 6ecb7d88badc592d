"""An image attack that is told the defense."""

import pytest
import torch

from attacks.images.adaptive import Adaptive, _mix, mean_of_rounds, without, without_bottleneck
from bench.cases import protocol
from bench.cases.client import FedSGDClient, soft_cross_entropy
from bench.cases.models import build
from bench.registry import attacks, defenses
from bench.threat import Batch, Facts, Knowledge, Observation, Outcome

K, SHAPE = 4, (1, 8, 8)
FCN = "fcn(depth=3, width=48, bias=False)"


def seeded(seed=0):
    return torch.Generator(device="cpu").manual_seed(seed)


def examples(count, seed):
    """Each class has a pattern of its own, with noise on it."""
    pattern = torch.rand(K, *SHAPE, generator=seeded(8), dtype=torch.float64, device="cpu")
    classes = torch.arange(count, device="cpu") % K
    noise = torch.rand(count, *SHAPE, generator=seeded(seed), dtype=torch.float64, device="cpu")
    return 0.8 * pattern[classes] + 0.2 * noise, torch.eye(K, dtype=torch.float64, device="cpu")[classes]


def observed(spec, model=FCN, talk="fedsgd", image=None, auxiliary=None):
    """An example, and what of it leaves a client behind a defense."""
    spec, defense = defenses.canonical(spec), defenses.make(spec)
    client = FedSGDClient(defense.prepare(build(model, SHAPE, K, seed=0).double(), seeded()).eval())
    images, labels = examples(9, seed=1)
    images = images if image is None else torch.cat([image.double()[None], images[1:]])
    private, rng = Batch(images[:1], labels[:1]), seeded(3)
    released = defense.change_batch(private, Batch(images[1:], labels[1:]), rng)
    sent = protocol.make(talk).updates(client, defense, [released], rng)
    head = client.model.get_submodule(client.head)
    facts = Facts(
        1,
        K,
        SHAPE,
        head.in_features,
        head.bias is not None,
        False,
        talk.partition("(")[0],
        frozenset({"defense"}),
    )
    knowledge = Knowledge(defense=spec, auxiliary=auxiliary)
    return private, released, Observation(client.model, sent[-1], client.head, facts, knowledge, sent[:-1])


def test_precode_is_no_bottleneck_for_one_example():
    """Its first layer has a bias, which gives its input and its gradient: analytic attacks go on."""
    private, _, seen = observed("precode(width=8)")
    plain = attacks.make("fcn_analytic").run(seen, seeded())
    assert plain.images is None
    found = Adaptive(attack="fcn_analytic").run(seen, seeded())
    assert found.outcome is Outcome.OK
    assert torch.allclose(found.images, private.images, atol=1e-6)
    assert torch.allclose(found.soft_labels, private.soft_labels)


@pytest.mark.parametrize("beta", [0.0, 1e-3, 1.0])
def test_the_network_without_bottleneck_has_the_gradient_that_was_sent(beta):
    """By autograd, up to one factor for all layers below."""
    private, _, seen = observed(f"precode(width=8, beta={beta})")
    without_it = without_bottleneck(seen)
    loss = soft_cross_entropy(without_it.model(private.images), without_it.knowledge.soft_labels)
    names = list(without_it.update)
    gradients = torch.autograd.grad(loss, [without_it.model.get_parameter(name) for name in names])
    for name, gradient in zip(names, gradients, strict=True):
        assert torch.allclose(without_it.update[name], gradient, rtol=1e-6, atol=1e-12), name
    head = without_it.update[f"{without_it.head}.weight"].norm()
    rest = sum(value.square().sum() for name, value in without_it.update.items() if "head" not in name).sqrt()
    assert 0.5 < head / rest < 2  # neither drowns the other


def test_the_masked_layer_is_left_out():
    _, _, seen = observed("soteria")
    left = without(seen, "head.weight")
    assert set(seen.update) - set(left.update) == {"head.weight"}


def test_an_attack_that_needs_the_masked_layer_gets_it_as_it_was_sent():
    """With biases an analytic attack reads all but the head's input elsewhere."""
    private, _, seen = observed("soteria", model="fcn(depth=3, width=48)")
    found = Adaptive(attack="fcn_analytic").run(seen, seeded())
    assert torch.allclose(found.images, private.images, atol=1e-5)


def test_rounds_are_averaged():
    _, _, seen = observed("gradient_noise", talk="rounds(count=4)")
    mean = mean_of_rounds(seen)
    sent = [update["linear1.weight"] for update in (seen.update, *seen.later_updates)]
    assert torch.allclose(mean["linear1.weight"], torch.stack(sent).mean(0))


def test_what_was_pasted_is_taken_out_and_named():
    rows, columns = torch.meshgrid(*[torch.arange(8, device="cpu") / 8] * 2, indexing="ij")
    smooth = ((rows + columns) / 4)[None]
    private, released, seen = observed("cutmix", image=smooth)
    found = Adaptive(attack="fcn_analytic").run(seen, seeded())
    before, after = ((one - private.images).square().mean() for one in (released.images, found.images))
    assert after < 0.8 * before
    assert torch.allclose(found.soft_labels, private.soft_labels)


def test_the_half_whose_weight_the_spec_allows_is_the_private_one():
    """Of weights from 0.1 to 0.4 the lighter half is the client's."""
    private, released, seen = observed("mixup(low=0.1, high=0.4)", auxiliary=Batch(*examples(40, seed=9)))
    found = Adaptive(attack="fcn_analytic").run(seen, seeded())
    assert released.soft_labels.argmax() != private.soft_labels.argmax()
    assert torch.allclose(found.soft_labels, private.soft_labels)
    before, after = ((one - private.images).square().mean() for one in (released.images, found.images))
    assert after < before / 4


@pytest.mark.parametrize(("field", "value"), [("attack", "idlg"), ("labels", "random_labels(")])
def test_attacks_that_find_something_else_are_refused(field, value):
    with pytest.raises(ValueError, match=r"finds no images|can't be read|no spec"):
        Adaptive(**{field: value})


def test_says_what_it_needs():
    _, _, seen = observed("none")
    assert Adaptive(attack="fcn_analytic").skip(seen.facts) is None
    assert "grant knowledge" in Adaptive().skip(Facts(1, K, SHAPE, 8, True, True))


def test_smoothing_is_taken_off_a_mix_before_its_shares_are_read():
    label = 0.9 * torch.tensor([0.0, 0.3, 0.7, 0.0], device="cpu") + 0.1 / K
    values, classes = _mix(label)
    assert torch.allclose(values, torch.tensor([0.7, 0.3], device="cpu"))
    assert classes.tolist() == [2, 1]
    assert _mix(torch.tensor([0.4, 0.6], device="cpu")).values.tolist() == pytest.approx([0.6, 0.4])
