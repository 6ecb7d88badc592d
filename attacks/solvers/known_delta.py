"""The image whose features and last convolution's gradient are those observed, where δ is known there.

With δ = ∂L/∂z of the last convolution known, its gradient δ ⊛ φ(x) is a continuous function of that layer's
input φ(x), as the features f(x) are: no derivative of a derivative, and none of the jumps that ∇W of lower
layers makes wherever a ReLU of x switches. For ReLU nets both are piecewise linear in x, so that Gauss-Newton
ends in the exact image once x is near enough for most ReLUs to be right. First-order descent brings it there:

1. signed Adam from noise on ‖r(x)‖² + w · TV(x), w falling geometrically;
2. Gauss-Newton on r(x), each step by conjugate gradients on Jᵀ J (CGLS), halved until ‖r‖ falls.

r(x) joins δ ⊛ φ(x) - ∇W and f(x) - f, each as a share of its norm.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp, vjp
from torch.nn import functional as F

MOMENTUM = 0.9
"""Adam's β₁, as signed Adam has it."""
CONJUGATE_STEPS = 300
FORCING = 0.03
"""Conjugate gradients stop where the normal equations' residual has fallen by this."""
HALVINGS = 8
SURE = 16
"""Four standard errors, squared: what a unit has to explain to be switched."""
MOST_SWITCHED = 200


class Network:
    """What a network's last convolution and its head see of images. Takes the model over: give it a copy."""

    def __init__(self, model: nn.Module, convolution: str, head: str) -> None:
        """`convolution` and `head` are names of modules."""
        self._model, self._names = model.requires_grad_(False), (convolution, head)
        self._seen: dict[str, Tensor] = {}
        for name in self._names:
            model.get_submodule(name).register_forward_pre_hook(partial(self._note, name))

    def _note(self, name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._seen[name] = inputs[0]

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C, H, W) -> φ (N, I, h, w), the convolution's input, and features (N, D)."""
        self._model(images)
        phi, features = (self._seen.pop(name) for name in self._names)
        return phi, features

    @property
    def windows(self) -> dict[str, Any]:
        """The convolution's kernel, stride, padding and dilation."""
        layer = self._model.get_submodule(self._names[0])
        assert isinstance(layer, nn.Conv2d)
        names = ("kernel_size", "stride", "padding", "dilation")
        return {name: getattr(layer, name) for name in names}

    def single(self) -> Network:
        """The same in float32."""
        return Network(_without_hooks(self._model, self._names).float(), *self._names)


def _without_hooks(model: nn.Module, names: tuple[str, ...]) -> nn.Module:
    copied = copy.deepcopy(model)
    for name in names:
        copied.get_submodule(name)._forward_pre_hooks.clear()
    return copied


@dataclass(frozen=True, eq=False)
class KnownDelta:
    """What is known, and the residual that it leaves.

    Attributes:
        network: in the dtype of all that follows.
        delta: (O, H', W'), ∂L/∂z of its last convolution.
        gradient: (O, I, h, w), that convolution's weight's.
        features: (D,).
    """

    network: Network
    delta: Tensor
    gradient: Tensor
    features: Tensor

    def residual(self, image: Tensor) -> Tensor:
        """What an image (C, H, W) leaves of both, r: a vector."""
        phi, features = self.network(image[None])
        windows = F.unfold(phi, **self.network.windows)[0]
        seen = self.delta.flatten(1) @ windows.T
        wanted = self.gradient.flatten(1)
        return torch.cat(
            [
                ((seen - wanted) / wanted.norm()).flatten(),
                (features[0] - self.features) / self.features.norm(),
            ]
        )

    def switched(self, image: Tensor, change: Tensor, allowed: Tensor) -> Tensor:
        """Which units' δ to change by `change`, (O, H', W'), so that ‖∇W - δ ⊛ φ‖ at an image falls: a mask.

        Greedily, the unit first that explains most, among the `allowed`, until none explains more than noise
        might. Neighbours' windows overlap: together they would explain the same thing twice.
        """
        phi, _ = self.network(image[None])
        windows = F.unfold(phi, **self.network.windows)[0]
        by, sizes = change.flatten(1), change.flatten(1).square() * windows.square().sum(0)
        left = self.gradient.flatten(1) - self.delta.flatten(1) @ windows.T
        chosen = torch.zeros_like(by, dtype=torch.bool)
        for _ in range(MOST_SWITCHED):
            gains = (2 * by * (left @ windows) - sizes).where(allowed.reshape(by.shape) & ~chosen, -math.inf)
            unit = int(gains.argmax())
            if not float(gains.flatten()[unit]) > SURE * float(left.square().mean()):
                break
            row, place = divmod(unit, by.shape[1])
            chosen[row, place] = True
            left[row] -= by[row, place] * windows[:, place]
        return chosen.reshape(change.shape)

    def single(self) -> KnownDelta:
        """The same in float32."""
        return KnownDelta(
            self.network.single(), self.delta.float(), self.gradient.float(), self.features.float()
        )


@dataclass(frozen=True, eq=False)
class Candidate:
    """An image (C, H, W) and ‖r‖ at it."""

    image: Tensor
    misfit: float


def total_variation(image: Tensor) -> Tensor:
    """The mean absolute differences of neighbours, across and down."""
    return torch.diff(image, dim=-1).abs().mean() + torch.diff(image, dim=-2).abs().mean()


def descend(
    problem: KnownDelta, start: Tensor, iterations: int, lr: float, tv: float, tv_end: float
) -> Tensor:
    """Signed Adam within [0, 1], its step falling as a cosine, TV's weight from `tv` to `tv_end`.

    Returns:
        The last image (C, H, W).
    """
    image, momentum = start.clone(), torch.zeros_like(start)
    for iteration in range(iterations):
        share = iteration / iterations
        with torch.enable_grad():
            leaf = image.requires_grad_()
            loss = problem.residual(leaf).square().sum()
            loss = loss + tv * (tv_end / tv) ** share * total_variation(leaf)
            (gradient,) = torch.autograd.grad(loss, leaf)
        momentum = MOMENTUM * momentum + (1 - MOMENTUM) * gradient.sign()
        step = lr * 0.5 * (1 + math.cos(math.pi * share)) / (1 - MOMENTUM ** (iteration + 1))
        image = (image.detach() - step * momentum).clamp(0, 1)
    return image


def polish(problem: KnownDelta, start: Tensor, steps: int, enough: float) -> Candidate:
    """Gauss-Newton from an image near enough.

    Stops where ‖r‖ ≤ `enough`, and where no step lowers it by a twentieth.
    """
    image, residual = start, problem.residual(start)
    for _ in range(steps):
        before = float(residual.norm())
        if not before > enough:
            break
        image, residual = _step(problem, image, residual, enough)
        if not float(residual.norm()) < 0.95 * before:
            break
    return Candidate(image, float(residual.norm()))


def _step(problem: KnownDelta, image: Tensor, residual: Tensor, enough: float) -> tuple[Tensor, Tensor]:
    """One Gauss-Newton step, halved until it helps; the same image where it doesn't."""
    pull = vjp(problem.residual, image)[1]
    change = conjugate_gradients(
        lambda v: jvp(problem.residual, (image,), (v,))[1], lambda w: pull(w)[0], -residual, image, enough
    )
    for _ in range(HALVINGS):
        moved = image + change
        here = problem.residual(moved)
        if here.norm() < residual.norm():
            return moved, here
        change = change / 2
    return image, residual


def conjugate_gradients(
    forward: Callable[[Tensor], Tensor],
    transpose: Callable[[Tensor], Tensor],
    right: Tensor,
    like: Tensor,
    enough: float,
) -> Tensor:
    """CGLS: x of `like`'s shape with ‖forward(x) - right‖ least, from zero.

    Ends early where that norm is down to `enough`: what is left then is noise, which further steps would
    fit, too.
    """
    x, left = torch.zeros_like(like), right
    normal = transpose(left)
    direction, square = normal, normal.square().sum()
    least = FORCING**2 * float(square)
    for _ in range(CONJUGATE_STEPS):
        if not (float(square) > least and float(left.norm()) > enough):
            break
        image = forward(direction)
        length = square / image.square().sum()
        x, left = x + length * direction, left - length * image
        normal = transpose(left)
        direction, square = normal + normal.square().sum() / square * direction, normal.square().sum()
    return x
