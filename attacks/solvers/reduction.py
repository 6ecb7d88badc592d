"""From ∇W (K, D) to K numbers: the only work that grows with K·D.

One example's gradient of the last layer is ∇W = u xᵀ with u = p - y. With v a unit vector along ±x, all that
is left of ∇W and W is s = ∇W v and a = W v, and one scalar t: x = t v, s = t u, W x = t a.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from attacks.solvers.missing import LEAST_SHARE, Completion, complete, is_pruned, lattice_spacing

POWER_STEPS = 12
_NOISE_ROWS = 16


def require_finite(**tensors: Tensor | None) -> None:
    """ValueError, with its name, where a tensor holds NaN or an infinite entry."""
    for name, tensor in tensors.items():
        # A sum is finite only if all of its terms are; where it isn't, it may have overflowed: look closer.
        if tensor is not None and not math.isfinite(float(tensor.sum())):
            for kind, holds in (("NaN", tensor.isnan()), ("infinite", tensor.isinf())):
                if bool(holds.any()):
                    raise ValueError(f"{name} has {kind} entries")


class Reduction(NamedTuple):
    """M gradients, reduced. All but `direction` in float64."""

    direction: Tensor  # (M, D) v, along the row of the largest norm, or the leading right singular vector
    row: Tensor  # (M,) the row of the largest norm
    largest: Tensor  # (M,) that norm
    lam_per_t: Tensor  # (M,) λ / t = v·g_r / ‖g_r‖²
    s: Tensor  # (M, K) ∇W v = t u
    a: Tensor  # (M, K) W v
    relative_noise: Tensor  # (M,) relative rounding of the numbers in ∇W
    additive_noise: Tensor  # (M,) standard deviation of noise on each entry of ∇W; 0: rounding alone
    s_variance: Tensor  # (M, K) of rows of ∇W that are missing as a whole
    a_variance: Tensor  # (M, K) of W v, from columns of ∇W that are missing as a whole


class RowProjection(NamedTuple):
    """∇W seen along its row of the largest norm."""

    row_norms: Tensor  # (M, K)
    row: Tensor  # (M,)
    direction: Tensor  # (M, D)
    s: Tensor  # (M, K)


def project_on_largest_row(weight_gradient: Tensor) -> RowProjection:
    """Project on the row of the largest norm: v = g_r/‖g_r‖ and s = ∇W v.

    Args:
        weight_gradient: (M, K, D); zero gradients give v = 0.
    """
    row_norms = torch.linalg.vector_norm(weight_gradient, dim=2)
    row = row_norms.argmax(dim=1)
    index = row[:, None, None].expand(-1, 1, weight_gradient.shape[2])
    largest = weight_gradient.gather(1, index)[:, 0].double()
    norm = torch.linalg.vector_norm(largest, dim=1, keepdim=True)
    direction = (largest / norm.clamp_min(torch.finfo(torch.float64).tiny)).to(weight_gradient.dtype)
    s = project(weight_gradient, direction)
    return RowProjection(row_norms, row, direction, s)


def project(weight_gradient: Tensor, direction: Tensor) -> Tensor:
    """∇W v, (M, K), from (M, K, D) and (M, D): as a product from the left, which is five times as fast."""
    return torch.bmm(direction[:, None], weight_gradient.mT)[:, 0]


def power_step(weight_gradient: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """One step towards the leading singular pair: v = ∇Wᵀs/‖∇Wᵀs‖ (M, D) and s = ∇W v (M, K)."""
    direction = torch.bmm(s[:, None], weight_gradient)[:, 0]
    norm = torch.linalg.vector_norm(direction, dim=1, keepdim=True)
    direction = direction / norm.clamp_min(torch.finfo(direction.dtype).tiny)
    return direction, project(weight_gradient, direction)


class Residual(NamedTuple):
    """What ∇W - s vᵀ says about the noise in ∇W."""

    relative: Tensor  # (M,)
    additive: Tensor  # (M,)
    uneven: Tensor  # (M,) whether rows differ in how many entries are zero: some may be missing


def telling_rows(weight_gradient: Tensor, row_norms: Tensor) -> Tensor:
    """Some rows of the smallest norms, then as many of the largest, in rising order: (M, R, D)."""
    num_classes, width = weight_gradient.shape[1:]
    half = max(min(_NOISE_ROWS, num_classes // 2), 1)
    order = row_norms.argsort(dim=1)
    few = order if 2 * half == num_classes else torch.cat([order[:, :half], order[:, -half:]], dim=1)
    return weight_gradient.gather(1, few[..., None].expand(-1, -1, width))


def rank_one_residual(weight_gradient: Tensor, row_norms: Tensor, direction: Tensor) -> Residual:
    """The noise in ∇W: its relative part, its additive part, and whether zeros may stand for missing entries.

    Rounding leaves each row a residual in proportion to the row; added noise leaves all rows the same. So
    the largest rows bound the former from above, and the smallest rows show the latter, however faint.
    A few rows of each kind are enough, whatever K.
    """
    rows = telling_rows(weight_gradient, row_norms)
    width = rows.shape[2]
    half = rows.shape[1] // 2
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    along = direction.to(rows.dtype)[..., None]  # (M, D, 1)
    s_rows = torch.bmm(rows, along)
    # The rounding of s = ∇W v would pass for noise: it leaves a part along v, which is taken off again.
    residual = torch.baddbmm(rows, s_rows, along.mT, alpha=-1)
    left = torch.bmm(residual, along)
    norm = torch.linalg.vector_norm(residual, dim=2, keepdim=True)
    norm2, left2, s2 = torch.cat([norm, left, s_rows], dim=2).double().square().unbind(dim=2)
    variance = (norm2 - left2).clamp_min(0) / max(width - 1, 1)  # (M, 2·half)
    scale = s2 / width  # mean square of a row's entries

    info = torch.finfo(weight_gradient.dtype)
    relative = torch.full_like(scale[:, 0], info.eps)
    if weight_gradient.dtype == torch.float64:
        large, large_scale = variance[:, half:-1], scale[:, half:-1]  # the last row is v itself
        if large.shape[1] == 0:
            large, large_scale = variance[:, :1], scale[:, :1]
        ratio = (large / large_scale.clamp_min(1e-300)).amin(dim=1).sqrt()
        # Rounding shows as a fraction of eps. Float64 numbers may have been float32 on their way here.
        single = torch.finfo(torch.float32).eps
        was_single = (ratio > 0.05 * single) & (ratio < 0.7 * single)
        relative = torch.where(was_single, single, relative)
    explained = 9 * relative[:, None].square() * scale[:, :half] + 4 * info.tiny**2
    excess = (variance[:, :half] - explained).clamp_min(0)
    there = rows.count_nonzero(dim=2)
    return Residual(
        relative=relative,
        additive=excess.median(dim=1).values.sqrt(),
        uneven=there.amin(dim=1) < (1 - LEAST_SHARE) * there.amax(dim=1),
    )


def reduce(weight_gradient: Tensor, weight: Tensor, noise_std: float | None) -> Reduction:
    """Reduce M gradients of separate examples on one model.

    Args:
        weight_gradient: (M, K, D).
        weight: (K, D).
        noise_std: of the noise on each entry of ∇W; None estimates it, 0 is rounding alone.
    """
    scale = 1.0
    projection = project_on_largest_row(weight_gradient)
    largest = float(projection.row_norms.max())
    info = torch.finfo(weight_gradient.dtype)
    if not largest < math.inf:
        require_finite(weight_gradient=weight_gradient)
    overflows = not largest < math.inf
    if overflows or (largest < info.tiny**0.5 / info.eps and bool((weight_gradient != 0).any())):
        # Squares would underflow in the norms (a net that is sure of itself): a power of two costs no digit.
        scale = 2.0**100 if weight_gradient.dtype != torch.float16 else 2.0**10
        scale = 1 / scale if overflows else scale
        projection = project_on_largest_row(weight_gradient * scale)
        weight_gradient = weight_gradient * scale
    row_norms, row, direction, s = projection
    residual = rank_one_residual(weight_gradient, row_norms, direction)
    relative, additive = residual.relative, residual.additive
    if noise_std is not None:
        additive = torch.full_like(additive, noise_std * scale)
    s_variance = torch.zeros(s.shape, dtype=torch.float64, device=s.device)
    a_variance = s_variance
    which = residual.uneven.nonzero()[:, 0]
    if len(which) > 0:
        rows = telling_rows(weight_gradient[which], row_norms[which])
        which = which[is_pruned(rows, direction[which])]
    if len(which) > 0:
        found = complete(weight_gradient[which], direction[which])
        kept = found.misfit < (8 * relative[which]).square() + 1e-12
        which, found = which[kept], Completion(*(field[kept] for field in found))
        direction = direction.index_copy(0, which, found.direction.to(direction.dtype))
        s = s.index_copy(0, which, found.s.to(s.dtype))
        additive = additive.index_fill(0, which, 0.0)
        s_variance = s_variance.index_copy(0, which, found.s_variance / scale**2)
        lost = found.direction_variance @ weight.double().square().T
        a_variance = a_variance.index_copy(0, which, lost)
    noisy = additive > 0
    if bool(noisy.any()):
        which = noisy.nonzero()[:, 0]
        gradient_n, direction_n, s_n = weight_gradient[which], direction[which], s[which]
        for _ in range(POWER_STEPS):
            direction_n, s_n = power_step(gradient_n, s_n)
        if noise_std is None:
            estimate = rank_one_residual(gradient_n, row_norms[which], direction_n).additive
            # Rounded to a lattice, to the nearest or at random: at most this much on an entry.
            additive[which] = torch.maximum(estimate, lattice_spacing(gradient_n) / 6**0.5)
        direction, s = direction.index_copy(0, which, direction_n), s.index_copy(0, which, s_n)
    a = torch.matmul(direction.to(weight.dtype), weight.T).double()
    if not math.isfinite(float(a.sum())):
        require_finite(weight=weight)
    row_s = s.gather(1, row[:, None])[:, 0].double()
    row_norm = row_norms.gather(1, row[:, None])[:, 0].double()
    lam_per_t = row_s / row_norm.square().clamp_min(1e-300) * scale
    return Reduction(
        direction,
        row,
        row_norm / scale,
        lam_per_t,
        s.double() / scale,
        a,
        relative,
        (additive / scale).to(torch.float64),
        s_variance,
        a_variance,
    )


def point_along(reduction: Reduction, rows: Tensor, x: Tensor, weight_gradient: Tensor) -> Reduction:
    """The reduction with the directions of the examples `rows` (R,) turned along their features x (R, D)."""
    direction = x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(1e-300)
    index = reduction.row[rows][:, None, None].expand(-1, 1, x.shape[1])
    largest = weight_gradient.gather(1, index)[:, 0].double()
    lam_per_t = (direction * largest).sum(dim=1) / largest.square().sum(dim=1).clamp_min(1e-300)
    whole = reduction.direction.double().index_copy(0, rows, direction)
    return reduction._replace(direction=whole, lam_per_t=reduction.lam_per_t.index_copy(0, rows, lam_per_t))
