"""How near predicted features (the last layer's input) are to the true ones.

Predictions are already in the truth's order (`labels.match`). Values that are not finite give an infinite
error and a cosine of 0. Dimensions may come before those of a batch: a stack of trials is measured at once.
"""

import torch
from torch import Tensor


def feature_distances(predicted: Tensor, true: Tensor) -> Tensor:
    """Euclidean distance of every prediction (M, D) to every true feature (N, D): (M, N), float64."""
    return torch.cdist(predicted.double(), true.double(), compute_mode="donot_use_mm_for_euclid_dist")


def feature_error(predicted: Tensor, true: Tensor) -> Tensor:
    """Mean over examples of ‖x̂ − x‖ / ‖x‖, (N, D), (N, D) -> (); infinite where x = 0 and x̂ isn't.

    >>> float(feature_error(torch.tensor([[3.0, 4.5]]), torch.tensor([[3.0, 4.0]])))
    0.1
    """
    differences = torch.linalg.vector_norm(predicted.double() - true.double(), dim=-1)
    norms = torch.linalg.vector_norm(true.double(), dim=-1)
    errors = torch.where(differences == 0, differences, differences / norms)
    return torch.nan_to_num(errors, nan=float("inf"), posinf=float("inf")).mean(dim=-1)


def feature_cosine(predicted: Tensor, true: Tensor) -> Tensor:
    """Mean over examples of the cosine between x̂ and x, (N, D), (N, D) -> (); 0 where either is zero.

    >>> round(float(feature_cosine(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 1.0]]))), 4)
    0.7071
    """
    return torch.nan_to_num((_unit(predicted) * _unit(true)).sum(dim=-1), nan=0.0).mean(dim=-1)


def _unit(vectors: Tensor) -> Tensor:
    """Rows of length one, (N, D); zero rows stay zero. The largest entry is divided out first."""
    vectors = vectors.double()
    scaled = torch.nan_to_num(vectors / vectors.abs().amax(dim=-1, keepdim=True), nan=0.0)
    return torch.nan_to_num(scaled / torch.linalg.vector_norm(scaled, dim=-1, keepdim=True), nan=0.0)
