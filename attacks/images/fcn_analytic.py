"""The input of a fully connected net from one gradient, in closed form: layer by layer, from the head down.

Layer l computes z_l = W_l a_(l-1) + b_l and a_l = σ(z_l). One example leaves ∇W_l = δ_l a_(l-1)ᵀ and
∇b_l = δ_l, where δ_l = ∂L/∂z_l. Once δ_l is known, a_(l-1) = ∇W_lᵀ δ_l / ‖δ_l‖², a least squares over all
rows. And δ_l is

- ∇b_l, where the layer has a bias (Phong et al. 2018 take one row's quotient);
- at the head, without one: ∇W f / ‖f‖², with its input f from λ-recovery (Wang, Liang, He 2024); p - y would
  lose digits to cancellation;
- below: (W_(l+1)ᵀ δ_(l+1)) ⊙ σ′, where σ′ follows from the output a_l.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from attacks.images._after_lambda import AfterLambda, sent_gradients
from attacks.solvers.head import Head
from attacks.solvers.layers import NotInvertibleError, Row, trace
from attacks.solvers.layerwise import DEAD, SentGradient
from bench import registry
from bench.threat import Observation, Outcome, Reconstruction


@registry.attacks.register
@dataclass(frozen=True)
class FCNAnalytic(AfterLambda):
    """Phong et al. 2018 (with biases) and Wang, Liang, He 2024 (without), for any label; in float64.

    For nets of linear layers with sigmoid, tanh, ReLU, LeakyReLU or nothing between them, whose first layer
    sees scale · pixel + offset of each pixel.

    Attributes:
        tolerance: how much of a layer's gradient (as a share of its norm) may contradict that it comes from
            one example, and how far outside [0, 1] pixels may lie, before the attack says `UNIDENTIFIABLE`.
            Rounding leaves 1e-6; noise that leaves 0.1 still leaves an image of about 40 dB.
    """

    name: ClassVar[str] = "fcn_analytic"
    title: ClassVar[str] = "FCN, analytic"
    paper: ClassVar[str] = "https://arxiv.org/abs/2402.03124"
    uses: ClassVar[frozenset[str]] = frozenset()

    tolerance: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < float("inf"):
            raise ValueError(f"tolerance={self.tolerance} is not a number above 0; 0.1 leaves 40 dB")

    def _with_image(
        self, found: Reconstruction, head: Head, observation: Observation, rng: torch.Generator
    ) -> Reconstruction:
        """`UNIDENTIFIABLE`, too, where a layer is dead, or the gradient is not that of one example."""
        row = trace(observation.model, observation.head, observation.facts.image_shape, rng)
        for layer in row.layers:
            if layer.convolution is not None:
                raise NotInvertibleError(f"the model is not fully connected: {layer.name} is a convolution")
        first_input, misfit = walk_down(row, sent_gradients(observation, row), head.features)
        pixels = (first_input.reshape(row.scale.shape) - row.offset) / row.scale
        reason = head.doubt or self._contradiction(pixels, misfit)
        return replace(
            found,
            outcome=Outcome.UNIDENTIFIABLE if reason else Outcome.OK,
            images=pixels.clamp(0, 1)[None].to(observation.head_weight),
            notes=found.notes | {"reason": reason, "misfit": misfit},
        )

    def _contradiction(self, pixels: Tensor, misfit: float) -> str:
        """What speaks against the answer, without the truth; empty where nothing does."""
        outside = float((pixels - pixels.clamp(0, 1)).abs().max())
        if misfit > self.tolerance:
            return f"not the gradient of one example: {misfit:.2g} of a layer's contradicts it"
        if outside > self.tolerance:
            return f"a contradiction: pixels lie up to {outside:.2g} outside [0, 1]"
        return ""


def walk_down(row: Row, gradients: list[SentGradient], features: Tensor) -> tuple[Tensor, float]:
    """From the head's input, (D,), down to the first layer's.

    Returns:
        The first layer's input (C·H·W,), and the greatest ‖∇W_l - δ_l a_(l-1)ᵀ‖ / ‖∇W_l‖ of any layer.

    Raises:
        NotInvertibleError: a layer is dead for this input, so that no gradient passes it.
    """
    head = len(row.layers) - 1
    a, delta, misfit = features, features, 0.0
    for index in range(head, -1, -1):
        layer, sent = row.layers[index], gradients[index]
        if sent.bias is not None:
            delta = sent.bias
        elif index == head:
            delta = sent.weight @ features / features.square().sum()
        else:
            delta = row.layers[index + 1].transpose(delta[None])[0] * layer.activation.slope(a)
        square = delta.square().sum()
        if not 0 < float(square) < float("inf"):
            raise NotInvertibleError(DEAD.format(layer.name))
        a = sent.weight.T @ delta / square
        norm = torch.linalg.matrix_norm(sent.weight).clamp_min(torch.finfo(a.dtype).tiny)
        misfit = max(misfit, float(torch.linalg.matrix_norm(sent.weight - torch.outer(delta, a)) / norm))
    return a, misfit
