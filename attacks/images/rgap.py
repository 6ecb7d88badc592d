"""R-GAP: recursion from the head down by linear least squares, for one hard-labelled example.

See `attacks/solvers/recursive.py`. Whether a net can be undone is counted before anything is solved: R-GAP's
rank analysis, with the equations of each place under a stride counted by themselves.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import one_hot

from attacks.images._after_lambda import OneExample
from attacks.solvers.layers import NotInvertibleError, trace
from attacks.solvers.layerwise import SentGradient, check
from attacks.solvers.recursive import head_input, solve
from bench import registry
from bench.threat import Observation, Outcome, Reconstruction

TOLERANCE = 0.1
"""How far outside [0, 1] pixels may lie before the answer contradicts itself."""


@registry.attacks.register
@dataclass(frozen=True)
class RGAP(OneExample):
    """Zhu, Blaschko 2021, in float64; the label is taken for hard, as theirs is; no batch norm or pooling."""

    name: ClassVar[str] = "rgap"
    title: ClassVar[str] = "R-GAP"
    paper: ClassVar[str] = "https://arxiv.org/abs/2010.07733"

    def run(self, observation: Observation, rng: torch.Generator) -> Reconstruction:
        """Soft labels (1, K), features (1, D) and images (1, C, H, W).

        `UNIDENTIFIABLE`, with the reason, where the net's equations are too few or have no solution, the
        head's gradient is no hard label's, or what comes out are no pixels.
        """
        like, head_gradient = observation.head_weight, observation.head_weight_gradient
        if not all(bool(value.isfinite().all()) for value in observation.update.values()):
            return Reconstruction(Outcome.DIVERGED, notes={"reason": "the gradient is not finite"})
        try:
            row = trace(observation.model, observation.head, observation.facts.image_shape, rng)
            check(row)
            gradients = []
            for layer in row.layers:
                sent = observation.update.get(f"{layer.name}.weight")
                if sent is None or bool((layer.gain != 1).any()):
                    raise NotInvertibleError(
                        f"{layer.name}'s gradient was not sent, or has a batch norm in it"
                    )
                gradients.append(SentGradient(sent.double(), None))
            if head_gradient is None or not bool(head_gradient.any()):
                raise NotInvertibleError(f"no gradient at {observation.head}")
            head = row.layers[-1]
            features, label = head_input(head_gradient.double(), head.weight, head.bias)
            u = head_gradient.double() @ features / features.square().sum()
            first_input = solve(row, gradients, features, u)
        except NotInvertibleError as error:
            return Reconstruction(Outcome.UNIDENTIFIABLE, notes={"reason": str(error)})
        pixels = (first_input - row.offset) / row.scale
        soft_labels = one_hot(torch.tensor([label], device=like.device), len(like)).to(like)
        if not bool(pixels.isfinite().all()):
            return Reconstruction(Outcome.DIVERGED, soft_labels, notes={"reason": "not finite"})
        outside = float((pixels - pixels.clamp(0, 1)).abs().max())
        notes: dict[str, float | str] = {"label_format": "hard", "outside": outside}
        if outside > TOLERANCE:
            notes["reason"] = f"a contradiction: pixels lie up to {outside:.2g} outside [0, 1]"
        return Reconstruction(
            Outcome.UNIDENTIFIABLE if outside > TOLERANCE else Outcome.OK,
            soft_labels,
            features[None].to(like),
            pixels.clamp(0, 1)[None].to(like),
            notes,
        )
