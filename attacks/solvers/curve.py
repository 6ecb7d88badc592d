"""The curve y(t) = softmax(t a + b) - s/t, and how well a point on it is a label of a given format.

A label of a format has all but k of its classes (the spikes) at one value e (the floor): hard k = 1, e = 0;
smoothing k = 1, e = ε/K; mixup k = 2, e = 0; and so on. A point t is judged by the classes off the spikes, by
r_i = y_i(t) - e in units of the rounding and noise that y_i(t) carries. In these units the false minimum of
the plain variance at |t| → ∞, where y tends to a one-hot vector, is none.

Everything here is straight-line tensor code: no decision depends on a value. On one example its time is the
number of operations, whatever K, so they are few; M examples and C candidates of each go at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_TINY = 1e-300
_FLOOR, _MASS, _TIME, _LABEL = range(4)
"""The columns of the least squares: e, α, log|t|, and what they are to explain."""


class Problem(NamedTuple):
    """M reduced gradients with the noise of their numbers; float64, with a place for the candidates."""

    s: Tensor  # (M, 1, K) ∇W v
    a: Tensor  # (M, 1, K) W v
    b: Tensor  # (M, 1, K) bias, or zeros
    s_variance: Tensor  # (M, 1, K) of s, above zero
    a_variance: Tensor  # (M, 1, K) of a
    logit_variance: Tensor  # (M, 1, K) of log p, besides t² · a_variance
    least: Tensor  # (M, 1) the bound |t| ≥ ‖s‖₁/2, less the noise in it
    slack: Tensor  # (M, 1) the reduced χ² up to which a fit passes
    floor: float  # the granted e, else 0
    sum_error: float  # standard error of α in u = α p - y

    def rows(self, which: Tensor) -> Problem:
        """The examples `which` alone."""
        s, a, b, s_variance, a_variance, logit_variance, least, slack = (
            x.index_select(0, which) for x in self[:8]
        )
        return Problem(
            s, a, b, s_variance, a_variance, logit_variance, least, slack, self.floor, self.sum_error
        )


class Frame(NamedTuple):
    """What is fitted at each of C candidates: the part of the least squares that no t changes."""

    spikes: Tensor  # (C,) k
    free_floor: Tensor  # (C,) 1 where e is fitted, 0 where it is the granted floor
    free_scale: Tensor  # (C,) 1 where the gradient's scale is fitted (clipping by an unknown factor)
    held: Tensor  # (C, 1) e where it is not fitted
    prior: Tensor  # (C, 4, 2) rows that hold α near one, and e where it is not fitted
    most_spikes: int
    scaled: bool  # whether any scale is free

    def candidates(self, which: Tensor) -> Frame:
        """The candidates `which` alone."""
        return Frame(
            self.spikes[which],
            self.free_floor[which],
            self.free_scale[which],
            self.held[which],
            self.prior[which],
            self.most_spikes,
            self.scaled,
        )

    def with_free_floor(self) -> Frame:
        """The same with e fitted at every candidate; no step of it says anything of y."""
        mass = self.prior[..., 1]
        prior = torch.stack([torch.zeros_like(mass), mass], dim=-1)
        return self._replace(free_floor=torch.ones_like(self.free_floor), prior=prior)


class Point(NamedTuple):
    """The curve at t, (M, C, K) each."""

    y: Tensor  # p - s/t
    p: Tensor
    slope: Tensor  # dy/dlog|t|
    variance: Tensor  # of y


class Fit(NamedTuple):
    """The best e and α at each t, and how well they fit: a triangle, from which all else is read.

    α stands for the sum of the label: a label that sums to one only in float32 makes the loss's gradient
    p·Σy - y, and a softmax is normalised only to its rounding.
    """

    point: Point
    off: Tensor  # (M, C, K) True off the spikes
    first_floor: Tensor  # (M, C) e, but for what the least squares adds
    triangle: Tensor  # (M, C, 4, 4) R of the QR factorisation of [1, p, slope, y - first_floor], weighted

    def _entry(self, row: int, column: int) -> Tensor:
        return self.triangle[..., row, column]

    @property
    def chi2(self) -> Tensor:
        """At t itself: what a step in log|t| would take off is still in it, (M, C)."""
        return self.triangle[..., _TIME:, _LABEL].square().sum(dim=-1)

    @property
    def gain(self) -> Tensor:
        """What a step in log|t| would take off χ², to first order, (M, C)."""
        return self._entry(_TIME, _LABEL).square()

    @property
    def step(self) -> Tensor:
        """Gauss-Newton step in log|t|, (M, C)."""
        return -self._entry(_TIME, _LABEL) / self._entry(_TIME, _TIME)

    @property
    def curvature(self) -> Tensor:
        """1/variance of log|t|, (M, C)."""
        return self._entry(_TIME, _TIME).square()

    @property
    def mass_curvature(self) -> Tensor:
        """1/variance of α at a given t, (M, C)."""
        return self._entry(_MASS, _MASS).square()

    @property
    def mass_change(self) -> Tensor:
        """α - 1, (M, C)."""
        return -self._entry(_MASS, _LABEL) / self._entry(_MASS, _MASS)

    @property
    def coupling(self) -> Tensor:
        """How α follows log|t|: dα/dlog|t| = -coupling, (M, C)."""
        return self._entry(_MASS, _TIME) / self._entry(_MASS, _MASS)

    @property
    def mean_p(self) -> Tensor:
        """Weighted mean of p off the spikes where e is free, else 0: (M, C)."""
        return self._entry(_FLOOR, _MASS) / self._entry(_FLOOR, _FLOOR)

    @property
    def mean_slope(self) -> Tensor:
        """Likewise of the slope."""
        return self._entry(_FLOOR, _TIME) / self._entry(_FLOOR, _FLOOR)

    @property
    def floor(self) -> Tensor:
        """The floor e at a given t, (M, C)."""
        added = self._entry(_FLOOR, _LABEL) / self._entry(_FLOOR, _FLOOR)
        return self.first_floor + added + self.mass_change * self.mean_p

    @property
    def total(self) -> Tensor:
        """Sum of the weights where e is free, else 1: (M, C)."""
        return self._entry(_FLOOR, _FLOOR).square()


def probabilities(problem: Problem, t: Tensor) -> Tensor:
    """softmax(t a + b): (M, C) → (M, C, K)."""
    return torch.softmax(torch.addcmul(problem.b, t[..., None], problem.a), dim=-1)


def point_at(problem: Problem, t: Tensor) -> Point:
    """The curve at t (M, C), with the variance of y(t) from the noise in s, a and p."""
    column = t[..., None]
    logits = column * problem.a  # but for b
    p = torch.softmax(logits + problem.b, dim=-1)
    s_over_t = problem.s / column
    mean = (p * logits).sum(dim=-1, keepdim=True)
    t2 = column.square()
    relative = torch.addcmul(problem.logit_variance, t2, problem.a_variance)
    return Point(
        y=p - s_over_t,
        p=p,
        slope=torch.addcmul(s_over_t, p, logits - mean),
        variance=torch.addcmul(problem.s_variance / t2, p.square(), relative),
    )


def fit(problem: Problem, t: Tensor, frame: Frame) -> Fit:
    """How well the classes off the spikes share one value at each t (M, C)."""
    point = point_at(problem, t)
    # The spikes are the k classes of the largest y.
    largest = point.y.topk(min(frame.most_spikes + 1, point.y.shape[-1]), dim=-1).values
    most = largest.gather(-1, frame.spikes[:, None].expand(len(t), -1, -1))
    return fit_classes(point, point.y <= most, frame)


def fit_classes(point: Point, off: Tensor, frame: Frame) -> Fit:
    """Weighted least squares in e, α and log|t|, in this order, over the classes `off` (M, C, K).

    By reflections: differences of sums would cancel where p and the slope are nearly parallel. Their own
    rounding goes with the length of a column, so most of e is taken off y before.
    """
    scale = off * point.variance.rsqrt()
    weight = scale.square()
    mean = (weight * point.y).sum(dim=-1, keepdim=True) / weight.sum(dim=-1, keepdim=True)
    ones = frame.free_floor[:, None]
    floor = torch.addcmul(frame.held, mean, ones)
    columns = [ones.expand_as(point.p), point.p, point.slope, point.y - floor]
    prior = frame.prior.expand(len(scale), -1, -1, -1)
    weighted = torch.cat([prior, torch.stack(columns, dim=-2) * scale[..., None, :]], dim=-1)
    return Fit(point, off, floor[..., 0], torch.linalg.qr(weighted.mT, mode="r").R)


class Polish(NamedTuple):
    """The state of the damped Gauss-Newton iteration in log|t|, (M, C) each; no step changes a sign."""

    t: Tensor  # the best so far
    chi2: Tensor
    gain: Tensor  # what the step should take off χ²
    step: Tensor
    damping: Tensor

    def rows(self, which: Tensor) -> Polish:
        """The examples `which` alone."""
        return Polish(*(part[which] for part in self))


def _bounded_step(found: Fit) -> Tensor:
    return found.step.nan_to_num(0.0).clamp(-0.7, 0.7)


def start_polish(problem: Problem, t: Tensor, frame: Frame) -> Polish:
    """The state at the seeds (M, C)."""
    found = fit(problem, t, frame)
    chi2 = found.chi2.nan_to_num(torch.inf)
    return Polish(t, chi2, found.gain, _bounded_step(found), torch.ones_like(t))


def polish_step(problem: Problem, state: Polish, frame: Frame) -> Polish:
    """Evaluate the proposed t, keep it where it is better, shorten the step where it isn't."""
    proposal = state.t * torch.exp(state.damping * state.step)
    proposal = torch.copysign(torch.maximum(proposal.abs(), problem.least), proposal)
    found = fit(problem, proposal, frame)
    chi2 = found.chi2
    better = chi2 < state.chi2
    return Polish(
        t=torch.where(better, proposal, state.t),
        chi2=torch.where(better, chi2, state.chi2),
        gain=torch.where(better, found.gain, state.gain),
        step=torch.where(better, _bounded_step(found), state.step),
        damping=torch.where(better, (2 * state.damping).clamp_max(1), 0.4 * state.damping),
    )


def rough_misfit(problem: Problem, t: Tensor, frame: Frame, tolerance: Tensor) -> Tensor:
    """How far each seed is from each shape, at a relative tolerance (M, 1): (M, S), C shapes → (M, C, S).

    Negative labels are penalised, as no format has them.
    """
    column = t[..., None]
    p = probabilities(problem, t)
    s_over_t = problem.s / column
    y = p - s_over_t
    noise = problem.s_variance / column.square()
    noise = torch.addcmul(noise, p.square(), column.square() * problem.a_variance)
    weight = 1 / (tolerance[..., None].square() * (p.square() + s_over_t.square()) + noise)
    # Sums over all classes, less those over the spikes, which are the classes of the largest y.
    weighted = weight * y
    terms = torch.stack([weight, weighted, weighted * y], dim=-2)  # (M, S, 3, K)
    count = min(frame.most_spikes, y.shape[-1])
    largest = y.topk(count, dim=-1).indices[..., None, :].expand(-1, -1, 3, -1)
    spikes = terms.gather(-1, largest).cumsum(dim=-1)
    sums = terms.sum(dim=-1, keepdim=True) - spikes.index_select(-1, frame.spikes - 1)
    total, first, second = sums.unbind(dim=-2)  # (M, S, C) each
    total = total.clamp_min(_TINY)
    floor = frame.free_floor * first / total + frame.held[:, 0]
    chi2 = (second - 2 * floor * first + floor.square() * total).clamp_min(0)
    negative = (-y.amin(dim=-1)).clamp_min(0) * t.abs() / problem.s.abs().amax(dim=-1)
    return (chi2 * (1 + 20 * negative[..., None])).transpose(1, 2)
