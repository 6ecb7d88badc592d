"""Seeds for t: closed forms that need no start and no bound, and a grid for what they miss.

Straight-line tensor code, all seeds of all examples at once. What is no seed comes out as NaN.
"""

from __future__ import annotations

import functools
import math
from itertools import combinations

import torch
from torch import Tensor

from attacks.solvers.curve import Problem

_PAIR_ANCHORS = 15
_TRIPLE_ANCHORS = 9
_NEWTON_STEPS = 3
_KNEE = 5.0


def anchor_ranks(num_classes: int, count: int) -> list[int]:
    """Ranks, in the order of a, that represent all classes: both ends densely, the middle sparsely.

    p grows or falls with t·a, so the classes whose p stands out of the rounding are at one of the ends.
    """
    if num_classes <= count:
        return list(range(num_classes))
    end = count // 3
    middle = count - 2 * end
    inner = [end + round((i + 0.5) * (num_classes - 2 * end) / middle) for i in range(middle)]
    ranks = {*range(end), *inner, *range(num_classes - end, num_classes)}
    return sorted(rank for rank in ranks if rank < num_classes)


@functools.cache
def _subsets(num_classes: int, count: int, size: int) -> list[tuple[int, ...]]:
    """All `size`-subsets of the anchors, as columns of ranks."""
    return list(zip(*combinations(anchor_ranks(num_classes, count), size), strict=True))


def _by_rank(problem: Problem, columns: list[Tensor], count: int, size: int) -> Tensor:
    """Columns (M, K) at all `size`-subsets of the anchors, in ascending a: (M, columns, size, subsets)."""
    a = problem.a[:, 0]
    ranks = torch.tensor(_subsets(a.shape[1], count, size), device=a.device)  # (size, subsets)
    classes = a.argsort(dim=1)[:, ranks]  # (M, size, subsets)
    picked = torch.stack(columns, dim=1)[..., None].expand(-1, -1, -1, ranks.shape[1])
    return picked.gather(2, classes[:, None].expand(-1, len(columns), -1, -1))


def slopes(problem: Problem) -> Tensor:
    """Seeds for e = 0, from pairs of classes: (M, pairs).

    Off the spikes s_i = t p_i, so log|s_i| - b_i is linear in a_i with slope t.
    Two classes off the spikes have s of one sign, that of t; so each pair tells t, its sign included.
    """
    s = problem.s[:, 0]
    height = s.abs().log() - problem.b[:, 0]
    picked = _by_rank(problem, [height, problem.a[:, 0], s], _PAIR_ANCHORS, 2)
    rise = picked[:, :2, 1] - picked[:, :2, 0]  # of the height, and of a
    t = rise[:, 0] / rise[:, 1]
    valid = (picked[:, 2] * t[:, None] > 0).all(dim=1)
    return torch.where(valid, t, torch.nan)


def triples(problem: Problem) -> Tensor:
    """Seeds for b = 0 and any e, from three classes with a_i < a_k < a_l that share it: (M, triples).

    (s_k - s_i)/(s_l - s_i) = (exp(qτ) - 1)/(exp(τ) - 1) with q = (a_k - a_i)/(a_l - a_i), τ = t(a_l - a_i).
    The logarithm of the right side is concave and falls in τ: one root, sign included. Reversing the order of
    the classes negates τ, so the root can be taken as positive. There the logarithm lies below its tangent at
    zero and below its asymptote, (q - 1)τ: Newton's method from the nearer of these two bounds falls onto the
    root without overshooting, and three steps bring it within 1e-5.
    """
    picked = _by_rank(problem, [problem.a[:, 0], problem.s[:, 0]], _TRIPLE_ANCHORS, 3)
    rise = (
        picked[:, :, 1:] - picked[:, :, :1]
    )  # (M, 2, 2, triples) to the class in the middle, and to the last
    width = rise[:, 0, 1]
    share = rise[:, :, 0] / rise[:, :, 1]
    valid = ((share > 0) & (share < 1)).all(dim=1)
    q, ratio = share.unbind(dim=1)
    reverse = ratio > q
    q = torch.where(valid, torch.where(reverse, 1 - q, q), 0.5)
    log_ratio = torch.where(valid, torch.where(reverse, 1 - ratio, ratio), 0.25).log()
    tau = torch.maximum(log_ratio, 2 * (log_ratio - q.log())) / (q - 1)
    for _ in range(_NEWTON_STEPS):
        tau = tau.clamp_min(1e-12)
        low, high = torch.exp(-q * tau), torch.exp(-tau)
        value = (q - 1) * tau + torch.log((1 - low) / (1 - high)) - log_ratio
        falling = (q - 1) + q * low / (1 - low) - high / (1 - high)
        tau = tau - value / falling
    t = torch.where(reverse, -tau, tau) / width
    return torch.where(valid & torch.isfinite(t), t, torch.nan)


def flat(problem: Problem) -> Tensor:
    """Seed for a = 0 and e = 0: t = s_i/p_i off the spikes, p = softmax(b): (M, 1)."""
    return (problem.s / torch.softmax(problem.b, dim=-1)).median(dim=-1).values


def grid(problem: Problem, points: int, most: float) -> Tensor:
    """|t| from its lower bound ‖s‖₁/2 up, both signs: (M, 2·points).

    A fit's basin in t is about as wide as 1/(spread of a), once logits differ by more than that: steps grow
    in proportion to t first, and evenly from there on, to logits that differ by `most`.
    """
    least = problem.s.abs().sum(dim=-1) / 2
    spread = problem.a.amax(dim=-1) - problem.a.amin(dim=-1)
    start = (least * spread).clamp(1e-12, most)  # logits' spread at the bound
    knee = min(_KNEE, most)  # steps are geometric below, even above
    first = torch.log(start.clamp_max(knee)) + (start.clamp_min(knee) - knee) / knee
    last = math.log(knee) + (most - knee) / knee
    u = torch.linspace(0, 1, points, dtype=least.dtype, device=least.device)
    warped = first + (last - first) * u
    rise = warped - math.log(knee)
    spreads = torch.where(rise < 0, torch.exp(warped.clamp_max(math.log(knee))), knee * (1 + rise))
    t = least * (spreads / start).clamp_min(1.0)
    return torch.cat([t, -t], dim=1)


def densest(seeds: Tensor, keep: int) -> Tensor:
    """The `keep` seeds with the nearest neighbours: (M, S) → (M, keep).

    Pairs and triples free of spikes all give the same t; the others scatter.
    """
    if seeds.shape[1] <= keep:
        return seeds
    magnitude = seeds.abs().log() + 50.0
    ordered = (magnitude * seeds.sign()).nan_to_num(torch.inf).sort(dim=1)
    reach = max(2, seeds.shape[1] // 12)
    gap = ordered.values[:, reach:] - ordered.values[:, :-reach]
    gap = gap.nan_to_num(torch.inf)
    index = gap.topk(min(keep, gap.shape[1]), dim=1, largest=False).indices + reach // 2
    return seeds.gather(1, ordered.indices.gather(1, index))
