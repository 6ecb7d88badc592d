"""The class of one example whose label is known to be hard, from a disturbed gradient of the last layer.

∇W = u xᵀ with u = p - y: all entries of u are positive but the class's own, which is as large as all others
together. So it lies farthest from u's mean, whatever the gradient's scale, its features' signs or its length;
also where signs alone were sent. u is the leading left singular vector: noise on the D columns averages out.

Where noise drowns that vector, what the public model makes of public images still tells where x lies, and the
class follows by Bayes' rule: column j of ∇W is u x_j + noise, x_j a normal variable.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_SCALES = 13  # four a power of ten
_ABOVE_NOISE = 1.5


class HardClass(NamedTuple):
    """One class an example, and how far it is to be believed; in the gradient's own units."""

    classes: Tensor  # (M,)
    lead: Tensor  # (M,) of the class over the next one in u ‖x‖; 0 where noise alone could be it
    noise: Tensor  # (M,) what is left beside rank one, as the standard deviation of an entry


def hard_class(gradient: Tensor) -> HardClass:
    """From M gradients (M, K, D), a bias' gradient among their columns."""
    centred = gradient.double()
    centred = centred - centred.mean(dim=1, keepdim=True)
    size = centred.abs().amax(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    centred = centred / size
    values, vectors = torch.linalg.eigh(centred @ centred.mT)
    s = vectors[:, :, -1] * values[:, -1:].clamp_min(0).sqrt()
    two = s.abs().topk(2, dim=1)
    num_classes, width = gradient.shape[1:]
    rest = values[:, :-1].clamp_min(0).sum(dim=1) / max((num_classes - 2) * (width - 1), 1)
    scale = size[:, 0, 0]
    # Noise alone has a leading vector too, of about this length.
    edge = rest.sqrt() * (num_classes**0.5 + width**0.5)
    stands_out = values[:, -1].clamp_min(0).sqrt() > _ABOVE_NOISE * edge
    return HardClass(
        two.indices[:, 0], (two.values[:, 0] - two.values[:, 1]) * scale * stands_out, rest.sqrt() * scale
    )


def posterior_of_class(gradient: Tensor, noise_std: Tensor, features: Tensor) -> Tensor:
    """The probability of each class (M, K), all as likely before.

    Row k is -c x for the class, and c a x with an a in [0, 1] for another: a is tried at a few values, and c,
    which clipping and the model's confidence decide, at powers of ten. Rows are taken one by one.

    Args:
        gradient: (M, K, D), with independent normal noise on each entry.
        noise_std: (M,) of it, above 0.
        features: (P, D) what the public model makes of public images (a one beside a bias' gradient).
    """
    g, variance = gradient.double(), noise_std.double().square()[:, None, None]
    mean, spread = features.double().mean(dim=0), features.double().var(dim=0)
    shares = torch.tensor([0.0, 1 / (g.shape[1] - 1), 0.3, 1.0], dtype=torch.float64, device=g.device)

    def likelihood(amplitude: Tensor) -> Tensor:
        """Of each row being so many times x, up to a common factor: (M, K), logarithmic."""
        signal = amplitude.square() * spread + variance
        return -0.5 * ((g - amplitude * mean).square() / signal + signal.log()).sum(dim=2)

    evidence = []
    for power in range(_SCALES):
        scale = torch.full_like(shares[0], 10 ** (-power / 4))
        others = torch.stack([likelihood(scale * share) for share in shares]).logsumexp(dim=0)
        evidence.append(likelihood(-scale) - others + others.sum(dim=1, keepdim=True))
    return torch.stack(evidence).logsumexp(dim=0).softmax(dim=1)
