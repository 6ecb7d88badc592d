"""Fresh examples for those who verify: drawn and changed by a secret, so that nobody can look them up.

Data sets and seeds are public: an attack that recomputes a trial's batch has its truth. Under a salt the
attacked examples come in another order, and each is turned, moved, scaled and lit a little differently from
its original, by amounts that only the secret tells.
"""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bench.cases.data import Dataset, InMemory, OnDisk

DEGREES, SHIFT, ZOOM, GAMMA = 8.0, 0.06, 0.08, 0.2
"""The most that an example is turned, moved (as a share of its side), scaled, and changed in log γ."""


@dataclass(frozen=True, eq=False)
class Changed:
    """Reads images, each changed by what the salt says of its index."""

    read: InMemory | OnDisk
    salt: str

    def __call__(self, indices: Tensor) -> Tensor:
        """The images of `indices`, (n, C, H, W), float32 in [0, 1]."""
        stored = self.read(indices)
        images = stored.to(torch.float32) / 255 if stored.dtype == torch.uint8 else stored
        if not len(images):
            return images
        drawn = np.stack([_draws(self.salt, index) for index in indices.tolist()])  # (n, 5)
        turn, right, down, scale, log_gamma = torch.tensor(drawn, dtype=torch.float32, device="cpu").T
        angle, factor = turn * math.radians(DEGREES), torch.exp(scale * ZOOM)
        cos, sin = angle.cos() * factor, angle.sin() * factor
        rows = [cos, -sin, 2 * SHIFT * right, sin, cos, 2 * SHIFT * down]
        affine = torch.stack(rows, dim=1).unflatten(1, (2, 3))  # (n, 2, 3)
        grid = F.affine_grid(affine, list(images.shape), align_corners=False)
        moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
        return moved.clamp(0, 1) ** torch.exp(log_gamma * GAMMA)[:, None, None, None]


def _draws(salt: str, index: int) -> np.ndarray:
    """Five numbers in [-1, 1], of one example."""
    words = np.frombuffer(hashlib.sha512(f"{salt} {index}".encode()).digest()[:40], dtype="<u8")
    return words.astype(np.float64) / 2.0**63 - 1


@functools.lru_cache(maxsize=4)
def salted(dataset: Dataset, salt: str) -> Dataset:
    """The data set as its clients hold it under a salt: same classes and split, other order and pixels."""
    assert isinstance(dataset.read, InMemory | OnDisk)
    sha256 = hashlib.sha256(f"{dataset.sha256} {salt}".encode()).hexdigest()
    return replace(dataset, read=Changed(dataset.read, salt), sha256=sha256)
