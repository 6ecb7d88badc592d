"""The examples of a batch from one ReLU layer's gradient, by the units at which each of them is dead.

A layer z = W x + b before a ReLU leaves ∇W = Δᵀ X for n examples, with Δ (n, m) the derivatives by z: rank n,
so that its singular vectors leave an n × n matrix open. But Δ is zero where a unit is dead for an example,
about half of the time: each row of Δ is a sparsest vector in the span of the left singular vectors (Dimitrov
et al. 2024, SPEAR). Where SPEAR draws n - 1 dead units at a time, exponentially many draws, here sparse
vectors are walked to from random starts by reweighted least squares, many as one stack, as in dictionary
learning (Bakarsky et al. 2025, SPEAR++).

∇b = Σ_i Δ_i gives each direction its length. Everything in float64. n = batch size, m = units of the layer,
D = width of its input.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.solvers.batch_zeros import Factors, refine

_STEPS = 40
_APART = 6
"""For so many steps walks keep off the directions that are known."""
_SUMMING = 24
"""For so many steps half of the walks make the sum of sizes small."""
_NARROWING = 0.6
_LEVERAGE = 0.999
"""Of a zero without which the others would not fix a direction: that is how mixtures of two examples look."""
_INDEPENDENT = 1e-4
_REFINED_AT_ONCE = 64


@dataclass(frozen=True, eq=False)
class BatchInputs:
    """The inputs of a layer, in no particular order.

    Args:
        inputs: (n, D); None where fewer than n directions were found.
        found: how many directions were found.
        consistency: the share of units and examples for which a derivative of zero and a dead unit go
            together; 1 for the true inputs.
    """

    inputs: Tensor | None
    found: int
    consistency: float


def factorise(gradient: Tensor, count: int) -> Factors | None:
    """The left side's directions of ∇W (m, D) for `count` examples; None where its rank is lower.

    `right` holds the left singular vectors, (n, m): it is there that zeros are sought. The noise is what the
    other singular values leave, or rounding.
    """
    left, values, right = torch.linalg.svd(gradient.double(), full_matrices=False)
    rounding = torch.finfo(gradient.dtype).eps
    rest = values[count:]
    noise = rest.square().sum().sqrt() / max(1.0, float(len(rest) * max(gradient.shape)) ** 0.5)
    noise = noise.clamp_min(0.01 * rounding * float(values[0]) / max(gradient.shape) ** 0.5)
    if len(values) < count or bool(values[count - 1] <= 10 * rounding * values[0]):
        return None
    return Factors(right[:count].T, values[:count], left[:, :count].T, noise)


def walk(columns: Tensor, starts: Tensor, known: Tensor, rng: torch.Generator) -> Tensor:
    """From random directions to such as are orthogonal to many columns: (R, n) of unit length.

    Iteratively reweighted least squares: first towards the least Σ_j |qᵀc_j|, then towards the most zeros.

    Args:
        columns: (n, m).
        starts: (R, n) of unit length.
        known: (F, n), directions to keep off at first.
        rng: on the CPU.
    """
    directions = starts
    rms = columns.square().mean().sqrt()
    # Half of them look for zeros alone: next to a like one, an example is no least sum of sizes.
    for_zeros = torch.arange(len(starts), device=starts.device)[:, None] % 2 == 0
    # More or less far off the known ones: all the way, there is one direction left next to n - 1.
    off = torch.rand(len(starts), 1, 1, generator=rng, dtype=torch.float64, device="cpu").to(columns)
    off = off * (known.T @ known)
    for step in range(_STEPS):
        apart = step < _APART
        width = torch.where(for_zeros, 0.5 if apart else _NARROWING ** (step - _APART), _NARROWING**step)
        squares = (directions @ columns).square() + (rms * width.to(rms)).clamp_min(1e-13).square()
        counting = for_zeros & (not apart) | (step >= _SUMMING)
        scatter = (columns * torch.where(counting, 1 / squares, squares.rsqrt())[:, None]) @ columns.T
        if apart:
            scatter = scatter + scatter.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None] * off
        directions = torch.linalg.eigh(scatter).eigenvectors[:, :, 0]
    return directions


def sparse_directions(factors: Factors, starts: int, rng: torch.Generator) -> Tensor:
    """Up to n independent directions of which more is zero than it takes to fix them: (F, n).

    Args:
        factors: of ∇W.
        starts: how many walks to try, at most.
        rng: on the CPU.
    """
    n = len(factors.values)
    known = factors.right[:0, :n]
    if n == 1:
        return torch.ones(1, 1, dtype=factors.right.dtype, device=factors.right.device)
    at_once = max(32, 4 * n)
    for _ in range(-(-starts // at_once)):
        drawn = torch.randn(at_once, n, generator=rng, dtype=torch.float64, device="cpu").to(known.device)
        drawn = drawn / torch.linalg.vector_norm(drawn, dim=1, keepdim=True)
        ends = walk(factors.right, drawn, known, rng)
        fresh = _distinct(ends, known)[:_REFINED_AT_ONCE]
        directions, zeros, leverage = refine(factors, fresh)
        told = (leverage < _LEVERAGE) & (zeros.sum(dim=1) > n)
        known = _independent(
            torch.cat([known, directions[told]]), torch.cat([_zeros(factors, known), zeros[told].sum(dim=1)])
        )
        if len(known) == n:
            break
    return known


def _zeros(factors: Factors, directions: Tensor) -> Tensor:
    """How many zeros each direction has, (F,)."""
    if not len(directions):
        return torch.zeros(0, dtype=torch.int64, device=directions.device)
    return refine(factors, directions)[1].sum(dim=1)


def _distinct(directions: Tensor, known: Tensor) -> Tensor:
    """Those that equal neither a known one nor an earlier one, up to the sign."""
    both = torch.cat([known, directions])
    alike = (both @ both.T).abs() > 1 - 1e-6
    earlier = torch.ones_like(alike).tril(-1)
    return directions[~(alike & earlier).any(dim=1)[len(known) :]]


def _independent(directions: Tensor, zeros: Tensor) -> Tensor:
    """The sparsest ones that are independent, n at most."""
    chosen: list[int] = []
    for index in zeros.argsort(descending=True, stable=True).tolist():
        if bool(torch.linalg.svdvals(directions[[*chosen, index]])[-1] > _INDEPENDENT):
            chosen.append(index)
        if len(chosen) == directions.shape[1]:
            break
    return directions[chosen]


def inputs_of_batch(
    weight_gradient: Tensor,
    bias_gradient: Tensor,
    weight: Tensor,
    bias: Tensor,
    count: int,
    starts: int,
    rng: torch.Generator,
) -> BatchInputs:
    """The inputs of a layer before a ReLU.

    Args:
        weight_gradient: (m, D).
        bias_gradient: (m,).
        weight: (m, D).
        bias: (m,).
        count: n.
        starts: how many walks to try, at most.
        rng: on the CPU.
    """
    factors = factorise(weight_gradient, count)
    if factors is None:
        return BatchInputs(None, 0, 0.0)
    directions = sparse_directions(factors, starts, rng)
    if len(directions) < count:
        return BatchInputs(None, len(directions), 0.0)
    derivatives = factors.right.T @ directions.T  # (m, n), each up to a factor
    lengths = least_squares(derivatives, bias_gradient.double()[:, None])[:, 0]
    # ∇W = Δᵀ X with Δᵀ = U Q and U, Q of full rank: X = Q⁻¹ Σ Vᵀ.
    mixing = directions.T * lengths
    inputs = torch.linalg.pinv(mixing) @ (factors.values[:, None] * factors.left.T)
    dead = inputs @ weight.double().T + bias.double() <= 0  # (n, m)
    scale = derivatives.abs().amax(dim=0, keepdim=True)
    zero = (derivatives.abs() < 1e-4 * scale).T
    return BatchInputs(inputs, count, float((dead == zero).double().mean()))


def least_squares(matrix: Tensor, right: Tensor) -> Tensor:
    """By QR, whose last digit is the same at every call: (M, n), (M, k) -> (n, k), M >= n."""
    orthogonal, triangle = torch.linalg.qr(matrix)
    found: Tensor = torch.linalg.solve_triangular(triangle, orthogonal.T @ right, upper=True)
    return found
