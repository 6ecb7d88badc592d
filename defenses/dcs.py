"""DCS: concealed samples, which look unlike the private ones and give nearly their gradient."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench import registry
from bench.threat import Batch, Client, Defense, Update


@registry.defenses.register
@dataclass(frozen=True)
class DCS(Defense):
    """Wu et al. 2024 (DCS-2): each private example gets a concealed one; the gradient is that of both.

    The concealed images start as `mix` noise and 1 - `mix` private, with labels mixed likewise with a random
    other class. Adam then lowers (1 - cos(∇, ∇')) + exp(-distance ‖x - x'‖) + logits ‖z - z'‖/‖z‖, with a
    tenth of the step after 3/8, 5/8 and 7/8 of the iterations, as in the authors' code (their ε is a constant
    of that loss). If the gradient then points away from the plain one, as much of the plain one is added as
    takes that out, but at least half of it. All examples count as sensitive. Pixels are not held in [0, 1],
    as in that code; its early stop is left out, since distances there depend on the normalisation. Where it
    divides the loss by three, this is the mean over all examples: the scale alone differs.

    What it protects: images, by mixing two gradients that are hard to tell apart. Nothing is proven; the
    private examples are still in the mean, and their labels with a weight of their own. Of an untrained
    network λ-recovery of batches, told that there are twice as many examples, finds all labels and features
    exactly; who takes the update for one example's finds a mix that is neither's.

    Attributes:
        iterations: of Adam, at least 0; the authors take 500 and 1000.
        lr: of Adam, above 0.
        distance: λ_x, at least 0.
        logits: λ_z, at least 0.
        mix: λ_y, in [0, 1].
    """

    name: ClassVar[str] = "dcs"
    title: ClassVar[str] = "DCS-2 (concealed samples)"
    paper: ClassVar[str] = "https://arxiv.org/abs/2209.05724"

    iterations: int = 500
    lr: float = 0.1
    distance: float = 0.01
    logits: float = 0.01
    mix: float = 0.7

    def __post_init__(self) -> None:
        if self.iterations < 0:
            raise ValueError(f"iterations={self.iterations} is not at least 0; the authors take 500")
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"lr={self.lr} is not a number above 0; the authors take 0.1")
        for name, value in (("distance", self.distance), ("logits", self.logits)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name}={value} is not a number of at least 0; the authors take 0.01")
        if not 0 <= self.mix <= 1:
            raise ValueError(f"mix={self.mix} is not in [0, 1]; the authors take 0.7 and 1")

    def gradient(self, client: Client, batch: Batch, rng: torch.Generator) -> Update:
        """Of private and concealed examples together: parameter name -> tensor of its shape."""
        plain, labels = client.gradient(batch), batch.soft_labels
        other = self._other_classes(labels, rng)
        concealed = self._concealed(client, batch, other, plain, rng)
        mixed = self.mix * other + (1 - self.mix) * labels
        both = Batch(torch.cat([batch.images, concealed]), torch.cat([labels, mixed]))
        return _turned(client.gradient(both), plain)

    def _other_classes(self, labels: Tensor, rng: torch.Generator) -> Tensor:
        """(N, K), hard: for each example a class that is not its own, each as likely."""
        n, k = labels.shape
        if k < 2:
            raise ValueError("dcs needs a second class for its concealed samples")
        shift = torch.randint(1, k, (n,), generator=rng, device=rng.device).to(labels.device)
        other = (labels.argmax(1) + shift) % k
        return torch.nn.functional.one_hot(other, k).to(labels)

    def _concealed(
        self, client: Client, batch: Batch, other: Tensor, plain: Update, rng: torch.Generator
    ) -> Tensor:
        """(N, C, H, W): images far from the private ones whose gradient and logits are near."""
        private = batch.images
        noise = torch.rand(private.shape, generator=rng, dtype=private.dtype, device=rng.device)
        concealed = (self.mix * noise.to(private.device) + (1 - self.mix) * private).requires_grad_()
        with torch.no_grad():
            true_logits = client.model(private)
        optimizer = torch.optim.Adam([concealed], lr=self.lr)
        milestones = [self.iterations * eighths // 8 for eighths in (3, 5, 7)]
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
        for _ in range(self.iterations):
            logits = client.model(concealed)
            apart = (concealed - private).flatten(1).norm(dim=1).mean()
            far = ((logits - true_logits).norm(dim=1) / true_logits.norm(dim=1)).mean()
            unlike = 1 - _cosine(_differentiable(client, logits, other), plain)
            loss = unlike + (-self.distance * apart).exp() + self.logits * far
            (concealed.grad,) = torch.autograd.grad(loss, concealed)
            optimizer.step()
            scheduler.step()
        return concealed.detach()


def _differentiable(client: Client, logits: Tensor, labels: Tensor) -> Update:
    """The gradient of the mean cross-entropy, to be differentiated by the image."""
    parameters = {name: value for name, value in client.model.named_parameters() if value.requires_grad}
    loss = -(labels * logits.log_softmax(-1)).sum(-1).mean()
    gradients = torch.autograd.grad(
        loss, list(parameters.values()), create_graph=True, materialize_grads=True
    )
    return dict(zip(parameters, gradients, strict=True))


def _dot(one: Update, other: Update) -> Tensor:
    return torch.stack([(one[name] * other[name]).sum() for name in one]).sum()


def _cosine(one: Update, other: Update) -> Tensor:
    return _dot(one, other) / (_dot(one, one).sqrt() * _dot(other, other).sqrt() + 1e-12)


def _turned(mixed: Update, plain: Update) -> Update:
    """`mixed`, with so much of `plain` added that it does not point away from it.

    The authors' quadratic programme (that of gradient episodic memory) for one constraint, margin 0.5 and
    ridge 1e-3, whose solution can be written down.
    """
    along = _dot(mixed, plain)
    needed = (-along / (_dot(plain, plain) + 1e-3)).clamp(min=0.5)
    added = torch.where(along < 0, needed, 0)
    return {name: value + added * plain[name] for name, value in mixed.items()}
