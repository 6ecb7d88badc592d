"""Batches by exact zeros: after a ReLU, an example's direction is told by the features at which it is zero.

∇W = (1/n) Uᵀ X has rank n, and X = M Vᵀ with V its right singular vectors and M (n, n) unknown. Row m_b of M
is orthogonal to every column of Vᵀ at which example b is zero, and X ≥ 0 puts all rows into the polyhedral
cone {m : Vᵀm ≥ 0}. An example with n - 1 independent zeros is an extreme ray of that cone. Rays are found by
walking along random directions from the inside to the boundary, face by face; it takes n - 1 walks however
many columns there are, where drawing n - 1 columns at a time takes exponentially many draws.

Most extreme rays are no example. Those that are one have more zeros than it takes to fix the ray, so that no
single zero can be left out with effect; a coincidence does not do that.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_ZERO = 8.0  # a zero is one within so many standard deviations of its noise
_DEPENDENT = 0.999  # leverage of a zero that alone fixes the ray
_WALKS_AT_ONCE = 2**24  # numbers in a work array
_REFINED_AT_ONCE = 32
_PATIENCE = 4096  # walks without a new ray, and four times as many as the last one took
_SAME_RAY = 1 - 1e-7


class Factors(NamedTuple):
    """∇W ≈ left · diag(values) · right, of rank n; float64. The noise is that of an entry of ∇W."""

    left: Tensor  # (K, n)
    values: Tensor  # (n,)
    right: Tensor  # (n, D)
    noise: Tensor  # ()


class Rays(NamedTuple):
    """Directions of examples, in the basis of the right singular vectors."""

    directions: Tensor  # (found, n) of unit length
    zeros: Tensor  # (found, D) True where the example is zero


def interior_point(columns: Tensor) -> Tensor | None:
    """M (n,) with mᵀc > 0 for all columns c of (n, D), scaled to unit length; None where there is none.

    Newton's method on Σ max(0, 1 - mᵀc)², a quadratic wherever the columns below one stay the same.
    """
    m = columns.sum(dim=1)
    m = m * (2 / (m @ columns).abs().mean())
    ridge = 1e-12 * torch.eye(len(m), dtype=m.dtype, device=m.device)

    def loss(point: Tensor) -> Tensor:
        return (1 - point @ columns).clamp_min(0).square().sum()

    for _ in range(100):
        short = columns[:, (m @ columns) < 1]
        if short.shape[1] == 0:
            break
        target = torch.linalg.solve(short @ short.T + ridge * len(m), short.sum(dim=1))
        steps = 0.5 ** torch.arange(12, dtype=m.dtype, device=m.device)
        points = m + steps[:, None] * (target - m)
        losses = (1 - points @ columns).clamp_min(0).square().sum(dim=1)
        best = int(losses.argmin())
        if not bool(losses[best] < loss(m)):
            break
        m = points[best]
    # The scale is free: a longer m is as good, so that only the sign matters.
    return m / torch.linalg.vector_norm(m) if bool(((m @ columns) > 0).all()) else None


def extreme_rays(columns: Tensor, start: Tensor, known: Tensor, walks: int, rng: torch.Generator) -> Tensor:
    """Walk from the inside of {m : mᵀc ≥ 0} to extreme rays: (walks, n) of unit length.

    Args:
        columns: (n, D) of unit length.
        start: (n,) inside.
        known: (L, n) rays that half of the walks turn away from.
        walks: how many.
        rng: on the CPU.
    """
    n = len(columns)
    total = columns.sum(dim=1)  # on a slice of constant mᵀΣc the cone is bounded
    basis = (total / torch.linalg.vector_norm(total))[None, :, None].expand(walks, n, 1)
    m = start.expand(walks, n)
    # One direction a walk, laid into each face, as towards a linear aim; fresh ones reach half as many.
    aim = torch.randn(walks, n, generator=rng, dtype=torch.float64, device="cpu").to(m.device)
    away = torch.linalg.qr(known.T).Q
    aim = torch.cat([aim[: walks // 2] - aim[: walks // 2] @ away @ away.T, aim[walks // 2 :]])
    for _ in range(n - 1):
        drawn = aim
        for _ in range(2):  # twice is enough for orthogonality to the rounding
            drawn = drawn - (basis @ (basis.transpose(1, 2) @ drawn[..., None]))[..., 0]
        way = drawn / torch.linalg.vector_norm(drawn, dim=1, keepdim=True).clamp_min(1e-300)
        height, slope = m @ columns, way @ columns
        reach = torch.where(slope < -1e-9, height.clamp_min(0) / -slope, torch.inf)
        far, hit = reach.min(dim=1)
        far = torch.where(far.isfinite(), far, 0.0)
        m = m + far[:, None] * way
        face = columns.T[hit]
        for _ in range(2):
            face = face - (basis @ (basis.transpose(1, 2) @ face[..., None]))[..., 0]
        face = face / torch.linalg.vector_norm(face, dim=1, keepdim=True).clamp_min(1e-300)
        basis = torch.cat([basis, face[..., None]], dim=2)
    found: Tensor = m / torch.linalg.vector_norm(m, dim=1, keepdim=True)
    return found


def zero_tolerance(factors: Factors, directions: Tensor) -> Tensor:
    """What passes for zero in x = mᵀ·right: an entry has noise ν‖m/σ‖; (R, n) -> (R, 1)."""
    weights = torch.linalg.vector_norm(directions / factors.values, dim=1, keepdim=True)
    found: Tensor = _ZERO * factors.noise * weights
    return found


def refine(factors: Factors, directions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Fit each ray (R, n) to all its zeros; its zeros (R, D), and the largest leverage among them (R,)."""
    for _ in range(2):
        zeros = (directions @ factors.right).abs() < zero_tolerance(factors, directions)
        fitted = torch.linalg.svd(zeros[..., None] * factors.right.T, full_matrices=False)
        new = fitted.Vh[:, -1]
        directions = new * torch.where((new * directions).sum(dim=1, keepdim=True) < 0, -1.0, 1.0)
    zeros = (directions @ factors.right).abs() < zero_tolerance(factors, directions)
    leverage = fitted.U[..., :-1].square().sum(dim=2).amax(dim=1)
    settled = fitted.S[:, -2] > 1e-6 * fitted.S[:, 0]  # else the zeros leave a plane, not a ray
    return directions, zeros, torch.where(settled, leverage, 1.0)


def directions_from_zeros(factors: Factors, walks: int, rng: torch.Generator) -> Rays:
    """The examples of a batch that their zeros tell: at most n, each of them certain.

    Args:
        factors: of ∇W.
        walks: how many walks to try, at most.
        rng: on the CPU.
    """
    n, width = factors.right.shape
    none = Rays(factors.right[:0, :n], torch.zeros(0, width, dtype=torch.bool, device=factors.right.device))
    size = torch.linalg.vector_norm(factors.values[:, None] * factors.right, dim=0)
    live = size > _ZERO * factors.noise * n**0.5
    if n < 2 or int(live.sum()) < n:
        return none
    columns = factors.right[:, live]
    columns = columns / torch.linalg.vector_norm(columns, dim=0)
    start = interior_point(columns)
    if start is None:
        return none
    found = none
    at_once = max(1, min(walks, 256, _WALKS_AT_ONCE // columns.shape[1]))
    tried = lately = 0
    while tried < walks and tried < _PATIENCE + 4 * lately:
        rays = extreme_rays(columns, start, found.directions, at_once, rng)
        tried += at_once
        zeros = ((rays @ factors.right).abs() < zero_tolerance(factors, rays)) & live
        count = zeros.sum(dim=1)
        order = count.argsort(descending=True, stable=True)
        rays = _distinct(rays[order[count[order] >= n]], found.directions)[:_REFINED_AT_ONCE]
        if len(rays) > 0:
            before = len(found.directions)
            found = _join(factors, found, rays, live)
            lately = tried if len(found.directions) > before else lately
        if len(found.directions) == n:
            break
    return found


def _distinct(rays: Tensor, known: Tensor) -> Tensor:
    """The rays that equal neither an earlier one nor a known one: (R, n) -> (R', n)."""
    both = torch.cat([known, rays])
    alike = (both @ both.T).abs() > _SAME_RAY
    earlier = torch.ones_like(alike).tril(-1)
    return rays[~(alike & earlier).any(dim=1)[len(known) :]]


def _join(factors: Factors, found: Rays, rays: Tensor, live: Tensor) -> Rays:
    """Add the rays that are examples, those with the most zeros first, up to n independent ones."""
    n = len(factors.values)
    rays, zeros, leverage = refine(factors, rays)
    zeros = zeros & live
    features = rays @ factors.right
    tolerance = zero_tolerance(factors, rays)
    # Columns that are near a ray by accident: so many more zeros are asked for.
    typical = features[:, live].abs().mean(dim=1).clamp_min(1e-300)
    by_accident = (int(live.sum()) * tolerance[:, 0] / typical).clamp_max(1e6)
    enough = zeros.sum(dim=1) >= n + (4 * by_accident).ceil().clamp_max(1e6)
    valid = (leverage < _DEPENDENT) & enough & (features.amin(dim=1) > -3 * tolerance[:, 0])
    rays, zeros = torch.cat([found.directions, rays[valid]]), torch.cat([found.zeros, zeros[valid]])
    chosen: list[int] = []
    for index in zeros.sum(dim=1).argsort(descending=True, stable=True).tolist():
        smallest = torch.linalg.svdvals(rays[[*chosen, index]])[-1]
        if bool(smallest > 1e-6):
            chosen.append(index)
        if len(chosen) == n:
            break
    return Rays(rays[chosen], zeros[chosen])
