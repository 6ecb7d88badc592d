"""Chance: labels drawn from the uniform distribution, without a look at the update."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import one_hot

from bench import registry
from bench.threat import Attack, Observation, Outcome, Reconstruction


@registry.attacks.register
@dataclass(frozen=True)
class RandomLabels(Attack):
    """The floor under every label board: each example's class is drawn uniformly."""

    name: ClassVar[str] = "random_labels"
    title: ClassVar[str] = "chance"
    produces: ClassVar[frozenset[str]] = frozenset({"soft_labels"})
    reads: ClassVar[str] = "head"

    def run(self, observation: Observation, rng: torch.Generator) -> Reconstruction:
        """Hard labels (N, K)."""
        facts, weight = observation.facts, observation.head_weight
        classes = torch.randint(facts.num_classes, (facts.batch_size,), generator=rng, device=rng.device)
        soft_labels = one_hot(classes, facts.num_classes).to(weight)
        return Reconstruction(Outcome.OK, soft_labels=soft_labels)
