"""GradInversion: gradient matching with image priors, batch norm's statistics, and a group of candidates."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from attacks.images._matching import MatchingAttack, check, gradients
from attacks.solvers.gradient_matching import BatchNormStatistics, DoubleBackward, Objective
from attacks.solvers.matching_objectives import Euclidean, GroupConsistency, Norm, TotalVariation
from attacks.solvers.matching_optimisers import Adam, Method, cosine_decay
from bench import registry
from bench.threat import Observation, Reconstruction, Update


@registry.attacks.register
@dataclass(frozen=True)
class GradInversion(MatchingAttack):
    """Yin et al. 2021: matching · ‖∇L(x) - ∇*‖² + priors by Adam, x clipped to [0, 1] at every step.

    Batch norm's statistics are the client's where they are granted, else the model's. Before their mean is
    taken, the candidates are registered by shifts in whole pixels; the paper's registration is a dense flow
    (RANSAC-Flow, a trained network), and its code is not public. The paper's noise on every step isn't here.

    Attributes:
        labels: where the labels come from: the spec of a label attack; `truth`; or `joint`.
        iterations: steps. The paper takes 20,000.
        restarts: how many candidates; they are drawn to what they share, and the lowest objective wins.
        lr: the first steps' length, above 0; it falls to 0 as half a cosine.
        matching: the weight of the squared distance between gradients, above 0.
        tv: the weight of total variation.
        norm: the weight of the images' mean square.
        batch_norm: the weight of batch norm's statistics.
        group: the weight of the mean square from the registered candidates' mean.
    """

    name: ClassVar[str] = "gradinversion"
    title: ClassVar[str] = "GradInversion"
    paper: ClassVar[str] = "https://arxiv.org/abs/2104.07586"
    produces: ClassVar[frozenset[str]] = frozenset({"soft_labels", "images"})
    uses: ClassVar[frozenset[str]] = frozenset({"batch_norm"})
    needs_length: ClassVar[bool] = True
    revision: ClassVar[int] = 2

    labels: str = "gradinversion_labels"
    restarts: int = 2
    lr: float = 0.1
    matching: float = 1e-4
    tv: float = 1e-4
    norm: float = 1e-6
    batch_norm: float = 0.1
    group: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = {"lr": 0, "matching": 0, "tv": 0, "norm": 0, "batch_norm": 0, "group": 0}
        check(self, weights, above=("lr", "matching"))

    def _objective(self, observation: Observation, gradient: Update, given: Reconstruction) -> Objective:
        known = known_statistics(observation)
        found = gradients(observation, gradient)
        if known:
            statistics = BatchNormStatistics(self.batch_norm, known)
            found = DoubleBackward(observation.model, observation.head, gradient, statistics=statistics)
        penalties = TotalVariation(self.tv), Norm(self.norm), GroupConsistency(self.group)
        weight = torch.full_like(observation.head_weight[0, 0], self.matching)
        return Objective(found, Euclidean(weight), penalties)

    def _method(self) -> Method:
        return Adam(self.lr, cosine_decay)


def known_statistics(observation: Observation) -> dict[str, tuple[Tensor, Tensor]]:
    """Of batch norm's inputs, (mean, variance): the client's if they are granted, else the model's."""
    if observation.knowledge.batch_norm is not None:
        return dict(observation.knowledge.batch_norm)
    return {
        name: (module.running_mean, module.running_var)
        for name, module in observation.model.named_modules()
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_mean is not None
        and module.running_var is not None
    }  # fmt: skip
