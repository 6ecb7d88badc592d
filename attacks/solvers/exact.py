"""The exact search: closed-form seeds, Gauss-Newton on the curve, the simplest format that fits.

Formats are tried in the order of their free numbers. Where ∇W is known to its rounding, the first one that
fits to the rounding is the answer; where noise was added, all are fitted and χ² is weighed against the
numbers that they free. Whatever the format, the error bars leave the floor e free, unless the caller rules
it out: an answer that holds only because e was assumed to be zero is none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from attacks.solvers import curve, joint, seeds
from attacks.solvers.curve import Frame, Polish, Problem
from attacks.solvers.label_models import Granted, Model, as_frame
from attacks.solvers.reduction import Reduction, point_along, reduce
from attacks.solvers.solution import SoftLabelSolution, concatenate
from attacks.solvers.verdict import (
    Candidates,
    Reason,
    Verdict,
    judge,
    judge_noisy,
    merge,
    no_verdict,
    penalty,
    replace,
    to_solution,
)

_MEMORY = 256 * 2**20
_CACHED = 16 * 2**20
"""Bytes of work arrays that stay near the processor: more at once is slower."""
_SEED_TOLERANCE = 0.02
_NORM_COLUMNS, _NORM_BLOCK = 256, 32
_JOINT_CANDIDATES = 6
_JOINT_STEPS = 25
# Rounding is known to a factor of a few, and a wrong format is off by 10³ and more; bounds are bounds.
_ROUNDING_SLACK, _MISSING_SLACK = 25.0, 2.0
_NOTHING_TO_GAIN = 0.01
"""In χ²: a tenth of the error bar."""
_MISFIT = 100.0
"""More χ² by class than this passes nowhere."""
_HOPELESS = 1e9
"""Seeds with more χ² by class than this are no seeds: closed forms are off by 10³ roundings at most."""


class Stage(NamedTuple):
    """A part of the search, with what it may be spared for.

    Args:
        models: to fit, simplest first.
        sources: of seeds.
        keep: seeds of each model, those of the least misfit; 0 makes it a first try: all are kept, no misfit
            is looked at, and where none is near a fit nothing is polished.
        steps: of the polish, at most.
        sharply: as many seeds again, chosen by their misfit in units of the rounding.
    """

    models: list[Model]
    sources: tuple[str, ...]
    keep: int
    steps: int
    sharply: bool = False

    @property
    def is_first_try(self) -> bool:
        """Whether it leaves what isn't near a fit to the next stage."""
        return self.keep == 0

    @property
    def seeds(self) -> int:
        """At most so many."""
        return sum(_SOURCES[source][0] for source in self.sources)

    def examples_at_once(self, num_classes: int) -> int:
        """How many examples keep the work arrays within the memory bound."""
        seeded = 10 * self.seeds
        polished = 25 * (self.keep * (1 + self.sharply) or self.seeds) * len(self.models)
        return max(1, _CACHED // (8 * num_classes * max(seeded, polished)))


def make_problem(
    reduction: Reduction, weight: Tensor, bias: Tensor | None, floor: float, sum_error: float
) -> Problem:
    """The reduced gradients with the noise of their numbers.

    Args:
        reduction: of M gradients.
        weight: (K, D).
        bias: (K,) or None.
        floor: the granted e, else 0.
        sum_error: standard error of the label's and the softmax's sum.
    """
    s, a = reduction.s[:, None], reduction.a[:, None]
    width = weight.shape[1]
    rounding, noise = reduction.relative_noise[:, None, None], reduction.additive_noise[:, None, None]
    # 1ᵀu = 0. Exact gradients keep their tiny entries; under noise the mean is noise alone.
    s = s - (noise > 0) * s.mean(dim=-1, keepdim=True)
    b = torch.zeros_like(s) if bias is None else bias.double().expand_as(s)
    summation = 1 + width**0.5 / 8  # what a dot product of D terms of one sign adds to the rounding
    rounding2, noise2 = rounding.square(), noise.square()
    signal2 = s.square().sum(dim=-1, keepdim=True).clamp_min(1e-300)
    measured = reduction.a_variance.amax(dim=1, keepdim=True) > 0
    underflow = torch.finfo(weight.dtype).tiny if weight.dtype != torch.float64 else 1e-130
    s_noise2 = reduction.s_variance[:, None] + noise2 + underflow**2
    a_noise2 = reduction.a_variance[:, None] + mean_row_square(weight) * (
        noise2 / signal2 + 4 / width * rounding2
    )
    s_variance = torch.addcmul(s_noise2, s.square(), rounding2, value=summation**2)
    # |t| = ‖s‖₁/‖p - y‖₁ ≥ ‖s‖₁/2
    least = 0.49 * s.abs().sum(dim=-1) - 3 * s_variance.sum(dim=-1).sqrt()
    return Problem(
        s=s,
        a=a,
        b=b,
        s_variance=s_variance,
        a_variance=torch.addcmul(a_noise2, a.square(), rounding2),
        logit_variance=rounding2 * (4 + b.square()),
        least=least.clamp_min(1e-150),
        slack=torch.where(measured, _MISSING_SLACK, _ROUNDING_SLACK).to(s),
        floor=floor,
        sum_error=sum_error,
    )


def mean_row_square(weight: Tensor) -> Tensor:
    """‖W_i‖² of each row (K,), in float64: of wide ones from some columns, as it scales rounding alone."""
    width = weight.shape[1]
    if width > 2 * _NORM_COLUMNS:
        start = torch.arange(
            0, width - _NORM_BLOCK, width * _NORM_BLOCK // _NORM_COLUMNS, device=weight.device
        )
        block = torch.arange(_NORM_BLOCK, device=weight.device)
        weight = weight.index_select(1, (start[:, None] + block).flatten())
    square: Tensor = torch.linalg.vector_norm(weight, dim=1).double().square()
    return square * (width / weight.shape[1])


_SOURCES: dict[str, tuple[int, Callable[[Problem], Tensor]]] = {  # at most so many seeds, and what makes them
    "two slopes": (2, lambda problem: seeds.densest(seeds.slopes(problem), 2)),
    "two triples": (2, lambda problem: seeds.densest(seeds.triples(problem), 2)),
    "slopes": (6, lambda problem: seeds.densest(seeds.slopes(problem), 6)),
    "all slopes": (105, seeds.slopes),
    "triples": (10, lambda problem: seeds.densest(seeds.triples(problem), 10)),
    "all triples": (84, seeds.triples),
    "flat": (1, seeds.flat),
    "grid": (24, lambda problem: seeds.grid(problem, 12, 30.0)),
    "fine grid": (320, lambda problem: seeds.grid(problem, 160, 120.0)),
}


def gather_seeds(problem: Problem, sources: tuple[str, ...]) -> Tensor:
    """Seeds of all named sources, those that break |t| ≥ ‖s‖₁/2 replaced by the bound: (M, S)."""
    t = torch.cat([_SOURCES[source][1](problem) for source in sources], dim=1)
    size = t.abs()
    return torch.where((size > 0.9 * problem.least) & (size < torch.inf), t, problem.least)


def stage_seeds(problem: Problem, stage: Stage) -> Tensor:
    """The seeds of each model of a stage: (M, models, seeds)."""
    t = gather_seeds(problem, stage.sources)
    if stage.is_first_try:
        return t[:, None].expand(-1, len(stage.models), -1)
    coarse = torch.full_like(problem.slack, _SEED_TOLERANCE)
    chosen = choose_seeds(problem, t, stage.models, stage.keep, coarse)
    if stage.sharply:
        # Where every class but one is saturated, that one tells t by digits that the coarse view can't see.
        rounding = 4 * problem.logit_variance.amin(dim=-1).sqrt()
        chosen = torch.cat([chosen, choose_seeds(problem, t, stage.models, stage.keep, rounding)], dim=2)
    return chosen


def choose_seeds(problem: Problem, t: Tensor, models: list[Model], keep: int, tolerance: Tensor) -> Tensor:
    """The `keep` seeds of the least rough misfit for each model: (M, models, keep).

    Args:
        problem: the reduced gradients.
        t: (M, S) seeds.
        models: to choose for.
        keep: seeds of each model.
        tolerance: (M, 1) relative, of the misfit.
    """
    t = t.sort(dim=1).values
    misfit = curve.rough_misfit(problem, t, as_frame(models, problem), tolerance).nan_to_num(torch.inf)
    # Neighbours share a basin: a seed that both of its neighbours beat or equal comes last.
    before = torch.nn.functional.pad(misfit[..., :-1], (1, 0), value=torch.inf)
    after = torch.nn.functional.pad(misfit[..., 1:], (0, 1), value=torch.inf)
    basin = torch.where((misfit <= before) & (misfit < after), misfit, misfit * 1e3 + 1e3)
    index = basin.topk(min(keep, t.shape[1]), dim=2, largest=False).indices  # (M, models, keep)
    return t[:, None].expand_as(misfit).gather(2, index)


def start(problem: Problem, t: Tensor, models: list[Model]) -> tuple[Polish, Frame]:
    """The candidates before the polish, from the seeds of each model: t (M, models, seeds)."""
    frame = as_frame([model for model in models for _ in range(t.shape[2])], problem)
    return curve.start_polish(problem, t.flatten(1), frame), frame


def polish(problem: Problem, state: Polish, frame: Frame, steps: int, together: int) -> Polish:
    """Gauss-Newton from all candidates at once; `together`: see `settled`."""
    earlier, previous = torch.full_like(state.chi2, torch.inf), state.chi2
    for _ in range(steps - 1):
        state = curve.polish_step(problem, state, frame)
        if bool(settled(state, earlier, problem.s.shape[-1], together).all()):
            break
        earlier, previous = previous, state.chi2
    return state


def settled(state: Polish, earlier: Tensor, num_classes: int, together: int) -> Tensor:
    """Where further steps change no verdict: (M,).

    Either some candidate fits and has no more to gain, and all simpler ones (they come first) have stopped
    improving, with those beside it, which may give another answer; or all have stopped.

    Args:
        state: of the polish.
        earlier: χ² (M, C) two steps ago.
        num_classes: K.
        together: so many candidates in a row may give other answers than each other.
    """
    chi2 = state.chi2
    fits = (chi2 < num_classes) & (state.gain < _NOTHING_TO_GAIN)
    still = (state.gain < 0.1 * chi2) | (chi2 > 0.9 * earlier) | fits
    calm = still.reshape(len(still), -1, together).all(dim=2).cumprod(dim=1) > 0
    fits = fits.reshape(len(fits), -1, together).any(dim=2)
    return (calm & fits).any(dim=1) | (earlier - chi2 <= 1e-6 * chi2).all(dim=1)


def stages(models: list[Model], has_bias: bool) -> list[Stage]:
    """The cascade, cheapest first; each stage runs on what the ones before left undecided."""
    plain = [m for m in models if m.spikes <= 2 and not m.free_floor]
    floored = [m for m in models if m.spikes <= 2 and m.free_floor]
    few = [m for m in models if m.freed <= 3]
    grid = "fine grid" if has_bias else "grid"
    made = [
        Stage(plain, ("two slopes", "flat"), 0, 8),
        Stage(floored if not has_bias else [], ("two triples",), 0, 8),
        Stage(few, ("slopes", "flat", "triples", grid), 4, 14),
        Stage(models, ("all slopes", "flat", "all triples", "fine grid"), 6, 40, sharply=True),
    ]
    return [stage for stage in made if stage.models]


def solve(problem: Problem, models: list[Model], granted: Granted, has_bias: bool) -> Verdict:
    """Run the cascade on M reduced gradients that are known to their rounding."""
    verdict = no_verdict(problem, Reason.NO_FIT)
    for stage in stages(models, has_bias):
        verdict = run_stage(problem, stage, granted, verdict)
        if bool(verdict.decided.all()):
            return verdict
    scaled = [m._replace(free_scale=True) for m in models if m.freed <= 3]
    scaled = [m for m in scaled if m.degrees(problem.s.shape[-1]) >= 2]
    # A mix of many classes can imitate a scaled gradient of few: what frees fewer numbers is believed.
    freed = verdict.spikes + verdict.has_floor.long()
    doubtful = ((verdict.reason == Reason.NO_FIT) | (freed > 4)).nonzero()[:, 0]
    if len(doubtful) > 0 and scaled:
        again = solve_scaled(problem.rows(doubtful), scaled, granted)
        old = Verdict(*(field[doubtful] for field in verdict))
        verdict = merge(verdict, doubtful, replace(old, again.reason == Reason.SCALED, again))
    if problem.s.shape[-1] <= 4:
        too_few = torch.full_like(verdict.reason, Reason.TOO_FEW)
        verdict = verdict._replace(
            reason=torch.where(verdict.reason == Reason.NO_FIT, too_few, verdict.reason)
        )
    return verdict


def solve_noisy(
    problem: Problem,
    reduction: Reduction,
    weight_gradient: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    models: list[Model],
    granted: Granted,
) -> tuple[Verdict, Tensor]:
    """The joint likelihood from the best candidates that the curve alone gives: verdict, and x (M, D)."""
    stage = stages(models, bias is not None)[-1]._replace(sharply=False)
    t = stage_seeds(problem, stage)
    state, frame = start(problem, t, stage.models)
    found = polish(problem, state, frame, stage.steps, t.shape[2])
    index = promising(found, frame, problem.s.shape[-1], _JOINT_CANDIDATES)
    spikes, free_floor = frame.spikes[index], frame.free_floor[index]
    x = found.t.gather(1, index)[..., None] * reduction.direction.double()[:, None]
    held = torch.full_like(problem.slack[:, 0], problem.floor)
    data = joint.gather_noisy(weight_gradient, weight, bias, held)
    noise = reduction.additive_noise
    at = joint.fit_jointly(data, data.inwards(x), spikes, free_floor, noise, _JOINT_STEPS)
    verdict, best = judge_noisy(data, at, spikes, free_floor, granted, noise)
    return verdict, data.outwards(at.x)[torch.arange(len(best), device=best.device), best]


def promising(found: Polish, frame: Frame, num_classes: int, keep: int) -> Tensor:
    """The candidates of the least χ² plus penalty, none twice: (M, keep)."""
    cost = found.chi2 + penalty(frame.spikes + frame.free_floor, num_classes)
    near = (found.t[:, :, None] / found.t[:, None] - 1).abs() < 1e-2  # (M, C, C)
    alike = (frame.spikes[:, None] == frame.spikes) & (frame.free_floor[:, None] == frame.free_floor)
    earlier = torch.ones_like(alike).tril(-1)
    again = (near & (alike & earlier)).any(dim=2)
    cost = torch.where(again, cost + 1e12, cost).nan_to_num(1e30)
    return cost.topk(min(keep, cost.shape[1]), dim=1, largest=False).indices


def unscaled(problem: Problem, keep: int) -> tuple[Problem, Tensor]:
    """Gradients of an unknown scale, brought to their own: straight-line.

    Neither slopes nor triples make use of the scale c; given t, it is how s rises with p: s = c t (p - e).

    Returns:
        `2·keep` problems for each of the M, and their t: (M · 2·keep, 1).
    """
    t = [seeds.densest(seeds.slopes(problem), keep), seeds.densest(seeds.triples(problem), keep)]
    t_both = torch.cat([x[:, :keep] for x in t], dim=1)
    p = curve.probabilities(problem, t_both)
    tries, num_classes = t_both.shape[1], p.shape[2]
    ordered = p.sort(dim=-1)
    s = problem.s.expand_as(p).gather(-1, ordered.indices)
    half = num_classes // 2
    rise = (s[..., half : 2 * half] - s[..., :half]) / (
        ordered.values[..., half : 2 * half] - ordered.values[..., :half]
    )
    scale = (rise.median(dim=-1).values / t_both).reshape(-1, 1, 1)
    usable = torch.isfinite(scale) & (scale > 0)
    scale = torch.where(usable, scale, 1.0)
    each = torch.arange(len(t_both), device=t_both.device).repeat_interleave(tries)
    many = problem.rows(each)
    many = many._replace(s=many.s / scale, s_variance=many.s_variance / scale.square())
    return many, torch.where(usable[:, 0], t_both.reshape(-1, 1), many.least)


def solve_scaled(problem: Problem, models: list[Model], granted: Granted) -> Verdict:
    """The best fit of each gradient with its scale left free; its reason is Reason.SCALED where it holds."""
    many, t = unscaled(problem, keep=2)
    state, frame = start(many, t[..., None].expand(-1, len(models), -1), models)
    found = Candidates(polish(many, state, frame, steps=20, together=1).t, frame)
    now = judge(many, found, granted)
    loss = torch.where(now.reason == Reason.SCALED, now.loss, torch.inf).reshape(len(problem.s), -1)
    index = loss.argmin(dim=1) + torch.arange(len(loss), device=t.device) * loss.shape[1]
    return Verdict(*(field[index] for field in now))


class Search(NamedTuple):
    """Candidates of some examples, on their way to the bottom of χ²."""

    rows: Tensor  # (R,) which examples
    problem: Problem
    frame: Frame
    state: Polish

    def near_a_fit(self, most: float) -> Search:
        """Those examples alone that have a candidate of at most so much χ² a class."""
        near = (self.state.chi2.amin(dim=1) < most * self.problem.s.shape[-1]).nonzero()[:, 0]
        if len(near) == len(self.rows):
            return self
        return Search(self.rows[near], self.problem.rows(near), self.frame, self.state.rows(near))


def run_stage(problem: Problem, stage: Stage, granted: Granted, verdict: Verdict) -> Verdict:
    """The verdict, brought up to date for the examples that are not decided yet."""
    undecided = ~verdict.decided
    if (
        stage.is_first_try
    ):  # what fits a simple label, though not for sure, is left to stages that see them all
        undecided = undecided & (verdict.reason == Reason.NO_FIT)
    for rows in torch.split(undecided.nonzero()[:, 0], stage.examples_at_once(problem.s.shape[-1])):
        part = problem if len(rows) == len(problem.s) else problem.rows(rows)
        t = stage_seeds(part, stage)
        state, frame = start(part, t, stage.models)
        search = Search(rows, part, frame, state)
        if stage.is_first_try:
            search = search.near_a_fit(_HOPELESS)
        if len(search.rows) > 0:
            # Slopes and triples have one root: whatever another seed of theirs found, it is no other answer.
            together = 1 if stage.is_first_try else t.shape[2]
            state = polish(search.problem, search.state, search.frame, stage.steps, together)
            search = search._replace(state=state)
            if stage.is_first_try:
                search = search.near_a_fit(_MISFIT)
        if len(search.rows) > 0:
            now = judge(search.problem, Candidates(search.state.t, search.frame), granted)
            verdict = now if len(search.rows) == len(problem.s) else merge(verdict, search.rows, now)
    return verdict


def recover_exactly(
    weight_gradient: Tensor, weight: Tensor, bias: Tensor | None, noise_std: float | None, granted: Granted
) -> SoftLabelSolution:
    """Soft labels and features of M gradients (M, K, D); see `recover_soft_labels`."""
    # Copies of gradients are made only under noise, where the power iteration runs on the noisy ones.
    size = weight.numel() * weight.element_size()
    size = max(1, min(_MEMORY // size, max(_CACHED // size, 32)))
    chunks = torch.split(weight_gradient, size)
    return concatenate([_recover_chunk(chunk, weight, bias, noise_std, granted) for chunk in chunks])


def _recover_chunk(
    weight_gradient: Tensor, weight: Tensor, bias: Tensor | None, noise_std: float | None, granted: Granted
) -> SoftLabelSolution:
    num_classes = weight.shape[0]
    reduction = reduce(weight_gradient, weight, noise_std)
    floor = 0.0 if granted.epsilon is None else granted.epsilon / num_classes
    sum_error = max(4 * torch.finfo(torch.float32).eps, torch.finfo(weight.dtype).eps)
    problem = make_problem(reduction, weight, bias, floor, sum_error)
    nothing = reduction.largest <= 0
    models = granted.models(num_classes)
    if num_classes == 2 or not models:
        verdict = no_verdict(problem, Reason.TWO_CLASSES if num_classes == 2 else Reason.TOO_FEW)
        verdict = replace(verdict, nothing, no_verdict(problem, Reason.ZERO))
        return to_solution(verdict, reduction, weight.dtype)
    noisy = reduction.additive_noise > 0
    exact = ~(noisy | nothing)
    if bool(exact.all()):
        verdict = solve(problem, models, granted, bias is not None)
        return to_solution(verdict, reduction, weight.dtype)
    verdict = no_verdict(problem, Reason.ZERO)
    rows = exact.nonzero()[:, 0]
    if len(rows) > 0:
        verdict = merge(verdict, rows, solve(problem.rows(rows), models, granted, bias is not None))
    rows = (noisy & ~nothing).nonzero()[:, 0]
    for some in torch.split(rows, max(1, _MEMORY // (64 * _JOINT_CANDIDATES * weight.numel()))):
        if len(some) == 0:
            break
        part = Reduction(*(field[some] for field in reduction))
        now, x = solve_noisy(problem.rows(some), part, weight_gradient[some], weight, bias, models, granted)
        verdict = merge(verdict, some, now)
        reduction = point_along(reduction, some, x, weight_gradient[some])
    return to_solution(verdict, reduction, weight.dtype)
