"""Feature-guided gradient matching: candidates whose last-layer feature is drawn to the one that λ gives.

How much the feature should count against the gradient is open in the paper. Here it isn't chosen: a stack of
weights goes down together from the same start, and the candidate whose gradient ends closest to the observed
one wins. That rule reads the observation alone; bench/studies/feature_weight.py says how good it is.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from attacks.images._labels import ask
from attacks.images._matching import MatchingAttack, check, gradients
from attacks.solvers.gradient_matching import Objective
from attacks.solvers.matching_objectives import Cosine, FeaturePull, TotalVariation
from attacks.solvers.matching_optimisers import Descent, Method, SignedAdam, Variables
from bench import registry
from bench.threat import Attack, Facts, Observation, Reconstruction, Update


@registry.attacks.register
@dataclass(frozen=True)
class FeatureGuided(MatchingAttack):
    """Wang, Liang, He 2024: 1 - cos(∇L(x), ∇*) + w · (1 - cos(φ(x), φ*)) + tv · TV(x), by signed Adam.

    Attributes:
        labels: where the labels come from: the spec of a label attack; `truth`; or `joint`.
        iterations: steps; nothing else ends the search.
        restarts: how many starts, each with every weight.
        weights: w, each at least 0: one candidate each. The one whose gradient ends closest wins.
        features: where φ*, the head's input, comes from: the spec of an attack that finds features.
        lr: the first steps' length, above 0; a tenth of it after 3/8, 5/8 and 7/8 of the iterations.
        tv: the weight of total variation, at least 0.
    """

    name: ClassVar[str] = "feature_guided"
    title: ClassVar[str] = "Feature-guided matching"
    revision: ClassVar[int] = 2
    paper: ClassVar[str] = "https://arxiv.org/abs/2402.03124"
    produces: ClassVar[frozenset[str]] = frozenset({"soft_labels", "images"})

    weights: tuple[float, ...] = (0.0, 1.0, 10.0, 100.0)
    features: str = "lambda_recovery"
    lr: float = 0.1
    tv: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, {"lr": 0, "tv": 0}, above=("lr",))
        if not self.weights or not all(0 <= weight < float("inf") for weight in self.weights):
            raise ValueError(f"weights={self.weights} is not at least one number of at least 0")
        if "features" not in self._feature_attack.produces:
            raise ValueError(f"features={self.features!r} is an attack that finds no features")
        object.__setattr__(self, "uses", self.uses | self._feature_attack.uses)

    @property
    def _feature_attack(self) -> Attack:
        return registry.attacks.make(self.features)

    @property
    def builds_on(self) -> tuple[str, ...]:
        """The label attack and the feature attack."""
        return tuple(dict.fromkeys((*super().builds_on, self.features)))

    def skip(self, facts: Facts) -> str | None:
        """Needs what its labels and its features need."""
        reason = self._feature_attack.skip(facts)
        return super().skip(facts) or (None if reason is None else f"features={self.features!r}: {reason}")

    def _known(self, observation: Observation, rng: torch.Generator) -> Reconstruction:
        given = super()._known(observation, rng)
        if self.labels == self.features or super()._lacks(given):
            return given
        found = ask(self.features, "features", observation, rng)
        outcome = found.outcome if found.features is None else given.outcome
        return replace(given, outcome=outcome, features=found.features, notes=found.notes | given.notes)

    def _lacks(self, given: Reconstruction) -> bool:
        return super()._lacks(given) or given.features is None

    def _starts(self, observation: Observation, rng: torch.Generator, labels: Tensor | None) -> Variables:
        """Each start once for every weight."""
        drawn = super()._starts(observation, rng, labels)
        return tuple(value.repeat_interleave(len(self.weights), dim=0) for value in drawn)

    def _objective(self, observation: Observation, gradient: Update, given: Reconstruction) -> Objective:
        like = observation.head_weight
        assert given.features is not None  # see `_lacks`
        weights = torch.tensor(self.weights, dtype=like.dtype, device=like.device).repeat(self.restarts)
        pull = FeaturePull(given.features.to(like), weights)
        return Objective(gradients(observation, gradient), Cosine(), (TotalVariation(self.tv),), pull)

    def _method(self) -> Method:
        return SignedAdam(self.lr)

    def _best(self, ends: Descent) -> int:
        """The one whose gradient ended closest, whatever its feature's weight."""
        return min(range(len(ends.distances)), key=ends.distances.__getitem__)
