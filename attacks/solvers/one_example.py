"""Whether a disturbed gradient of the last layer is that of one example: what is left beside rank one.

Noise leaves something of every direction. A second example, or a second step, leaves one direction more.
"""

from __future__ import annotations

import torch
from torch import Tensor

_STEPS = 8
_CONCENTRATED = 0.6
_BEYOND_NOISE = 2.0
_LEFT = 1e-3
"""Less than this of a gradient's norm may be rounding, whose directions mean nothing."""


def has_second_direction(gradient: Tensor, features: Tensor) -> Tensor:
    """Whether most of what one example doesn't explain lies in one direction more: (M,).

    Args:
        gradient: (M, K, D).
        features: (M, D) the example's, up to a factor.
    """
    num_classes, width = gradient.shape[1:]
    few = max(min(num_classes - 1, width) - 1, 1)
    # What the leading direction of noise alone has of it all.
    of_noise = (1 / (num_classes - 1) ** 0.5 + 1 / width**0.5) ** 2 if few > 1 else 1.0
    bound = max(_CONCENTRATED, _BEYOND_NOISE * of_noise)
    size = torch.linalg.vector_norm(gradient, dim=(1, 2)).double()
    v = features / torch.linalg.vector_norm(features, dim=1, keepdim=True).clamp_min(1e-30)
    along = torch.linalg.vector_norm(torch.matmul(gradient, v[..., None]), dim=(1, 2)).double()
    doubtful = ((size.square() - along.square()).clamp_min(0).sqrt() > _LEFT * size).nonzero()[:, 0]
    found = torch.zeros_like(size, dtype=torch.bool)
    if bound >= 1 or len(doubtful) == 0:
        return found
    g = gradient[doubtful].double()
    g = g - g.mean(dim=1, keepdim=True)
    right = torch.stack([v[doubtful].double(), g.square().sum(dim=1)], dim=2)  # (M, D, 2)
    for _ in range(_STEPS):
        right = torch.linalg.qr(g.mT @ (g @ right)).Q
    values = torch.linalg.svdvals(g @ right).square()  # (M, 2)
    rest = g.square().sum(dim=(1, 2)) - values[:, 0]
    found[doubtful] = (values[:, 1] > bound * rest) & (rest > (_LEFT * size[doubtful]).square())
    return found
