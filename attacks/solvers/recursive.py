"""R-GAP (Zhu, Blaschko 2021): a net's input from one hard-labelled gradient, by plain least squares.

At the head the input is c d with a direction d that the gradient gives and a number c > 0, found from the one
equation ⟨∇W, W⟩ = Σ_k u_k c (W d)_k, where u = softmax(c W d + b) - y. It may have several roots, the
paper's twins; with more than two classes the root that agrees best with ∇W d = c u is taken. Below, each
layer's input solves the equations of its output and of its gradient, all weighing the same; fully connected
layers use the gradient's alone. `layerwise` is the same recursion from λ's head, weighted by errors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attacks.solvers.layers import Layer, NotInvertibleError, Row
from attacks.solvers.layerwise import SentGradient, correlate

_GRID = 4001
_DECADES = (-8.0, 10.0)
_BISECTIONS = 60
_HARD = 0.05  # of ‖∇W d‖: far above rounding, below what a mixed label leaves


def head_input(weight_gradient: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, int]:
    """The head's input (D,) and the class, of a hard label; K >= 2.

    Raises:
        NotInvertibleError: no c solves the equation, or none agrees with the gradient: no hard label.
    """
    norms = torch.linalg.vector_norm(weight_gradient, dim=1)
    label = int(norms.argmax())  # 1 - p_y is the sum of all others; of two classes it is a guess
    direction = -weight_gradient[label] / norms[label]
    a, s = weight @ direction, weight_gradient @ direction  # z = c a + b, s = c u
    known = (weight_gradient * weight).sum()

    def gap(c: Tensor) -> Tensor:
        """(M,) -> (M,): Σ u_k c a_k - ⟨∇W, W⟩."""
        u = torch.softmax(c[:, None] * a + bias, dim=1)
        u[:, label] -= 1
        missing: Tensor = c * (u @ a) - known
        return missing

    scale = 1 / torch.linalg.vector_norm(a).clamp_min(1e-300)
    c = scale * torch.logspace(*_DECADES, _GRID, dtype=a.dtype, device=a.device)
    values = gap(c)
    crossing = (values[:-1].sign() * values[1:].sign() <= 0).nonzero()[:, 0]
    if not len(crossing):
        raise NotInvertibleError("no length of the head's input explains its gradient: no hard label")
    low, high = c[crossing], c[crossing + 1]
    for _ in range(_BISECTIONS):
        middle = (low * high).sqrt()
        same = gap(middle).sign() == gap(low).sign()
        low, high = torch.where(same, middle, low), torch.where(same, high, middle)
    roots = (low * high).sqrt()
    u = torch.softmax(roots[:, None] * a + bias, dim=1)
    u[:, label] -= 1
    misses = torch.linalg.vector_norm(roots[:, None] * u - s, dim=1)
    if not bool(misses.min() <= _HARD * torch.linalg.vector_norm(s)):
        raise NotInvertibleError("no hard label explains the head's gradient")
    return roots[misses.argmin()] * direction, label


def solve(row: Row, gradients: list[SentGradient], features: Tensor, u: Tensor) -> Tensor:
    """From the head's input (D,) and the gradient by its logits (K,) to the first layer's input.

    Raises:
        NotInvertibleError: the gradient vanishes on its way, or an activation has no inverse.
    """
    output, delta = features, u
    for index in range(len(row.layers) - 2, -1, -1):
        above, layer = row.layers[index + 1], row.layers[index]
        if layer.activation.inverse is None and layer.convolution is not None:
            raise NotInvertibleError(f"{layer.activation.name} after {layer.name} has no inverse")
        pulled = above.transpose(delta[None]).reshape(output.shape)
        delta = (layer.activation.slope(output) * pulled).reshape(layer.output_shape)
        size = delta.square().sum()
        if not 0 < float(size) < float("inf"):
            raise NotInvertibleError(f"no gradient at {layer.name}: a layer is dead for this input")
        if layer.convolution is None:
            output = gradients[index].weight.T @ delta.flatten() / size
        else:
            output = plain_least_squares(layer, gradients[index].weight, delta, output).flatten()
    return output.reshape(row.scale.shape)


def plain_least_squares(layer: Layer, gradient: Tensor, delta: Tensor, output: Tensor) -> Tensor:
    """A convolution's input (I, H, W) from both sets of equations, all of the same weight.

    Raises:
        NotInvertibleError: they leave some of it open.
    """
    assert layer.activation.inverse is not None
    count = int(torch.tensor(layer.input_shape, device="cpu").prod())
    units = torch.eye(count, dtype=delta.dtype, device=delta.device).reshape(count, *layer.input_shape)
    forward = layer.forward(units).flatten(1)
    backward = torch.vmap(lambda unit: correlate(layer, delta, unit))(units).flatten(1)
    matrix = torch.cat([forward, backward], dim=1).T
    wanted = layer.activation.inverse(output.reshape(layer.output_shape)) - layer.shaped_bias
    right = torch.cat([wanted.flatten(), gradient.flatten()])
    orthogonal, triangle = torch.linalg.qr(matrix)
    if bool(triangle.diagonal().abs().min() < 1e-12 * triangle.diagonal().abs().max()):
        raise NotInvertibleError(f"the input of {layer.name} is not determined: its equations are singular")
    found = torch.linalg.solve_triangular(triangle, (orthogonal.T @ right)[:, None], upper=True)
    image: Tensor = found.reshape(layer.input_shape)
    return image
