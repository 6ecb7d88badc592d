"""Gradient matching without a graph: the derivative of D(∇L(x)) in closed form, for nets of layers in a row.

With v = ∂D/∂g held fixed, ∂/∂x <v, ∇_W L(x)> is what ∂L/∂x changes by when W moves along v: Pearlmutter's
R-operator, a forward and a backward pass beside those that the gradient itself takes. With z_l = W_l a_(l-1)
+ b_l, a_l = σ(z_l), δ_l = ∂L/∂z_l and R(·) for the change along v:

    forward    R z_l = v_l a_(l-1) + v_bl + W_l R a_(l-1),    R a_l = σ'(z_l) R z_l,    R a_0 = 0
    head       R δ = (diag p - p pᵀ) R z / N
    backward   e_(l-1) = σ'(z_(l-1)) (W_lᵀ e_l + v_lᵀ δ_l) + σ''(z_(l-1)) R z_(l-1) (W_lᵀ δ_l)

and e at the images is the derivative. A convolution is the same on columns of patches, made once for three
uses. R candidates (restarts) and their N images each go through together, as (channels, R, N·positions): with
channels first, what the candidates share is one matrix product, and the sum over a batch is part of one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attacks.solvers.matching_objectives import Distance, FeaturePull, Matched

Curve = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""σ' and σ'' (None for zero) as functions of σ's output."""


def _sigmoid(a: Tensor) -> tuple[Tensor, Tensor | None]:
    slope = torch.addcmul(a, a, a, value=-1)
    return slope, torch.addcmul(slope, slope, a, value=-2)


def _tanh(a: Tensor) -> tuple[Tensor, Tensor | None]:
    slope = 1 - a * a
    return slope, -2 * a * slope


def _relu(a: Tensor) -> tuple[Tensor, Tensor | None]:
    return a.sign(), None  # the output's, which is at least 0


def _leaky(leak: float) -> Curve:
    return lambda a: (torch.where(a > 0, torch.ones_like(a), leak), None)


def curve_of(module: nn.Module) -> Curve | None:
    """σ' and σ'' of an activation; None where the module is none that is known."""
    match module:
        case nn.Sigmoid():
            return _sigmoid
        case nn.Tanh():
            return _tanh
        case nn.ReLU():
            return _relu
        case nn.LeakyReLU(negative_slope=leak) if leak >= 0:
            return _leaky(leak)
    return None


MANY_MAPS = 8
"""From so many on, whole maps are added at once; torch's own folding takes one after the other."""


class Layer(Protocol):
    """What both passes ask of a layer; it keeps what the next pass needs."""

    def forward(self, a: Tensor) -> Tensor:
        """Input -> output."""
        ...

    def backward(self, delta: Tensor) -> Tensor:
        """∂L/∂output -> ∂L/∂input."""
        ...

    def push(self, r: Tensor | None) -> Tensor | None:
        """R input -> R output; None for zero."""
        ...

    def pull(self, e: Tensor) -> Tensor:
        """R ∂L/∂output -> R ∂L/∂input."""
        ...


class Activation:
    """a = σ(z), entry by entry."""

    def __init__(self, module: Callable[[Tensor], Tensor], curve: Curve) -> None:
        self._module, self._curve = module, curve

    def forward(self, a: Tensor) -> Tensor:
        """Keeps σ' and σ''."""
        output = self._module(a)
        self._slope, self._curvature = self._curve(output)
        return output

    def backward(self, delta: Tensor) -> Tensor:
        """Keeps δ at the output."""
        self._delta = delta
        return delta * self._slope

    def push(self, r: Tensor | None) -> Tensor | None:
        """Keeps R z."""
        self._r = r
        return None if r is None else r * self._slope

    def pull(self, e: Tensor) -> Tensor:
        """The only place for σ''."""
        e = e * self._slope
        if self._curvature is None or self._r is None:
            return e
        return torch.addcmul(e, self._curvature * self._r, self._delta)


class Flatten:
    """(C, R, N, H, W) -> (C·H·W, R, N)."""

    def forward(self, a: Tensor) -> Tensor:
        """Keeps the input's shape."""
        self._shape = a.shape
        return a.permute(0, 3, 4, 1, 2).flatten(0, 2)

    def backward(self, delta: Tensor) -> Tensor:
        """Back to maps."""
        channels, rows, images, height, width = self._shape
        return delta.view(channels, height, width, rows, images).permute(0, 3, 4, 1, 2).contiguous()

    def push(self, r: Tensor | None) -> Tensor | None:
        """As `forward`."""
        return None if r is None else r.permute(0, 3, 4, 1, 2).flatten(0, 2)

    def pull(self, e: Tensor) -> Tensor:
        """As `backward`."""
        return self.backward(e)


class Patches:
    """A convolution's patches as columns."""

    def __init__(self, conv: nn.Conv2d) -> None:
        self._kernel = conv.kernel_size[0], conv.kernel_size[1]
        self._stride = conv.stride[0], conv.stride[1]
        assert not isinstance(conv.padding, str)  # see `is_covered`
        self._padding = conv.padding[0], conv.padding[1]

    def outputs(self, shape: torch.Size) -> tuple[int, int]:
        """The size of what the convolution makes of maps of this shape, (C, R, N, H, W)."""
        down, across = (
            (size + 2 * padding - kernel) // stride + 1
            for size, padding, kernel, stride in zip(
                shape[3:], self._padding, self._kernel, self._stride, strict=True
            )
        )
        return down, across

    def columns(self, a: Tensor) -> Tensor:
        """(C, R, N, H, W) -> (C·k·k, R·N·outputs)."""
        channels, rows, images = a.shape[:3]
        down, across = self.outputs(a.shape)
        if self._padding != (0, 0):
            a = F.pad(a, (self._padding[1], self._padding[1], self._padding[0], self._padding[0]))
        else:
            a = a.contiguous()
        channel, row, image, line, pixel = a.stride()
        patches = a.as_strided(
            (channels, *self._kernel, rows, images, down, across),
            (channel, line, pixel, row, image, line * self._stride[0], pixel * self._stride[1]),
        )
        return patches.reshape(channels * math.prod(self._kernel), rows * images * down * across)

    def folded(self, columns: Tensor, shape: torch.Size) -> Tensor:
        """The transpose of `columns`: to maps of this shape."""
        channels, rows, images, height, width = shape
        (down, across), (top, left) = self.outputs(shape), self._padding
        if rows * images < MANY_MAPS:
            each = columns.view(len(columns), rows * images, -1).transpose(0, 1)
            maps = F.fold(each, (height, width), self._kernel, 1, self._padding, self._stride)
            return maps.transpose(0, 1).contiguous().view(shape)
        # Summed across first, then down: 2 k additions to whole maps, where all of a patch's take k².
        parts = columns.view(channels, *self._kernel, rows, images, down, across)
        lines = columns.new_zeros(channels, self._kernel[0], rows, images, down, width + 2 * left)
        for i in range(self._kernel[1]):
            lines[..., i : i + self._stride[1] * across : self._stride[1]] += parts[:, :, i]
        padded = columns.new_zeros(channels, rows, images, height + 2 * top, width + 2 * left)
        for i in range(self._kernel[0]):
            padded[:, :, :, i : i + self._stride[0] * down : self._stride[0]] += lines[:, i]
        return padded[:, :, :, top : top + height, left : left + width]


class Weighted:
    """z = W u(a) + b, with u the columns of patches of a convolution, or the input itself."""

    def __init__(self, module: nn.Conv2d | nn.Linear, weight_span: slice | None, bias_span: slice | None):
        """The spans: where its tensors stand in the gradient as one vector, if they were observed."""
        self._patches = Patches(module) if isinstance(module, nn.Conv2d) else None
        self._weight = module.weight.detach().flatten(1)  # (O, I)
        self._transposed = self._weight.t()
        self._bias = None if module.bias is None else module.bias.detach()[:, None]
        self._spans = weight_span, bias_span

    def forward(self, a: Tensor) -> Tensor:
        """Keeps the columns."""
        self._shape = a.shape
        self._columns = self._unfold(a)
        if self._bias is None:
            return self._shaped(torch.mm(self._weight, self._columns))
        return self._shaped(torch.addmm(self._bias, self._weight, self._columns))

    def differentiate(self, delta: Tensor, gradient: Tensor) -> None:
        """Writes ∂L/∂W and ∂L/∂b into their spans of the gradient (R, T)."""
        self._delta = self._by_candidate(delta)
        for span, value in self._parts(gradient):
            if span == 0:
                torch.bmm(self._delta, self._by_candidate(self._columns).mT, out=value)
            else:
                torch.sum(self._delta, dim=2, out=value)

    def backward(self, delta: Tensor) -> Tensor:
        """Wᵀ δ."""
        return self._fold(torch.mm(self._transposed, delta.flatten(1)))

    def aim(self, v: Tensor) -> None:
        """Takes its part of v (R, T)."""
        self._v, self._v_bias = None, None
        for span, value in self._parts(v):
            if span == 0:
                self._v = value
            else:
                self._v_bias = value

    def push(self, r: Tensor | None) -> Tensor | None:
        """V a + v_b + W R a."""
        if r is None and self._v is None and self._v_bias is None:
            return None
        if r is None:
            moved = self._columns.new_zeros(len(self._weight), self._columns.shape[1])
        else:
            moved = torch.mm(self._weight, self._unfold(r))
        each = self._by_candidate(moved)
        if self._v is not None:
            each.baddbmm_(self._v, self._by_candidate(self._columns))
        if self._v_bias is not None:
            each += self._v_bias[:, :, None]
        return self._shaped(moved)

    def pull(self, e: Tensor) -> Tensor:
        """Wᵀ e + Vᵀ δ."""
        columns = torch.mm(self._transposed, e.flatten(1))
        if self._v is not None:
            self._by_candidate(columns).baddbmm_(self._v.mT, self._delta)
        return self._fold(columns)

    def _parts(self, vector: Tensor) -> list[tuple[int, Tensor]]:
        """Of a gradient (R, T): 0 and the weight's part (R, O, I), 1 and the bias's (R, O), if observed."""
        parts = []
        for index, (span, shape) in enumerate(zip(self._spans, (self._weight.shape, (-1,)), strict=True)):
            if span is not None:
                parts.append((index, vector[:, span].view(len(vector), *shape)))
        return parts

    def _by_candidate(self, a: Tensor) -> Tensor:
        """(C, R, N, …) or (C, R·N·positions) -> (R, C, N·positions)."""
        return a.view(len(a), self._shape[1], -1).transpose(0, 1)

    def _unfold(self, a: Tensor) -> Tensor:
        return a.flatten(1) if self._patches is None else self._patches.columns(a)

    def _fold(self, columns: Tensor) -> Tensor:
        return (
            columns.view(self._shape) if self._patches is None else self._patches.folded(columns, self._shape)
        )

    def _shaped(self, columns: Tensor) -> Tensor:
        size = () if self._patches is None else self._patches.outputs(self._shape)
        return columns.view(len(columns), *self._shape[1:3], *size)


class Chain(NamedTuple):
    """A net of layers in a row.

    Args:
        scale: of the first layer's input, offset + scale · pixels, entry by entry: (C, H, W) or (C·H·W,).
        offset: see `scale`.
        names: the module name of each layer from the first with parameters to the head; "" for a step from
            maps to vectors that is no module.
    """

    scale: Tensor
    offset: Tensor
    names: list[str]


def is_covered(module: nn.Module) -> bool:
    """Whether it can stand between the first layer with parameters and the head."""
    match module:
        case nn.Linear() | nn.Identity() | nn.Flatten(start_dim=1, end_dim=-1):
            return True
        case nn.Conv2d(groups=1, dilation=(1, 1), padding_mode="zeros", padding=tuple()):
            return True
        case nn.Dropout():
            return not module.training or module.p == 0
    return curve_of(module) is not None


def chain_of(model: nn.Module, images: Tensor) -> Chain | None:
    """The model as a chain, if a chain gives its logits on these images, (N, C, H, W)."""
    called: list[tuple[str, int]] = []  # of the modules without children, with its input's dimensions

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, inputs: called.append((name, inputs[0].ndim))

    own, exact = copy.deepcopy(model).double(), images.double()
    for name, module in own.named_modules():
        if not list(module.children()):
            module.register_forward_pre_hook(note(name))
    with torch.no_grad():
        logits = own(exact)

    names, dimensions = [], images.ndim
    for name, seen in called.copy():
        is_flat = isinstance(own.get_submodule(name), nn.Flatten)
        if seen < dimensions and not is_flat:
            names.append("")
        names.append(name)
        dimensions = 2 if is_flat else seen
    modules = [own.get_submodule(name) if name else nn.Flatten() for name in names]
    with_parameters = [name for name, module in zip(names, modules, strict=True) if list(module.parameters())]
    if sorted(with_parameters) != sorted({name.rpartition(".")[0] for name, _ in own.named_parameters()}):
        return None  # one is used twice, or not at all
    first = names.index(with_parameters[0])
    if not isinstance(modules[-1], nn.Linear) or not all(map(is_covered, modules[first:])):
        return None
    with torch.no_grad():
        before = nn.Sequential(*modules[:first])
        offset, ones = before(torch.stack([torch.zeros_like(exact[0]), torch.ones_like(exact[0])]))
        scale = ones - offset
        if offset.numel() != images[0].numel():
            return None
        rebuilt = nn.Sequential(*modules[first:])(offset + scale * exact.view(-1, *offset.shape))
    return (
        Chain(scale.to(images), offset.to(images), names[first:]) if torch.allclose(rebuilt, logits) else None
    )


class ClosedForm:
    """Distances of R candidates' gradients from the observed one, with their derivatives.

    Mean soft cross-entropy over each candidate's N images.
    """

    def __init__(self, model: nn.Module, chain: Chain, target: Mapping[str, Tensor]) -> None:
        """`target`: the observed gradient, parameter name -> tensor; what isn't there isn't matched."""
        self._scale, self._offset = (value[:, None, None] for value in (chain.scale, chain.offset))
        self._layers: list[Layer] = []
        self._target = torch.cat([value.detach().flatten() for value in target.values()])
        ends = (
            torch.tensor([0, *(value.numel() for value in target.values())], device="cpu").cumsum(0).tolist()
        )
        spans = {name: slice(*ends[index : index + 2]) for index, name in enumerate(target)}
        for name in chain.names:
            module = model.get_submodule(name) if name else nn.Flatten()
            curve = curve_of(module)
            if isinstance(module, nn.Conv2d | nn.Linear):
                self._layers.append(Weighted(module, spans.get(f"{name}.weight"), spans.get(f"{name}.bias")))
            elif curve is not None:
                self._layers.append(Activation(module, curve))
            elif isinstance(module, nn.Flatten):
                self._layers.append(Flatten())

    @torch.no_grad()
    def __call__(
        self, images: Tensor, soft_labels: Tensor, distance: Distance, pull: FeaturePull | None
    ) -> Matched:
        """The distance, the pull on features added to it, and the slopes of their sum.

        Args:
            images: (R, N, C, H, W).
            soft_labels: (R, N, K).
            distance: of gradients.
            pull: a penalty on the head's inputs.
        """
        rows, count = images.shape[:2]
        a = images if self._scale.ndim == 5 else images.flatten(2)
        a = torch.addcmul(self._offset, a.movedim(2, 0), self._scale)
        for layer in self._layers[:-1]:
            a = layer.forward(a)
        features, p = a, torch.softmax(self._layers[-1].forward(a), dim=0)

        y = soft_labels.permute(2, 0, 1)
        mass = y.sum(dim=0)
        gradient = self._differentiate((p * mass - y) / count, rows)
        matched, v = distance(gradient, self._target)
        r: Tensor | None = None
        for layer in self._layers:
            if isinstance(layer, Weighted):
                layer.aim(v)
            r = layer.push(r)
        assert r is not None  # something is matched
        spread = (r - (p * r).sum(dim=0)) / count  # R log p / N

        total, e = matched, self._layers[-1].pull(p * mass * spread)
        if pull is not None:
            penalty, slope = pull(features.permute(1, 2, 0))
            total, e = total + penalty, e + slope.permute(2, 0, 1)
        for layer in reversed(self._layers[:-1]):
            e = layer.pull(e)
        slope = (e * self._scale).movedim(0, 2).reshape(images.shape)
        return Matched(total, matched, slope, -spread.permute(1, 2, 0))

    def _differentiate(self, delta: Tensor, rows: int) -> Tensor:
        """∂L/∂W of all that was observed, (R, T), from δ at the logits."""
        gradient = delta.new_empty(rows, len(self._target))
        for layer in reversed(self._layers):
            if isinstance(layer, Weighted):
                layer.differentiate(delta, gradient)
            if layer is not self._layers[0]:
                delta = layer.backward(delta)
        return gradient
