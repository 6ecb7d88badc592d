"""QSGD: a few bits an entry, by stochastic rounding."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from bench import registry
from bench.threat import Client, Defense, Update, with_generators


@registry.defenses.register
@dataclass(frozen=True)
class Quantization(Defense):
    """Alistarh et al. 2017: v -> m sign(v) l/s, l one of the two integers next to s|v|/m, so that E = v.

    s = 2^(bits-1) - 1 levels and a sign make `bits` bits an entry. m is the tensor's largest magnitude, as
    in the paper's experiments; its theorem has the 2-norm, which rounds nearly all of a large tensor to 0.

    What it protects: the digits below a level. It is unbiased, so the mean over rounds on the same batch
    converges to the exact update; zeros stay zeros.

    Attributes:
        bits: of one entry, sign included; 2 to 16. `sign_sgd` sends one bit.
    """

    name: ClassVar[str] = "quantization"
    title: ClassVar[str] = "quantization (QSGD)"
    revision: ClassVar[int] = 2
    paper: ClassVar[str] = "https://arxiv.org/abs/1610.02132"

    bits: int = 8

    def __post_init__(self) -> None:
        if self.bits not in range(2, 17):
            raise ValueError(f"bits={self.bits} is not an integer from 2 to 16; for one bit take sign_sgd")

    def change_update(self, client: Client, update: Update, rng: torch.Generator) -> Update:
        """Rounds each entry to a level at random: parameter name -> tensor of its shape."""
        return {name: self._rounded(value, own) for name, value, own in with_generators(update, rng)}

    def is_tensorwise(self) -> bool:
        """Each tensor has its own scale, and its own generator."""
        return True

    def _rounded(self, value: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        levels = 2 ** (self.bits - 1) - 1
        largest = value.abs().amax()
        scale = torch.where(largest > 0, largest, 1)
        position = value.abs().div_(scale).mul_(levels)
        drawn = torch.rand(value.shape, generator=rng, dtype=value.dtype, device=rng.device)
        level = position.floor()
        level += (drawn.to(value.device) < position.sub_(level)).to(value.dtype)
        return level.div_(levels).mul_(scale).copysign_(value)
