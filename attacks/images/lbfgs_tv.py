"""L-BFGS on the relative squared distance between gradients and total variation: for small budgets."""

from dataclasses import dataclass, replace
from itertools import count
from typing import ClassVar, Literal

import torch
from torch import Tensor

from attacks.images._matching import MatchingAttack, check, gradients, in_box
from attacks.solvers.gradient_matching import Objective
from attacks.solvers.matching_objectives import TotalVariation, relative, relative_by_tensor
from attacks.solvers.matching_optimisers import LBFGS, Descent, Function, Method, Value, Variables, descend
from bench import registry
from bench.threat import Observation, Reconstruction, Update

DISTANCES = {"whole": relative, "by_tensor": relative_by_tensor}


@registry.attacks.register
@dataclass(frozen=True)
class LBFGSTV(MatchingAttack):
    """After Geng et al. 2021: ‖∇L(x) - ∇*‖²/‖∇*‖² + w · TV(x), with x the sigmoid of what is moved.

    The weight w falls from `tv` to `tv_end`, by one factor an evaluation: first a smooth image is sought,
    then its detail. A constant weight is too small for a short search or too great for what a long one could
    tell (results/images/lbfgs_budget.md).

    Attributes:
        labels: where the labels come from: the spec of a label attack; `truth`; or `joint`.
        iterations: evaluations of the objective, those of the line search among them.
        restarts: how many starts, as one stack; the lowest objective wins.
        tv: the weight of total variation at the first evaluation, above 0.
        tv_end: the same at the last one, above 0; no more than `tv`.
        line_search: `none`: every step is taken, at length 1, but no longer than 0.3 (root mean square); or
            `wolfe`, which never climbs, and for that gets stuck on ReLU nets, where the objective jumps.
        layers: `whole`: all tensors as one vector; `by_tensor`: each tensor's distance relative to its own
            length, and their mean.
    """

    name: ClassVar[str] = "lbfgs_tv"
    title: ClassVar[str] = "L-BFGS with TV"
    paper: ClassVar[str] = "https://arxiv.org/abs/2110.09074"
    produces: ClassVar[frozenset[str]] = frozenset({"soft_labels", "images"})
    needs_length: ClassVar[bool] = True
    revision: ClassVar[int] = 2

    iterations: int = 300
    tv: float = 3.0
    tv_end: float = 0.01
    line_search: Literal["none", "wolfe"] = "none"
    layers: Literal["whole", "by_tensor"] = "whole"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, {"tv_end": 0, "tv": self.tv_end}, above=("tv_end",))

    def _objective(self, observation: Observation, gradient: Update, given: Reconstruction) -> Objective:
        distance = DISTANCES[self.layers](gradient.values())
        return Objective(gradients(observation, gradient), distance)

    def _function(self, objective: Objective, labels: Tensor | None) -> Function:
        """With less of the total variation at each call, which is one evaluation."""
        falls = self.tv_end / self.tv
        weights = (self.tv * falls ** (call / self.iterations) for call in count())

        def function(variables: Variables) -> Value:
            now = replace(objective, penalties=(TotalVariation(next(weights)),))
            return super(LBFGSTV, self)._function(now, labels)(variables)

        return function

    def _method(self) -> Method:
        return LBFGS(memory=100, line_search=self.line_search, first_step=0.5, longest=0.3)

    def _descend(self, function: Function, start: Variables) -> Descent:
        logits = torch.logit(start[0].clamp(0.02, 0.98))
        return descend(
            in_box(function),
            (logits, *start[1:]),
            self._method(),
            self.iterations,
            boxed=False,
            watch=self._report,
        )

    def _images(self, variable: Tensor) -> Tensor:
        return torch.sigmoid(variable)
