"""A fully connected layer's inputs from their mixtures: independent component analysis with an image's prior.

∇W = A X mixes n inputs X (n, D). Centred and whitened, an unmixing U of unit rows is moved by Adam
to inputs that are far from Gaussian, smooth, and different from each other (Kariyappa et al. 2023, the
cocktail party attack). Signs and lengths stay open, but for ∇b = A 1, which the same U takes to the factor of
each input: that is ours, the authors fix signs by the truth and stretch each image over its range.

n = batch size, m = units of the layer, D = width of its input.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class UnmixingWeights:
    """What the parts of the objective count.

    Attributes:
        negentropy: of the squared mean log cosh of each input, made large; the released code leaves it out.
        variation: of the total variation.
        apart: of mean(exp(sharpness · abs(cos)) - 1) over pairs of rows of U.
        sharpness: see `apart`.
    """

    negentropy: float
    variation: float
    apart: float
    sharpness: float


@dataclass(frozen=True, eq=False)
class Unmixed:
    """The inputs (n, D), up to a factor each where `scaled` is False, and the objective at its end."""

    inputs: Tensor
    scaled: bool
    loss: float


def unmix(
    weight_gradient: Tensor,
    bias_gradient: Tensor | None,
    count: int,
    variation: Callable[[Tensor], Tensor],
    weights: UnmixingWeights,
    iterations: int,
    lr: float,
) -> Unmixed | None:
    """The inputs of a layer; None where ∇W's rank is below n.

    Args:
        weight_gradient: (m, D).
        bias_gradient: (m,), if it was sent.
        count: n.
        variation: total variation of inputs (n, D), a scalar.
        weights: of the objective.
        iterations: Adam's steps.
        lr: the first step's length; it falls to 0 along a cosine.
    """
    mixtures = weight_gradient.double()
    centre = mixtures.mean(dim=1, keepdim=True)
    left, values, right = torch.linalg.svd(mixtures - centre, full_matrices=False)
    if len(values) < count or bool(values[count - 1] <= 1e-6 * values[0]):
        return None
    stretch = math.sqrt(mixtures.shape[1] - 1)
    whitening = stretch * left[:, :count].T / values[:count, None]  # (n, m)
    white, offsets = stretch * right[:count], whitening @ centre

    unmixing = torch.eye(count, dtype=white.dtype, device=white.device).requires_grad_()
    optimiser = torch.optim.Adam([unmixing], lr=lr)
    loss = math.inf
    with torch.enable_grad():
        for iteration in range(iterations + 1):
            rows = unmixing / torch.linalg.vector_norm(unmixing, dim=1, keepdim=True)
            sources = rows @ white
            non_gaussian = log_cosh(sources).mean(dim=1).square().mean()
            cosines = (rows @ rows.T).abs() - torch.eye(count, dtype=rows.dtype, device=rows.device)
            alike = torch.expm1(weights.sharpness * cosines).mean()
            objective = (
                weights.variation * variation(sources + rows @ offsets)
                + weights.apart * alike
                - weights.negentropy * non_gaussian
            )
            loss = objective.item()
            if iteration == iterations or not math.isfinite(loss):
                break
            for group in optimiser.param_groups:
                group["lr"] = lr * (1 + math.cos(math.pi * iteration / iterations)) / 2
            (unmixing.grad,) = torch.autograd.grad(objective, [unmixing])
            optimiser.step()
    rows = rows.detach()
    inputs = rows @ (white + offsets)
    if bias_gradient is None:
        return Unmixed(inputs, False, loss)
    factors = rows @ whitening @ bias_gradient.double()
    return Unmixed(inputs / factors[:, None], True, loss)


def log_cosh(values: Tensor) -> Tensor:
    """The logarithm of cosh, without overflow."""
    size = values.abs()
    return size + torch.log1p(torch.exp(-2 * size)) - math.log(2)
