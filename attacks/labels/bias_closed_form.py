"""The closed form that a bias gives away: any label of one example, exactly.

With z = W x + b, ∇b = u = p - y and ∇W = u xᵀ. So x = ∇Wᵀ∇b / ‖∇b‖², least squares over all rows, and
y = softmax(W x + b) - ∇b, whatever the label's format.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from bench import registry
from bench.threat import Attack, Facts, Observation, Outcome, Reconstruction


@registry.attacks.register
@dataclass(frozen=True)
class BiasClosedForm(Attack):
    """Phong et al. 2017 for the last layer's input; the softmax then gives the label."""

    name: ClassVar[str] = "bias_closed_form"
    title: ClassVar[str] = "closed form (bias)"
    paper: ClassVar[str] = "https://eprint.iacr.org/2017/715"
    produces: ClassVar[frozenset[str]] = frozenset({"soft_labels", "features"})
    reads: ClassVar[str] = "head"
    uses: ClassVar[frozenset[str]] = frozenset({"local_steps", "local_lr"})

    def skip(self, facts: Facts) -> str | None:
        """One example, a head with a bias, and a gradient whose scale is known."""
        if facts.batch_size != 1:
            return f"needs a batch of one, got {facts.batch_size}"
        if facts.protocol.startswith("fedavg") and not facts.granted >= self.uses:
            return "needs the client's number of local steps and its learning rate"
        return None if facts.head_bias else "needs a last layer with a bias"

    def run(self, observation: Observation, rng: torch.Generator) -> Reconstruction:
        """Soft labels (1, K) and features (1, D); `UNIDENTIFIABLE` where ∇b = 0: then only p = y is known."""
        bias, sent = observation.head_bias, observation.head_bias_gradient
        gradient = observation.head_weight_gradient
        if bias is None or sent is None or gradient is None:
            return Reconstruction(
                Outcome.UNIDENTIFIABLE, notes={"reason": "the head's gradient was not sent"}
            )
        u = sent.double()
        if not bool(u.any()):
            return Reconstruction(
                Outcome.UNIDENTIFIABLE, notes={"reason": "the bias gradient is zero: p = y"}
            )
        largest = u.abs().amax()  # first, since ‖u‖² may underflow
        length = torch.linalg.vector_norm(u / largest)
        features = gradient.double().T @ (u / largest / length) / length / largest
        p = torch.softmax(observation.head_weight.double() @ features + bias.double(), dim=0)
        soft_labels = p - u
        if not bool(soft_labels.isfinite().all()):
            return Reconstruction(Outcome.DIVERGED)
        row = int(u.abs().argmax())
        return Reconstruction(
            Outcome.OK,
            soft_labels=soft_labels[None].to(gradient),
            features=features[None].to(gradient),
            notes={"lam": 1 / float(u[row]), "row": row},
        )
