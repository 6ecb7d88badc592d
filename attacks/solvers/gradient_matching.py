"""Gradient matching: the images whose gradient is close to an observed one.

An `Objective` is a distance between gradients with penalties on images and features (matching_objectives.py).
How it changes with the images goes through the gradient of the loss itself. For nets of layers in a row that
is there in closed form (matching_closed_form.py); for the rest, by double backward, below. What makes it
small is in matching_optimisers.py.

R = candidates in a stack, N = images of each, K = classes, D = width of the head's input.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from attacks.solvers.matching_closed_form import ClosedForm, chain_of
from attacks.solvers.matching_objectives import (
    Distance,
    FeaturePull,
    Matched,
    Penalty,
)


class LocalSteps(NamedTuple):
    """What a FedAvg client does between two updates: so many steps of SGD at this rate."""

    steps: int
    lr: float


ONE_GRADIENT = LocalSteps(1, 1.0)


@dataclass(frozen=True, eq=False)
class BatchNormStatistics:
    """weight · Σ_layers ‖mean - known mean‖ + ‖variance - known variance‖ of batch norm's inputs.

    Args:
        weight: of the sum.
        known: module name -> (mean, variance), (C,) each.
    """

    weight: float
    known: Mapping[str, tuple[Tensor, Tensor]]

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Module name -> (N, C, …), differentiable -> a scalar."""
        gaps = []
        for name, (mean, variance) in self.known.items():
            variance_found, mean_found = torch.var_mean(
                inputs[name].transpose(0, 1).flatten(1), dim=1, correction=0
            )
            gaps += [(mean_found - mean).norm(), (variance_found - variance).norm()]
        return self.weight * torch.stack(gaps).sum()


class DoubleBackward:
    """Distances of R candidates' gradients from the observed one, with their derivatives, for any model.

    Mean soft cross-entropy over each candidate's N images. Candidates go through one after the other: a graph
    of a gradient is large, and a stack of them no faster.
    """

    def __init__(
        self,
        model: nn.Module,
        head: str,
        target: Mapping[str, Tensor],
        local_steps: LocalSteps = ONE_GRADIENT,
        statistics: BatchNormStatistics | None = None,
    ) -> None:
        """The model stays as it is: its parameters are read, all else is copied.

        Args:
            model: the public weights, in the client's mode.
            head: the module name of the last linear layer.
            target: the observed gradient, parameter name -> tensor; what isn't there isn't matched.
            local_steps: where it is the mean of the gradients of several steps.
            statistics: a penalty on the inputs of batch norm.
        """
        self._names = list(target)
        self._target = torch.cat([value.detach().flatten() for value in target.values()])
        self._gradient = torch.empty_like(self._target)
        self._local_steps, self._statistics = local_steps, statistics
        self._model = copy.deepcopy(model)
        moving = {name for name, value in model.named_parameters() if value.requires_grad}
        self._parameters = {name: value.detach() for name, value in self._model.named_parameters()}
        self._moving = [
            name for name in self._parameters if name in target or (local_steps.steps > 1 and name in moving)
        ]
        for name in self._moving:
            self._parameters[name].requires_grad_()
        self._buffers = dict(self._model.named_buffers())
        self._head, self._inputs = head, dict[str, Tensor]()
        for name in [head, *(statistics.known if statistics else ())]:
            self._model.get_submodule(name).register_forward_pre_hook(self._noting(name))

    def _noting(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._inputs[name] = inputs[0]

        return note

    def __call__(
        self, images: Tensor, soft_labels: Tensor, distance: Distance, pull: FeaturePull | None
    ) -> Matched:
        """The distance, the penalties on features and statistics added to it, and the slopes of their sum.

        Args:
            images: (R, N, C, H, W).
            soft_labels: (R, N, K).
            distance: of gradients.
            pull: a penalty on the head's inputs.
        """
        each = [
            self._one(image, label, distance, None if pull is None else pull.of(candidate))
            for candidate, (image, label) in enumerate(zip(images, soft_labels, strict=True))
        ]
        return Matched(*map(torch.cat, zip(*each, strict=True)))

    def _one(
        self, images: Tensor, soft_labels: Tensor, distance: Distance, pull: FeaturePull | None
    ) -> Matched:
        """A stack of one, from images (N, C, H, W) and labels (N, K)."""
        leaves = images.detach().requires_grad_(), soft_labels.detach().requires_grad_()
        with torch.enable_grad():
            gradient, inputs = self._mean_gradient(*leaves)
            outputs = list(gradient)
            statistics = None if self._statistics is None else self._statistics(inputs)
        with torch.no_grad():
            torch.cat([value.flatten() for value in gradient], out=self._gradient)
            matched, v = distance(self._gradient[None], self._target)
            parts = torch.split(v[0], [value.numel() for value in gradient])
            slopes = [part.view_as(value) for part, value in zip(parts, gradient, strict=True)]
            total = matched
            if pull is not None:
                penalty, slope = pull(inputs[self._head][None])
                total, outputs, slopes = total + penalty, [*outputs, inputs[self._head]], [*slopes, slope[0]]
            if statistics is not None:
                total = total + statistics.detach()
                outputs, slopes = [*outputs, statistics], [*slopes, torch.ones_like(statistics)]
        # A parameter that the model doesn't use has a gradient of zeros, which depends on nothing.
        used = [index for index, value in enumerate(outputs) if value.requires_grad]
        outputs, slopes = ([values[index] for index in used] for values in (outputs, slopes))
        found = torch.autograd.grad(outputs, leaves, slopes, materialize_grads=True)
        return Matched(total, matched, found[0][None], found[1][None])

    def _mean_gradient(self, images: Tensor, soft_labels: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
        """What the client would have sent, tensor by tensor; and what came in where it is watched."""
        weights, inputs = self._parameters, dict[str, Tensor]()
        total: list[Tensor] = []
        for step in range(self._local_steps.steps):
            logits = functional_call(self._model, (weights, self._buffers), (images,))
            inputs = inputs or dict(self._inputs)  # of the public weights
            loss = -(soft_labels * torch.log_softmax(logits, dim=1)).sum(dim=1).mean()
            derivatives = torch.autograd.grad(
                loss, [weights[name] for name in self._moving], create_graph=True, materialize_grads=True
            )
            moved = dict(zip(self._moving, derivatives, strict=True))
            matched = [moved[name] for name in self._names]
            total = matched if not total else [one + more for one, more in zip(total, matched, strict=True)]
            if step + 1 < self._local_steps.steps:
                lr = self._local_steps.lr
                weights = weights | {name: weights[name] - lr * value for name, value in moved.items()}
        self._inputs.clear()
        count = self._local_steps.steps
        return (total if count == 1 else [value / count for value in total]), inputs


Gradients = ClosedForm | DoubleBackward


def gradients_of(model: nn.Module, head: str, target: Mapping[str, Tensor], images: Tensor) -> Gradients:
    """In closed form where the model is a chain, as found on these images (N, C, H, W)."""
    chain = chain_of(model, images)
    if chain is None or chain.names[-1] != head:
        return DoubleBackward(model, head, target)
    return ClosedForm(model, chain, target)


@dataclass(frozen=True, eq=False)
class Objective:
    """All that is made small: a distance between gradients, and penalties.

    Args:
        gradients: where distances and their derivatives come from.
        distance: of gradients.
        penalties: on images.
        pull: on the head's inputs.
    """

    gradients: Gradients
    distance: Distance
    penalties: tuple[Penalty, ...] = ()
    pull: FeaturePull | None = None

    def __call__(self, images: Tensor, soft_labels: Tensor) -> Matched:
        """Images (R, N, C, H, W) and labels (R, N, K) -> what they come to, and its slopes."""
        matched = self.gradients(images, soft_labels, self.distance, self.pull)
        total, slope = matched.total, matched.images_slope
        with torch.no_grad():
            for penalty in self.penalties:
                value, more = penalty(images)
                total, slope = total + value, slope + more
        return Matched(total, matched.distance, slope, matched.labels_slope)
