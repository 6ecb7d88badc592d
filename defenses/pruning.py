"""Gradient pruning: only the largest entries are sent."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from bench import registry
from bench.threat import Client, Defense, Update


@registry.defenses.register
@dataclass(frozen=True)
class Pruning(Defense):
    """Lin et al. 2018 (deep gradient compression), one round of it: each tensor keeps its largest entries.

    What it protects: entries that are not sent. The kept ones are exact, and which ones they are is
    information too: what an attack recovers from a share of the entries, it still recovers. What the paper
    adds for accuracy over rounds (residuals carried over, momentum) is not part of one update.

    Attributes:
        share: of a tensor's entries that become zero, in [0, 1); at least one entry is kept.
    """

    name: ClassVar[str] = "pruning"
    title: ClassVar[str] = "gradient pruning"
    paper: ClassVar[str] = "https://arxiv.org/abs/1712.01887"

    share: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ValueError(f"share={self.share} is not in [0, 1); papers prune 0.7 to 0.99")

    def change_update(self, client: Client, update: Update, rng: torch.Generator) -> Update:
        """Zeroes all but the largest magnitudes of each tensor: parameter name -> tensor of its shape."""
        return {name: self._pruned(value) for name, value in update.items()}

    def is_tensorwise(self) -> bool:
        """Each tensor keeps its own largest."""
        return True

    def _pruned(self, value: torch.Tensor) -> torch.Tensor:
        kept = max(1, round((1 - self.share) * value.numel()))
        flat = value.flatten()
        largest = flat.abs().topk(kept).indices
        return torch.zeros_like(flat).scatter(0, largest, flat[largest]).view_as(value)
