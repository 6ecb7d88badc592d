"""Mixup: a convex mix of two images and of their labels."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from bench import registry
from bench.threat import Batch, Defense


@registry.defenses.register
@dataclass(frozen=True)
class Mixup(Defense):
    """Zhang et al. 2018: w x + (1 - w) x', w = low + (high - low) · Beta(alpha, alpha).

    The partner x' comes from the client's other data. The paper mixes whatever it draws; here a partner of
    another class is taken where there is one, so that a mixed label is mixed.

    What it protects: which of the two classes and images is the private one, as far as `low` and `high` leave
    that open. The mixed label and image are as readable as others; the halves of the image are told apart
    only as well as images of their classes are known, and both were the client's.

    Attributes:
        alpha: the Beta distribution's parameter, above 0; 1 is uniform.
        low: the least weight, in [0, 1].
        high: the greatest.
    """

    name: ClassVar[str] = "mixup"
    title: ClassVar[str] = "mixup"
    paper: ClassVar[str] = "https://arxiv.org/abs/1710.09412"

    alpha: float = 1.0
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"alpha={self.alpha} is not above 0; the paper uses 0.2 to 1")
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(f"low={self.low}, high={self.high} are not in [0, 1], low before high")

    def change_batch(self, batch: Batch, pool: Batch, rng: torch.Generator) -> Batch:
        """Mixes every example with one of `pool`; both images (N, C, H, W) and labels (N, K)."""
        if len(pool) == 0:
            raise ValueError("mixup needs a partner, and the client has no other data")
        images, labels = batch.images, batch.soft_labels
        other_class = labels.argmax(1)[:, None] != pool.soft_labels.argmax(1)[None]  # (N, P)
        other_class |= ~other_class.any(1, keepdim=True)
        partner = torch.multinomial(other_class.to(rng.device, torch.float64), 1, generator=rng)[:, 0]
        partner = partner.to(images.device)
        weight = self.low + (self.high - self.low) * self._beta(len(batch), rng)
        w = weight.to(images)[:, None, None, None]
        mixed = w * images + (1 - w) * pool.images[partner]
        w = weight.to(labels)[:, None]
        return Batch(mixed, w * labels + (1 - w) * pool.soft_labels[partner])

    def _beta(self, n: int, rng: torch.Generator) -> torch.Tensor:
        """(n,) draws of Beta(alpha, alpha), as the share of one of two gamma variables.

        Gamma(alpha) is Gamma(alpha + 1) U^(1/alpha), here by its logarithm: for a small alpha it underflows.
        """
        shape = torch.full((2, n), self.alpha + 1, dtype=torch.float64, device=rng.device)
        gamma = torch._standard_gamma(shape, generator=rng)  # torch.distributions takes no generator
        uniform = torch.rand(2, n, generator=rng, dtype=torch.float64, device=rng.device)
        first, second = gamma.log() + uniform.log() / self.alpha
        return torch.sigmoid(first - second)
