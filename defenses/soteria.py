"""Soteria: the head's gradient is masked where a feature says most of the image."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench import registry
from bench.threat import Batch, Client, Defense, Update

AT_ONCE = 64
"""How many images' derivatives, of one feature each, are taken at a time: more of them leave the cache."""


@registry.defenses.register
@dataclass(frozen=True)
class Soteria(Defense):
    """Sun et al. 2021: the columns of the features r_i with the smallest ‖∂r_i/∂x‖ / |r_i| become zero.

    Those are the features whose removal moves the image most per unit of accuracy lost, with ‖∂r_i/∂x‖ as the
    authors' stand-in for the inverse. For a batch both are summed over the examples first, so that a feature
    that is off for one of them still counts. A feature that is off for all has no gradient to mask: the
    share is one of the others.

    What it protects: the masked features, against attacks that match or read the head's weights. All other
    layers' gradients, the head's bias and its other columns stay exact: an attack that leaves the head out
    (Balunović et al. 2022) meets no defense, and the label stays readable.

    Attributes:
        share: of the features that are on, masked; in [0, 1]. Papers take 0.01 to 0.6.
    """

    name: ClassVar[str] = "soteria"
    title: ClassVar[str] = "Soteria"
    paper: ClassVar[str] = "https://arxiv.org/abs/2012.06043"

    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share={self.share} is not in [0, 1]; papers take 0.01 to 0.6")

    def gradient(self, client: Client, batch: Batch, rng: torch.Generator) -> Update:
        """The plain gradient with columns of the head's (K, D) weight masked."""
        update, weight = client.gradient(batch), f"{client.head}.weight"
        ratio = _ratio(client, batch.images)
        count = round(self.share * int(ratio.isfinite().sum()))
        masked = ratio.argsort(stable=True)[:count]
        return update | {weight: update[weight].index_fill(1, masked, 0)}


def _ratio(client: Client, images: Tensor) -> Tensor:
    """(D,): Σ_n ‖∂r_i/∂x_n‖ / Σ_n |r_ni|, infinite where the feature is off for all."""
    images, seen = images.detach().requires_grad_(), []
    head = client.model.get_submodule(client.head)
    hook = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        client.model(images)
    finally:
        hook.remove()
    (features,) = seen  # (N, D)
    n, width = features.shape
    directions = torch.eye(width, dtype=features.dtype, device=features.device)[:, None].expand(
        width, n, width
    )
    norms = []
    for some in directions.split(max(1, AT_ONCE // n)):
        (moved,) = torch.autograd.grad(
            features, images, some, retain_graph=True, is_grads_batched=True, materialize_grads=True
        )  # one of all zeros where nothing leads back to the image
        norms.append(moved.flatten(2).norm(dim=2).sum(1))
    size = features.detach().abs().sum(0)
    return torch.where(size > 0, torch.cat(norms) / size, torch.inf)
