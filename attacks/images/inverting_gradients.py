"""Inverting Gradients: images of little total variation whose gradient points where the observed one does."""

from dataclasses import dataclass
from typing import ClassVar

from attacks.images._matching import MatchingAttack, check, gradients
from attacks.solvers.gradient_matching import Objective
from attacks.solvers.matching_objectives import Cosine, TotalVariation
from attacks.solvers.matching_optimisers import Method, SignedAdam
from bench import registry
from bench.threat import Observation, Reconstruction, Update


@registry.attacks.register
@dataclass(frozen=True)
class InvertingGradients(MatchingAttack):
    """Geiping et al. 2020: 1 - cos(∇L(x), ∇*) + tv · TV(x) by signed Adam, x clipped to [0, 1] at every step.

    It runs on pixels, before the model normalises them. The paper works on normalised ones, whose unit is
    about a quarter of a pixel's range: its step of 0.1 is 0.025 here, its TV weight of 0.0125 is 0.05.

    Attributes:
        labels: where the labels come from: the spec of a label attack; `truth` (granted: an upper bound); or
            `joint`, logits that are moved along with the images.
        iterations: steps, at least 1; nothing else ends the search. The paper takes up to 24,000.
        restarts: how many starts, each from other noise, as one stack; the lowest objective wins.
        lr: the first steps' length, above 0; a tenth of it after 3/8, 5/8 and 7/8 of the iterations.
        tv: the weight of total variation, at least 0.
    """

    name: ClassVar[str] = "inverting_gradients"
    title: ClassVar[str] = "Inverting Gradients"
    revision: ClassVar[int] = 2
    paper: ClassVar[str] = "https://arxiv.org/abs/2003.14053"
    produces: ClassVar[frozenset[str]] = frozenset({"soft_labels", "images"})

    lr: float = 0.1
    tv: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, {"lr": 0, "tv": 0}, above=("lr",))

    def _objective(self, observation: Observation, gradient: Update, given: Reconstruction) -> Objective:
        return Objective(gradients(observation, gradient), Cosine(), (TotalVariation(self.tv),))

    def _method(self) -> Method:
        return SignedAdam(self.lr)
