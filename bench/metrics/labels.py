"""How near predicted soft labels are to the true ones.

Predictions come in any order: `match` pairs them with the truth, once a trial, and every other metric takes
predictions that are already in the truth's order. A row that is not finite is a wrong row: its distance is
infinite, its top-1 is 0, and it names no class. Nothing raises on bad values; shapes must agree. From
`label_errors` on, dimensions may come before those of a batch: a stack of trials is measured at once.

An example's class is the first entry within 1e-6 of its row's maximum, so that a fifty-fifty mix recovered
up to rounding names the same class as the truth.
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

SUCCESS_TOLERANCE = 0.01
TIE = 1e-6
"""Entries that lie within this of their row's maximum share it."""
WORST = 1e6
"""The distance of a prediction that is not finite, and the cap of all others."""


def label_distances(predicted: Tensor, true: Tensor) -> Tensor:
    """L1 distance of every prediction (M, K) to every true label (N, K): (M, N), float64."""
    return torch.cdist(predicted.double(), true.double(), p=1.0)


def match(distances: Tensor) -> Tensor:
    """The assignment with the least total distance: for each of N true examples its prediction, (N,), int64.

    `distances` is (M, N) with M >= N; those that are not finite count as the worst.

    >>> match(torch.tensor([[0.9, 0.0], [0.1, 0.8]])).tolist()
    [1, 0]
    """
    if distances.shape == (1, 1):
        return torch.zeros(1, dtype=torch.int64, device=distances.device)
    costs = torch.nan_to_num(distances.double(), nan=WORST, posinf=WORST, neginf=WORST).clamp(max=WORST)
    predictions, truths = linear_sum_assignment(costs.cpu().numpy())
    order = predictions[truths.argsort()].tolist()
    return torch.tensor(order, dtype=torch.int64, device=distances.device)


def label_errors(predicted: Tensor, true: Tensor) -> Tensor:
    """The largest error of each example's label, (N, K), (N, K) -> (N,); infinite where it isn't finite.

    >>> label_errors(torch.tensor([[0.9, 0.1]]), torch.tensor([[1.0, 0.0]])).round(decimals=6).tolist()
    [0.1]
    """
    return _infinite_if_broken((predicted.double() - true.double()).abs().amax(dim=-1))


def label_error(predicted: Tensor, true: Tensor) -> Tensor:
    """max|ŷ − y| over all examples and classes, (N, K), (N, K) -> ()."""
    return label_errors(predicted, true).amax(dim=-1)


def success(predicted: Tensor, true: Tensor) -> Tensor:
    """Whether every label of every example is within 0.01, (N, K), (N, K) -> (), bool.

    >>> bool(success(torch.tensor([[0.905, 0.095]]), torch.tensor([[0.9, 0.1]])))
    True
    """
    return label_error(predicted, true) <= SUCCESS_TOLERANCE


def label_l1(predicted: Tensor, true: Tensor) -> Tensor:
    """Mean over examples of Σ_k |ŷ_k − y_k|, from 0 to 2 within the simplex, (N, K), (N, K) -> ().

    >>> float(label_l1(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])))
    2.0
    """
    return _infinite_if_broken((predicted.double() - true.double()).abs().sum(dim=-1)).mean(dim=-1)


def top1(predicted: Tensor, true: Tensor) -> Tensor:
    """Mean share of a prediction's maxima that are maxima of the truth, (N, K), (N, K) -> ().

    A prediction with t tied maxima is a guess among t classes: one right class among them counts 1/t. Where
    the truth is tied (a fifty-fifty mix), either of its classes is right.

    >>> float(top1(torch.tensor([[0.25, 0.25, 0.25, 0.25]]), torch.tensor([[0.0, 1.0, 0.0, 0.0]])))
    0.25
    >>> float(top1(torch.tensor([[0.4, 0.6]]), torch.tensor([[0.5, 0.5]])))
    1.0
    """
    guesses = _maxima(predicted)  # (N, K)
    right = (guesses & _maxima(true)).sum(dim=-1)
    return (right / guesses.sum(dim=-1).clamp(min=1)).double().mean(dim=-1)


def class_existence(predicted: Tensor, true: Tensor) -> Tensor:
    """LeAcc: the share of the K classes whose presence in the batch is told rightly, (N, K), (N, K) -> ().

    With N much smaller than K most classes are absent and rightly so: 1 − 2N/K is the least that it can be.

    >>> float(class_existence(torch.eye(4)[[0, 0]], torch.eye(4)[[0, 1]]))
    0.75
    """
    return ((_counts(predicted) > 0) == (_counts(true) > 0)).double().mean(dim=-1)


def class_counts(predicted: Tensor, true: Tensor) -> Tensor:
    """LnAcc: Σ_k min(n̂_k, n_k) / N, the overlap of the multisets of classes, (N, K), (N, K) -> ().

    >>> float(class_counts(torch.eye(4)[[0, 0]], torch.eye(4)[[0, 1]]))
    0.5
    """
    return torch.minimum(_counts(predicted), _counts(true)).sum(dim=-1).double() / true.shape[-2]


def class_counts_exact(predicted: Tensor, true: Tensor) -> Tensor:
    """The share of the K classes whose number is told exactly, (N, K), (N, K) -> ().

    The authors of iLRG call this LnAcc, and what is LnAcc here, `class_counts`, IRec. One example taken for
    another class makes two classes wrong, however many each of them has.

    >>> float(class_counts_exact(torch.eye(4)[[0, 0]], torch.eye(4)[[0, 1]]))
    0.5
    """
    return (_counts(predicted) == _counts(true)).double().mean(dim=-1)


def lam_error(predicted: float, true: float) -> float:
    """|λ̂ − λ| / |λ|; infinite where λ̂ is not finite.

    >>> round(lam_error(-1.1, -1.0), 12)
    0.1
    """
    error = abs(predicted - true) / abs(true) if true else float("inf")
    return error if error == error else float("inf")


def _infinite_if_broken(distances: Tensor) -> Tensor:
    return torch.nan_to_num(distances, nan=float("inf"), posinf=float("inf"))


def _maxima(labels: Tensor) -> Tensor:
    """Which entries share their row's maximum, (N, K), bool; none in a row that is not finite."""
    tops = labels >= labels.amax(dim=-1, keepdim=True) - TIE
    return tops & torch.isfinite(labels).all(dim=-1, keepdim=True)


def _counts(labels: Tensor) -> Tensor:
    """How many examples each class has, (K,): the first maximum of each row."""
    tops = _maxima(labels)
    return (tops & (tops.cumsum(dim=-1) == 1)).sum(dim=-2)
