"""`a+b`: defenses composed stage by stage, left to right."""

from dataclasses import dataclass
from functools import reduce
from typing import ClassVar

import torch
from torch import nn

from bench.threat import Batch, Client, Defense, Update


@dataclass(frozen=True)
class Chain(Defense):
    """Several defenses at once. At most one of them replaces the gradient."""

    name: ClassVar[str] = "chain"
    title: ClassVar[str] = "a chain of defenses"

    parts: tuple[Defense, ...]

    def __post_init__(self) -> None:
        replacing = [part.name for part in self.parts if "gradient" in part.stages()]
        if len(replacing) > 1:
            raise ValueError(f"{' and '.join(replacing)} both replace the gradient; a chain takes one such")

    def stages(self) -> frozenset[str]:
        """The stages of all parts."""
        return frozenset().union(*(part.stages() for part in self.parts))

    def prepare(self, model: nn.Module, rng: torch.Generator) -> nn.Module:
        """Every part's change of the architecture, in turn."""
        return reduce(lambda changed, part: part.prepare(changed, rng), self.parts, model)

    def change_batch(self, batch: Batch, pool: Batch, rng: torch.Generator) -> Batch:
        """Every part's change of the batch, in turn."""
        return reduce(lambda changed, part: part.change_batch(changed, pool, rng), self.parts, batch)

    def released_size(self, private: int, image_shape: tuple[int, int, int]) -> int:
        """Every part's, in turn."""
        return reduce(lambda n, part: part.released_size(n, image_shape), self.parts, private)

    def gradient(self, client: Client, batch: Batch, rng: torch.Generator) -> Update:
        """The gradient of the one part that replaces it, else the plain one."""
        for part in self.parts:
            if "gradient" in part.stages():
                return part.gradient(client, batch, rng)
        return client.gradient(batch)

    def change_update(self, client: Client, update: Update, rng: torch.Generator) -> Update:
        """Every part's change of the update, in turn."""
        return reduce(lambda changed, part: part.change_update(client, changed, rng), self.parts, update)

    def is_tensorwise(self) -> bool:
        """Where every part is."""
        return all(part.is_tensorwise() for part in self.parts)

    def privacy(self, steps: int, sample_rate: float, delta: float) -> tuple[float, float] | None:
        """None: what one part guarantees is not derived for the chain (mixup changes DP's sensitivity)."""
        return None
