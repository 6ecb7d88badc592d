"""λ-recovery that is told the defense, on updates that the defenses made."""

from dataclasses import replace

import pytest
import torch

from attacks.labels.lambda_recovery_adaptive import KNOWN, LambdaRecoveryAdaptive, mean_of_rounds, told
from bench.cases import protocol
from bench.cases.client import FedSGDClient
from bench.cases.models import build
from bench.registry import attacks, defenses
from bench.threat import Batch, Facts, Knowledge, Observation, Outcome, mask

K, SHAPE, N = 10, (1, 12, 12), 5


def seeded(seed=0):
    return torch.Generator(device="cpu").manual_seed(seed)


def observations(spec, count=N, talk="fedsgd", bias=True):
    """What (private, released) batches of one example look like behind a defense."""
    spec, defense = defenses.canonical(spec), defenses.make(spec)
    client = FedSGDClient(build(f"convnet(width=8, bias={bias})", SHAPE, K, seed=0))
    images = torch.rand(count + 20, *SHAPE, generator=seeded(1), device="cpu")
    labels = torch.eye(K, device="cpu")[torch.arange(count + 20, device="cpu") % K]
    pool = Batch(images[count:], labels[count:])
    made = []
    for index in range(count):
        rng = seeded(100 + index)
        private = Batch(images[index : index + 1], labels[index : index + 1])
        released = defense.change_batch(private, pool, rng)
        sent = [
            mask(update, "head", "head")
            for update in protocol.make(talk).updates(client, defense, [released], rng)
        ]
        width = client.model.head.in_features
        facts = Facts(1, K, SHAPE, width, bias, True, talk.partition("(")[0], frozenset({"defense"}))
        seen = Observation(client.model, sent[-1], "head", facts, Knowledge(defense=spec), tuple(sent[:-1]))
        made.append((private, released, seen))
    return made


def rate(attack, cases):
    """How often every entry of the released label is within 0.01."""
    right = []
    for _, released, seen in cases:
        found = attack.run(seen, seeded()).soft_labels
        right.append(found is not None and float((found - released.soft_labels).abs().max()) <= 0.01)
    return sum(right) / len(right)


PLAIN, ADAPTIVE = attacks.make("lambda_recovery"), LambdaRecoveryAdaptive()


@pytest.mark.parametrize(
    "spec",
    [
        "none",
        "label_smoothing",
        "label_smoothing(epsilon=(0.1, 0.5))",
        "mixup(low=0.1, high=0.9)",
        "sign_sgd",
        "soteria",
        "pruning(share=0.99)",
        "quantization(bits=3)",
        "gradient_noise(std=0.03)",
        "dp_gaussian(noise_multiplier=0.02)",
    ],
)
def test_finds_every_label(spec):
    assert rate(ADAPTIVE, observations(spec)) == 1


@pytest.mark.parametrize(
    "spec",
    ["mixup(low=0.2, high=0.8)+dp_gaussian(clip=0.5, noise_multiplier=0.0005)", "gradient_noise(std=0.1)"],
)
def test_what_stops_the_plain_attack_falls_to_this_one(spec):
    cases = observations(spec, count=3)
    assert rate(PLAIN, cases) < 0.4
    assert rate(ADAPTIVE, cases) > 0.8


def test_concealed_examples_are_found_and_told_from_the_private_ones():
    """Its gradient is that of two examples: one is private and hard, the other's label is mixed."""
    cases = observations("dcs(iterations=30)", count=2)
    assert rate(ADAPTIVE, cases) == 1
    for private, _, seen in cases:
        found = ADAPTIVE.run(seen, seeded())
        assert found.outcome is Outcome.OK
        true = seen.model[:-1](private.images)
        assert torch.nn.functional.cosine_similarity(found.features, true) > 0.9999


def test_rounds_on_the_same_batch_wear_noise_off():
    """The mean of M updates has the noise of one over √M."""
    spec = "mixup(low=0.2, high=0.8)+gradient_noise(std=0.03)"
    one, many = (rate(ADAPTIVE, observations(spec, talk=f"rounds(count={m})")) for m in (1, 64))
    assert many > one + 0.3


def test_the_mean_is_that_of_all_rounds():
    ((_, _, seen),) = observations("gradient_noise", count=1, talk="rounds(count=3)")
    mean, bias = mean_of_rounds(seen)
    sent = [update["head.weight"] for update in (seen.update, *seen.later_updates)]
    assert torch.allclose(mean, torch.stack(sent).mean(0))
    assert bias.shape == (K,)


def test_overwhelming_noise_is_said_to_leave_nothing():
    outcomes = [ADAPTIVE.run(seen, seeded()).outcome for *_, seen in observations("gradient_noise(std=30.0)")]
    assert outcomes.count(Outcome.UNIDENTIFIABLE) > N / 2


@pytest.mark.parametrize(
    ("spec", "label_format", "noise_std", "clipped"),
    [
        ("none", "hard", None, False),
        ("label_smoothing+mixup", "smoothed_mixup", None, False),
        ("mixup+cutmix", "k_mix", None, False),
        ("dp_gaussian(clip=2.0, noise_multiplier=0.5)", "hard", 1.0, True),
        ("dp_laplace(clip=2.0, noise_multiplier=0.5)", "hard", 2**0.5, True),
        ("dp_gaussian(clip=3.0, noise_multiplier=1.0)+gradient_noise(std=4.0)", "hard", 5.0, True),
        ("gradient_noise+pruning", "hard", None, False),
    ],
)
def test_reads_a_spec(spec, label_format, noise_std, clipped):
    known = told(defenses.canonical(spec))
    assert (known.label_format, known.clipped) == (label_format, clipped)
    assert known.noise_std == (None if noise_std is None else pytest.approx(noise_std))


def test_is_skipped_without_the_spec():
    ((_, _, seen),) = observations("none", count=1)
    assert "grant knowledge" in ADAPTIVE.skip(replace(seen.facts, granted=frozenset()))
    assert ADAPTIVE.skip(seen.facts) is None


def test_of_a_defense_that_it_does_not_know_it_assumes_nothing():
    assert told("mine.py:Mine(strength=2)+gradient_noise(std=0.1)").label_format is None
    assert told("mine.py:Mine(strength=2)+gradient_noise(std=0.1)").noise_std is None


def test_all_of_the_suites_defenses_are_known():
    assert set(defenses.names()) <= KNOWN


def test_features_are_those_before_clipping():
    cases = observations("dp_gaussian(clip=1.0, noise_multiplier=0.001)")
    for _, released, seen in cases:
        found = ADAPTIVE.run(seen, seeded())
        assert torch.equal(found.soft_labels, released.soft_labels)
        client = FedSGDClient(seen.model)
        x = client.features(released.images[None])[0]
        assert float((found.features - x).norm() / x.norm()) < 0.3  # .9 without a search for the factor
