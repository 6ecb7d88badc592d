"""∇W with entries missing (pruned), or on a lattice (quantised).

A pruned gradient keeps its largest entries, and each is exact: the rank-one matrix s vᵀ follows from them
alone, wherever a row and a column keep one entry. What is missing was below the least entry that is there: a
bound on rows and columns without any.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_STEPS = 100
LEAST_SHARE = 0.005
"""A gradient counts as pruned where more of a row's entries than this are zero, against rank one."""
_FAR = 1e-3
_MOST_LEVELS = 2.0**17


class Completion(NamedTuple):
    """The rank-one matrix behind the entries that are there, of M gradients; float64."""

    direction: Tensor  # (M, D)
    s: Tensor  # (M, K)
    s_variance: Tensor  # (M, K) of rows without an entry
    direction_variance: Tensor  # (M, D) of columns without an entry
    misfit: Tensor  # (M,) of the entries that are there, relative to their mean square: a variance


def is_pruned(rows: Tensor, direction: Tensor) -> Tensor:
    """Whether rows have zeros where rank one has none.

    Args:
        rows: (M, R, D) some rows of ∇W.
        direction: (M, D), a row of the largest norm.

    Returns:
        (M,) True where it is pruned.
    """
    least = torch.finfo(torch.float32).tiny
    rows, direction = rows.double(), direction.double()
    s_rows = torch.matmul(rows, direction[..., None])[..., 0]
    expected = (s_rows[..., None] * direction[:, None]).abs() > 1e3 * least
    absent = ((rows == 0) & expected).double().mean(dim=2)  # (M, R)
    # A row that is zero as a whole may have underflowed, or cancelled where p rounds to y; if pruned, the
    # others keep no small entries.
    gone = (rows == 0).all(dim=2)
    size = rows.abs().flatten(1)
    far = torch.where(size == 0, torch.inf, size).amin(dim=1) > _FAR * size.amax(dim=1)
    return (torch.where(gone, 0.0, absent).amax(dim=1) > LEAST_SHARE) | (gone.any(dim=1) & far)


def complete(weight_gradient: Tensor, direction: Tensor) -> Completion:
    """Least squares over the entries that are there, rows and columns in turn, from `direction` (M, D)."""
    gradient = weight_gradient.double()
    there = (gradient != 0).double()
    v = direction.double()
    for _ in range(_STEPS):
        s = _fitted(gradient, there, v)
        following = _fitted(gradient.mT, there.mT, s)
        following = following / torch.linalg.vector_norm(following, dim=1, keepdim=True).clamp_min(1e-300)
        moved = torch.linalg.vector_norm(following - v, dim=1).amax()
        v = following
        if float(moved) < 1e-15 * gradient.shape[2] ** 0.5:
            break
    s = _fitted(gradient, there, v)
    misfit = (there * (gradient - s[..., None] * v[:, None])).square().sum(dim=(1, 2))
    misfit = misfit / gradient.square().sum(dim=(1, 2)).clamp_min(1e-300)

    threshold = torch.where(there > 0, gradient.abs(), torch.inf).amin(dim=(1, 2))[:, None]
    no_row, no_column = there.sum(dim=2) == 0, there.sum(dim=1) == 0
    row_bound = threshold / v.abs().amax(dim=1, keepdim=True)
    column_bound = threshold / s.abs().amax(dim=1, keepdim=True)
    # Features of one sign (after a ReLU) lie between zero and the bound, others on both sides of zero.
    positive, negative = ((sign * v >= 0).all(dim=1, keepdim=True) for sign in (1, -1))
    side = positive.double() - negative.double()
    v = torch.where(no_column, side * column_bound / 2, v)
    spread = torch.where(side == 0, column_bound, column_bound / 2)
    return Completion(
        direction=v,
        s=s,
        s_variance=torch.where(no_row, row_bound.square() / 3, 0.0),
        direction_variance=torch.where(no_column, spread.square() / 3, 0.0),
        misfit=misfit,
    )


def _fitted(gradient: Tensor, there: Tensor, v: Tensor) -> Tensor:
    """Each row's factor on v, over its entries that are there; zero where there are none: (M, K)."""
    weight = (there @ v.square()[..., None])[..., 0]
    return torch.where(weight > 0, (gradient @ v[..., None])[..., 0] / weight.clamp_min(1e-300), 0.0)


def lattice_spacing(weight_gradient: Tensor) -> Tensor:
    """The spacing of the lattice that all entries lie on; 0 where they lie on none: (M,)."""
    size = weight_gradient.double().abs().flatten(1).sort(dim=1).values
    largest = size[:, -1:]
    close = 4 * torch.finfo(weight_gradient.dtype).eps * largest
    gaps = torch.diff(size, dim=1, prepend=torch.zeros_like(largest))
    spacing = torch.where(gaps > close, gaps, torch.inf).amin(dim=1)
    levels = (largest[:, 0] / spacing).round()
    spacing = largest[:, 0] / levels.clamp_min(1)
    off = (size / spacing[:, None]).frac()
    off = torch.minimum(off, 1 - off).amax(dim=1)
    tolerance = 4 * torch.finfo(weight_gradient.dtype).eps * levels + 1e-9
    on_lattice = (levels < _MOST_LEVELS) & (off <= tolerance) & (tolerance < 0.1)
    return torch.where(on_lattice, spacing, 0.0)
