"""The shapes of label that the exact search fits, and what the caller may know of them beforehand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from attacks.solvers.curve import Frame, Problem

MOST_SPIKES = 8


class Model(NamedTuple):
    """A label in which all but `spikes` classes share one value e."""

    spikes: int
    free_floor: bool
    free_scale: bool = False

    @property
    def freed(self) -> int:
        """Numbers fitted besides t and the scale."""
        return self.spikes + self.free_floor

    def degrees(self, num_classes: int) -> int:
        """Equations left once t, e and the scale are fitted."""
        return num_classes - self.spikes - 1 - self.free_floor - self.free_scale


@dataclass(frozen=True)
class Granted:
    """What the caller knows beforehand.

    Args:
        label_format: one of FORMATS, or None.
        epsilon: the smoothing ε, or None.
        mixing: the weight of one of two mixed labels, or None.
    """

    label_format: str | None = None
    epsilon: float | None = None
    mixing: float | None = None

    def models(self, num_classes: int) -> list[Model]:
        """The shapes of label that may be, simplest first."""
        spikes = [2] if self.mixing is not None else list(range(1, self.most_spikes + 1))
        floors = [False, True] if self.floor_is_free else [False]
        checks = int(self.mixing is not None)  # a known mix is one more equation
        models = [Model(k, free) for k in spikes for free in floors]
        models = [m for m in models if m.degrees(num_classes) + checks >= (1 if m.spikes <= 2 else 2)]
        return sorted(models, key=lambda m: (m.freed, m.free_floor))

    @property
    def most_spikes(self) -> int:
        """The most classes that may stand out of the others."""
        if self.mixing is not None:
            return 2
        known = {"hard": 1, "smoothing": 1, "mixup": 2, "smoothed_mixup": 2}
        return known.get(self.label_format or "", MOST_SPIKES)

    @property
    def floor_is_free(self) -> bool:
        """Whether the value that the other classes share is unknown."""
        return self.epsilon is None and self.label_format not in ("hard", "mixup", "k_mix")


def as_frame(models: list[Model], problem: Problem) -> Frame:
    """What the models leave free, one a candidate, as tensors on the problem's device."""
    numbers, priors = [], []
    for spikes, free_floor, free_scale in models:
        numbers.append([spikes, free_floor, free_scale, 0.0 if free_floor else problem.floor])
        # What isn't fitted gets a row of its own, and meets no other; α is one to the rounding.
        alone, narrow = 0.0 if free_floor else 1.0, 0.0 if free_scale else 1 / problem.sum_error
        priors.append([[alone, 0.0], [0.0, narrow], [0.0, 0.0], [0.0, 0.0]])
    columns = torch.tensor(numbers, dtype=problem.s.dtype, device=problem.s.device).unbind(dim=1)
    return Frame(
        spikes=columns[0].long(),
        free_floor=columns[1],
        free_scale=columns[2],
        held=columns[3][:, None],
        prior=torch.tensor(priors, dtype=problem.s.dtype, device=problem.s.device),
        most_spikes=max(m.spikes for m in models),
        scaled=any(m.free_scale for m in models),
    )
