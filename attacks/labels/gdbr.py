"""GDBR: how often each class is in a batch whose last layer's gradient is withheld.

A client that keeps the head's gradient back still sends that of the layer before. With u = p - y and J_x
the derivative of the logits by that layer's parameters, it is mean J_xᵀ u. The bridge: the mean of the
product is taken as the product of the means, with J̄ from images that the attacker holds. Least squares
gives mean u, and k_i = n (p̄_i - ū_i).

The paper says: track the gradient's flow between layers, derive the logits' gradient, then the counts, with
batch means and public data. No more than its abstract and summaries of it were to be had, twice, and no code:
these steps are our own reading of them.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from attacks.solvers.class_counts import hard_labels, nearest_counts
from attacks.solvers.head_inputs import noise_images
from bench import registry
from bench.threat import Attack, Facts, Observation, Outcome, Reconstruction


@registry.attacks.register
@dataclass(frozen=True)
class GDBR(Attack):
    """Zhang, Chow, Li 2024; it looks at no gradient of the head, sent or not.

    Attributes:
        images: `noise`, or the public data (`auxiliary`), which has to be granted.
        count: how many images of noise, at least 1.
    """

    name: ClassVar[str] = "gdbr"
    title: ClassVar[str] = "GDBR"
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.12640"
    threat_model: ClassVar[str] = "B"
    produces: ClassVar[frozenset[str]] = frozenset({"soft_labels"})
    uses: ClassVar[frozenset[str]] = frozenset({"local_steps", "local_lr"})

    images: Literal["noise", "auxiliary"] = "noise"
    count: int = 128

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count={self.count} is not at least 1 image of noise")
        if self.images == "auxiliary":  # on the instance, before the class's own
            object.__setattr__(self, "uses", type(self).uses | {"auxiliary"})
            object.__setattr__(self, "threat_model", "D")

    def skip(self, facts: Facts) -> str | None:
        """Public data if it is to be used, and a gradient whose scale is known."""
        if self.images == "auxiliary" and "auxiliary" not in facts.granted:
            return "needs public data: grant knowledge = ['auxiliary']"
        if facts.protocol.startswith("fedavg") and not facts.granted >= {"local_steps", "local_lr"}:
            return "needs the client's number of local steps and its learning rate"
        return None

    def run(self, observation: Observation, rng: torch.Generator) -> Reconstruction:
        """Hard labels (N, K); `UNIDENTIFIABLE` where no layer before the head sent any but zero."""
        model, n = observation.model, observation.facts.batch_size
        layer = _layer_before(model, observation.head, set(observation.update))
        sent = {name: observation.update[name].double() * _scale(observation) for name in layer}
        if not any(bool(value.any()) for value in sent.values()):
            return Reconstruction(
                Outcome.UNIDENTIFIABLE, notes={"reason": "no layer before the head sent a gradient"}
            )
        if not all(bool(value.isfinite().all()) for value in sent.values()):
            return Reconstruction(Outcome.DIVERGED, notes={"reason": "the gradient is not finite"})
        jacobian, p = _mean_jacobian(model, layer, self._images(observation, rng))
        gradient = torch.cat([sent[name].flatten() for name in layer])
        # The same least squares in K unknowns; mean u sums to zero.
        u = torch.linalg.pinv(jacobian @ jacobian.T, hermitian=True) @ (jacobian @ gradient)
        estimate = n * (p - u + u.mean())
        if not bool(estimate.isfinite().all()):
            return Reconstruction(Outcome.DIVERGED, notes={"reason": "the estimate is not finite"})
        soft_labels = hard_labels(nearest_counts(estimate, n), observation.head_weight)
        return Reconstruction(Outcome.OK, soft_labels=soft_labels, notes={"label_format": "hard"})

    def _images(self, observation: Observation, rng: torch.Generator) -> Tensor:
        public = observation.knowledge.auxiliary
        if self.images == "noise" or public is None:
            return noise_images(self.count, observation.facts.image_shape, rng)
        return public.images


def _scale(observation: Observation) -> float:
    """What makes a FedAvg client's weight deltas a mean gradient; 1 for a gradient."""
    steps, lr = observation.knowledge.local_steps, observation.knowledge.local_lr
    if not observation.facts.protocol.startswith("fedavg") or steps is None or lr is None:
        return 1.0
    return -1 / (lr * steps)


def _layer_before(model: nn.Module, head: str, sent: set[str]) -> list[str]:
    """The parameters of the last module before the head, in the model's order, that sent its gradient."""
    names = [name for name, _ in model.named_parameters()]
    first = next(place for place, name in enumerate(names) if name.rpartition(".")[0] == head)
    before = [name for name in names[:first] if name in sent]
    return [name for name in before if name.rpartition(".")[0] == before[-1].rpartition(".")[0]]


def _mean_jacobian(model: nn.Module, layer: list[str], images: Tensor) -> tuple[Tensor, Tensor]:
    """The mean logits' derivative by a layer's parameters (K, P), and mean probabilities (K,), float64."""
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    moved = {name: parameters[name].clone().requires_grad_() for name in layer}
    logits = functional_call(model, parameters | moved, (images.to(parameters[layer[0]]),))
    mean = logits.mean(dim=0)
    each_class = torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
    rows = torch.autograd.grad(mean, list(moved.values()), each_class, is_grads_batched=True)
    jacobian = torch.cat([row.flatten(start_dim=1) for row in rows], dim=1)
    return jacobian.double(), logits.detach().double().softmax(dim=1).mean(dim=0)
