"""GradDefense: noise on a random half of the update, cut into slices of equal sensitivity."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench import registry
from bench.threat import Batch, Client, Defense, Update


@registry.defenses.register
@dataclass(frozen=True)
class GradDefense(Defense):
    """Wang et al., INFOCOM 2022: of `slices` slices of the gradient, `perturbed` ones get N(0, std²).

    A tensor's sensitivity is the norm of the derivative of its entries' sum by an image, averaged over
    images; its entries share it evenly, and the flattened update is cut where the running sum crosses each
    `slices`-th of the total. The authors measure it on a public set; here that is the client's other data,
    none of which is in the batch (or the batch, where there is no other). They cut at multiples of the
    tensors' greatest common size, here the cut is at the entry. Their server then denoises the aggregate,
    which is no part of what a client sends.

    What it protects: the slices that are drawn; the others are exact. The head's gradient sums to zero
    whatever the image, so that its sensitivity is zero and it lies whole at the end of the last slice: with
    one slice in two drawn, half of all updates show it as it is.

    Attributes:
        slices: how many, at least 1; the authors take 10.
        perturbed: how many of them get noise, at most `slices`; the authors take 5.
        std: the noise's standard deviation, at least 0; the authors take 5e-4.
    """

    name: ClassVar[str] = "graddefense"
    title: ClassVar[str] = "GradDefense"
    revision: ClassVar[int] = 2
    paper: ClassVar[str] = "https://ieeexplore.ieee.org/document/9796841"

    slices: int = 10
    perturbed: int = 5
    std: float = 5e-4

    def __post_init__(self) -> None:
        if self.slices < 1:
            raise ValueError(f"slices={self.slices} is not at least 1; the authors take 10")
        if not 0 <= self.perturbed <= self.slices:
            raise ValueError(f"perturbed={self.perturbed} is not in 0 to slices={self.slices}")
        if not 0 <= self.std < float("inf"):
            raise ValueError(f"std={self.std} is not a number of at least 0; the authors take 5e-4")

    def gradient(self, client: Client, batch: Batch, rng: torch.Generator) -> Update:
        """The plain gradient with noise on the slices drawn: parameter name -> tensor of its shape."""
        update, sensitivity = client.gradient(batch), _sensitivity(client, client.pool or batch)
        total = sensitivity.sum()
        drawn = torch.randperm(self.slices, generator=rng, device=rng.device)[: self.perturbed]
        noisy = torch.zeros(self.slices, dtype=torch.bool, device=total.device)
        noisy[drawn.to(total.device)] = True
        before = sensitivity.cumsum(0) - sensitivity
        sent = {}
        for (name, value), start, own in zip(update.items(), before, sensitivity, strict=True):
            place = (torch.arange(value.numel(), device=value.device) + 0.5) / value.numel()
            slice_of = (self.slices * (start + place * own) / total).long().clamp(max=self.slices - 1)
            noise = torch.randn(value.shape, generator=rng, dtype=value.dtype, device=rng.device)
            sent[name] = value + self.std * noise.to(value.device) * noisy[slice_of].view_as(value)
        return sent


def _sensitivity(client: Client, batch: Batch) -> Tensor:
    """(L,), float64: mean_n ‖∂(Σ entries of ∇_l)/∂x_n‖ of each of the model's tensors; all 1 if all are 0."""
    images = batch.images.detach().requires_grad_()
    logits = client.model(images)
    loss = -(batch.soft_labels * logits.log_softmax(-1)).sum(-1).mean()
    parameters = [value for value in client.model.parameters() if value.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    norms = []
    for gradient in gradients:
        (moved,) = torch.autograd.grad(
            gradient.sum(), images, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        norms.append(moved.flatten(1).norm(dim=1).mean())
    sensitivity = torch.stack(norms).double()
    return torch.where(sensitivity.sum() > 0, sensitivity, torch.ones_like(sensitivity))
