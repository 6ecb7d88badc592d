"""A network as a row of layers, each a linear map and an activation: what analytic attacks walk down.

K = classes, D = width of the head's input; O and I = a layer's output and input channels.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

KEEPS_VALUES = (nn.Flatten, nn.Identity, nn.Dropout)
"""In eval mode these change at most the shape."""


class NotInvertibleError(ValueError):
    """Why a network, or a gradient, can't be undone; the text is meant for the record."""


@dataclass(frozen=True, eq=False)
class Activation:
    """σ, elementwise.

    Attributes:
        name: its class.
        forward: σ.
        slope: σ′ as a function of σ's output.
        inverse: σ⁻¹; None where several inputs share an output.
        bounds: of σ's output, where it has two.
    """

    name: str
    forward: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor] | None
    bounds: tuple[float, float] | None = None


def inside(values: Tensor, low: float, high: float) -> Tensor:
    """Values an ε inside of (low, high), where the inverse of a saturated activation is finite."""
    margin = torch.finfo(values.dtype).eps
    return values.clamp(low + margin, high - margin)


def activation_of(modules: list[nn.Module]) -> Activation:
    """The one activation among the modules between two linear maps; the identity where there is none.

    Raises:
        NotInvertibleError: several, or one of which σ′ doesn't follow from the output.
    """
    match [module for module in modules if not isinstance(module, KEEPS_VALUES)]:
        case []:
            return Activation("Identity", torch.clone, torch.ones_like, torch.clone)
        case [nn.Sigmoid()]:
            return Activation(
                "Sigmoid",
                torch.sigmoid,
                lambda a: a * (1 - a),
                lambda a: torch.logit(inside(a, 0, 1)),
                (0.0, 1.0),
            )
        case [nn.Tanh()]:
            return Activation(
                "Tanh",
                torch.tanh,
                lambda a: 1 - a.square(),
                lambda a: torch.atanh(inside(a, -1, 1)),
                (-1.0, 1.0),
            )
        case [nn.ReLU()]:
            return Activation("ReLU", torch.relu, lambda a: (a > 0).to(a), None)
        case [nn.LeakyReLU(negative_slope=leak)] if leak > 0:
            return Activation(
                f"LeakyReLU({leak:g})",
                lambda z: torch.where(z > 0, z, leak * z),
                lambda a: torch.where(a > 0, 1.0, leak).to(a),
                lambda a: torch.where(a > 0, a, a / leak),
            )
        case others:
            kinds = ", ".join(type(module).__name__ for module in others)
    raise NotInvertibleError(
        f"{kinds} between layers; only one of sigmoid, tanh, ReLU and LeakyReLU is undone"
    )


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear map with a bias and the activation after it; a batch norm in eval mode is folded in.

    Attributes:
        name: the module's name.
        weight: (O, I) or (O, I, h, w).
        bias: (O,).
        gain: (O,), what the batch norm multiplied the weight by: the sent gradient divided by it is that of
            `weight`.
        convolution: stride, padding and dilation; None for a fully connected layer.
        input_shape: (I, H, W), or (I,).
        output_shape: (O, H, W), or (O,).
        activation: what comes after it.
    """

    name: str
    weight: Tensor
    bias: Tensor
    gain: Tensor
    convolution: dict[str, Any] | None
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    activation: Activation

    @property
    def shaped_bias(self) -> Tensor:
        """The bias as it is added to an output."""
        return self.bias.reshape(-1, *[1] * (len(self.output_shape) - 1))

    @property
    def unknowns(self) -> int:
        """How many numbers its input has."""
        return math.prod(self.input_shape)

    def forward(self, inputs: Tensor) -> Tensor:
        """(M, *input_shape) -> (M, *output_shape), before the activation, without the bias."""
        if self.convolution is None:
            return F.linear(inputs, self.weight)
        outputs: Tensor = F.conv2d(inputs, self.weight, **self.convolution)
        return outputs

    def transpose(self, outputs: Tensor) -> Tensor:
        """The transpose of `forward`: (M, *output_shape) -> (M, *input_shape)."""
        if self.convolution is None:
            return outputs @ self.weight
        shape = (len(outputs), *self.input_shape)
        inputs: Tensor = conv2d_input(shape, self.weight, outputs, **self.convolution)  # type: ignore[no-untyped-call]
        return inputs


@dataclass(frozen=True, eq=False)
class Row:
    """A network in float64: its layers, the first one first, behind scale · pixel + offset of each pixel.

    Attributes:
        layers: at least one.
        scale: (C, H, W).
        offset: (C, H, W).
    """

    layers: list[Layer]
    scale: Tensor
    offset: Tensor


def trace(model: nn.Module, head: str, image_shape: tuple[int, ...], rng: torch.Generator) -> Row:
    """The network as a row of layers, checked against its own logits on a random image.

    Raises:
        NotInvertibleError: it is no such row.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.training and module.p > 0:
            raise NotInvertibleError(f"the model drops units at random, in {name}")
        if isinstance(module, nn.BatchNorm2d) and (module.training or module.running_var is None):
            raise NotInvertibleError(f"{name} takes its statistics from the batch: no linear map")
    copied = copy.deepcopy(model).double().eval()
    device = next(copied.parameters()).device
    noise = torch.rand(image_shape, generator=rng, dtype=torch.float64, device=rng.device).to(device)
    images = torch.stack([torch.zeros_like(noise), torch.ones_like(noise), noise])
    names = {module: name for name, module in copied.named_modules()}
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []  # of the modules without children
    with torch.no_grad(), ExitStack() as hooks:
        for module in names:
            if not list(module.children()):
                handle = module.register_forward_hook(
                    lambda module, inputs, output: calls.append((module, inputs[0], output))
                )
                hooks.callback(handle.remove)
        logits = copied(images)

    linear = [i for i, (module, *_) in enumerate(calls) if isinstance(module, nn.Linear | nn.Conv2d)]
    if not linear or names[calls[linear[-1]][0]] != head:
        raise NotInvertibleError(f"the last linear layer that the model calls is not its head {head}")
    layers = []
    for place, index in enumerate(linear):
        module, inputs, output = calls[index]
        end = linear[place + 1] if place + 1 < len(linear) else len(calls)
        after = [called for called, *_ in calls[index + 1 : end]]
        layers.append(_layer(names[module], module, after, inputs, output))
    scale, offset = _pixel_map(calls[linear[0]][1], noise)
    for below, layer in itertools.pairwise(layers):
        if math.prod(layer.input_shape) != math.prod(below.output_shape):
            raise NotInvertibleError(f"{layer.name} does not take the output of {below.name} as it is")
    row = Row(layers, scale, offset)
    if not torch.allclose(_logits(row, noise), logits[2]):
        raise NotInvertibleError("the model is more than linear layers and activations in a row")
    return row


def _layer(name: str, module: nn.Module, after: list[nn.Module], inputs: Tensor, output: Tensor) -> Layer:
    """A layer, and what comes after it up to the next one."""
    assert isinstance(module, nn.Linear | nn.Conv2d)
    weight = module.weight.detach()
    bias = weight.new_zeros(len(weight)) if module.bias is None else module.bias.detach()
    gain = torch.ones_like(bias)
    convolution: dict[str, Any] | None = None
    if isinstance(module, nn.Conv2d):
        if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
            raise NotInvertibleError(f"{name} has groups, or another padding than a number of zeros")
        convolution = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}
    if after and isinstance(after[0], nn.BatchNorm2d):
        norm, after = after[0], after[1:]
        assert norm.running_var is not None
        assert norm.running_mean is not None
        gain = (norm.running_var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight.detach())
        weight = weight * gain.reshape(-1, *[1] * (weight.ndim - 1))
        bias = (bias - norm.running_mean) * gain + (0 if norm.bias is None else norm.bias.detach())
    return Layer(
        name,
        weight,
        bias,
        gain,
        convolution,
        tuple(inputs.shape[1:]),
        tuple(output.shape[1:]),
        activation_of(after),
    )


def _pixel_map(first_input: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, offset) of the map from pixels to the first layer's input, seen on images of 0, 1 and noise."""
    if first_input[0].numel() != noise.numel():
        raise NotInvertibleError("the first layer does not see each pixel once")
    zeros, ones, seen = (one.reshape(noise.shape) for one in first_input)
    if not bool((ones - zeros).all()):
        raise NotInvertibleError("the first layer does not see some of the pixels")
    if not torch.allclose(zeros + (ones - zeros) * noise, seen):
        raise NotInvertibleError("the first layer does not see single pixels")
    return ones - zeros, zeros


def _logits(row: Row, image: Tensor) -> Tensor:
    """(K,) of one image (C, H, W)."""
    a = (row.offset + row.scale * image)[None]
    for layer in row.layers:
        z = layer.forward(a.reshape(1, *layer.input_shape)) + layer.shaped_bias
        a = layer.activation.forward(z)
    return a[0]
