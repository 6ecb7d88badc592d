"""The input of a row of layers from one example's gradient: linear least squares, layer by layer.

Layer l computes z_l = W_l * a_(l-1) + b_l and a_l = σ(z_l); with δ_l = ∂L/∂z_l its gradient is
∇W_l[o, i, k] = Σ_p δ_l[o, p] a_(l-1)[i, p·s + k]. Once a_l and δ_l are known, a_(l-1) meets two sets of
linear equations, O·P of the first and O·I·h·w of the second:

    W_l * a_(l-1) = σ⁻¹(a_l) - b_l,        δ_l ⊛ a_(l-1) = ∇W_l,

and δ_(l-1) = σ′(a_(l-1)) ⊙ W_lᵀ δ_l follows. R-GAP (Zhu, Blaschko 2021) starts from a hard label's logits and
weighs both sets alike; here the label and the head's input come from λ, and every row is weighted by its
error: that of a_l, which the least squares above gave and 1/σ′ enlarges, and that of ∇W_l and δ_l.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jvp
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from attacks.solvers.layers import Layer, NotInvertibleError, Row

COLUMNS_AT_ONCE = 512
"""Of a normal matrix: how many unit vectors go through a convolution together."""
MOST_UNKNOWNS = 13_000
"""Of one layer: its normal matrix takes 8 n² bytes, 1.4 GB."""
REFINEMENTS = 3
ROUNDING = 6e-7
"""Of what a client sends, relative: float32's, over a forward and a backward pass."""
EPSILON = 1e-7
"""The same of a single sum, relative to what is summed."""
DEAD = "no gradient at {}: a layer is dead for this input, or p = y"
NOISE_TOLERATED = 1.5
"""How much larger than expected residuals may be before the least squares is weighted anew by them."""
RIDGE = 1e-15
"""Of the normal matrix's mean diagonal: it keeps the factorisation going where rounding made it singular."""


@dataclass(frozen=True, eq=False)
class Estimate:
    """Numbers in a row and their standard errors, (n,) each."""

    value: Tensor
    std: Tensor


@dataclass(frozen=True, eq=False)
class SentGradient:
    """What was sent of one layer, in float64, by its folded weight; the bias' is None where there is none."""

    weight: Tensor
    bias: Tensor | None


def taps_by_offset(layer: Layer) -> list[tuple[int, int]]:
    """(inputs of a channel, taps of the kernel that meet each of them), by their place under the stride.

    With stride s a row of inputs falls into s kinds, by its number modulo s, and a tap k meets one kind only:
    that of k·dilation - padding. Inputs beyond the last window meet none.
    """
    assert layer.convolution is not None
    sides = []
    for axis in (0, 1):
        stride, padding, dilation = (
            layer.convolution[name][axis] for name in ("stride", "padding", "dilation")
        )
        size, windows = layer.input_shape[1 + axis], layer.output_shape[1 + axis]
        offsets = [k * dilation - padding for k in range(layer.weight.shape[2 + axis])]
        met = [
            sum(
                (place - offset) % stride == 0 and 0 <= (place - offset) // stride < windows
                for offset in offsets
            )
            for place in range(size)
        ]
        kinds: dict[tuple[int, bool], list[int]] = {}
        for place in range(size):
            taps = sum((place - offset) % stride == 0 for offset in offsets)
            kinds.setdefault((place % stride, met[place] > 0), []).append(taps if met[place] else 0)
        sides.append([(len(taps), taps[0]) for taps in kinds.values()])
    return [(n * m, t * u) for (n, t), (m, u) in itertools.product(*sides)]


def missing_equations(layer: Layer) -> int:
    """How many unknowns of the layer's input are left over, by counting; 0 where they may be determined.

    Each channel is met by O·t equations of the gradient for the n inputs of one place under the stride; what
    they leave open, over all channels and places, the O·P forward equations have to close. Of these O·O say
    nothing new: Σ_p δ[o, p] (W * a)[o′, p] = Σ_ik W[o′, i, k] ∇W[o, i, k].
    """
    if layer.convolution is None:
        return 0
    outputs, places = layer.output_shape[0], math.prod(layer.output_shape[1:])
    kinds = taps_by_offset(layer)
    unseen = sum(n for n, taps in kinds if taps == 0)
    left = layer.input_shape[0] * sum(max(0, n - outputs * taps) for n, taps in kinds if taps)
    return layer.input_shape[0] * unseen + max(0, left - outputs * max(0, places - outputs))


def check(row: Row) -> None:
    """That every layer can be undone, by its activation and by the number of equations: before any gradient.

    Raises:
        NotInvertibleError: one can't.
    """
    for layer in row.layers[:-1]:
        if layer.convolution is None:
            continue
        unknowns = layer.unknowns
        if layer.activation.inverse is None:
            raise NotInvertibleError(f"{layer.activation.name} after {layer.name} has no inverse")
        if missing := missing_equations(layer):
            raise NotInvertibleError(
                f"the input of {layer.name} is not determined: {missing} equations too few for {unknowns}"
            )
        if unknowns > MOST_UNKNOWNS:
            raise NotInvertibleError(
                f"{layer.name} has {unknowns} unknowns; least squares takes {MOST_UNKNOWNS} at most"
            )


def solve(row: Row, gradients: list[SentGradient], features: Tensor) -> tuple[Tensor, float]:
    """From the head's input down to the first layer's.

    Args:
        row: the network.
        gradients: of its layers, the first one's first.
        features: (D,), the head's input.

    Returns:
        The first layer's input, of its shape, and the greatest share of a layer's gradient that what was
        found of it leaves unexplained.

    Raises:
        NotInvertibleError: no gradient passes a layer, or a layer's equations have no solution.
    """
    noise = relative_noise(gradients[-1], features)
    if gradients[-1].bias is None:
        features = rescaled(row, gradients, features, noise)
    step, misfit = at_head(row, gradients, features, noise), 0.0
    while True:
        layer, sent = row.layers[step.index], gradients[step.index]
        if layer.convolution is None:
            found = step.fully_connected(sent.weight, noise)
            explained = torch.outer(step.delta, found.value)
        else:
            found = least_squares(row, step, sent.weight, noise)
            explained = correlate(layer, step.delta, found.value.reshape(layer.input_shape))
        norm = torch.linalg.vector_norm(sent.weight).clamp_min(torch.finfo(found.value.dtype).tiny)
        misfit = max(misfit, float(torch.linalg.vector_norm(sent.weight - explained) / norm))
        if step.index == 0:
            return found.value.reshape(row.scale.shape), misfit
        step = step.down(row, found)


@dataclass(frozen=True, eq=False)
class Step:
    """Where the way down stands: at a layer whose output and δ are known.

    Attributes:
        index: the layer's.
        output: what the layer gives after σ; at the head, its input instead.
        delta: δ, of the layer's output's shape.
        delta_error: the relative error of δ.
    """

    index: int
    output: Estimate
    delta: Tensor
    delta_error: float

    def fully_connected(self, gradient: Tensor, noise: float) -> Estimate:
        """The input of a fully connected layer, ∇Wᵀδ/‖δ‖²."""
        value = gradient.T @ self.delta / self.delta.square().sum()
        size = math.hypot(noise, self.delta_error) * value.square().mean().sqrt()
        return Estimate(value, size.expand_as(value))

    def down(self, row: Row, found: Estimate) -> Step:
        """One layer down, where `found` is the input of this one."""
        above, layer = row.layers[self.index], row.layers[self.index - 1]
        pulled = above.transpose(self.delta[None]).flatten()
        slope, slope_error = jvp(layer.activation.slope, (found.value,), (found.std,))[:2]
        delta = (pulled * slope).reshape(layer.output_shape)
        if not 0 < float(delta.square().sum()) < float("inf"):
            raise NotInvertibleError(DEAD.format(layer.name))
        error = math.hypot(self.delta_error, float((pulled * slope_error).norm() / delta.norm()))
        return Step(self.index - 1, found, delta, error)


def at_head(row: Row, gradients: list[SentGradient], features: Tensor, noise: float) -> Step:
    """The first step: u = ∇b, or ∇W f / ‖f‖²; p - y would lose digits to cancellation."""
    sent = gradients[-1]
    u = sent.weight @ features / features.square().sum() if sent.bias is None else sent.bias
    if not 0 < float(u.square().sum()) < float("inf"):
        raise NotInvertibleError(DEAD.format(row.layers[-1].name))
    # Each feature is a mean over the K rows of ∇W, each u_i over its D columns: noise averages out in them.
    share, delta_error = (max(ROUNDING, noise / math.sqrt(count)) for count in sent.weight.shape)
    size = share * features.square().mean().sqrt()
    return Step(len(row.layers) - 1, Estimate(features, size.expand_as(features)), u, delta_error)


def rescaled(row: Row, gradients: list[SentGradient], features: Tensor, noise: float) -> Tensor:
    """The head's input on the scale that the uppermost convolution's equations fit best.

    λ comes from the few numbers that tell labels apart, and its rounding is common to all features: it is the
    one error that doesn't average out on the way down. There are more equations than unknowns below: their
    residual, linear in a small change of scale, says which one fits (Gauss-Newton on that one number).
    """

    def step_at(scaled: Tensor) -> Step:
        step = at_head(row, gradients, scaled, noise)
        while step.index and row.layers[step.index].convolution is None:
            found = step.fully_connected(gradients[step.index].weight, noise)
            step = step.down(row, found)
        return step

    step = step_at(features)
    layer, gradient = row.layers[step.index], gradients[step.index].weight
    if layer.convolution is None:
        return features
    equations, small = Equations.of(row, step, gradient, noise), noise
    for _ in range(2):
        here = equations.residual(step_at(features), gradient)
        change = (equations.residual(step_at(features * (1 + small)), gradient) - here) / small
        # λ's own error is not a hundred times the noise: where the equations say little, it stays.
        features = features * (1 - float(change @ here / (change @ change + (100 * noise) ** -2)))
    return features


def relative_noise(head: SentGradient, features: Tensor) -> float:
    """The share of the head's gradient that is not u fᵀ: the noise, and at least float32's rounding."""
    u = head.weight @ features / features.square().sum()
    share = torch.linalg.matrix_norm(head.weight - torch.outer(u, features)) / head.weight.norm()
    return max(ROUNDING, float(share.nan_to_num()))


def _prior(below: Layer) -> Estimate | None:
    """What an activation's bounds say of its output: the uniform distribution's mean and deviation."""
    if below.activation.bounds is None:
        return None
    low, high = below.activation.bounds
    ones = torch.ones(math.prod(below.output_shape), dtype=below.bias.dtype, device=below.bias.device)
    return Estimate((low + high) / 2 * ones, (high - low) / math.sqrt(12) * ones)


def _pixel_prior(row: Row) -> Estimate:
    """The same of pixels in [0, 1], as the first layer sees them."""
    return Estimate((row.offset + row.scale / 2).flatten(), (row.scale.abs() / math.sqrt(12)).flatten())


def correlate(layer: Layer, delta: Tensor, a: Tensor) -> Tensor:
    """δ ⊛ a, the weight's gradient, (O, I, h, w)."""
    assert layer.convolution is not None
    shape = tuple(layer.weight.shape)
    gradient: Tensor = conv2d_weight(a[None], shape, delta[None], **layer.convolution)  # type: ignore[no-untyped-call]
    return gradient


def correlate_transpose(layer: Layer, delta: Tensor, gradient: Tensor) -> Tensor:
    """The transpose of `correlate` in a: (O, I, h, w) -> (I, H, W)."""
    assert layer.convolution is not None
    shape = (1, *layer.input_shape)
    pulled: Tensor = conv2d_input(shape, gradient, delta[None], **layer.convolution)  # type: ignore[no-untyped-call]
    return pulled[0]


@dataclass(frozen=True, eq=False)
class Equations:
    """A convolution's equations for its input, as weighted least squares.

    Attributes:
        layer: the convolution.
        forward: (O, H', W'), the weight of each equation W_l * a = σ⁻¹ - b; squared, as all weights here.
        backward: of all equations δ ⊛ a = ∇W.
        prior: what is known of the input beforehand, where anything is.
        factor: (n, n), the normal matrix's Cholesky factor.
        gram: (H·W, H·W), GᵀG of one channel.
    """

    layer: Layer
    forward: Tensor
    backward: float
    prior: Estimate | None
    factor: Tensor
    gram: Tensor

    @classmethod
    def of(cls, row: Row, step: Step, gradient: Tensor, noise: float, seen: float = 0.0) -> Equations:
        """The equations at a step.

        Args:
            row: the network.
            step: at a convolution.
            gradient: (O, I, h, w), its weight's.
            noise: the gradient's, as a share of it.
            seen: the least error of the gradient's equations, where residuals have shown it.

        Raises:
            NotInvertibleError: they don't determine the input.
        """
        layer, output = row.layers[step.index], step.output
        prior = _pixel_prior(row) if step.index == 0 else _prior(row.layers[step.index - 1])
        # What is summed up is larger than the sums: rounding and δ's error are shares of it.
        size = gradient.square().mean().sqrt()
        summed = step.delta.square().sum().div(len(step.delta)).sqrt()
        amplitude = size / summed
        if prior is not None:
            amplitude = (prior.value.square() + prior.std.square()).mean().sqrt()
        expected = math.hypot(noise * float(size), step.delta_error * float(summed * amplitude))
        backward: float = max(expected, seen) ** -2
        # σ⁻¹ enlarges an error of the output by 1/σ′: a row without a slope says nothing.
        slope = layer.activation.slope(output.value).reshape(layer.output_shape)
        rounding = EPSILON * amplitude * layer.weight.abs().flatten(1).sum(1).reshape(-1, 1, 1)
        std = output.std.reshape(layer.output_shape)
        forward = slope.square() / (std.square() + (slope * rounding).square())

        normal, gram = normal_parts(layer, step.delta, forward)
        for block in diagonal_blocks(normal, layer.input_shape[0]):
            block += backward * gram
        if prior is not None:
            normal.diagonal().add_(prior.std.square().reciprocal())
        normal.diagonal().add_(RIDGE * normal.diagonal().mean())
        factor, failed = torch.linalg.cholesky_ex(normal)
        if int(failed) or not bool(factor.isfinite().all()):
            raise NotInvertibleError(f"the input of {layer.name} is not determined: singular equations")
        return cls(layer, forward, backward, prior, factor, gram)

    def solve(self, step: Step, gradient: Tensor) -> Tensor:
        """The input, (I, H, W).

        Each refinement solves for what the last answer leaves, which brings back the digits that are lost
        where a matrix is squared.
        """
        wanted, a = self._wanted(step), step.delta.new_zeros(self.layer.input_shape)
        for _ in range(1 + REFINEMENTS):
            forward, backward = self._misses(wanted, step.delta, gradient, a)
            right = self.layer.transpose((self.forward * forward)[None])[0]
            right = right + self.backward * correlate_transpose(self.layer, step.delta, backward)
            right = right.flatten()
            if self.prior is not None:
                right = right + (self.prior.value - a.flatten()) / self.prior.std.square()
            a = a + torch.cholesky_solve(right[:, None], self.factor).reshape(a.shape)
        return a

    def residual(self, step: Step, gradient: Tensor) -> Tensor:
        """What the solution leaves of all equations, in units of their errors."""
        a = self.solve(step, gradient)
        forward, backward = self._misses(self._wanted(step), step.delta, gradient, a)
        return torch.cat([(self.forward.sqrt() * forward).flatten(), self.backward**0.5 * backward.flatten()])

    def _wanted(self, step: Step) -> Tensor:
        assert self.layer.activation.inverse is not None
        output = step.output.value.reshape(self.layer.output_shape)
        return self.layer.activation.inverse(output) - self.layer.shaped_bias

    def _misses(self, wanted: Tensor, delta: Tensor, gradient: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        return wanted - self.layer.forward(a[None])[0], gradient - correlate(self.layer, delta, a)


def least_squares(row: Row, step: Step, gradient: Tensor, noise: float) -> Estimate:
    """A convolution's input, and its standard errors (zero for the first layer's, where nobody needs them).

    How far off the gradient is isn't known. It is first taken for `noise`; and where residuals turn out
    larger, for what these say.

    Raises:
        NotInvertibleError: the equations don't determine it.
    """
    seen = 0.0
    while True:
        equations = Equations.of(row, step, gradient, noise, seen)
        a = equations.solve(step, gradient)
        if step.index == 0:  # nothing below asks for its errors
            return Estimate(a.flatten(), torch.zeros_like(a).flatten())
        covariance = torch.cholesky_inverse(equations.factor)
        # How many numbers were fitted to the gradient's equations, and what that left of them.
        shares = [(block * equations.gram).sum() for block in diagonal_blocks(covariance, len(a))]
        left = gradient - correlate(equations.layer, step.delta, a)
        degrees = (left.numel() - equations.backward * torch.stack(shares).sum()).clamp_min(1)
        seen = float((left.square().sum() / degrees).sqrt())
        if seen <= NOISE_TOLERATED * equations.backward**-0.5:
            return Estimate(a.flatten(), covariance.diagonal().sqrt())


def normal_parts(layer: Layer, delta: Tensor, forward: Tensor) -> tuple[Tensor, Tensor]:
    """Fᵀ diag(forward) F, (n, n) with n = I·H·W, and a block of GᵀG, (H·W, H·W), the same for every channel.

    F's part comes column by column from the convolution itself, whose support is local.
    """
    assert layer.convolution is not None
    channels, height, width = layer.input_shape
    n, area = channels * height * width, height * width
    like = {"dtype": delta.dtype, "device": delta.device}
    normal = torch.empty(n, n, **like)  # type: ignore[call-overload]
    for start in range(0, n, COLUMNS_AT_ONCE):
        count = min(COLUMNS_AT_ONCE, n - start)
        units = torch.zeros(count, n, **like)  # type: ignore[call-overload]
        units.diagonal(offset=start).fill_(1)
        images = layer.forward(units.reshape(count, *layer.input_shape))
        normal[start : start + count] = layer.transpose(forward * images).reshape(count, n)
    kernel = layer.weight.shape[2:]
    taps = math.prod(kernel)
    placed = torch.zeros(len(delta), taps, taps, delta[0].numel(), **like)  # type: ignore[call-overload]
    placed.diagonal(dim1=1, dim2=2).copy_(delta.flatten(1)[:, :, None].expand(-1, -1, taps))
    rows = F.fold(placed.flatten(0, 1), (height, width), kernel, **layer.convolution).reshape(-1, area)
    return normal, rows.T @ rows


def diagonal_blocks(matrix: Tensor, channels: int) -> list[Tensor]:
    """Views of the blocks of (n, n) that belong to one channel each, (n / I, n / I)."""
    area = len(matrix) // channels
    return [matrix[i : i + area, i : i + area] for i in range(0, len(matrix), area)]
