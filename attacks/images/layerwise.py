"""Layer by layer: the exact input of a convolutional net from one gradient, by linear least squares after λ.

From the head's input and label down, each layer's input follows from its output and its weight's gradient:
two sets of linear equations, see attacks/solvers/layerwise.py. R-GAP (Zhu, Blaschko 2021) does so for hard
labels; here label and input come from λ (Wang, Liang, He 2024), so that labels may be soft, no bias is
needed, and λ itself is sharpened by the equations below it.

Where it ends. Sequential nets of convolutions and linear layers, batch norm in eval mode folded in, one
example. Every activation before a convolution's input has to have an inverse: sigmoid, tanh, LeakyReLU, not
ReLU (after linear layers it may). No pooling, no shortcuts: they hide which unit gave what. And each
convolution needs as many equations as its input has numbers: under a stride they are counted for each place
under it, which DLG's LeNet passes up to 32 × 32 and fails at 64 × 64. What fails says so before anything is
solved; `delta_matching` takes over there.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from attacks.images._after_lambda import AfterLambda, sent_gradients
from attacks.solvers import layerwise
from attacks.solvers.head import Head
from attacks.solvers.layers import trace
from bench import registry
from bench.threat import Observation, Outcome, Reconstruction


@registry.attacks.register
@dataclass(frozen=True)
class Layerwise(AfterLambda):
    """Ours: R-GAP's recursion from λ's label and feature, each equation weighted by its error; in float64.

    Attributes:
        tolerance: the largest share of a layer's gradient (by its norm) that the answer may leave
            unexplained before the attack says `UNIDENTIFIABLE`. Rounding leaves some 1e-5.
    """

    name: ClassVar[str] = "layerwise"
    title: ClassVar[str] = "Layer by layer"
    paper: ClassVar[str] = "https://arxiv.org/abs/2010.07733"

    tolerance: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < float("inf"):
            raise ValueError(f"tolerance={self.tolerance} is not a number above 0; 0.1 leaves some 25 dB")

    def _with_image(
        self, found: Reconstruction, head: Head, observation: Observation, rng: torch.Generator
    ) -> Reconstruction:
        """`UNIDENTIFIABLE`, too, where the gradient contradicts the answer."""
        row = trace(observation.model, observation.head, observation.facts.image_shape, rng)
        layerwise.check(row)
        first, misfit = layerwise.solve(row, sent_gradients(observation, row), head.features)
        pixels = (first - row.offset) / row.scale
        reason = head.doubt
        if not reason and not misfit <= self.tolerance:
            reason = f"a contradiction: {misfit:.2g} of a layer's gradient is not explained"
        return replace(
            found,
            outcome=Outcome.UNIDENTIFIABLE if reason else Outcome.OK,
            images=pixels.nan_to_num(0.5).clamp(0, 1)[None].to(observation.head_weight),
            notes=found.notes | {"reason": reason, "misfit": misfit},
        )
