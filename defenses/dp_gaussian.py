"""DP-SGD's Gaussian mechanism: clip each example's gradient, add noise to the sum."""

import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch

from bench import registry
from bench.threat import Batch, Client, Defense, Update


@registry.defenses.register
@dataclass(frozen=True)
class DPGaussian(Defense):
    """Abadi et al. 2016: (1/N) (Σ_n g_n · min(1, C/‖g_n‖) + σC · N(0, I)), the norm over all parameters.

    Attributes:
        clip: C, the bound on an example's gradient norm; above 0.
        noise_multiplier: σ, at least 0. Attack papers use 1e-4 to 1e-1; real DP needs about 0.5 and more.
    """

    name: ClassVar[str] = "dp_gaussian"
    title: ClassVar[str] = "DP-SGD (Gaussian)"
    paper: ClassVar[str] = "https://arxiv.org/abs/1607.00133"

    clip: float = 1.0
    noise_multiplier: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.clip < float("inf"):
            raise ValueError(f"clip={self.clip} is not a number above 0; DP-SGD often takes 1.0")
        if not 0 <= self.noise_multiplier < float("inf"):
            raise ValueError(f"noise_multiplier={self.noise_multiplier} is not a number of at least 0")

    def gradient(self, client: Client, batch: Batch, rng: torch.Generator) -> Update:
        """The noisy mean of clipped per-example gradients: parameter name -> tensor of its shape."""
        per_example = client.example_gradients(batch)
        square = sum(g.flatten(1).square().sum(1) for g in per_example.values())
        assert isinstance(square, torch.Tensor)  # a model has at least one parameter
        factor = (self.clip / square.sqrt()).clamp(max=1.0)  # (N,); a zero gradient gives inf, hence 1
        return {
            name: (torch.einsum("n,n...->...", factor.to(g), g) + self._noise(g[0], rng)) / len(batch)
            for name, g in per_example.items()
        }

    def _noise(self, like: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        drawn = torch.randn(like.shape, generator=rng, dtype=like.dtype, device=rng.device)
        return (self.noise_multiplier * self.clip) * drawn.to(like.device)

    def privacy(self, steps: int, sample_rate: float, delta: float) -> tuple[float, float] | None:
        """(ε, δ) by opacus's RDP accountant; None without noise."""
        if self.noise_multiplier == 0:
            return None
        from opacus.accountants import RDPAccountant

        accountant = RDPAccountant()
        accountant.history = [(self.noise_multiplier, sample_rate, steps)]
        with warnings.catch_warnings():  # it warns where its range of orders ends: the bound still holds
            warnings.simplefilter("ignore")
            return float(accountant.get_epsilon(delta=delta)), delta
