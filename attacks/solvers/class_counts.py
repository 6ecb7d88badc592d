"""From how many examples a class seems to have to whole numbers and hard labels.

N = batch size, K = classes. `s` stands for the sums of the rows of the last layer's gradient, s_i = Σ_d
∇W_id.
"""

import torch
from torch import Tensor
from torch.nn.functional import one_hot


def nearest_counts(estimate: Tensor, total: int) -> Tensor:
    """The whole numbers k >= 0 with Σk = total that are nearest to an estimate: (..., K) -> (..., K), int64.

    They minimise Σ(k_i - x_i)². The projection onto the simplex, its whole parts, and one more for the
    largest fractions: that is exact, since taking the cheapest of all steps j - x_i, total times, leads
    there too.

    >>> nearest_counts(torch.tensor([2.6, 1.7, -0.3]), 4).tolist()
    [2, 2, 0]
    """
    x = estimate.double()
    x = x - x.amax(dim=-1, keepdim=True)  # the projection is the same, and `total` doesn't drown in it
    falling = x.sort(dim=-1, descending=True).values
    places = torch.arange(1, x.shape[-1] + 1, device=x.device)
    excess = (falling.cumsum(dim=-1) - total) / places
    support = (falling > excess).sum(dim=-1, keepdim=True).clamp(min=1)
    real = (x - excess.gather(-1, support - 1)).clamp(min=0)
    whole = real.floor()
    missing = total - whole.sum(dim=-1, keepdim=True)
    rank = (real - whole).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (whole + (rank < missing)).long()


def counts_by_impact(row_sums: Tensor, impact: Tensor, offsets: Tensor, total: int) -> Tensor:
    """LLG's greedy choice: (K,) row sums, () impact below zero, (K,) offsets -> (K,) counts, int64.

    Every class with s_i < 0 is taken once and its s_i - offset_i relieved of the impact of one example;
    then the class with the least is, until `total` are taken. Should more than `total` be below zero (no
    hard label does that), the least are taken.
    """
    taken = (row_sums < 0) & (row_sums.argsort(stable=True).argsort() < total)
    left = (row_sums - offsets).double() / impact.double() - taken.double()
    return taken.long() + nearest_counts(left, total - int(taken.sum()))


def impact_and_offsets(
    features: Tensor, probabilities: Tensor, soft_labels: Tensor, total: int
) -> tuple[Tensor, Tensor]:
    """LLG's impact () of one example and offsets (K,), measured on M images instead of guessed.

    Of a batch of N from class i, s_i is the mean of (p_i - 1) Σ_d x_d, and s_j that of p_j Σ_d x_d. The
    impact is the mean of s_i / N over classes i, times 1 + 1/K; an offset is the mean of s_j over classes i
    ≠ j. `soft_labels` (M, K) says to which classes an image belongs.
    """
    num_classes = probabilities.shape[1]
    sums = features.sum(dim=1, keepdim=True)  # (M, 1)
    weights = class_weights(soft_labels)  # (K, M)
    others = weights @ (probabilities * sums)  # (K, K): of a batch of class i, s_j but for -y_j
    own = others.diagonal()
    impact = (own - (weights @ sums)[:, 0]).mean() * (1 + 1 / num_classes) / total
    return impact, (others.sum(dim=0) - own) / (num_classes - 1)


def class_weights(soft_labels: Tensor) -> Tensor:
    """Soft labels (M, K) of images -> (K, M): the weights that make each class's mean; rows sum to one.

    A class without an image gets the mean of all, the best guess that is left.
    """
    weights = soft_labels.double().T
    counts = weights.sum(dim=1, keepdim=True)
    return torch.where(counts > 0, weights / counts.clamp(min=1e-300), 1 / len(soft_labels))


def hard_labels(counts: Tensor, like: Tensor) -> Tensor:
    """(K,) counts -> (N, K) one-hot rows, classes in order, of the dtype of `like`."""
    return one_hot(torch.repeat_interleave(counts), len(counts)).to(like)
