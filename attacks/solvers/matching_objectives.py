"""What gradient matching makes small: a distance between gradients, and penalties on images and features.

R = candidates in a stack, N = images of each, T = entries of the gradient, all tensors in one vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from attacks.solvers.registration import shifted_towards


class Distance(Protocol):
    """How far gradients are from the observed one."""

    def __call__(self, gradient: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The distance (R,), and its slope in the gradient (R, T), which takes the gradient's memory.

        Args:
            gradient: (R, T), overwritten.
            target: (T,), what was observed.
        """
        ...


@dataclass(frozen=True, eq=False)
class Cosine:
    """1 - cos of the angle between two gradients, each taken as one long vector; 1 where either is zero."""

    def __call__(self, gradient: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The distance is in [0, 2]."""
        least = torch.finfo(gradient.dtype).tiny ** 0.5
        inverse = 1 / torch.linalg.vector_norm(gradient, dim=1).clamp_min(least)
        toward = -inverse / torch.linalg.vector_norm(target).clamp_min(least)
        cosine = -(gradient @ target) * toward
        along = cosine * inverse.square()
        return 1 - cosine, gradient.mul_(along.unsqueeze(1)).addcmul_(toward.unsqueeze(1), target)


@dataclass(frozen=True, eq=False)
class Euclidean:
    """Σ_i w_i (g_i - g*_i)².

    Args:
        weights: w, (T,) or a scalar.
    """

    weights: Tensor

    def __call__(self, gradient: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The distance is at least 0."""
        gap = gradient.sub_(target)
        weighted = gap * self.weights
        return torch.linalg.vecdot(gap, weighted), weighted.mul_(2)


def relative(target: Iterable[Tensor]) -> Euclidean:
    """‖g - g*‖² / ‖g*‖²: 1 for no gradient at all."""
    square = torch.stack([value.square().sum() for value in target]).sum()
    return Euclidean(1 / square.clamp_min(torch.finfo(square.dtype).tiny))


def relative_by_tensor(target: Iterable[Tensor]) -> Euclidean:
    """The mean over tensors of ‖g_p - g*_p‖² / ‖g*_p‖², so that each counts alike; zeros don't count."""
    shares = []
    for value in target:
        square = value.square().sum()
        share = torch.where(square > 0, 1 / square.clamp_min(torch.finfo(square.dtype).tiny), 0)
        shares.append(share.expand(value.numel()))
    counted = sum(bool(share[0]) for share in shares)
    return Euclidean(torch.cat(shares) / max(counted, 1))


Penalty = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Images (R, N, C, H, W) -> a penalty (R,) and its slope, of the images' shape."""


@dataclass(frozen=True)
class TotalVariation:
    """weight · the absolute differences of neighbours, across and down, over the number of entries.

    Unlike breaching's, it doesn't take what lies beyond the right and lower borders for black.
    """

    weight: float

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """A penalty, with the slope 0 between equal neighbours."""
        total, slopes = images.new_zeros(len(images)), []
        for dim in (-1, -2):
            step = torch.diff(images, dim=dim)
            sign = step.sign()
            total += torch.linalg.vecdot(sign.flatten(1), step.flatten(1))
            slopes.append(torch.diff(F.pad(sign, (1, 1) if dim == -1 else (0, 0, 1, 1)), dim=dim))
        share = self.weight * len(images) / images.numel()
        return share * total, (slopes[0] + slopes[1]).mul_(-share)


@dataclass(frozen=True)
class Norm:
    """weight · the mean square of the images."""

    weight: float

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """A penalty."""
        share = self.weight * len(images) / images.numel()
        return share * images.square().flatten(1).sum(dim=1), 2 * share * images


@dataclass(frozen=True)
class GroupConsistency:
    """weight · the mean squared distance from the candidates' consensus, which is held fixed for the slope.

    The consensus is their mean after each was shifted to where it is nearest to the most central of them (Yin
    et al. 2021 register by a dense flow: here by whole pixels). One candidate alone isn't drawn anywhere.
    """

    weight: float

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """A penalty."""
        away = images - self.consensus(images)
        share = self.weight * len(images) / images.numel()
        return share * away.square().flatten(1).sum(dim=1), 2 * share * away

    def consensus(self, images: Tensor) -> Tensor:
        """What R candidates (R, N, C, H, W) have in common, (N, C, H, W)."""
        from_mean = (images - images.mean(dim=0)).square().sum(dim=(2, 3, 4), keepdim=True)
        central = images.take_along_dim(from_mean.argmin(dim=0, keepdim=True), dim=0)
        return shifted_towards(images, central).mean(dim=0)


@dataclass(frozen=True, eq=False)
class FeaturePull:
    """weight · (1 - cos) between the head's input and the feature that is known, the mean over images.

    Args:
        features: (N, D), known.
        weights: (R,), one for each candidate.
    """

    features: Tensor
    weights: Tensor

    def of(self, candidate: int) -> FeaturePull:
        """The pull on one candidate."""
        return FeaturePull(self.features, self.weights[candidate : candidate + 1])

    def __call__(self, found: Tensor) -> tuple[Tensor, Tensor]:
        """Head's inputs (R, N, D) -> the penalty (R,) and its slope (R, N, D)."""
        least = torch.finfo(found.dtype).tiny
        inverse = found.square().sum(dim=2, keepdim=True).clamp_min(least).rsqrt()
        known = F.normalize(self.features, dim=1)
        cosine = (found * known).sum(dim=2, keepdim=True) * inverse
        share = (self.weights / len(known))[:, None, None]
        penalty = (share * (1 - cosine)).sum(dim=(1, 2))
        return penalty, share * inverse * (cosine * inverse * found - known)


class Matched(NamedTuple):
    """What a stack of candidates comes to."""

    total: Tensor  # (R,), all that is made small
    distance: Tensor  # (R,), between the gradients alone
    images_slope: Tensor  # (R, N, C, H, W), of the total
    labels_slope: Tensor  # (R, N, K)
