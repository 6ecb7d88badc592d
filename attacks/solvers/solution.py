"""What the solvers return, and the label formats that they tell apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FORMATS = ("hard", "smoothing", "mixup", "smoothed_mixup", "k_mix", "smoothed_k_mix")
"""The formats that can be granted. A solution may also say "any": a label without structure."""

OK, UNIDENTIFIABLE, STEP_LIMIT = "ok", "unidentifiable", "step_limit"

LABEL_TOLERANCE = 0.01
"""An answer counts as found where every entry of the label is within this of the truth."""


@dataclass(frozen=True, eq=False)
class SoftLabelSolution:
    """One example's label and last-layer feature, or M of them with a leading M (lists for strings).

    Args:
        outcome: "ok"; "unidentifiable" where the gradient does not determine the answer; "step_limit" where
            a published search ended without reaching its own criterion.
        reason: why an outcome is not "ok", or what there is to know about one that is; else empty.
        soft_labels: (K,), sums to one. The best guess where the outcome is not "ok"; None (a row of NaN in a
            stack) where there is none.
        features: (D,) the last layer's input x; None (NaN in a stack) as above.
        lam: λ of `row`: x = λ ∇W[row], λ = 1/(p_row - y_row).
        row: the row of ∇W with the largest norm.
        label_format: one of FORMATS, or "any" for a label without structure; "" where nothing was found.
        format_confidence: the weight of that format among those that were fitted, in [0, 1].
        lam_std: standard error of λ.
        label_std: standard error of the worst entry of the label.
        epsilon_interval: (2,) the smoothing ε = K·(the value that all other classes share), ± two errors.
        loss: what the search minimised: reduced χ² (exact), 1000·Var (published), 0 for a closed form.
    """

    outcome: Any  # str, or list[str] of a stack
    reason: Any
    soft_labels: Tensor | None
    features: Tensor | None
    lam: Tensor
    row: Tensor
    label_format: Any
    format_confidence: Tensor
    lam_std: Tensor
    label_std: Tensor
    epsilon_interval: Tensor
    loss: Tensor


def format_name(spikes: int, has_floor: bool) -> str:
    """The format of a label in which all but `spikes` classes share one value, zero unless `has_floor`."""
    plain, smoothed = {1: ("hard", "smoothing"), 2: ("mixup", "smoothed_mixup")}.get(
        spikes, ("k_mix", "smoothed_k_mix")
    )
    return smoothed if has_floor else plain


def only_example(stack: SoftLabelSolution) -> SoftLabelSolution:
    """The solution of a stack of one, without the leading dimension."""
    assert stack.soft_labels is not None
    assert stack.features is not None
    found = not bool(stack.soft_labels[0, 0].isnan())  # rows without an answer are NaN throughout
    found_features = not bool(stack.features[0, 0].isnan())
    return SoftLabelSolution(
        outcome=stack.outcome[0],
        reason=stack.reason[0],
        soft_labels=stack.soft_labels[0] if found else None,
        features=stack.features[0] if found_features else None,
        lam=stack.lam[0],
        row=stack.row[0],
        label_format=stack.label_format[0],
        format_confidence=stack.format_confidence[0],
        lam_std=stack.lam_std[0],
        label_std=stack.label_std[0],
        epsilon_interval=stack.epsilon_interval[0],
        loss=stack.loss[0],
    )


def empty_stack(weight: Tensor) -> SoftLabelSolution:
    """The solution of no example at all, for weights (K, D)."""
    none = torch.empty(0, dtype=weight.dtype, device=weight.device)
    return SoftLabelSolution(
        outcome=[],
        reason=[],
        soft_labels=none.reshape(0, weight.shape[0]),
        features=none.reshape(0, weight.shape[1]),
        lam=none,
        row=none.long(),
        label_format=[],
        format_confidence=none,
        lam_std=none,
        label_std=none,
        epsilon_interval=none.reshape(0, 2),
        loss=none,
    )


def ordinary(solution: SoftLabelSolution) -> SoftLabelSolution:
    """The same in tensors that autograd can work on, whatever mode they were made in."""
    fields = vars(solution).items()
    return SoftLabelSolution(**{k: v.clone() if isinstance(v, Tensor) else v for k, v in fields})


def concatenate(parts: list[SoftLabelSolution]) -> SoftLabelSolution:
    """One stack of several."""
    if len(parts) == 1:
        return parts[0]
    fields: dict[str, Any] = {}
    for name in SoftLabelSolution.__dataclass_fields__:
        values = [getattr(part, name) for part in parts]
        joined = [x for value in values for x in value] if isinstance(values[0], list) else torch.cat(values)
        fields[name] = joined
    return SoftLabelSolution(**fields)


def with_rows(
    stack: SoftLabelSolution, others: SoftLabelSolution, place: dict[int, int]
) -> SoftLabelSolution:
    """The stack, with the rows m of `place` taken from another: m -> which row of `others`."""
    if not place:
        return stack
    rows, sources = list(place), list(place.values())
    fields: dict[str, Any] = {}
    for name, value in vars(stack).items():
        other = getattr(others, name)
        if isinstance(value, list):
            fields[name] = [other[place[m]] if m in place else one for m, one in enumerate(value)]
        else:
            index = torch.tensor(rows, device=value.device)
            fields[name] = value.index_copy(0, index, other[sources])
    return SoftLabelSolution(**fields)
