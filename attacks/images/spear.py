"""SPEAR: a batch's images, exactly, from the first layer's gradient, by the ReLUs that are dead for each.

See `attacks/solvers/sparse_directions.py`. Where the head's gradient was sent, the labels follow from the
images, whatever they are: P - Y = n (X⁺ ∇W)ᵀ with X the head's inputs.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from attacks.solvers.layers import NotInvertibleError, trace
from attacks.solvers.sparse_directions import inputs_of_batch, least_squares
from bench import registry
from bench.threat import Attack, Facts, Observation, Outcome, Reconstruction


@registry.attacks.register
@dataclass(frozen=True)
class SPEAR(Attack):
    """Dimitrov et al. 2024, searching as SPEAR++ (Bakarsky et al. 2025) does: fully connected ReLU nets.

    The paper draws sets of units, so that its time grows as 2ⁿ; the search for sparse directions here does
    not. It needs a first layer with a bias, and about ten times as many units as images.

    Attributes:
        starts: searches for a direction, at most.
        consistency: the share of units and images for which a derivative of zero and a dead unit have to go
            together, so that the attack calls its answer right; the paper's λ.
    """

    name: ClassVar[str] = "spear"
    title: ClassVar[str] = "SPEAR"
    paper: ClassVar[str] = "https://arxiv.org/abs/2403.03945"
    produces: ClassVar[frozenset[str]] = frozenset({"soft_labels", "features", "images"})

    starts: int = 2000
    consistency: float = 0.99

    def __post_init__(self) -> None:
        if self.starts < 1:
            raise ValueError(f"starts={self.starts} is not at least 1")
        if not 0.5 < self.consistency <= 1:
            raise ValueError(f"consistency={self.consistency} is not in (0.5, 1]; chance gives 0.5")

    def skip(self, facts: Facts) -> str | None:
        """A gradient, whose rank is no greater than the number of pixels."""
        if facts.protocol.startswith("fedavg"):
            return f"needs the gradient of one step, got {facts.protocol}"
        channels, height, width = facts.image_shape
        if facts.batch_size > channels * height * width:
            return f"needs no more images than pixels, got {facts.batch_size}"
        return None

    def run(self, observation: Observation, rng: torch.Generator) -> Reconstruction:
        """Images (N, C, H, W), features (N, D), and soft labels (N, K) where the head's gradient was sent.

        `UNIDENTIFIABLE` where the model is no such net, where the gradient has a lower rank than N, or where
        the answer contradicts the pattern of dead units; `STEP_LIMIT` where directions are missing.
        """
        facts = observation.facts
        try:
            row = trace(observation.model, observation.head, facts.image_shape, rng)
        except NotInvertibleError as error:
            return _nothing(str(error))
        first = row.layers[0]
        sent = [observation.update.get(f"{first.name}.{part}") for part in ("weight", "bias")]
        if first.convolution is not None or first.activation.name != "ReLU":
            return _nothing("the first layer is not fully connected with a ReLU after it")
        weight_gradient, bias_gradient = sent
        if weight_gradient is None or bias_gradient is None:
            return _nothing(f"the gradients of {first.name}'s weight and bias were not sent: it needs both")
        if not all(bool(value.isfinite().all()) for value in (weight_gradient, bias_gradient)):
            return Reconstruction(Outcome.DIVERGED, notes={"reason": "the gradient is not finite"})

        solved = inputs_of_batch(
            weight_gradient, bias_gradient, first.weight, first.bias, facts.batch_size, self.starts, rng
        )
        notes: dict[str, float | str] = {"found": solved.found, "consistency": solved.consistency}
        if solved.inputs is None:
            if solved.found == 0:
                return _nothing(f"the gradient's rank is below {facts.batch_size}, or nothing is dead in it")
            reason = f"{solved.found} of {facts.batch_size} images' directions found"
            return Reconstruction(Outcome.STEP_LIMIT, notes=notes | {"reason": reason})
        inputs = solved.inputs.reshape(-1, *facts.image_shape)
        pixels = ((inputs - row.offset) / row.scale).clamp(0, 1)
        features = inputs.reshape(-1, *first.input_shape)
        for layer in row.layers[:-1]:
            features = layer.activation.forward(layer.forward(features) + layer.shaped_bias)
        soft_labels = None
        head_gradient = observation.head_weight_gradient
        if head_gradient is not None and len(features) <= features.shape[1]:
            head = row.layers[-1]
            errors = facts.batch_size * least_squares(features.T, head_gradient.double().T)
            soft_labels = torch.softmax(head.forward(features) + head.shaped_bias, dim=1) - errors
            soft_labels = soft_labels if bool(soft_labels.isfinite().all()) else None
        like = observation.head_weight
        consistent = solved.consistency >= self.consistency
        if not consistent:
            notes["reason"] = f"dead units contradict {1 - solved.consistency:.1%} of the derivatives"
        return Reconstruction(
            Outcome.OK if consistent else Outcome.UNIDENTIFIABLE,
            None if soft_labels is None else soft_labels.to(like),
            features.to(like),
            pixels.to(like),
            notes,
        )


def _nothing(reason: str) -> Reconstruction:
    return Reconstruction(Outcome.UNIDENTIFIABLE, notes={"reason": reason})
