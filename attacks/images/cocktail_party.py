"""The cocktail party attack: a batch's images from the mixtures in the first layer's gradient, by ICA.

See `attacks/solvers/independent_components.py`. The authors fix each image's sign by the truth; here the
bias' gradient tells sign and length, and without one an image is stretched over its range with a sign that is
a guess. For convolutional nets they recover the embedding and invert it; that is not done here.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attacks.solvers.independent_components import UnmixingWeights, unmix
from attacks.solvers.layers import NotInvertibleError, trace
from bench import registry
from bench.threat import Attack, Facts, Observation, Outcome, Reconstruction


@registry.attacks.register
@dataclass(frozen=True)
class CocktailParty(Attack):
    """Kariyappa et al. 2023, for nets of layers in a row whose first is fully connected.

    Attributes:
        iterations: Adam's steps, at least 1; nothing else ends the search. The paper takes 25,000.
        lr: the first step's length.
        tv: the weight of total variation.
        apart: the weight of what keeps two components from being the same.
        sharpness: how fast that grows with their cosine.
        negentropy: the weight of how far from Gaussian components are; 0 in the released code.

    The authors tune the weights by LPIPS on one batch, to 3.1, 1.47 and 12.4 for 128 of Tiny ImageNet. On
    4 to 16 of CIFAR-10 that keeps alike images from coming out; ours give up to 15 dB more there.
    """

    name: ClassVar[str] = "cocktail_party"
    title: ClassVar[str] = "Cocktail party attack"
    paper: ClassVar[str] = "https://arxiv.org/abs/2209.05578"
    produces: ClassVar[frozenset[str]] = frozenset({"images"})

    iterations: int = 1000
    lr: float = 0.02
    tv: float = 3.1
    apart: float = 0.3
    sharpness: float = 5.0
    negentropy: float = 1.0

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"iterations={self.iterations} is not at least 1; the paper uses 25000")
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"lr={self.lr} is not a number above 0; 0.02 is usual")
        for name in ("tv", "apart", "sharpness", "negentropy"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} is not a number of at least 0")

    def skip(self, facts: Facts) -> str | None:
        """A mixture of several images, no more of them than pixels."""
        if facts.batch_size < 2:
            return f"needs a batch of two at least, got {facts.batch_size}"
        channels, height, width = facts.image_shape
        if facts.batch_size > channels * height * width:
            return f"needs no more images than pixels, got {facts.batch_size}"
        return None

    def run(self, observation: Observation, rng: torch.Generator) -> Reconstruction:
        """Images (N, C, H, W).

        `STEP_LIMIT`, as the search always takes all its iterations; `UNIDENTIFIABLE` where the first layer is
        not fully connected, its gradient was not sent, or its rank is below N; `DIVERGED` where the objective
        stopped being finite.
        """
        facts = observation.facts
        try:
            row = trace(observation.model, observation.head, facts.image_shape, rng)
        except NotInvertibleError as error:
            return _nothing(str(error))
        first = row.layers[0]
        weight_gradient = observation.update.get(f"{first.name}.weight")
        bias_gradient = observation.update.get(f"{first.name}.bias")
        if first.convolution is not None:
            return _nothing(f"the first layer, {first.name}, is not fully connected")
        if weight_gradient is None:
            return _nothing(f"the gradient of {first.name}.weight was not sent")
        sent = [weight_gradient] if bias_gradient is None else [weight_gradient, bias_gradient]
        if not all(bool(value.isfinite().all()) for value in sent):
            return Reconstruction(Outcome.DIVERGED, notes={"reason": "the gradient is not finite"})

        def variation(inputs: Tensor) -> Tensor:
            images = inputs.reshape(-1, *facts.image_shape)
            return torch.diff(images, dim=3).abs().mean() + torch.diff(images, dim=2).abs().mean()

        weights = UnmixingWeights(self.negentropy, self.tv, self.apart, self.sharpness)
        found = unmix(
            weight_gradient, bias_gradient, facts.batch_size, variation, weights, self.iterations, self.lr
        )
        if found is None:
            return _nothing(f"the gradient's rank is below {facts.batch_size}")
        notes: dict[str, float | str] = {"loss": found.loss}
        pixels = (found.inputs.reshape(-1, *facts.image_shape) - row.offset) / row.scale
        if not found.scaled:
            low, high = (end(pixels, dim=(1, 2, 3), keepdim=True) for end in (torch.amin, torch.amax))
            pixels = (pixels - low) / (high - low)
            notes["signs"] = "guessed: the layer has no bias"
        if not bool(pixels.isfinite().all()):
            return Reconstruction(Outcome.DIVERGED, notes=notes | {"reason": "not finite"})
        images = pixels.clamp(0, 1).to(observation.head_weight)
        return Reconstruction(Outcome.STEP_LIMIT, images=images, notes=notes)


def _nothing(reason: str) -> Reconstruction:
    return Reconstruction(Outcome.UNIDENTIFIABLE, notes={"reason": reason})
