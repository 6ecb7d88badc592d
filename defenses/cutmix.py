"""CutMix: a rectangle of another image, labels mixed by its area."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from bench import registry
from bench.threat import Batch, Defense


@registry.defenses.register
@dataclass(frozen=True)
class CutMix(Defense):
    """Yun et al. 2019: a box of share 1 - λ, λ ~ Beta(α, α), its centre uniform, is pasted from a partner.

    The box is cut off at the border, and the label's weight is the share of pixels that really stayed. As in
    `mixup`, each example has its own λ, box and partner, from the client's other data, of another class where
    there is one; the paper takes one λ and box a batch and the batch's own shuffle.

    What it protects: the pixels under the box, and the plain class from rules that expect a hard label. All
    other pixels are the private ones: who recovers the released image has them, and the box too where its
    border shows, since the recovered label says how large it is; with it, which of the two classes is the
    private one (`adaptive`).

    Attributes:
        alpha: the Beta distribution's parameter, above 0; the paper takes 1, which is uniform.
    """

    name: ClassVar[str] = "cutmix"
    title: ClassVar[str] = "CutMix"
    paper: ClassVar[str] = "https://arxiv.org/abs/1905.04899"

    alpha: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"alpha={self.alpha} is not above 0; the paper uses 1")

    def change_batch(self, batch: Batch, pool: Batch, rng: torch.Generator) -> Batch:
        """Pastes a box into every image (N, C, H, W) and mixes its label (N, K)."""
        if len(pool) == 0:
            raise ValueError("cutmix needs a partner, and the client has no other data")
        images, labels = batch.images, batch.soft_labels
        partner = self._partners(labels, pool.soft_labels, rng).to(images.device)
        _, _, height, width = images.shape
        inside = self._boxes(len(batch), height, width, rng)
        mixed = torch.where(inside[:, None].to(images.device), pool.images[partner], images)
        weight = 1 - inside.double().mean((1, 2)).to(labels)[:, None]
        return Batch(mixed, weight * labels + (1 - weight) * pool.soft_labels[partner])

    def _partners(self, labels: torch.Tensor, others: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        """(N,): for each example one of the pool, of another class where there is one."""
        other_class = labels.argmax(1)[:, None] != others.argmax(1)[None]  # (N, P)
        other_class |= ~other_class.any(1, keepdim=True)
        return torch.multinomial(other_class.to(rng.device, torch.float64), 1, generator=rng)[:, 0]

    def _boxes(self, n: int, height: int, width: int, rng: torch.Generator) -> torch.Tensor:
        """(N, H, W), whether a pixel lies under the example's box."""
        side = (1 - self._beta(n, rng)).sqrt()
        centre = torch.rand(2, n, generator=rng, dtype=torch.float64, device=rng.device)
        inside = []
        for length, middle in zip((height, width), centre, strict=True):
            cut = (length * side).long()
            first = (length * middle).long() - cut // 2
            pixel = torch.arange(length, device=rng.device)
            inside.append((pixel >= first[:, None]) & (pixel < (first + cut)[:, None]))
        rows, columns = inside
        return rows[:, :, None] & columns[:, None, :]

    def _beta(self, n: int, rng: torch.Generator) -> torch.Tensor:
        """(n,) draws of Beta(α, α); see `mixup` on small α."""
        shape = torch.full((2, n), self.alpha + 1, dtype=torch.float64, device=rng.device)
        gamma = torch._standard_gamma(shape, generator=rng)  # torch.distributions takes no generator
        uniform = torch.rand(2, n, generator=rng, dtype=torch.float64, device=rng.device)
        first, second = gamma.log() + uniform.log() / self.alpha
        return torch.sigmoid(first - second)
