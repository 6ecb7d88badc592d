"""Every defense meets every attack that applies, on a small net: each ends in a reconstruction."""

import dataclasses

import pytest
import torch

from attacks.images.adaptive import Adaptive
from bench.cases.client import FedSGDClient
from bench.cases.models import build, find_head, nonnegative_features
from bench.registry import attacks, defenses
from bench.threat import Batch, Facts, Knowledge, Observation, Reconstruction, grant, mask

CLASSES, SHAPE = 5, (1, 8, 8)
CHAINS = ["precode(width=8)+mixup+quantization", "oasis+soteria+pruning", "cutmix+dp_laplace+sign_sgd"]
ALL = [name for name in defenses.names() if name not in ("dcs", "precode")]
ALL += ["dcs(iterations=3)", "precode(width=8)", *CHAINS]


def sent(spec, bias, n):
    """The client's model, and its update under the defense."""
    defense, rng = defenses.make(spec), torch.Generator(device="cpu").manual_seed(1)
    model = build(f"fcn(depth=2, width=32, bias={bias})", SHAPE, CLASSES, seed=3)
    client = FedSGDClient(defense.prepare(model, rng).eval())
    images = torch.rand(n + 8, *SHAPE, generator=rng, device="cpu")
    labels = torch.eye(CLASSES, device="cpu")[torch.arange(n + 8, device="cpu") % CLASSES]
    private, pool = Batch(images[:n], labels[:n]), Batch(images[n:], labels[n:])
    released = defense.change_batch(private, pool, rng)
    return client.model, defense.change_update(client, defense.gradient(client, released, rng), rng)


def briefly(attack):
    if isinstance(attack, Adaptive):
        return Adaptive(attack="inverting_gradients(labels='truth', iterations=4)")
    names = {field.name for field in dataclasses.fields(attack)}
    return dataclasses.replace(attack, iterations=4) if "iterations" in names else attack


@pytest.mark.parametrize("spec", ALL)
@pytest.mark.parametrize(("bias", "n"), [(False, 1), (True, 1), (True, 2)])
def test_every_attack_that_applies_comes_to_an_end(spec, bias, n):
    model, update = sent(spec, bias, n)
    head = find_head(model)
    facts = Facts(
        batch_size=n,
        num_classes=CLASSES,
        image_shape=SHAPE,
        feature_width=model.get_submodule(head).in_features,
        head_bias=bias,
        nonnegative_features=nonnegative_features(model, head, SHAPE),
    )
    met = 0
    for name in attacks.names():
        attack = briefly(attacks.make(name))
        own = dataclasses.replace(facts, granted=attack.uses & {"defense"})
        if attack.skip(own) is not None:
            continue
        told = grant(Knowledge(defense=defenses.canonical(spec)), own.granted)
        observation = Observation(model, mask(update, head, attack.reads), head, own, told)
        answer = attack.run(observation, torch.Generator(device="cpu").manual_seed(2))
        assert isinstance(answer, Reconstruction), name
        met += 1
    assert met > 0
