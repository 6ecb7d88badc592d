"""What attacks by gradient matching share: starts, and how the search ended.

The labels are not sought with the images, unless asked for: see `_labels.py`.
"""

import logging
import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from attacks.images._labels import LENGTH, GivenLabels, drawing_from
from attacks.solvers.gradient_matching import Gradients, Objective, gradients_of
from attacks.solvers.matching_objectives import Euclidean
from attacks.solvers.matching_optimisers import (
    LBFGS,
    Descent,
    Function,
    Method,
    Value,
    Variables,
    descend,
)
from bench.threat import Facts, Observation, Outcome, Reconstruction, Update

MATCHED = 1e-10
"""Of the squared distance at the start: about where rounding in float32 ends the search."""

log = logging.getLogger(__name__)


def check(attack: object, least: Mapping[str, float], above: tuple[str, ...] = ()) -> None:
    """That these parameters are finite and at least so much, and those in `above` more.

    Raises:
        ValueError: one isn't.
    """
    for name, bound in least.items():
        value = getattr(attack, name)
        if not bound <= value < math.inf or (name in above and value == bound):
            relation = "above" if name in above else "of at least"
            raise ValueError(f"{name}={value} is not a number {relation} {bound:g}")


@dataclass(frozen=True)
class MatchingAttack(GivenLabels):
    """The base of attacks by gradient matching.

    Attributes:
        labels: where the labels come from: the spec of a label attack; `truth` (granted: an upper bound); or
            `joint`, logits that are moved along with the images.
        iterations: evaluations of the objective, at least 1.
        restarts: how many starts, each from other noise, as one stack; the lowest objective wins.
    """

    needs_length: ClassVar[bool] = False
    """Whether the gradient's length matters: FedAvg hides it where steps and rate aren't granted."""

    labels: str = "lambda_recovery"
    iterations: int = 1000
    restarts: int = 1

    def __post_init__(self) -> None:
        check(self, {"iterations": 1, "restarts": 1})
        self._take_labels(LENGTH if self.needs_length else frozenset())

    def skip(self, facts: Facts) -> str | None:
        """Needs what its labels need."""
        hidden = facts.protocol.startswith("fedavg") and not facts.granted >= LENGTH
        if self.needs_length and hidden and not self._lacks_truth(facts):
            return "needs the gradient's length: grant knowledge = ['local_steps', 'local_lr']"
        return super().skip(facts)

    @abstractmethod
    def _objective(self, observation: Observation, gradient: Update, given: Reconstruction) -> Objective:
        """What is made small; `given` is what is known of labels and features."""

    @abstractmethod
    def _method(self) -> Method:
        """What makes it small."""

    def _start(self, shape: tuple[int, ...], rng: torch.Generator, dtype: torch.dtype) -> Tensor:
        """One candidate's images, (N, C, H, W): uniform noise."""
        return torch.rand(shape, generator=rng, dtype=dtype, device=rng.device)

    def _function(self, objective: Objective, labels: Tensor | None) -> Function:
        """The objective of images in [0, 1], and of logits where the labels are sought too."""
        return with_labels(objective, labels) if labels is not None else with_logits(objective)

    def _descend(self, function: Function, start: Variables) -> Descent:
        """From the start down; images are clipped to [0, 1] after every step."""
        return descend(function, start, self._method(), self.iterations, boxed=True, watch=self._report)

    def _best(self, ends: Descent) -> int:
        """Which candidate wins."""
        return min(range(len(ends.totals)), key=ends.totals.__getitem__)

    def run(self, observation: Observation, rng: torch.Generator) -> Reconstruction:
        """Images (N, C, H, W), and soft labels (N, K) unless they were granted.

        `OK` where the gradient was matched to rounding (which only DLG and its like look for); `STEP_LIMIT`
        where the search took all its iterations or found no lower point, as the notes say;
        `DIVERGED` where the objective of every start was or became not finite; `UNIDENTIFIABLE` where the
        update is zero; the label attack's own outcome where it finds no labels.
        """
        gradient = observed_gradient(observation)
        if not any(bool(value.any()) for value in gradient.values()):
            return Reconstruction(Outcome.UNIDENTIFIABLE, notes={"reason": "the update is zero, or not sent"})
        given = self._known(observation, rng)
        if self._lacks(given):
            return replace(given, features=None)
        like = observation.head_weight  # for dtype and device
        labels = None if given.soft_labels is None else given.soft_labels.to(like)
        with drawing_from(rng, like.device):
            objective = self._objective(observation, gradient, given)
            ends = self._descend(self._function(objective, labels), self._starts(observation, rng, labels))
        return self._answer(ends, given, labels)

    def _starts(self, observation: Observation, rng: torch.Generator, labels: Tensor | None) -> Variables:
        """Images (R, N, C, H, W), and logits (R, N, K) where there are no labels; candidate by candidate."""
        facts, like = observation.facts, observation.head_weight
        images, logits = [], []
        for _ in range(self.restarts):
            images.append(self._start((facts.batch_size, *facts.image_shape), rng, like.dtype))
            if labels is None:
                shape = (facts.batch_size, facts.num_classes)
                logits.append(torch.randn(shape, generator=rng, dtype=like.dtype, device=rng.device))
        return tuple(torch.stack(drawn).to(like.device) for drawn in (images, logits) if drawn)

    def _answer(self, ends: Descent, given: Reconstruction, labels: Tensor | None) -> Reconstruction:
        """The best candidate, and how its search ended."""
        best = self._best(ends)
        notes = given.notes | {
            "loss": ends.totals[best],
            "distance": ends.distances[best],
            "stopped": ends.ends[best],
            "iterations": ends.iterations,
        }
        if all(end == "not finite" for end in ends.ends):
            outcome = Outcome.DIVERGED
            notes["reason"] = "; ".join(filter(None, [str(notes.get("reason", "")), "not finite"]))
        else:
            outcome = Outcome.OK if ends.ends[best] == "matched" else Outcome.STEP_LIMIT
        images = None
        if math.isfinite(ends.totals[best]):
            images = self._images(ends.variables[0][best])
            if labels is None:
                labels = torch.softmax(ends.variables[1][best], dim=1)
        produced = labels if "soft_labels" in self.produces else None
        return Reconstruction(outcome, produced, images=images, notes=notes)

    def _images(self, variable: Tensor) -> Tensor:
        """The images, from the variable that was moved."""
        return variable.clamp(0, 1)

    def _report(self, iteration: int, totals: list[float]) -> None:
        """A line after each tenth."""
        if log.isEnabledFor(logging.INFO) and iteration % max(self.iterations // 10, 1) == 0:
            log.info("%s: iteration %d of %d: %.4g", self.name, iteration, self.iterations, min(totals))


@dataclass(frozen=True)
class DeepLeakage(MatchingAttack):
    """‖∇L(x) - ∇*‖² by L-BFGS, without bounds, penalties or schedule.

    Attributes:
        line_search: `none` as published: every step is taken, at length 1; or `wolfe`, which never climbs,
            and for that gets stuck on ReLU nets, where the objective jumps.
    """

    needs_length: ClassVar[bool] = True

    line_search: Literal["none", "wolfe"] = "none"

    def _objective(self, observation: Observation, gradient: Update, given: Reconstruction) -> Objective:
        return Objective(
            gradients(observation, gradient), Euclidean(torch.ones_like(observation.head_weight[0, 0]))
        )

    def _method(self) -> Method:
        return LBFGS(memory=100, line_search=self.line_search)

    def _descend(self, function: Function, start: Variables) -> Descent:
        return descend(
            function, start, self._method(), self.iterations, boxed=False, enough=MATCHED, watch=self._report
        )


def with_labels(objective: Objective, labels: Tensor) -> Function:
    """The objective of the images alone; labels are (N, K)."""

    def function(variables: Variables) -> Value:
        (images,) = variables
        matched = objective(images, labels.expand(len(images), *labels.shape))
        return Value(matched.total, matched.distance, (matched.images_slope,))

    return function


def with_logits(objective: Objective) -> Function:
    """The objective of images and of the logits of their labels, (R, N, K)."""

    def function(variables: Variables) -> Value:
        images, logits = variables
        labels = torch.softmax(logits, dim=2)
        matched = objective(images, labels)
        slope = labels * matched.labels_slope
        slope = slope - labels * slope.sum(dim=2, keepdim=True)
        return Value(matched.total, matched.distance, (matched.images_slope, slope))

    return function


def gradients(observation: Observation, target: Update) -> Gradients:
    """Distances from the observed gradient: in closed form where the model is a chain of layers."""
    like = observation.head_weight
    ramp = torch.linspace(
        0, 1, math.prod(observation.facts.image_shape), dtype=like.dtype, device=like.device
    )
    probe = ramp.view(1, *observation.facts.image_shape)
    return gradients_of(observation.model, observation.head, target, torch.cat([probe, 1 - probe]))


def observed_gradient(observation: Observation) -> Update:
    """The update as a gradient: for FedAvg -Δ, which is the mean over local steps up to a factor.

    The factor, too, where steps and rate are granted.
    """
    if not observation.facts.protocol.startswith("fedavg"):
        return observation.update
    steps, lr = observation.knowledge.local_steps, observation.knowledge.local_lr
    scale = -1.0 if steps is None or lr is None else -1 / (steps * lr)
    return {name: scale * sent for name, sent in observation.update.items()}


def in_box(function: Function) -> Function:
    """The function of logits whose sigmoid is the images: they can't leave [0, 1]."""

    def boxed(variables: Variables) -> Value:
        images = torch.sigmoid(variables[0])
        value = function((images, *variables[1:]))
        slope = value.slopes[0] * images * (1 - images)
        return Value(value.total, value.distance, (slope, *value.slopes[1:]))

    return boxed
