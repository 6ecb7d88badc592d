"""The head of a network after λ: its input, and the gradient by the logits, with what can be said of both."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.solvers.layers import NotInvertibleError
from attacks.solvers.recover import recover_soft_label


@dataclass(frozen=True, eq=False)
class Head:
    """What λ gives, in float64.

    Attributes:
        soft_labels: (K,), in the gradient's dtype, or None.
        features: (D,), the head's input.
        u: (K,), the gradient by the logits: ∇b, or ∇W f / ‖f‖²; p - y would lose digits to cancellation.
        noise: the share of ∇W that is not u fᵀ: rounding, or noise.
        doubt: why the λ solver doesn't stand for its answer; empty where it does.
        notes: format and λ, for the record.
    """

    soft_labels: Tensor | None
    features: Tensor
    u: Tensor
    noise: float
    doubt: str
    notes: dict[str, float | str]


def recover_head(
    weight_gradient: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    bias_gradient: Tensor | None,
    label_format: str | None,
) -> Head:
    """The head's input from its own gradient.

    Args:
        weight_gradient: (K, D).
        weight: (K, D).
        bias: (K,), where it has one.
        bias_gradient: (K,), where it was sent.
        label_format: where it is known.

    Raises:
        NotInvertibleError: nothing was sent, or no input is found.
    """
    if weight_gradient is None:
        raise NotInvertibleError("the head's gradient was not sent")
    found = recover_soft_label(weight_gradient, weight, bias, bias_gradient, label_format=label_format)
    doubt = "" if found.outcome == "ok" else f"the label: {found.reason}"
    if found.features is None:
        raise NotInvertibleError(doubt)
    features, sent = found.features.double(), weight_gradient.double()
    u = sent @ features / features.square().sum() if bias_gradient is None else bias_gradient.double()
    if not 0 < float(u.square().sum()) < float("inf"):
        raise NotInvertibleError("no gradient at the head: p = y, or its input is zero")
    left = torch.linalg.matrix_norm(sent - torch.outer(u, features))
    noise = float(left / torch.linalg.matrix_norm(sent))
    notes = {"label_format": found.label_format, "lam": float(found.lam), "row": int(found.row)}
    return Head(found.soft_labels, features, u, noise, doubt, notes)
