"""The entry points: soft label and feature of one example, or of a stack, from the last layer's gradient."""

from __future__ import annotations

import difflib

import torch
from torch import Tensor

from attacks.solvers.closed_form import MAY_BE_SCALED, recover_from_bias_gradient
from attacks.solvers.exact import recover_exactly
from attacks.solvers.label_models import MOST_SPIKES, Granted
from attacks.solvers.published import recover_as_published
from attacks.solvers.reduction import require_finite
from attacks.solvers.solution import (
    FORMATS,
    OK,
    SoftLabelSolution,
    empty_stack,
    only_example,
    ordinary,
    with_rows,
)

SEARCHES = ("exact", "lbfgs", "pso", "paper")


def recover_soft_label(
    weight_gradient: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    bias_gradient: Tensor | None = None,
    *,
    label_format: str | None = None,
    search: str = "exact",
    noise_std: float | None = None,
    epsilon: float | None = None,
    mixing: float | None = None,
) -> SoftLabelSolution:
    """Recover the soft label and the last layer's input of one example (Wang, Liang, He, ICLR 2024).

    The loss is cross-entropy on softmax(W x + b) with a label y that sums to one, so that ∇W = (p - y) xᵀ.
    Then x = λ ∇W[row] for one scalar λ = 1/(p_row - y_row), and y(λ) follows (arXiv 2402.03124, section 4).

    Args:
        weight_gradient: ∇W of the last layer, (K, D).
        weight: W, (K, D).
        bias: b, (K,); None where the layer has none.
        bias_gradient: ∇b, (K,): makes the answer a closed form, for any label.
        label_format: where it is known, one of "hard", "smoothing", "mixup", "smoothed_mixup", "k_mix",
            "smoothed_k_mix"; None finds it.
        search: "exact", or as published: "lbfgs", "pso", or "paper" (one after the other).
        noise_std: standard deviation of the noise on each entry of the gradient; None estimates it, 0 is
            rounding alone.
        epsilon: the smoothing where it is known, in [0, 1].
        mixing: the weight of one of two mixed labels where it is known, in [0, 1].

    Returns:
        The solution, on the inputs' device and dtype. Where the gradient does not determine the answer, its
        outcome is "unidentifiable" and its reason says why.

    Raises:
        ValueError: an input is mis-shaped, not finite, or out of range.
    """
    _require(weight_gradient.dim() == 2, f"weight_gradient must be (K, D), got {_shape(weight_gradient)}")
    if bias_gradient is not None:
        _require(bias_gradient.dim() == 1, f"bias_gradient must be (K,), got {_shape(bias_gradient)}")
    stack = recover_soft_labels(
        weight_gradient[None],
        weight,
        bias,
        None if bias_gradient is None else bias_gradient[None],
        label_format=label_format,
        search=search,
        noise_std=noise_std,
        epsilon=epsilon,
        mixing=mixing,
    )
    return only_example(stack)


def recover_soft_labels(
    weight_gradient: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    bias_gradient: Tensor | None = None,
    *,
    label_format: str | None = None,
    search: str = "exact",
    noise_std: float | None = None,
    epsilon: float | None = None,
    mixing: float | None = None,
) -> SoftLabelSolution:
    """Recover M separate examples on one model at once; otherwise as `recover_soft_label`.

    Args:
        weight_gradient: ∇W of each example, (M, K, D).
        weight: W, (K, D).
        bias: b, (K,).
        bias_gradient: ∇b of each example, (M, K).
        label_format: as in `recover_soft_label`; it holds for all examples, like all that follows.
        search: as in `recover_soft_label`.
        noise_std: as in `recover_soft_label`.
        epsilon: as in `recover_soft_label`.
        mixing: as in `recover_soft_label`.

    Returns:
        One solution with a leading M; its strings are lists. Rows without an answer are NaN.
    """
    _check(weight_gradient, weight, bias, bias_gradient)
    _check_choice("label_format", label_format, FORMATS)
    _check_choice("search", search, SEARCHES)
    _require(search is not None, "search is None; the known ones are " + ", ".join(SEARCHES))
    for name, value in (("epsilon", epsilon), ("mixing", mixing)):
        _require(value is None or 0 <= value <= 1, f"{name}={value} is not in [0, 1]")
    _require(
        noise_std is None or 0 <= noise_std < float("inf"), f"noise_std={noise_std} is not ≥ 0 and finite"
    )
    if len(weight_gradient) == 0:
        return empty_stack(weight)
    granted = Granted(label_format, epsilon, mixing)
    with torch.inference_mode():  # a seventh faster than no_grad, where small operations are all there is
        found = _recover(weight_gradient, weight, bias, bias_gradient, search, noise_std, granted)
    return ordinary(found)


def _recover(
    weight_gradient: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bias_gradient: Tensor | None,
    search: str,
    noise_std: float | None,
    granted: Granted,
) -> SoftLabelSolution:
    if bias_gradient is None and search == "exact":
        require_finite(bias=bias)  # the reduction looks at the others, as it reads them
        return recover_exactly(weight_gradient, weight, bias, noise_std, granted)
    require_finite(weight_gradient=weight_gradient, weight=weight, bias=bias, bias_gradient=bias_gradient)
    if bias_gradient is not None:
        found = recover_from_bias_gradient(
            weight_gradient, weight, bias, bias_gradient, noise_std, MOST_SPIKES
        )
        return found if search != "exact" else _unless_scaled(found, weight_gradient, weight, bias, noise_std)
    return recover_as_published(weight_gradient, weight, bias, granted.label_format, search, noise_std)


def _unless_scaled(
    found: SoftLabelSolution,
    weight_gradient: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    noise_std: float | None,
) -> SoftLabelSolution:
    """Where ∇b, taken for p - y, leaves a label of no structure or of many spikes: λ's answer, if simpler.

    A clipped gradient, or one times a client's learning rate, looks like that. λ doesn't need its scale.
    """
    complexity = [
        len(_COMPLEXITY) if reason in MAY_BE_SCALED else _COMPLEXITY[kind] if outcome == OK else -1
        for outcome, reason, kind in zip(found.outcome, found.reason, found.label_format, strict=True)
    ]
    loose = [m for m, own in enumerate(complexity) if own >= _COMPLEXITY["k_mix"]]
    if not loose:
        return found
    free = recover_exactly(weight_gradient[loose], weight, bias, noise_std, Granted(None, None, None))
    simpler = {
        m: at
        for at, m in enumerate(loose)
        if free.outcome[at] == OK and _COMPLEXITY[free.label_format[at]] < complexity[m]
    }
    return with_rows(found, free, simpler)


_COMPLEXITY = {kind: at for at, kind in enumerate((*FORMATS, "any"))}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _check_choice(name: str, value: str | None, known: tuple[str, ...]) -> None:
    if value is None or value in known:
        return
    near = difflib.get_close_matches(str(value), known, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"unknown {name} {value!r}; {hint}the known ones are {', '.join(known)}")


def _check(
    weight_gradient: Tensor, weight: Tensor, bias: Tensor | None, bias_gradient: Tensor | None
) -> None:
    _require(weight.dim() == 2, f"weight must be (K, D), got {_shape(weight)}")
    num_classes, width = weight.shape
    _require(num_classes >= 2 and width >= 1, f"weight {_shape(weight)} needs two classes and one feature")
    _require(
        weight_gradient.dim() == 3 and weight_gradient.shape[1:] == weight.shape,
        f"weight_gradient {_shape(weight_gradient[0] if len(weight_gradient) else weight_gradient)} "
        f"doesn't match weight {_shape(weight)}",
    )
    if bias is not None:
        _require(bias.shape == (num_classes,), f"bias must be ({num_classes},), got {_shape(bias)}")
    if bias_gradient is not None:
        _require(
            bias_gradient.shape == weight_gradient.shape[:2],
            f"bias_gradient must be ({num_classes},) an example, got {_shape(bias_gradient)}",
        )
    given = {
        "weight_gradient": weight_gradient,
        "weight": weight,
        "bias": bias,
        "bias_gradient": bias_gradient,
    }
    for name, tensor in given.items():
        if tensor is None:
            continue
        _require(tensor.is_floating_point(), f"{name} is {tensor.dtype}, not floating point")
        _require(tensor.dtype == weight.dtype, f"{name} is {tensor.dtype}, weight is {weight.dtype}")
        _require(tensor.device == weight.device, f"{name} is on {tensor.device}, weight on {weight.device}")
