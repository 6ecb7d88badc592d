"""signSGD: the sign of each entry, and nothing else."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from bench import registry
from bench.threat import Client, Defense, Update


@registry.defenses.register
@dataclass(frozen=True)
class SignSGD(Defense):
    """Bernstein et al. 2018: v -> sign(v), one bit an entry.

    What it protects: every magnitude, and with them λ. What it leaves: signs, which name a single hard label
    (its row alone is negative where features are not) and the sign of each feature's product with u; an
    entry that is exactly zero stays zero, so a dead feature's column still shows.
    """

    name: ClassVar[str] = "sign_sgd"
    title: ClassVar[str] = "signs only (signSGD)"
    paper: ClassVar[str] = "https://arxiv.org/abs/1802.04434"

    def change_update(self, client: Client, update: Update, rng: torch.Generator) -> Update:
        """Each entry's sign, -1, 0 or 1: parameter name -> tensor of its shape."""
        return {name: value.sign() for name, value in update.items()}

    def is_tensorwise(self) -> bool:
        """Each entry is changed by itself."""
        return True
