"""Two images from one that is a mix of both, or has a piece of the other in it, once the mix is known.

N = images, C, H, W as usual; P = public images.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SHARED = 0.5
_RIDGE = 1e-2
_SMOOTHING_STEPS = 300


def unmix(mixed: Tensor, weight: float, own: int, other: int, public: Tensor, classes: Tensor) -> Tensor:
    """The expected first image x of mixed = w x + (1 - w) x', each a normal variable of its class.

    Args:
        mixed: (C, H, W).
        weight: w, in [0, 1].
        own: x's class.
        other: that of x'.
        public: (P, C, H, W), from which classes' means and covariances are taken; at least one of each.
        classes: (P,).

    Returns:
        (C, H, W) in [0, 1].
    """
    pixels = public.flatten(1).double()
    within = pixels.new_zeros(pixels.shape[1], pixels.shape[1])
    for one in range(int(classes.max()) + 1):
        if bool((classes == one).any()):
            centred = pixels[classes == one] - pixels[classes == one].mean(0)
            within += centred.T @ centred / len(pixels)
    within.diagonal().add_(_RIDGE * within.diagonal().mean() + 1e-9)
    means, covariances = [], []
    for one in (own, other):
        of_class = pixels[classes == one]
        centred = of_class - of_class.mean(0)
        means.append(of_class.mean(0))
        covariances.append(_SHARED * within + (1 - _SHARED) * centred.T @ centred / len(of_class))
    gap = mixed.flatten().double() - weight * means[0] - (1 - weight) * means[1]
    spread = weight**2 * covariances[0] + (1 - weight) ** 2 * covariances[1]
    spread.diagonal().add_(1e-9)
    found = means[0] + weight * covariances[0] @ torch.linalg.solve(spread, gap)
    image: Tensor = found.clamp(0, 1).reshape(mixed.shape).to(mixed)
    return image


def find_box(image: Tensor, shares: tuple[float, ...]) -> tuple[Tensor, int]:
    """The rectangle with the sharpest border for its length, among those of the given shares of all pixels.

    Args:
        image: (C, H, W).
        shares: of the area, one a hypothesis.

    Returns:
        (H, W), whether a pixel lies inside, and the index of the share.
    """
    _, height, width = image.shape
    across = torch.zeros(height, width + 1, dtype=torch.float64, device=image.device)
    down = torch.zeros(height + 1, width, dtype=torch.float64, device=image.device)
    across[:, 1:-1] = torch.diff(image.double(), dim=2).abs().sum(0)
    down[1:-1] = torch.diff(image.double(), dim=1).abs().sum(0)
    # What is usual for a step between neighbours, so that a longer border is no better by itself.
    across[:, 1:-1] -= across[:, 1:-1].mean()
    down[1:-1] -= down[1:-1].mean()
    columns = torch.nn.functional.pad(across.cumsum(0), (0, 0, 1, 0))  # (H + 1, W + 1)
    rows = torch.nn.functional.pad(down.cumsum(1), (1, 0))  # (H + 1, W + 1)
    best, inside, chosen = -torch.inf, torch.zeros(height, width, dtype=torch.bool, device=image.device), 0
    for index, share in enumerate(shares):
        for high, wide in _sizes(share * height * width, height, width):
            sides = columns[high:] - columns[:-high]  # (H - high + 1, W + 1)
            edges = rows[:, wide:] - rows[:, :-wide]  # (H + 1, W - wide + 1)
            score = sides[:, :-wide] + sides[:, wide:] + edges[:-high] + edges[high:]
            top = float(score.max())
            if top > best:
                best, chosen = top, index
                y, x = divmod(int(score.argmax()), score.shape[1])
                inside = torch.zeros_like(inside)
                inside[y : y + high, x : x + wide] = True
    return inside, chosen


def _sizes(area: float, height: int, width: int) -> list[tuple[int, int]]:
    """Heights and widths of boxes of this many pixels: of any proportions, as borders cut a part off."""
    wanted = round(area)
    return [
        (high, wanted // high)
        for high in range(1, height + 1)
        if wanted > 0 and wanted % high == 0 and wanted // high <= width
    ]


def filled(image: Tensor, inside: Tensor) -> Tensor:
    """The image with what lies inside replaced by the smoothest continuation of what lies around it.

    Args:
        image: (C, H, W).
        inside: (H, W).
    """
    if bool(inside.all()):
        return image
    kept = ~inside
    mean = (image * kept).sum(dim=(1, 2), keepdim=True) / kept.sum()
    result = torch.where(inside, mean, image)
    for _ in range(_SMOOTHING_STEPS):
        around = torch.nn.functional.pad(result[None], (1, 1, 1, 1), mode="replicate")[0]
        mean = (around[:, 1:-1, :-2] + around[:, 1:-1, 2:] + around[:, :-2, 1:-1] + around[:, 2:, 1:-1]) / 4
        result = torch.where(inside, mean, image)
    return result
