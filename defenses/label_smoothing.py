"""Label smoothing: y <- (1 - epsilon) y + epsilon / K, before the loss."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from bench import registry
from bench.threat import Batch, Defense


@registry.defenses.register
@dataclass(frozen=True)
class LabelSmoothing(Defense):
    """Szegedy et al. 2016.

    What it protects: nothing of the private batch. Images stay, the class stays the largest entry, and λ
    gives ε too; only rules that expect a hard label fail, where a network is surer of it than the label.

    Attributes:
        epsilon: mass moved from the label to the uniform distribution, in [0, 1]; a pair (low, high) draws
            it uniformly for each example, as Wang et al. 2024 do.
    """

    name: ClassVar[str] = "label_smoothing"
    title: ClassVar[str] = "label smoothing"
    paper: ClassVar[str] = "https://arxiv.org/abs/1512.00567"

    epsilon: float | tuple[float, float] = 0.1

    def __post_init__(self) -> None:
        low, high = self._range
        if not 0 <= low <= high <= 1:
            raise ValueError(f"epsilon={self.epsilon} is not in [0, 1], low before high; the paper uses 0.1")

    @property
    def _range(self) -> tuple[float, float]:
        return self.epsilon if isinstance(self.epsilon, tuple) else (self.epsilon, self.epsilon)

    def change_batch(self, batch: Batch, pool: Batch, rng: torch.Generator) -> Batch:
        """Smooths the labels (N, K); the images stay."""
        labels, (low, high) = batch.soft_labels, self._range
        drawn = torch.rand(len(batch), 1, generator=rng, dtype=torch.float64, device=rng.device)
        epsilon = (low + (high - low) * drawn).to(labels)
        return Batch(batch.images, (1 - epsilon) * labels + epsilon / labels.shape[1])
