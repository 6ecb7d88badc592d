"""Batches of dense features: one example at a time, by Levenberg-Marquardt over its n coordinates.

In the basis of ∇W's right singular vectors example b is x_b = m_bᵀ Vᵀ, and its u_b = softmax(W x_b) - y_b
lies in the span of the left ones. With the classes on which y_b has mass beside one shared value, y_b is
linear in a few numbers; projected out together with the span, they leave

    Q softmax(W V m) = 0   and   mᵀ Σ⁻¹ c = n   for   u = U_s c,

K - n - (numbers of the label) + 1 equations in n unknowns; a bias gradient adds one, as a feature that is one
for every example. What is found is taken off ∇W, whose rank falls by one, and the rest is searched again.

Examples a ≠ b of one batch satisfy m_aᵀ Σ⁻¹ c_b = 0 as well. A direction that zeros told leaves one unknown,
the length, and each other known direction takes one off the span of u_b. Where equations and unknowns are as
many, false roots appear beside the true ones, which are the ones that agree with each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attacks.solvers.batch_zeros import Factors

_MEMORY = 2**24  # numbers in a work array
_STARTS = 768
_ROUNDS = ((8, 0.35), (12, 0.35), (30, 1.0))  # iterations, and the share of starts that goes on
_ROUNDS_ALONG = ((3, 0.2), (6, 0.3), (20, 1.0))  # of one unknown
_CLASSES = 128
_PAIRED = 24
_DAMPING = (1e-14, 1e8)
_ROOT_CHI2 = 100.0
_UNIT = 1e-3  # |mᵀ Σ⁻¹ c / n - 1| of a root
_FOUND_BEFORE = 1e-10  # relative error that earlier finds leave in the rest; the common fit takes it out
_SURE = 1e3  # how far u stands out of its noise: at u = 0 all equations hold
_SAME = 1e-4
_AGREE = 1e-4  # |m_aᵀ Σ⁻¹ c_b| / n of two examples of one batch
_LENGTHS = (0.1, 0.4, 1.0, 2.5, 8.0)  # starts along a known direction, over the length at small logits


class Head(NamedTuple):
    """What is public of the last layer, and the shape of the problem; float64."""

    weight: Tensor  # (K, D)
    bias: Tensor  # (K,) zeros where there is none
    has_constant: bool  # the last feature is one for every example: the bias gradient is its column
    nonnegative: bool  # X >= 0
    batch_size: int


class Hypothesis(NamedTuple):
    """The label of one example: free on some classes, one shared value (zero unless `floor`) elsewhere."""

    spikes: tuple[int, ...]
    floor: bool

    @property
    def numbers(self) -> int:
        """How many numbers it leaves free."""
        return len(self.spikes) + self.floor


class Example(NamedTuple):
    """One example, in the basis of the batch's right singular vectors."""

    coordinates: Tensor  # (n,) m
    u: Tensor  # (K,) p - y


class Equations(NamedTuple):
    """One linear system a start: R starts over the r examples that are left."""

    span: Tensor  # (H, K, w + numbers) orthonormal: the left vectors, or w of them, and the label's classes
    into_left: Tensor  # (H, r, K) c = into_left p
    dual: Tensor  # (H, r) Σ⁻¹c at x = 0, were the label's floor zero
    which: Tensor  # (R,) the hypothesis of each start
    frame: Tensor  # (R, r, q) orthonormal: m = frame z

    def kept(self, keep: Tensor) -> Equations:
        """Those of some starts."""
        return self._replace(which=self.which[keep], frame=self.frame[keep])


def leverage(factors: Factors) -> Tensor:
    """How much of each class lies in the span of the u's, (K,): near one for a class that one label holds."""
    return factors.left.square().sum(dim=1)


def hypotheses(factors: Factors, spikes: int, floor: bool) -> list[Hypothesis]:
    """Labels with so many free classes, the likely classes first."""
    order = leverage(factors).argsort(descending=True, stable=True).tolist()
    if spikes == 1:
        return [Hypothesis((c,), floor) for c in order[:_CLASSES]]
    most = max(2 * len(factors.values) + 2, 12)
    return [Hypothesis(pair, floor) for pair in combinations(order[: min(_PAIRED, most)], spikes)]


def degrees(head: Head, hypothesis: Hypothesis, span: int, unknowns: int) -> int:
    """Equations less unknowns, u in a span of so many dimensions."""
    return len(head.bias) - span - hypothesis.numbers + 1 + head.has_constant - unknowns


def equations(
    factors: Factors, head: Head, tried: list[Hypothesis], inside: Tensor, starts: int
) -> Equations:
    """The systems of all hypotheses, `starts` starts each; c lies inside of (r, w) orthonormal."""
    num_classes, left = factors.left.shape
    within = inside.shape[1]
    own = (factors.left @ inside).expand(len(tried), -1, -1)
    make: dict[str, Any] = {"dtype": factors.left.dtype, "device": factors.left.device}
    classes = torch.tensor([h.spikes for h in tried], device=factors.left.device)  # (H, k)
    label = torch.nn.functional.one_hot(classes, num_classes).to(factors.left.dtype).transpose(1, 2)
    columns = [own, label]
    if tried[0].floor:
        columns.append(torch.ones(len(tried), num_classes, 1, **make))
    span, triangle = torch.linalg.qr(torch.cat(columns, dim=2))
    # A class that lies in the span leaves nothing to tell its mass by: the pseudo-inverse stays finite.
    inverse = torch.linalg.pinv(triangle, rtol=1e-12)
    into_left = inside @ (inverse @ span.transpose(1, 2))[:, :within]
    some = within + label.shape[2]  # the floor's column is the last
    inverse = torch.linalg.pinv(triangle[:, :some, :some], rtol=1e-12)
    flat = span[..., :some].transpose(1, 2) @ torch.softmax(head.bias, dim=0)
    dual = (inverse @ flat[..., None])[:, :within, 0] @ inside.T / factors.values
    which = torch.arange(len(tried), device=factors.left.device).repeat_interleave(starts)
    return Equations(span, into_left, dual, which, torch.eye(left, **make).expand(len(which), -1, -1))


def draw_starts(
    factors: Factors,
    head: Head,
    system: Equations,
    tried: list[Hypothesis],
    rng: torch.Generator,
) -> Tensor:
    """Starts (R, r): what a class's row holds beyond the others, random directions, and mixtures."""
    count, left = len(system.which), len(factors.values)
    rows = factors.left * factors.values
    beyond = rows.median(dim=0).values - rows  # (K, r): an untrained net's p is nearly the same everywhere
    classes = torch.tensor([h.spikes for h in tried], device=rows.device)[system.which]  # (R, k)
    draw: dict[str, Any] = {"generator": rng, "dtype": torch.float64, "device": "cpu"}
    shares = torch.rand(count, classes.shape[1], **draw).to(rows.device)
    own = (shares[..., None] * beyond[classes]).sum(dim=1)
    own = own / torch.linalg.vector_norm(own, dim=1, keepdim=True).clamp_min(1e-300)
    stray = torch.randn(count, left, **draw).to(rows.device)
    stray = stray / torch.linalg.vector_norm(stray, dim=1, keepdim=True)
    level = torch.tensor([0.0, 0.1, 0.4, 1.0, 3.0, 100.0], dtype=rows.dtype, device=rows.device)
    level = level[torch.arange(count, device=rows.device) % len(level)]
    way = own + level[:, None] * stray
    if head.nonnegative:
        way = way * torch.where((way @ factors.right).sum(dim=1, keepdim=True) < 0, -1.0, 1.0)
    way = way / torch.linalg.vector_norm(way, dim=1, keepdim=True)
    spread = torch.exp(torch.rand(count, **draw).to(rows.device) - 0.5)
    found: Tensor = way * (typical_length(head, system, way) * spread)[:, None]
    return found


def typical_length(head: Head, system: Equations, way: Tensor) -> Tensor:
    """How far along (R, r) mᵀ Σ⁻¹ c = n, were p what it is at x = 0: (R,)."""
    dual = system.dual[system.which]
    along = (way * dual).sum(dim=1)
    shortest = 0.05 * dual.square().sum(dim=1).sqrt()
    return head.batch_size / torch.maximum(along.abs(), shortest)


def minimise(
    factors: Factors, head: Head, system: Equations, z: Tensor, iterations: int
) -> tuple[Tensor, Tensor]:
    """Levenberg-Marquardt from all starts at once: z (R, q) and the sum of squares (R,)."""
    frame = system.frame
    logits_of = head.weight @ factors.right.T  # (K, r)
    ways = logits_of @ frame  # (R, K, q)
    span, into_left = system.span[system.which], system.into_left[system.which]
    constant = factors.right[:, -1]

    def residuals(z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        m = (frame @ z[..., None])[..., 0]
        p = torch.softmax(m @ logits_of.T + head.bias, dim=1)
        off = p - (span @ (span.transpose(1, 2) @ p[..., None]))[..., 0]
        c = (into_left @ p[..., None])[..., 0]
        rest = [((m / factors.values) * c).sum(dim=1, keepdim=True) / head.batch_size - 1]
        if head.has_constant:
            rest.append((m @ constant)[:, None] - 1)
        # m runs off to a saturated softmax, where p - y vanishes with all equations, unless that costs.
        weight = torch.sqrt(1 + m.square().sum(dim=1, keepdim=True) / length2)
        return m, p, c, weight, torch.cat([weight * off, *rest], dim=1)

    length2 = z.square().sum(dim=1, keepdim=True).clamp_min(1e-300)
    m, p, c, weight, r = residuals(z)
    cost, damping = r.square().sum(dim=1), torch.full_like(z[:, 0], 1e-2)
    for _ in range(iterations):
        slope = p[:, :, None] * (ways - p[:, None] @ ways)  # (R, K, q)
        slope_c = into_left @ slope
        rows = [weight[..., None] * (slope - span @ (span.transpose(1, 2) @ slope))]
        rows.append(
            ((c / factors.values)[:, None] @ frame + (m / factors.values)[:, None] @ slope_c)
            / head.batch_size
        )
        if head.has_constant:
            rows.append(constant @ frame[:, None])
        jacobian = torch.cat(rows, dim=1)
        normal = jacobian.transpose(1, 2) @ jacobian
        size = normal.diagonal(dim1=1, dim2=2)
        size = size + 1e-14 * size.amax(dim=1, keepdim=True) + 1e-300
        damped = normal + torch.diag_embed(damping[:, None] * size)
        down = (jacobian.transpose(1, 2) @ r[..., None])[..., 0]
        step, info = torch.linalg.solve_ex(damped, down)
        new_z = torch.where((info == 0)[:, None], z - step, z)
        new_m, new_p, new_c, new_weight, new_r = residuals(new_z)
        new_cost = new_r.square().sum(dim=1)
        better = new_cost < cost
        z, m, p, c, weight, r = (
            torch.where(better[:, None], new, old)
            for new, old in zip(
                (new_z, new_m, new_p, new_c, new_weight, new_r), (z, m, p, c, weight, r), strict=True
            )
        )
        cost = torch.where(better, new_cost, cost)
        damping = torch.where(better, damping * 0.2, damping * 5).clamp(*_DAMPING)
    return z, cost


def roots(factors: Factors, head: Head, system: Equations, m: Tensor) -> tuple[Tensor, Tensor]:
    """Which of m (R, r) solve their equations to the noise and are examples, (R,); and their u (R, K)."""
    p = torch.softmax(m @ (head.weight @ factors.right.T).T + head.bias, dim=1)
    c = (system.into_left[system.which] @ p[..., None])[..., 0]
    span = system.span[system.which]
    off = p - (span @ (span.transpose(1, 2) @ p[..., None]))[..., 0]
    u = c @ factors.left.T
    # u lies in the span up to ν‖Σ⁻¹c‖ an entry; p has its own rounding.
    spread = factors.noise * torch.linalg.vector_norm(c / factors.values, dim=1)
    spread = spread + _FOUND_BEFORE * torch.linalg.vector_norm(u, dim=1)
    chi2 = (off / spread[:, None]).square().sum(dim=1)
    unit = ((m / factors.values) * c).sum(dim=1) / head.batch_size - 1
    good = (chi2 < _ROOT_CHI2 * p.shape[1]) & (unit.abs() < _UNIT)
    good &= torch.linalg.vector_norm(u, dim=1) > _SURE * spread
    y = p - u
    slack = 1e-3 + 8 * spread
    good &= (y.amin(dim=1) > -slack) & (y.amax(dim=1) < 1 + slack)
    if head.nonnegative:
        x = m @ factors.right
        doubt = 8 * factors.noise * torch.linalg.vector_norm(m / factors.values, dim=1)
        good &= x.amin(dim=1) > -doubt - 1e-5 * x.amax(dim=1)
    return good, u


def find(
    factors: Factors, head: Head, tried: list[Hypothesis], rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Examples of the given labels: coordinates (F, r) and u (F, K), different from each other."""
    starts = max(6, _STARTS // len(tried))
    anywhere = torch.eye(len(factors.values), dtype=factors.left.dtype, device=factors.left.device)
    found = []
    for some in _portions(factors, tried, starts):
        system = equations(factors, head, some, anywhere, starts)
        found.append(_descend(factors, head, system, draw_starts(factors, head, system, some, rng), _ROUNDS))
    return _different(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def find_along(
    factors: Factors, head: Head, tried: list[Hypothesis], way: Tensor, others: Tensor
) -> tuple[Tensor, Tensor]:
    """The example of direction way (r,), beside those of other known directions (L, r): as `find`."""
    inside = orthogonal_to(factors, others)
    tried = [h for h in tried if degrees(head, h, inside.shape[1], 1) >= 1]
    if not tried:
        return factors.right[:0, : len(way)], factors.left.T[:0]
    lengths = way.new_tensor(_LENGTHS)
    found = []
    for some in _portions(factors, tried, len(lengths)):
        system = equations(factors, head, some, inside, len(lengths))
        system = system._replace(frame=way[None, :, None].expand(len(system.which), -1, -1))
        z = lengths.repeat(len(some)) * typical_length(head, system, system.frame[..., 0])
        found.append(_descend(factors, head, system, z[:, None], _ROUNDS_ALONG))
    return _different(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def orthogonal_to(factors: Factors, directions: Tensor) -> Tensor:
    """Where c of an example lies, (r, r - L), beside examples of known directions (L, r)."""
    rows = directions / factors.values
    rows = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    found: Tensor = torch.linalg.svd(rows, full_matrices=True).Vh[len(rows) :].T
    return found


def _portions(factors: Factors, tried: list[Hypothesis], starts: int) -> Iterator[list[Hypothesis]]:
    """As many hypotheses as fit into a work array."""
    num_classes, left = factors.left.shape
    wide = num_classes * (3 * left + tried[0].numbers)
    at_once = max(1, _MEMORY // (starts * wide))
    for first in range(0, len(tried), at_once):
        yield tried[first : first + at_once]


def _descend(
    factors: Factors, head: Head, system: Equations, z: Tensor, rounds: tuple[tuple[int, float], ...]
) -> tuple[Tensor, Tensor]:
    """The roots that the starts (R, q) lead to: (F, r) and u (F, K)."""
    for iterations, share in rounds:
        z, cost = minimise(factors, head, system, z, iterations)
        keep = cost.argsort(stable=True)[: max(32, int(share * len(cost)))]
        z, system = z[keep], system.kept(keep)
    m = (system.frame @ z[..., None])[..., 0]
    good, u = roots(factors, head, system, m)
    return m[good], u[good]


def agreeing(factors: Factors, m: Tensor, u: Tensor, batch_size: int) -> list[int]:
    """Which of the roots (F, r), u (F, K) agree with each other as examples of one batch; at least two."""
    if len(m) < 2:
        return []
    cross = ((m / factors.values) @ (u @ factors.left).T / batch_size).abs()
    off = torch.maximum(cross, cross.T)  # 1 on the diagonal, zero for two of one batch
    if not bool(off.amin() < _AGREE):
        return []
    first, second = divmod(int(off.argmin()), len(off))
    chosen = [first, second]
    for other in off[chosen].amax(dim=0).argsort(stable=True).tolist():
        if bool(off[chosen, other].amax() < _AGREE):
            chosen.append(other)
    return chosen


def _different(m: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    unit = m / torch.linalg.vector_norm(m, dim=1, keepdim=True).clamp_min(1e-300)
    near = torch.cdist(unit, unit, compute_mode="donot_use_mm_for_euclid_dist") < _SAME
    first = ~(near & torch.ones_like(near).tril(-1)).any(dim=1)
    return m[first], u[first]


def deflate(factors: Factors, examples: list[Example], batch_size: int) -> tuple[Factors, Tensor]:
    """What the found examples leave of ∇W, and its right basis in that of the whole: (r, n)."""
    n = len(factors.values)
    small = torch.diag(factors.values)
    for one in examples:
        small = small - torch.outer(factors.left.T @ one.u, one.coordinates) / batch_size
    left, values, right = torch.linalg.svd(small)
    r = n - len(examples)
    # What the found ones leave beyond that rank is their own error, and the noise of the rest.
    own_error = torch.linalg.vector_norm(values[r:]) / len(factors.left) ** 0.5
    rest = Factors(
        left=factors.left @ left[:, :r],
        values=values[:r].clamp_min(1e-300),
        right=right[:r] @ factors.right,
        noise=torch.maximum(factors.noise, own_error),
    )
    return rest, right[:r]


def search(
    factors: Factors,
    head: Head,
    spikes: tuple[int, ...],
    floors: tuple[bool, ...],
    directions: Tensor,
    rng: torch.Generator,
) -> list[Example]:
    """As many of the n examples as are found; the simplest labels first.

    Args:
        factors: of ∇W, with the bias gradient as its last column where there is one.
        head: of the same width.
        spikes: how many classes a label may hold.
        floors: whether its other classes may share a value that isn't zero.
        directions: (L, n) those that zeros told.
        rng: on the CPU.
    """
    found: list[Example] = []
    n = len(factors.values)
    kinds = sorted(((k, e) for k in spikes for e in floors), key=lambda kind: (sum(kind), kind[1]))
    for k, floor in kinds:
        rest, basis = deflate(factors, found, head.batch_size)
        if len(basis) == 0:
            break
        ways = directions @ basis.T
        ways = ways[torch.linalg.vector_norm(ways, dim=1) > 1 - _SAME]  # not of an example found before
        tried = hypotheses(rest, k, floor)
        for one, way in enumerate(ways):
            others = torch.cat([ways[:one], ways[one + 1 :]])
            found += _examples(*find_along(rest, head, tried, way, others), basis)[:1]
    progress = True
    while progress and len(found) < n:
        rest, basis = deflate(factors, found, head.batch_size)
        new = _search_one_by_one(rest, head, kinds, basis, rng) or _search_together(
            rest, head, kinds, basis, rng
        )
        progress = bool(new)
        found += new[: n - len(found)]
    return found


def _search_one_by_one(
    rest: Factors, head: Head, kinds: list[tuple[int, bool]], basis: Tensor, rng: torch.Generator
) -> list[Example]:
    """Examples that one example's equations determine, of the first kind that has any."""
    for k, floor in kinds:
        tried = [h for h in hypotheses(rest, k, floor) if degrees(head, h, len(basis), len(basis)) >= 1]
        if tried:
            new = _examples(*find(rest, head, tried, rng), basis)
            if new:
                return new
    return []


def _search_together(
    rest: Factors, head: Head, kinds: list[tuple[int, bool]], basis: Tensor, rng: torch.Generator
) -> list[Example]:
    """Examples whose equations alone leave false roots, told by their agreement."""
    pools = []
    for k, floor in kinds:
        tried = [h for h in hypotheses(rest, k, floor) if degrees(head, h, len(basis), len(basis)) == 0]
        if tried:
            pools.append(find(rest, head, tried, rng))
    if not pools:
        return []
    m, u = (torch.cat(parts) for parts in zip(*pools, strict=True))
    chosen = agreeing(rest, m, u, head.batch_size)
    return _examples(m[chosen], u[chosen], basis)


def _examples(coordinates: Tensor, u: Tensor, basis: Tensor) -> list[Example]:
    return [Example(m @ basis, one) for m, one in zip(coordinates, u, strict=True)]
