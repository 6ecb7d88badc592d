"""What makes a matching objective small: Adam, Adam on signs, L-BFGS, for a stack of candidates at once.

Every variable has the candidates first, (R, …); each candidate goes its own way, keeps the best point that it
has met, and stops by itself: none waits for another, and one that meets NaN takes none with it. No rule knows
the truth. An iteration is one evaluation of the objective, whatever the method.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

MILESTONES = (3 / 8, 5 / 8, 7 / 8)
"""After these shares of all iterations a step is a tenth as long as before."""

MOMENTUM, SECOND_MOMENT = 0.9, 0.999
"""Adam's β₁ and β₂."""

ARMIJO, CURVATURE = 1e-4, 0.9
"""The weak Wolfe conditions: this share of the fall that the slope promises, at most this much slope left."""

TRIALS = 25
"""After so many rejected points on one line nothing lower is looked for there."""

Variables = tuple[Tensor, ...]
Schedule = Callable[[float], float]
"""The share of the iterations that are over -> the factor of a step."""


class Value(NamedTuple):
    """An objective at R points."""

    total: Tensor  # (R,)
    distance: Tensor  # (R,), the part of it that compares gradients
    slopes: Variables  # of the total


Function = Callable[[Variables], Value]
Watch = Callable[[int, list[float]], None]
"""Told the iteration and each candidate's lowest total so far."""


def constant(share: float) -> float:
    """No schedule."""
    return 1.0


def step_decay(share: float) -> float:
    """A tenth after each of `MILESTONES`."""
    return float(0.1 ** sum(share >= milestone for milestone in MILESTONES))


def cosine_decay(share: float) -> float:
    """Half a cosine, from 1 to 0."""
    return (1 + math.cos(math.pi * share)) / 2


class Moves(Protocol):
    """A method's state: told where the candidates are, it says where to look next."""

    def __call__(self, variables: Variables, value: Value, share: float) -> Variables:
        """The next points; `share` of the iterations are over."""
        ...

    backtracks: bool
    """Whether it comes back from points that are not finite."""

    def stuck(self) -> list[bool]:
        """For which candidates nothing lower will be found."""
        ...


class Method(Protocol):
    """A method's parameters."""

    def begin(self, variables: Variables) -> Moves:
        """A fresh state."""
        ...


@dataclass(frozen=True)
class Adam:
    """Kingma and Ba 2015, each entry on its own.

    Args:
        lr: the length of a step.
        schedule: its factor over time.
    """

    lr: float
    schedule: Schedule = constant

    def begin(self, variables: Variables) -> Moves:
        """Zero moments."""
        return _AdamMoves(self, variables)


class _AdamMoves:
    backtracks = False

    def __init__(self, method: Adam, variables: Variables) -> None:
        self._method, self._step = method, 0
        self._rows = len(variables[0])
        self._moments = [(torch.zeros_like(value), torch.zeros_like(value)) for value in variables]

    def __call__(self, variables: Variables, value: Value, share: float) -> Variables:
        self._step += 1
        length = self._method.lr * self._method.schedule(share) / (1 - MOMENTUM**self._step)
        unbias = 1 / (1 - SECOND_MOMENT**self._step)
        moved = []
        for variable, slope, (first, second) in zip(variables, value.slopes, self._moments, strict=True):
            first.mul_(MOMENTUM).add_(slope, alpha=1 - MOMENTUM)
            second.mul_(SECOND_MOMENT).addcmul_(slope, slope, value=1 - SECOND_MOMENT)
            moved.append(variable - length * first / ((second * unbias).sqrt() + 1e-8))
        return tuple(moved)

    def stuck(self) -> list[bool]:
        return [False] * self._rows


@dataclass(frozen=True)
class SignedAdam:
    """Adam on the signs of the slope, as in Geiping et al. 2020 (arXiv 2003.14053).

    Adam's second moment is then 1, which leaves the momentum of signs.

    Args:
        lr: the length of a step.
        schedule: its factor over time.
    """

    lr: float
    schedule: Schedule = step_decay

    def begin(self, variables: Variables) -> Moves:
        """Zero momentum."""
        return _SignedMoves(self, variables)


class _SignedMoves:
    backtracks = False

    def __init__(self, method: SignedAdam, variables: Variables) -> None:
        self._method, self._step = method, 0
        self._rows = len(variables[0])
        self._momenta = [torch.zeros_like(value) for value in variables]

    def __call__(self, variables: Variables, value: Value, share: float) -> Variables:
        self._step += 1
        length = self._method.lr * self._method.schedule(share) / (1 - MOMENTUM**self._step)
        for momentum, slope in zip(self._momenta, value.slopes, strict=True):
            momentum.mul_(MOMENTUM).add_(slope.sign(), alpha=1 - MOMENTUM)
        return tuple(
            torch.sub(variable, momentum, alpha=length)
            for variable, momentum in zip(variables, self._momenta, strict=True)
        )

    def stuck(self) -> list[bool]:
        return [False] * self._rows


@dataclass(frozen=True)
class LBFGS:
    """Limited-memory BFGS, each candidate with a memory and a line of its own.

    Args:
        memory: how many pairs of steps and changes of slope are kept.
        line_search: `wolfe`: the weak Wolfe conditions, by bisection, after a first step of `first_step`
            (root mean square); `none`: every step is taken at length `lr` (the first at most 1/‖slope‖₁ of
            it), as torch's and DLG's code do.
        lr: the length of a step without a line search.
        first_step: see above.
        longest: a step without a line search, and the first one on a line, is no longer than this (root mean
            square): where the objective jumps, as on ReLU nets, the memory's step can be of any length.
    """

    memory: int = 20
    line_search: Literal["wolfe", "none"] = "wolfe"
    lr: float = 1.0
    first_step: float = 0.1
    longest: float = math.inf

    def begin(self, variables: Variables) -> Moves:
        """An empty memory."""
        return _LBFGSMoves(self, variables)


class _LBFGSMoves:
    """d = entries of a candidate's variables in a row, m = `memory`."""

    def __init__(self, method: LBFGS, variables: Variables) -> None:
        self._method, self.backtracks = method, method.line_search == "wolfe"
        flat = _flat(variables)
        rows = flat.shape[:1]
        self._steps = flat.new_zeros((*rows, method.memory, flat.shape[1]))  # s, the oldest first
        self._changes = torch.zeros_like(self._steps)  # y
        self._point, self._slope, self._direction = flat, torch.zeros_like(flat), torch.zeros_like(flat)
        self._total = torch.full_like(flat[:, 0], torch.inf)  # at the point
        self._length, self._low = torch.zeros_like(self._total), torch.zeros_like(self._total)
        self._high = torch.full_like(self._total, torch.inf)
        self._rejected = torch.zeros_like(self._total)
        self._started = torch.zeros_like(self._total, dtype=torch.bool)

    def __call__(self, variables: Variables, value: Value, share: float) -> Variables:
        tried, slope = _flat(variables), _flat(value.slopes)
        promised = (self._slope * self._direction).sum(dim=1)
        left = (slope * self._direction).sum(dim=1)
        accepted, long = self._judge(value.total, promised, left)
        self._bisect(accepted, long, value.total, promised)

        row = accepted[:, None]
        self._remember(accepted & self._started, tried - self._point, slope - self._slope)
        self._point = torch.where(row, tried, self._point)
        self._slope = torch.where(row, slope, self._slope)
        self._total = torch.where(accepted, value.total, self._total)
        fresh = ~self._started
        self._started = self._started | accepted
        self._direction = torch.where(row, -self._product(self._slope), self._direction)
        first = self._first_length()
        longest = self._method.longest / self._direction.square().mean(dim=1).sqrt()
        length = torch.fmin(torch.where(fresh, first, self._method.lr), longest)
        self._length = torch.where(accepted, length, self._length)
        return _unflat(self._point + self._length[:, None] * self._direction, variables)

    def _judge(self, total: Tensor, promised: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        """Which points are taken, and which are too far along their line."""
        if self._method.line_search == "none":
            return torch.ones_like(self._started), torch.zeros_like(self._started)
        long = ~(total <= self._total + ARMIJO * self._length * promised)  # or not finite
        short = left < CURVATURE * promised
        return ~self._started | ~(long | short), self._started & long

    def _bisect(self, accepted: Tensor, long: Tensor, total: Tensor, promised: Tensor) -> None:
        """The next length on the line of those that stay on it."""
        self._rejected = torch.where(accepted, 0, self._rejected + 1)
        self._high = torch.where(accepted, torch.inf, torch.where(long, self._length, self._high))
        self._low = torch.where(accepted, 0, torch.where(long, self._low, self._length))
        # Where only one point is known to be too far: the minimum of the parabola through both ends.
        above = total - self._total - self._length * promised
        parabola = (-promised * self._length.square() / (2 * above)).clamp(
            0.1 * self._length, 0.5 * self._length
        )
        middle = torch.where((self._low == 0) & parabola.isfinite(), parabola, (self._low + self._high) / 2)
        self._length = torch.where(self._high.isinf(), 2 * self._low, middle)

    def _first_length(self) -> Tensor:
        if self._method.line_search == "none":
            return (1 / self._slope.abs().sum(dim=1)).clamp(max=1) * self._method.lr
        return self._method.first_step / self._slope.square().mean(dim=1).sqrt()

    def _remember(self, rows: Tensor, step: Tensor, change: Tensor) -> None:
        """Keeps pairs of positive curvature."""
        curved = rows & ((step * change).sum(dim=1) > 1e-10 * change.square().sum(dim=1))
        for kept, new in ((self._steps, step), (self._changes, change)):
            kept.copy_(
                torch.where(curved[:, None, None], torch.cat([kept[:, 1:], new[:, None]], dim=1), kept)
            )

    def _product(self, slope: Tensor) -> Tensor:
        """The approximate inverse Hessian times the slope, (R, d): Byrd, Nocedal, Schnabel 1994, (3.13)."""
        s, y, vector = self._steps, self._changes, slope[:, :, None]
        inner = s @ y.mT  # (R, m, m)
        diagonal = inner.diagonal(dim1=1, dim2=2)
        empty = diagonal == 0
        newest = y[:, -1].square().sum(dim=1)
        scale = torch.where(newest > 0, diagonal[:, -1] / newest, 1)[:, None, None]
        upper = inner.triu() + torch.diag_embed(empty.to(inner))
        sv, yv = s @ vector, y @ vector  # (R, m, 1)
        w = torch.linalg.solve_triangular(upper, sv, upper=True)
        middle = diagonal[:, :, None] * w + scale * (y @ (y.mT @ w) - yv)
        top = torch.linalg.solve_triangular(upper.mT, middle, upper=False)
        product: Tensor = scale * vector + s.mT @ top - scale * (y.mT @ w)
        return product[:, :, 0]

    def stuck(self) -> list[bool]:
        stuck: list[bool] = (
            (self._rejected >= TRIALS) | ((self._slope == 0).all(dim=1) & self._started)
        ).tolist()
        return stuck


def _flat(variables: Variables) -> Tensor:
    return torch.cat([value.flatten(1) for value in variables], dim=1)


def _unflat(flat: Tensor, like: Variables) -> Variables:
    parts = torch.split(flat, [value[0].numel() for value in like], dim=1)
    return tuple(part.view_as(value) for part, value in zip(parts, like, strict=True))


End = Literal["step limit", "matched", "no lower point", "not finite"]


@dataclass(frozen=True, eq=False)
class Descent:
    """How a descent ended, for each of R candidates.

    Args:
        variables: those at which each candidate's objective was lowest; its start if it was finite nowhere.
        totals: the objective at exactly these variables; infinite where it was finite nowhere.
        distances: the part of it that compares gradients.
        ends: why each stopped.
        iterations: how many were taken.
    """

    variables: Variables
    totals: list[float]
    distances: list[float]
    ends: list[End]
    iterations: int


def descend(
    function: Function,
    start: Variables,
    method: Method,
    iterations: int,
    *,
    boxed: bool,
    enough: float = 0.0,
    watch: Watch | None = None,
) -> Descent:
    """Follows a method from a start, and keeps the best.

    Args:
        function: the objective.
        start: images first, (R, …).
        method: how to go.
        iterations: at most so many steps.
        boxed: whether the first variable is clipped to [0, 1] after every step.
        enough: a candidate stops once its gradient is as close as this share of the distance at its start.
        watch: is told of every iteration.
    """
    variables = tuple(value.detach().clone() for value in start)
    moves, best, rows = method.begin(variables), variables, len(start[0])
    totals, distances = [math.inf] * rows, [math.inf] * rows
    ends: list[End | None] = [None] * rows
    for iteration in range(iterations + 1):
        value = function(variables)
        total, distance = torch.stack([value.total, value.distance]).tolist()
        if iteration == 0:
            near = [enough * value for value in distance]
        # None where it isn't finite, and none of a candidate that has stopped.
        lower = [new < old and end is None for new, old, end in zip(total, totals, ends, strict=True)]
        for row in (row for row, is_lower in enumerate(lower) if is_lower):
            totals[row], distances[row] = total[row], distance[row]
        best = _chosen(lower, variables, best)
        if watch is not None:
            watch(iteration, totals)
        stuck = moves.stuck()
        for row in (row for row, end in enumerate(ends) if end is None):
            if not math.isfinite(total[row]) and (iteration == 0 or not moves.backtracks):
                ends[row] = "not finite"
            elif distance[row] < near[row]:
                ends[row] = "matched"
            elif stuck[row]:
                ends[row] = "no lower point"
        going = [end is None for end in ends]
        if iteration == iterations or not any(going):  # the last step's result is judged, too
            break
        variables = _chosen(going, moves(variables, value, iteration / iterations), best)
        if boxed:
            variables = (variables[0].clamp(0, 1), *variables[1:])
    return Descent(best, totals, distances, [end or "step limit" for end in ends], iteration)


def _chosen(rows: list[bool], new: Variables, old: Variables) -> Variables:
    """The new variables of these candidates, the old ones of the others."""
    if not any(rows):
        return old
    if all(rows):
        return new
    chosen = torch.tensor(rows, device=new[0].device)
    return tuple(
        torch.where(chosen.view(-1, *[1] * (one.ndim - 1)), one, other)
        for one, other in zip(new, old, strict=True)
    )
