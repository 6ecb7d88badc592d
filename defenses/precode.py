"""PRECODE: a variational bottleneck before the head makes the gradient random."""

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from bench import registry
from bench.threat import Batch, Client, Defense, Update


@registry.defenses.register
@dataclass(frozen=True)
class PRECODE(Defense):
    """Scheliga et al. 2022: features -> (μ, σ) -> z = μ + σ ε -> features; the loss gets β KL.

    ε is drawn by the client for each gradient, in either mode; the public model alone, in eval mode, takes
    z = μ. As in the authors' code σ is a softplus, and the divergence from N(0, 1) is counted in bits, summed
    over `width` and averaged over the batch. It is in the client's loss, and no part of the model.

    What it protects: layers before it, whose gradient varies with an ε that the attacker doesn't know. The
    head's own gradient is exact in its own (random) input: the label is as readable as before, and an
    attack that leaves the bottleneck out or optimises ε (Balunović et al. 2022) recovers images. Of one
    example the encoder, which is linear and has a bias, gives away its input and ∂L/∂input exactly: what
    lies before it is then as open as without a defense (`adaptive`).

    Attributes:
        width: of z, above 0; the paper takes 256.
        beta: the divergence's weight, at least 0; the paper takes 1e-3.
    """

    name: ClassVar[str] = "precode"
    title: ClassVar[str] = "PRECODE"
    revision: ClassVar[int] = 2
    paper: ClassVar[str] = "https://arxiv.org/abs/2108.04725"

    width: int = 256
    beta: float = 1e-3

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width={self.width} is not at least 1; the paper takes 256")
        if not 0 <= self.beta < float("inf"):
            raise ValueError(f"beta={self.beta} is not a number of at least 0; the paper takes 1e-3")

    def prepare(self, model: nn.Module, rng: torch.Generator) -> nn.Module:
        """Puts the bottleneck before the last linear layer, in place; the head keeps its weights."""
        name = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
        parent, _, leaf = name.rpartition(".")
        head = model.get_submodule(name)
        weight = model.get_parameter(f"{name}.weight".lstrip("."))
        bottleneck = _bottleneck(weight, self.width, rng)
        widened = nn.Sequential(OrderedDict(bottleneck=bottleneck, head=head))
        if not name:  # the model is its head
            return widened
        setattr(model.get_submodule(parent), leaf, widened)
        return model

    def gradient(self, client: Client, batch: Batch, rng: torch.Generator) -> Update:
        """Of cross-entropy + β KL, with ε from `rng`: parameter name -> tensor of its shape."""
        samples = [module for module in client.model.modules() if isinstance(module, Sample)]
        bits: list[Tensor] = []
        hooks = [
            sample.register_forward_hook(lambda module, given, _: bits.append(divergence(given[0])))
            for sample in samples
        ]
        for sample in samples:
            sample.generator = rng
        try:
            logits = client.model(batch.images)
        finally:
            for sample, hook in zip(samples, hooks, strict=True):
                sample.generator = None
                hook.remove()
        entropy = -(batch.soft_labels * logits.log_softmax(-1)).sum(-1).mean()
        parameters = {name: value for name, value in client.model.named_parameters() if value.requires_grad}
        gradients = torch.autograd.grad(
            entropy + self.beta * sum(bits), list(parameters.values()), materialize_grads=True
        )
        return dict(zip(parameters, gradients, strict=True))


class Sample(nn.Module):
    """(N, 2 width) -> (N, width): z = μ + σ ε.

    Attributes:
        generator: where ε comes from while the client computes its gradient. Without one, ε is torch's own
            in train mode and 0 in eval mode.
    """

    def __init__(self) -> None:
        super().__init__()
        self.generator: torch.Generator | None = None

    def forward(self, moments: Tensor) -> Tensor:
        """A sample of N(μ, σ²)."""
        mean, std = _mean_and_std(moments)
        return mean + std * self._noise(mean)

    def _noise(self, like: Tensor) -> Tensor:
        if self.generator is not None:
            rng = self.generator
            return torch.randn(like.shape, generator=rng, dtype=like.dtype, device=rng.device).to(like.device)
        return torch.randn_like(like) if self.training else torch.zeros_like(like)


def divergence(moments: Tensor) -> Tensor:
    """KL(N(μ, σ²), N(0, 1)) in bits, summed over z and averaged over the batch, from (N, 2 width)."""
    mean, std = _mean_and_std(moments)
    return (0.5 * (mean**2 + std**2 - 1) - std.log()).sum(1).mean() / math.log(2)


def _mean_and_std(moments: Tensor) -> tuple[Tensor, Tensor]:
    mean, spread = moments.chunk(2, dim=1)
    return mean, F.softplus(spread)


def _bottleneck(like: Tensor, width: int, rng: torch.Generator) -> nn.Sequential:
    """(N, D) -> (N, D) beside a head of weight `like` (K, D); weights are drawn as PyTorch does."""
    features = like.shape[1]
    encoder = skip_init(nn.Linear, features, 2 * width, device=like.device, dtype=like.dtype)
    decoder = skip_init(nn.Linear, width, features, device=like.device, dtype=like.dtype)
    with torch.no_grad():
        for layer in (encoder, decoder):
            for parameter in layer.parameters():
                drawn = torch.rand(parameter.shape, generator=rng, dtype=like.dtype, device=rng.device)
                parameter.copy_((2 * drawn - 1) / layer.in_features**0.5)
    return nn.Sequential(OrderedDict(encoder=encoder, sample=Sample(), decoder=decoder))
