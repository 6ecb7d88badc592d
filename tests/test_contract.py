"""What every registered attack and defense keeps to; a new one is met here without a change."""

import copy
import dataclasses
import math
import re

import pytest
import torch
from torch import nn

from bench.cases import models
from bench.cases.client import FedSGDClient
from bench.registry import attacks, defenses
from bench.threat import (
    STAGES,
    Batch,
    Facts,
    Knowledge,
    Observation,
    Outcome,
    Reconstruction,
    grant,
    mask,
)

CLASSES, SHAPE = 5, (1, 8, 8)
KNOWLEDGE = {field.name for field in dataclasses.fields(Knowledge)}


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def batch(n: int = 1, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(seed, seed + n) % CLASSES
    return Batch(torch.rand(n, *SHAPE, generator=generator), torch.eye(CLASSES)[labels])


def network(bias: bool) -> nn.Module:
    return models.build(f"fcn(depth=2, width=32, bias={bias})", SHAPE, CLASSES, seed=3)


def briefly(attack):
    """The attack with few iterations: its contract, not its strength, is looked at."""
    names = {field.name for field in dataclasses.fields(attack)}
    return dataclasses.replace(attack, iterations=4) if "iterations" in names else attack


def observation(attack, bias: bool, seed: int = 0, n: int = 1, protocol: str = "fedsgd") -> Observation:
    """What an attack to which everything is granted sees of a small network."""
    client, private = FedSGDClient(network(bias)), batch(n, seed)
    auxiliary = batch(n=20, seed=1)
    everything = Knowledge(
        soft_labels=private.soft_labels, label_format="hard", auxiliary=auxiliary, defense="none"
    )
    knowledge = grant(everything, attack.uses)
    facts = Facts(
        batch_size=n,
        num_classes=CLASSES,
        image_shape=SHAPE,
        feature_width=32,
        head_bias=bias,
        nonnegative_features=True,
        protocol=protocol,
        granted=frozenset(attack.uses & {"soft_labels", "label_format", "auxiliary", "defense"}),
    )
    update = mask(client.gradient(private), client.head, attack.reads)
    if protocol == "head_withheld":
        update = {key: value for key, value in update.items() if not key.startswith(f"{client.head}.")}
    return Observation(client.model, update, client.head, facts, knowledge)


def applicable(name: str) -> list[tuple]:
    """The attack and what it applies to: with and without bias, one example and two, the head withheld."""
    attack = briefly(attacks.make(name))
    cases = [
        observation(attack, bias, n=n, protocol=protocol)
        for bias in (False, True)
        for n in (1, 2)
        for protocol in ("fedsgd", "head_withheld")
    ]
    return [(attack, case) for case in cases if attack.skip(case.facts) is None]


def same(one: torch.Tensor | None, other: torch.Tensor | None, tolerance: float = 0.0) -> bool:
    if one is None or other is None:
        return one is other
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", attacks.names())
class TestAttack:
    def test_says_what_it_is(self, name):
        cls = attacks.find(name)
        assert cls.name == name
        assert cls.title
        assert cls.revision >= 1
        assert re.fullmatch(r"https?://\S+|", cls.paper)
        assert cls.threat_model in set("ABCDEFGH")
        assert cls.produces
        assert cls.produces <= {"soft_labels", "features", "images"}
        assert cls.reads in ("head", "all")
        assert attacks.make(name).uses <= KNOWLEDGE
        assert cls.__doc__

    def test_is_a_frozen_dataclass_of_literals(self, name):
        attack = attacks.make(name)
        assert type(attack).__dataclass_params__.frozen
        assert attacks.make(attacks.canonical(name)) == attack
        assert attacks.canonical(attacks.canonical(name)) == attacks.canonical(name)

    def test_skips_in_one_line_or_not_at_all(self, name):
        attack = attacks.make(name)
        for n, bias, nonnegative in ((1, False, False), (1, True, True), (4, False, True), (4, True, False)):
            reason = attack.skip(Facts(n, CLASSES, SHAPE, 32, bias, nonnegative))
            assert reason is None or (reason and "\n" not in reason)

    def test_applies_to_some_network(self, name):
        assert applicable(name)

    def test_returns_what_it_produces(self, name):
        for attack, case in applicable(name):
            answer = attack.run(case, rng())
            assert isinstance(answer, Reconstruction)
            assert answer.outcome in (
                Outcome.OK,
                Outcome.STEP_LIMIT,
                Outcome.DIVERGED,
                Outcome.UNIDENTIFIABLE,
            )
            n = case.facts.batch_size
            shapes = {"soft_labels": (n, CLASSES), "features": (n, 32), "images": (n, *SHAPE)}
            for part, shape in shapes.items():
                value = getattr(answer, part)
                assert value is None or part in attack.produces
                if value is not None:
                    assert value.shape == shape
                    assert value.isfinite().all()
                    assert not value.requires_grad
            if answer.outcome is Outcome.OK:
                assert any(getattr(answer, part) is not None for part in attack.produces)
            if answer.images is not None:
                assert answer.images.min() >= 0
                assert answer.images.max() <= 1

    def test_follows_from_observation_and_generator_alone(self, name):
        for attack, case in applicable(name):
            torch.manual_seed(1)
            first = attack.run(case, rng())
            torch.manual_seed(2)
            second = attack.run(case, rng())
            assert first.outcome is second.outcome
            for part in ("soft_labels", "features", "images"):
                assert same(getattr(first, part), getattr(second, part))

    def test_leaves_model_and_update_as_they_were(self, name):
        for attack, case in applicable(name):
            weights, update = copy.deepcopy(case.model.state_dict()), copy.deepcopy(case.update)
            attack.run(case, rng())
            assert all(same(weights[key], value) for key, value in case.model.state_dict().items())
            assert all(same(update[key], value) for key, value in case.update.items())
            assert not case.model.training
            for module in case.model.modules():
                assert not module._forward_hooks
                assert not module._forward_pre_hooks
            assert all(parameter.grad is None for parameter in case.model.parameters())
            assert all(parameter.requires_grad for parameter in case.model.parameters())

    def test_run_many_agrees_with_run(self, name):
        attack = briefly(attacks.make(name))
        if not hasattr(attack, "run_many"):
            pytest.skip("takes one observation at a time")
        for bias in (False, True):
            cases = [observation(attack, bias, seed) for seed in range(3)]
            if attack.skip(cases[0].facts) is not None:
                continue
            stacked = attack.run_many(cases, [rng() for _ in cases])
            for answer, case in zip(stacked, cases, strict=True):
                alone = attack.run(case, rng())
                assert answer.outcome is alone.outcome
                for part in ("soft_labels", "features", "images"):
                    assert same(getattr(answer, part), getattr(alone, part), tolerance=1e-4)

    def test_makes_no_tensor_without_a_device(self, name, device_discipline):
        for attack, case in applicable(name):
            generator = rng()
            with device_discipline:
                attack.run(case, generator)

    def test_survives_a_gradient_of_zeros(self, name):
        for attack, case in applicable(name):
            zeros = {key: torch.zeros_like(value) for key, value in case.update.items()}
            answer = attack.run(dataclasses.replace(case, update=zeros), rng())
            assert isinstance(answer, Reconstruction)


@pytest.mark.parametrize("name", defenses.names())
class TestDefense:
    def test_says_what_it_is(self, name):
        cls = defenses.find(name)
        assert cls.name == name
        assert cls.title
        assert cls.revision >= 1
        assert re.fullmatch(r"https?://\S+|", cls.paper)
        assert cls.__doc__

    def test_is_a_frozen_dataclass_of_literals(self, name):
        defense = defenses.make(name)
        assert type(defense).__dataclass_params__.frozen
        assert defenses.make(defenses.canonical(name)) == defense

    def test_names_the_stages_at_which_it_acts(self, name):
        assert defenses.make(name).stages() <= set(STAGES)

    def test_releases_a_batch_of_distributions(self, name):
        private, pool = batch(n=2), batch(n=6, seed=1)
        before = copy.deepcopy(private)
        released = defenses.make(name).change_batch(private, pool, rng())
        assert same(private.images, before.images)
        assert same(private.soft_labels, before.soft_labels)
        assert released.images.shape[1:] == SHAPE
        assert len(released.images) == len(released.soft_labels)
        assert len(released.images) == defenses.make(name).released_size(len(private), SHAPE)
        assert released.images.min() >= 0
        assert released.images.max() <= 1
        assert released.soft_labels.min() >= 0
        assert torch.allclose(released.soft_labels.sum(1), torch.ones(len(released)), atol=1e-6)

    def test_sends_an_update_of_the_models_shapes(self, name):
        defense = defenses.make(name)
        client = FedSGDClient(defense.prepare(network(bias=True), rng()).eval())
        weights = copy.deepcopy(client.model.state_dict())
        sent = defense.change_update(client, defense.gradient(client, batch(n=2), rng()), rng())
        assert {key: value.shape for key, value in sent.items()} == {
            key: value.shape for key, value in client.model.named_parameters()
        }
        assert all(value.isfinite().all() for value in sent.values())
        assert all(same(weights[key], value) for key, value in client.model.state_dict().items())

    def test_follows_from_its_generator_alone(self, name):
        defense, client = defenses.make(name), FedSGDClient(network(bias=True))

        def sent(seed: int) -> dict[str, torch.Tensor]:
            torch.manual_seed(seed)
            generator = rng()
            released = defense.change_batch(batch(n=2), batch(n=6, seed=1), generator)
            return defense.change_update(client, defense.gradient(client, released, generator), generator)

        first, second = sent(1), sent(2)
        assert all(same(first[key], second[key]) for key in first)

    def test_changes_a_tensor_without_the_others_where_it_says_so(self, name):
        defense, client = defenses.make(name), FedSGDClient(network(bias=True))
        update, one = client.gradient(batch(n=2)), f"{client.head}.weight"
        alone = defense.change_update(client, {one: update[one]}, rng())[one]
        among = defense.change_update(client, update, rng())[one]
        assert same(alone, among) or not defense.is_tensorwise()

    def test_promises_a_finite_epsilon_or_none(self, name):
        promised = defenses.make(name).privacy(steps=100, sample_rate=0.01, delta=1e-5)
        if promised is not None:
            epsilon, delta = promised
            assert math.isfinite(epsilon)
            assert epsilon > 0
            assert delta == 1e-5

    def test_makes_no_tensor_without_a_device(self, name, device_discipline):
        defense, client, private, pool = (
            defenses.make(name),
            FedSGDClient(network(bias=True)),
            batch(n=2),
            batch(n=6, seed=1),
        )
        generator = rng()
        with device_discipline:
            released = defense.change_batch(private, pool, generator)
            defense.change_update(client, defense.gradient(client, released, generator), generator)
