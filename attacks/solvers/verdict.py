"""From polished candidates to an answer: which format, how sure, or why there is none."""

from __future__ import annotations

import math
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from attacks.solvers import curve
from attacks.solvers.curve import Fit, Frame, Problem
from attacks.solvers.joint import NoisyGradients, Point, error_bars, largest_square
from attacks.solvers.label_models import Granted
from attacks.solvers.reduction import Reduction
from attacks.solvers.solution import LABEL_TOLERANCE, OK, UNIDENTIFIABLE, SoftLabelSolution, format_name

_BIC = 4.0
_RIVAL = 6.0  # in χ²: a fit that is worse by less may be the true one
_ERRORS = 3.0  # label_std times this must lie within LABEL_TOLERANCE


class Reason(IntEnum):
    """Why an answer is none, or is special."""

    FOUND = 0
    ZERO = 1
    TWO_CLASSES = 2
    TOO_FEW = 3
    NO_FIT = 4
    SEVERAL = 5
    UNIFORM = 6
    SATURATED = 7
    NOISE = 8
    SCALED = 9
    ONE_TELLER = 10


SENTENCES = {
    Reason.FOUND: "",
    Reason.ZERO: "the weight gradient is zero: x = 0 or p = y",
    Reason.TWO_CLASSES: "with two classes and no bias gradient (x, y) and (-x, 1 - y) look the same",
    Reason.TOO_FEW: "too few classes: a soft label leaves no equation to check the root with",
    Reason.NO_FIT: "no label of a known format fits: without structure an interval of λ does",
    Reason.SEVERAL: "several λ fit, with different labels",
    Reason.UNIFORM: "the softmax is uniform off the target (weights near zero): only t(1 - ε) is known",
    Reason.SATURATED: "the softmax is saturated at the target: only t·ε is known; the class is certain",
    Reason.NOISE: "noise or rounding leaves the label known to its error bar only",
    Reason.SCALED: "fits a gradient scaled by an unknown factor, as by clipping",
    Reason.ONE_TELLER: "too few classes tell λ, and they could as well be more classes of the mix",
}


class Candidates(NamedTuple):
    """Polished candidates of M examples, simplest models first."""

    t: Tensor  # (M, C)
    frame: Frame


class Verdict(NamedTuple):
    """What the candidates of M examples amount to."""

    reason: Tensor  # (M,) index into REASONS
    decided: Tensor  # (M,) no further search is needed
    t: Tensor  # (M,)
    y: Tensor  # (M, K)
    spikes: Tensor  # (M,)
    has_floor: Tensor  # (M,)
    confidence: Tensor  # (M,)
    t_std: Tensor  # (M,) relative
    label_std: Tensor  # (M,)
    epsilon: Tensor  # (M,)
    epsilon_std: Tensor  # (M,)
    loss: Tensor  # (M,)


class Assessment(NamedTuple):
    """Every candidate with its label, error bars and equations left."""

    fit: Fit
    y: Tensor  # (M, C, K) on the format
    floor: Tensor  # (M, C)
    floor_std: Tensor
    t_std: Tensor  # of log|t|
    label_std: Tensor
    loosest: Tensor  # largest variance of y(t) off the spikes
    degrees: Tensor  # equations left
    reduced: Tensor  # χ² by equation
    valid: Tensor  # a label: no entry below zero, no spike below the floor


def assess(problem: Problem, found: Candidates, floor_is_free: bool) -> Assessment:
    """Labels and error bars of all candidates; straight-line.

    Args:
        problem: the reduced gradients.
        found: the candidates.
        floor_is_free: the error bars leave e free where it isn't known, though the fit may hold it at zero.
    """
    frame = found.frame
    fit = curve.fit(problem, found.t, found.frame)
    point, off, mass_change = fit.point, fit.off, fit.mass_change
    floor = fit.floor
    y = torch.addcmul(point.y, mass_change[..., None], point.p)
    if frame.scaled:
        scale = torch.where(frame.free_scale > 0, 1 + mass_change, 1.0)
        y, floor = y / scale[..., None], floor / scale

    # Error bars: the covariance of (log|t|, α, e).
    loose, floor_variance = fit, torch.zeros_like(floor)
    if floor_is_free:
        loose = curve.fit_classes(point, off, frame.with_free_floor())
        floor_variance = 1 / loose.total
    t_variance = 1 / loose.curvature.clamp_min(1e-300)
    mass_variance = 1 / loose.mass_curvature
    coupling = loose.coupling
    mean_p = loose.mean_p
    floor_slope = loose.mean_slope - coupling * mean_p
    floor_variance = floor_variance + floor_slope.square() * t_variance + mean_p.square() * mass_variance
    spike_slope = point.slope - coupling[..., None] * point.p
    # The label sums to one: the spikes take up what is left, each as far as it is uncertain itself.
    on_spikes = point.variance.masked_fill(off, 0.0)
    share = on_spikes / on_spikes.sum(dim=-1, keepdim=True).clamp_min(1e-300)
    spike_variance = spike_slope.square() * t_variance[..., None]
    spike_variance = torch.addcmul(spike_variance, point.p.square(), mass_variance[..., None])
    spike_variance = torch.addcmul(spike_variance, on_spikes, 1 - share)
    worst_spike = torch.where(
        frame.spikes > 1,
        spike_variance.masked_fill(off, 0.0).amax(dim=-1),
        (y.shape[-1] - 1) ** 2 * floor_variance,
    )

    telling = 100 * point.variance < torch.maximum(point.p, (point.p - point.y).abs()).square()
    degrees = (telling & off).sum(dim=-1) - (1 + frame.free_floor + frame.free_scale)
    reduced = fit.chi2 / degrees.clamp_min(1)
    inflation = reduced.clamp_min(1)
    floor_std = (floor_variance * inflation).sqrt()

    # The label on its format: the floor off the spikes, what is left on them.
    on_format = torch.where(off, floor[..., None], y)
    left = 1 - on_format.sum(dim=-1, keepdim=True)
    loosest = (off * point.variance).amax(dim=-1)
    slack = 5 * (floor_std + loosest.sqrt()) + 1e-9
    lowest_spike = y.masked_fill(off, torch.inf).amin(dim=-1)
    return Assessment(
        fit=fit,
        y=torch.addcmul(on_format, share, left),
        floor=floor,
        floor_std=floor_std,
        t_std=(t_variance * inflation).sqrt(),
        label_std=(torch.maximum(floor_variance, worst_spike) * inflation).sqrt(),
        loosest=loosest,
        degrees=degrees,
        reduced=reduced,
        valid=(reduced < torch.inf) & (floor > -slack) & (lowest_spike > floor - slack - 1e-6),
    )


def doubtful_variance(found: Candidates, fit: Fit, best: Tensor) -> Tensor:
    """What the label's variance gains if the classes that tell most about t were more spikes: (M,).

    Any t can be made to fit where one class alone tells t: it could as well be one more spike. With every
    spike beyond two, and with a free scale, there are more roots to choose among: so many more must agree.

    Args:
        found: the candidates.
        fit: of all of them.
        best: (M,) the chosen one of each example.
    """
    rows, frame = torch.arange(len(best), device=best.device), found.frame
    # They are of one model each: as candidates of one example, not of many, (1, M, K).
    point = curve.Point(*(x[rows, best][None] for x in fit.point))
    off = fit.off[rows, best][None]
    count = min(max(frame.most_spikes - 2, 1) + 1, off.shape[-1])
    spared = ((frame.spikes - 2).clamp_min(1) + frame.free_scale.long()).clamp_max(count)
    mean_slope = fit.mean_slope[rows, best]
    information = off * (point.slope - mean_slope[:, None]).square() / point.variance
    most_telling = information.topk(count, dim=-1).indices
    is_spared = torch.arange(count, device=best.device) < spared[best][:, None]
    others = off.scatter(-1, most_telling, off.gather(-1, most_telling) & ~is_spared)
    without = curve.fit_classes(point, others, frame.candidates(best))
    steepest = torch.where(others, without.mean_slope[..., None], point.slope).square().amax(dim=-1)
    return (steepest / without.curvature.clamp_min(1e-300))[0]


def why_blurred(problem: Problem, t: Tensor, off: Tensor, doubtful: Tensor) -> Tensor:
    """The reason why an answer t (M,) isn't sharp, from the classes `off` its spikes (M, K): (M,)."""
    logits = torch.addcmul(problem.b[:, 0], t[:, None], problem.a[:, 0])
    both = torch.stack([logits, problem.s[:, 0]])  # (2, M, K)
    highest = both.masked_fill(~off, -torch.inf).amax(dim=-1)
    lowest = both.masked_fill(~off, torch.inf).amin(dim=-1)
    flatness, relief = highest - lowest
    size = torch.maximum(highest[1], -lowest[1]).clamp_min(1e-300)
    smooth = relief < 0.05 * size
    uniform = (flatness < 0.05) | (smooth & (flatness < 1))
    reason = torch.where(smooth, int(Reason.SATURATED), int(Reason.NOISE))
    reason = torch.where(doubtful & ~smooth, int(Reason.ONE_TELLER), reason)
    return torch.where(uniform, int(Reason.UNIFORM), reason)


def impose_mixing(label: Tensor, floor: Tensor, label_std: Tensor, mixing: float) -> tuple[Tensor, Tensor]:
    """Labels (M, C, K) with the two largest entries set to a granted mix, and whether they were near."""
    largest = label.topk(2, dim=-1)
    mass = 1 - label.shape[-1] * floor  # what the spikes have above the floor
    shares = torch.tensor([max(mixing, 1 - mixing), min(mixing, 1 - mixing)], device=label.device)
    wanted = floor[..., None] + mass[..., None] * shares.to(label.dtype)
    agrees = (largest.values - wanted).abs().amax(dim=-1) < LABEL_TOLERANCE + 5 * label_std
    return label.scatter(-1, largest.indices, wanted), agrees


def penalty(freed: Tensor, num_classes: int) -> Tensor:
    """What χ² must gain for each number freed."""
    return _BIC * freed * math.log(num_classes)


def judge(problem: Problem, found: Candidates, granted: Granted) -> Verdict:
    """Choose among candidates, and say whether the choice can be trusted; straight-line.

    Args:
        problem: the reduced gradients, known to their rounding.
        found: the candidates.
        granted: what the caller knows.
    """
    frame = found.frame
    num_classes = problem.s.shape[-1]
    view = assess(problem, found, granted.floor_is_free)
    freed = frame.spikes + frame.free_floor + 10 * frame.free_scale  # (C,)
    label, valid, extra = view.y, view.valid, 0
    if granted.mixing is not None:
        label, agrees = impose_mixing(label, view.floor, view.label_std, granted.mixing)
        valid, extra = valid & agrees, 1
    fits = valid & (view.reduced < problem.slack) & (view.degrees + extra >= 1)
    misfit = view.reduced * view.degrees.clamp_min(1) + penalty(freed, num_classes)
    cost = torch.where(fits, 1e6 * freed + view.reduced, 1e12 + misfit.clamp_max(1e11))
    cost = torch.where(valid, cost, cost + 1e12).nan_to_num(1e30)
    best = cost.argmin(dim=1)  # (M,)
    rows = torch.arange(len(best), device=best.device)

    y = label[rows, best]
    differs = (label - y[:, None]).abs().amax(dim=-1) > LABEL_TOLERANCE  # (M, C)
    freed_best = freed[best]
    as_simple = fits & (freed <= freed_best[:, None])
    several = (as_simple & differs).any(dim=1)
    kind = 2 * frame.spikes + frame.free_floor
    same = kind == kind[best][:, None]  # (M, C)

    numbers = [found.t, view.label_std, view.t_std, view.floor, view.floor_std, view.loosest]
    numbers += [view.reduced, view.degrees, fits.to(label.dtype)]
    t, label_std, t_std, floor, floor_std, loosest, reduced, degrees, fitted = torch.stack(numbers, dim=-1)[
        rows, best
    ].unbind(dim=1)
    spikes, has_floor = frame.spikes[best], frame.free_floor[best] > 0
    inflation = reduced.clamp_min(1)
    variance = label_std.square() + doubtful_variance(found, view.fit, best) * inflation
    variance = torch.maximum(variance, loosest * inflation)
    doubtful = (_ERRORS**2 * variance > LABEL_TOLERANCE**2) & (spikes < granted.most_spikes)
    sharp = (_ERRORS * label_std < LABEL_TOLERANCE) & (t_std < 0.1) & ~doubtful
    reason = torch.where(several, int(Reason.SEVERAL), int(Reason.FOUND))
    if frame.scaled:
        scaled = (frame.free_scale[best] > 0) & ~several
        reason = torch.where(scaled, int(Reason.SCALED), reason)
    is_fit = fitted > 0
    reason = torch.where(sharp, reason, why_blurred(problem, t, view.fit.off[rows, best], doubtful))
    return Verdict(
        reason=torch.where(is_fit, reason, int(Reason.NO_FIT)),
        decided=is_fit & sharp & ~several & (degrees >= 2 + freed_best),
        t=t,
        y=y,
        spikes=spikes,
        has_floor=has_floor if granted.floor_is_free else floor.abs() > 1e-12,
        confidence=share_of(same, as_simple.to(label.dtype)),
        t_std=t_std,
        label_std=label_std,
        epsilon=num_classes * floor,
        epsilon_std=num_classes * floor_std,
        loss=reduced,
    )


def share_of(same: Tensor, weight: Tensor) -> Tensor:
    """What the best of the candidates `same` (M, C) weighs, beside the best of all others: (M,)."""
    best = [torch.where(where, weight, 0.0).amax(dim=1) for where in (same, ~same)]
    return best[0] / (best[0] + best[1]).clamp_min(1e-12)


def judge_noisy(
    data: NoisyGradients,
    at: Point,
    spikes: Tensor,
    free_floor: Tensor,
    granted: Granted,
    noise: Tensor,
) -> tuple[Verdict, Tensor]:
    """Choose among joint fits by χ² and the numbers that they free; the verdict, and the choice (M,).

    Args:
        data: the gradients.
        at: the fits, (M, C).
        spikes: (M, C).
        free_floor: (M, C).
        granted: what the caller knows.
        noise: (M,) standard deviation.
    """
    num_classes = at.y.shape[-1]
    log_length_std, label_std = error_bars(data, at, granted.floor_is_free, noise)
    floor = torch.where(at.off, at.y, 0.0).amax(dim=-1) + torch.where(at.off, at.y, 0.0).amin(dim=-1)
    label, extra = at.y, 0
    slack = 5 * label_std
    lowest_spike = torch.where(at.off, torch.inf, at.y).amin(dim=-1)
    valid = torch.isfinite(at.misfit) & (floor > -slack) & (lowest_spike > floor - slack)
    if granted.mixing is not None:
        label, agrees = impose_mixing(label, floor, label_std, granted.mixing)
        valid, extra = valid & agrees, 1
    # What a label of this format leaves over beside the best matrix of rank one.
    closest = at.x[torch.arange(len(noise), device=noise.device), at.misfit.argmin(dim=1)]
    signal = largest_square(data, closest)
    excess = ((at.misfit + signal[:, None]) / noise.square()[:, None]).clamp_min(0)
    degrees = num_classes - spikes - 1 - free_floor + extra
    freed = spikes + free_floor
    cost = excess + penalty(freed, num_classes)
    cost = torch.where(valid, cost, cost + 1e12).nan_to_num(1e30)
    best = cost.argmin(dim=1, keepdim=True)

    def chosen(x: Tensor) -> Tensor:
        return x.gather(1, best)[:, 0]

    y = label.gather(1, best[..., None].expand(-1, 1, num_classes))[:, 0]
    differs = (label - y[:, None]).abs().amax(dim=-1) > LABEL_TOLERANCE + 3 * chosen(label_std)[:, None]
    several = (valid & differs & (cost < chosen(cost)[:, None] + _RIVAL)).any(dim=1)
    same = (spikes == chosen(spikes)[:, None]) & (free_floor == chosen(free_floor)[:, None])
    weight = torch.exp(-0.5 * (cost - chosen(cost)[:, None])) * valid
    sharp = (_ERRORS * chosen(label_std) < LABEL_TOLERANCE) & (chosen(log_length_std) < 0.1)
    reduced = chosen(excess / degrees)
    fits = chosen(valid.to(cost.dtype)) > 0
    fits = fits & (reduced < 1 + _RIVAL * (2 / chosen(degrees)).sqrt() + 10 / chosen(degrees))
    reason = torch.where(several, Reason.SEVERAL, Reason.FOUND)
    reason = torch.where(fits, reason, Reason.NO_FIT)
    return Verdict(
        reason=torch.where(sharp, reason, Reason.NOISE),
        decided=fits,
        t=torch.linalg.vector_norm(at.x, dim=-1).gather(1, best)[:, 0],
        y=y,
        spikes=chosen(spikes),
        has_floor=chosen(free_floor) > 0 if granted.floor_is_free else chosen(floor).abs() > 1e-12,
        confidence=share_of(same, weight),
        t_std=chosen(log_length_std),
        label_std=chosen(label_std),
        epsilon=num_classes * chosen(floor),
        epsilon_std=num_classes * chosen(label_std),
        loss=reduced,
    ), best[:, 0]


def no_verdict(problem: Problem, reason: Reason) -> Verdict:
    """No answer for any of M examples."""
    nan = torch.full_like(problem.s[:, 0], torch.nan)
    one = nan.select(1, 0)
    count = torch.zeros_like(one, dtype=torch.long)
    never = count > 0
    return Verdict(
        reason=count + int(reason),
        decided=never,
        t=one,
        y=nan,
        spikes=count,
        has_floor=never,
        confidence=torch.zeros_like(one),
        t_std=one,
        label_std=one,
        epsilon=one,
        epsilon_std=one,
        loss=one,
    )


def replace(verdict: Verdict, where: Tensor, new: Verdict) -> Verdict:
    """The verdict with the examples `where` (M,) taken from another one."""
    masks = [where.reshape(-1, *[1] * (old.dim() - 1)) for old in verdict]
    return Verdict(*(torch.where(mask, n, old) for mask, n, old in zip(masks, new, verdict, strict=True)))


def merge(verdict: Verdict, rows: Tensor, new: Verdict) -> Verdict:
    """The verdict with the examples `rows` taken from another one on them alone."""
    return Verdict(*(old.index_copy(0, rows, n) for old, n in zip(verdict, new, strict=True)))


def to_solution(verdict: Verdict, reduction: Reduction, dtype: torch.dtype) -> SoftLabelSolution:
    """In the caller's terms and dtype."""
    codes = verdict.reason.tolist()
    y = verdict.y.clamp(0, 1)
    y = y / y.sum(dim=1, keepdim=True)
    formats = [
        format_name(k, floor) if k else ""
        for k, floor in zip(verdict.spikes.tolist(), verdict.has_floor.tolist(), strict=True)
    ]
    lam = verdict.t * reduction.lam_per_t
    epsilon = verdict.epsilon[:, None] + 2 * verdict.epsilon_std[:, None] * torch.tensor(
        [-1.0, 1.0], dtype=y.dtype, device=y.device
    )
    unknown = torch.tensor([0.0, 1.0], dtype=y.dtype, device=y.device)
    epsilon = torch.where(epsilon.isnan(), unknown, epsilon).clamp(0, 1)
    numbers = [lam, verdict.confidence, lam.abs() * verdict.t_std, verdict.label_std.clamp_max(1)]
    lam, confidence, lam_std, label_std, loss = torch.stack([*numbers, verdict.loss]).to(dtype).unbind()
    return SoftLabelSolution(
        outcome=[OK if code in (Reason.FOUND, Reason.SCALED) else UNIDENTIFIABLE for code in codes],
        reason=[SENTENCES[Reason(code)] for code in codes],
        soft_labels=y.to(dtype),
        features=(verdict.t[:, None] * reduction.direction.double()).to(dtype),
        lam=lam,
        row=reduction.row,
        label_format=formats,
        format_confidence=confidence,
        lam_std=lam_std,
        label_std=label_std,
        epsilon_interval=epsilon.to(dtype),
        loss=loss,
    )
