"""With the bias gradient nothing is searched: ∇b = u, x = ∇Wᵀ∇b/‖∇b‖², y = softmax(W x + b) - ∇b.

Any label, with or without structure. Under noise u and x are those of the nearest u [xᵀ 1] to [∇W ∇b].

A column of zeros is a feature that is off, or one whose gradient was masked: then W x lacks it, and y comes
out wrong while u is exact. A wrong p leaves no structure in y, so that a label with structure tells that
nothing is missing; but of many spikes only where p isn't zero at two other classes. A label without
structure is believed where u rules out the usual ones, whatever p is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attacks.solvers.missing import complete, is_pruned
from attacks.solvers.reduction import POWER_STEPS, power_step, rank_one_residual, telling_rows
from attacks.solvers.solution import LABEL_TOLERANCE, OK, UNIDENTIFIABLE, SoftLabelSolution, format_name

REASONS = (
    "",
    "the bias gradient is zero: p = y, and neither is known",
    "the noise leaves the label known to its error bar only",
    "without structure in the label, features of which nothing was sent may be off or masked",
    "p - ∇b is below zero: the gradient is scaled, or another model's or loss's",
)
_ZERO, _BLURRED, _MASKED, _BELOW = range(1, len(REASONS))
MAY_BE_SCALED = frozenset({REASONS[_MASKED], REASONS[_BELOW]})
"""Reasons why p - ∇b is no answer where the gradient may be one: of an unknown scale."""

_TELLING = 100.0
"""Tolerances by which p exceeds zero at a class that a wrong p would show; if y has many spikes, two must."""
_MOST_SMOOTHING = 0.5
_UNSEEN = 4.0
"""Standard deviations of noise that no entry of a column exceeds of which nothing was sent."""


def label_structure(y: Tensor, tolerance: Tensor, most_spikes: int) -> tuple[Tensor, Tensor]:
    """The number of spikes of each label (0: no structure) and the value that the other classes share.

    Args:
        y: (M, K).
        tolerance: (M,) how far apart equal entries may lie.
        most_spikes: labels with more spikes have no structure.
    """
    num_classes = y.shape[1]
    ordered = y.sort(dim=1, descending=True).values
    most = min(most_spikes, num_classes - 1)
    rest_spread = ordered[:, 1 : most + 1] - ordered[:, -1:]  # (M, most): off the k largest
    equal = rest_spread <= tolerance[:, None]
    if most == num_classes - 1 > 1:  # one class alone shares its value with nobody: it must be zero
        last_is_zero = ordered[:, -1:] <= tolerance[:, None]
        equal = torch.cat([equal[:, :-1], equal[:, -1:] & last_is_zero], dim=1)
    spikes = torch.where(equal.any(dim=1), equal.to(torch.int8).argmax(dim=1) + 1, 0)
    index = torch.arange(num_classes, device=y.device)
    rest = index[None] >= spikes[:, None].clamp_min(1)
    floor = (ordered * rest).sum(dim=1) / rest.sum(dim=1)
    return spikes, floor


def may_have_structure(u: Tensor, tolerance: Tensor) -> Tensor:
    """Whether some mix of two classes, smoothed by half at most, has this u = p - y (M, K) for any p: (M,).

    p ≥ 0 asks for y ≥ -u: off the two the shared value is at least the largest -u, and y sums to one.
    """
    num_classes = u.shape[1]
    mixed = min(2, num_classes - 1)
    least = (-u).clamp_min(0).topk(mixed + 1, dim=1).values
    floor = least[:, -1]
    mass = least[:, :-1].sum(dim=1) + (num_classes - mixed) * floor
    return (mass <= 1 + num_classes * tolerance) & (num_classes * (floor - tolerance) <= _MOST_SMOOTHING)


def leading_pair(both: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """U (M, K) and x (M, D) of the nearest u [xᵀ 1] to M noisy [∇W ∇b] (M, K, D + 1), from a first x.

    ∇b alone gives u with the noise of its entries; every column of ∇W is one more look at it.
    """
    v = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
    s = torch.matmul(both, v[..., None])[..., 0]
    for _ in range(POWER_STEPS):
        v, s = power_step(both, s)
    last = v[:, -1:]
    return s * last, v[:, :-1] / torch.where(last == 0, 1.0, last)


class Completed(NamedTuple):
    """What pruned entries leave of one example; float64."""

    u: Tensor  # (K,)
    x: Tensor  # (D,)
    u_variance: Tensor  # (K,) of rows of which nothing was sent
    x_variance: Tensor  # (D,) of columns of which nothing was sent

    def on(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """u, x, the variance of u, and that of the logits."""
        return self.u, self.x, self.u_variance, weight.double().square() @ self.x_variance


def completed(weight_gradient: Tensor, direction: Tensor, bias_gradient: Tensor) -> Completed | None:
    """One pruned ∇W (K, D) and ∇b (K,): each entry that was sent is exact, and ∇W = s vᵀ, s = t u, x = t v.

    None where no matrix of rank one agrees with what was sent, or ∇b tells no t.
    """
    found = complete(weight_gradient[None], direction[None])
    rounding = 8 * torch.finfo(weight_gradient.dtype).eps
    sent = bias_gradient.square().sum()
    t = (found.s[0] * bias_gradient).sum() / sent
    if not (bool(found.misfit[0] < rounding**2 + 1e-12) and bool(t.isfinite()) and bool(t != 0)):
        return None
    u = torch.where(bias_gradient != 0, bias_gradient, found.s[0] / t)
    return Completed(
        u, t * found.direction[0], found.s_variance[0] / t.square(), t.square() * found.direction_variance[0]
    )


def recover_from_bias_gradient(
    weight_gradient: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bias_gradient: Tensor,
    noise_std: float | None,
    most_spikes: int,
) -> SoftLabelSolution:
    """Soft labels and features of M gradients (M, K, D), (M, K); see `recover_soft_labels`."""
    dtype, eps = weight_gradient.dtype, torch.finfo(weight_gradient.dtype).eps
    u = bias_gradient.double()
    u_norm = torch.linalg.vector_norm(u, dim=1)
    unit = u / u_norm.clamp_min(1e-300)[:, None]
    along = torch.matmul(unit.to(dtype)[:, None], weight_gradient)[:, 0].double()  # (M, D) ‖u‖ x
    x = along / u_norm.clamp_min(1e-300)[:, None]
    row_norms = torch.linalg.vector_norm(weight_gradient, dim=2)
    u_variance, logit_variance = torch.zeros_like(u), torch.zeros_like(u)
    if noise_std is None:
        direction = x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(1e-300)
        residual = rank_one_residual(weight_gradient, row_norms, direction.to(dtype))
        noise = residual.additive.double()
        lost = ((u == 0) & (row_norms > 0)).any(dim=1)  # of ∇b, where its row of ∇W was sent
        for index in (residual.uneven | lost).nonzero()[:, 0].tolist():
            rows = telling_rows(weight_gradient[index, None], row_norms[index, None])
            if not bool(lost[index]) and not bool(is_pruned(rows, direction[index, None])[0]):
                continue
            found = completed(weight_gradient[index], direction[index].to(dtype), u[index])
            if found is not None:
                u[index], x[index], u_variance[index], logit_variance[index] = found.on(weight)
                noise[index] = 0.0
    else:
        noise = torch.full_like(u_norm, noise_std)
    noisy = ((noise > 0) & (u_norm > 0)).nonzero()[:, 0]
    u_noise = noise.clone()
    if len(noisy) > 0:
        both = torch.cat([weight_gradient[noisy].double(), u[noisy, :, None]], dim=2)
        u[noisy], x[noisy] = leading_pair(both, x[noisy])
        u_noise[noisy] = noise[noisy] / torch.sqrt(1 + x[noisy].square().sum(dim=1))
    logits = torch.matmul(x.to(weight.dtype), weight.T).double()
    logits = logits if bias is None else logits + bias.double()
    p = torch.softmax(logits, dim=1)
    y = p - u

    row = torch.where(row_norms.amax(dim=1) > 0, row_norms.argmax(dim=1), u.abs().argmax(dim=1))
    lam = 1 / u.gather(1, row[:, None])[:, 0]
    # δx is noise/‖u‖ in every coordinate, and as a whole x/‖u‖ times the noise of ∇b; so is u as a whole.
    weight_norm = torch.linalg.vector_norm(weight, dim=1).double()
    relative = noise / u_norm.clamp_min(1e-300)
    logit_std = relative[:, None] * torch.sqrt(weight_norm.square() + logits.square())
    logit_std = logit_std + 4 * eps * (1 + logits.abs())
    logit_std = torch.sqrt(logit_std.square() + logit_variance)
    own = u_noise[:, None].square() + (relative[:, None] * u).square() + u_variance
    label_std = torch.sqrt(own + (p * (1 - p) * logit_std).square()).amax(dim=1)
    lam_std = lam.abs() * (noise / u.gather(1, row[:, None])[:, 0].abs() + eps)

    blurred = 3 * label_std > LABEL_TOLERANCE
    tolerance = 6 * label_std + 100 * eps
    spikes, floor = label_structure(y, tolerance, most_spikes)
    num_classes = y.shape[1]
    below = (y < -tolerance[:, None]).any(dim=1)
    shared = (y - floor[:, None]).abs() <= tolerance[:, None]
    telling = (shared & (p > _TELLING * tolerance[:, None])).sum(dim=1) > 1
    loose = (spikes == 0) & may_have_structure(u, tolerance) | (spikes > 2) & ~telling
    doubtful = (below | loose).nonzero()[:, 0]
    masked = torch.zeros_like(below)
    if len(doubtful) > 0:
        largest = weight_gradient[doubtful].abs().amax(dim=1)  # (R, D)
        masked[doubtful] = (largest <= _UNSEEN * noise[doubtful, None]).any(dim=1)
    label_std = label_std.masked_fill(masked | below, 1.0)
    epsilon = torch.stack([floor - 2 * label_std, floor + 2 * label_std], dim=1) * num_classes
    zero = u_norm == 0
    verdict = torch.where(below, _BELOW, 0)
    for where, code in ((masked, _MASKED), (blurred, _BLURRED), (zero, _ZERO)):
        verdict = verdict.masked_fill(where, code)
    codes = verdict.tolist()
    nan = torch.full_like(u_norm, torch.nan)
    return SoftLabelSolution(
        outcome=[UNIDENTIFIABLE if code else OK for code in codes],
        reason=[REASONS[code] for code in codes],
        soft_labels=torch.where(zero[:, None], nan[:, None], y.clamp(0, 1)).to(dtype),
        features=torch.where(zero[:, None], nan[:, None], x).to(dtype),
        lam=torch.where(zero, nan, lam).to(dtype),
        row=row,
        label_format=[
            "" if code == _ZERO else format_name(k, has_floor) if k else "any"
            for code, k, has_floor in zip(codes, spikes.tolist(), (floor > tolerance).tolist(), strict=True)
        ],
        format_confidence=torch.where(zero, torch.zeros_like(nan), torch.ones_like(nan)).to(dtype),
        lam_std=torch.where(zero, nan, lam_std).to(dtype),
        label_std=torch.where(zero, nan, label_std.clamp_max(1)).to(dtype),
        epsilon_interval=epsilon.clamp(0, 1).to(dtype),
        loss=torch.zeros_like(nan).to(dtype),
    )
