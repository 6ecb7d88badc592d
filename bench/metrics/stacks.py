"""The metrics of a stack of trials at once: what `score` gives one by one, for less than a tenth of its time.

M = trials, N = batch size, K = classes, D = width of the head's input.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench.metrics import COLUMNS, UNANSWERED, label_columns, score
from bench.metrics.features import feature_cosine, feature_error
from bench.metrics.labels import top1
from bench.threat import Batch, Reconstruction

Columns = dict[str, float | bool | None]


@dataclass(frozen=True, eq=False)
class Truth:
    """What an answer is measured against; `pool` holds images among which its own may be told."""

    released: Batch
    private: Batch
    features: Tensor  # (N, D)
    pool: Tensor | None = field(default=None, kw_only=True)  # (P, C, H, W)


def scores(
    answers: Sequence[Reconstruction], truths: Sequence[Truth], produces: frozenset[str]
) -> list[Columns]:
    """The columns of each trial. Labels and features of single examples are measured together."""
    columns: list[Columns] = [{} for _ in answers]
    alike: dict[tuple[object, ...], list[int]] = {}
    for at, (answer, truth) in enumerate(zip(answers, truths, strict=True)):
        if _is_single(answer, truth):
            parts = (answer.soft_labels, answer.features)
            kind = tuple(None if part is None else (part.dtype, part.shape) for part in parts)
            alike.setdefault(kind, []).append(at)
        else:
            columns[at] = score(
                answer.soft_labels,
                answer.features,
                answer.images,
                released=truth.released,
                private=truth.private,
                true_features=truth.features,
                produces=produces,
                pool=truth.pool,
            )
    for places in alike.values():
        together = _together([answers[at] for at in places], [truths[at] for at in places], produces)
        for at, found in zip(places, together, strict=True):
            columns[at] = found
    return columns


def _is_single(answer: Reconstruction, truth: Truth) -> bool:
    """Whether nothing has to be matched, and each part has its truth's shape."""
    labels, features = answer.soft_labels, answer.features
    return (
        answer.images is None
        and labels is not None
        and len(truth.released) == len(truth.private) == 1
        and labels.shape == truth.released.soft_labels.shape
        and (features is None or features.shape == truth.features.shape)
    )


def _together(
    answers: Sequence[Reconstruction], truths: Sequence[Truth], produces: frozenset[str]
) -> list[Columns]:
    """As `score`, of answers of one kind."""
    device = truths[0].released.soft_labels.device
    labels = _stacked([answer.soft_labels for answer in answers], device)  # (M, 1, K)
    features = _stacked([answer.features for answer in answers], device)  # (M, 1, D)
    assert labels is not None
    released = torch.stack([truth.released.soft_labels for truth in truths])
    private = torch.stack([truth.private.soft_labels for truth in truths])
    values = label_columns(labels, released) | {"private_top1": top1(labels, private)}
    if features is not None:
        true = torch.stack([truth.features for truth in truths])
        values["feature_error"] = feature_error(features, true)
        values["feature_cosine"] = feature_cosine(features, true)
    columns: Columns = dict.fromkeys(COLUMNS)
    for part in sorted(produces | {"soft_labels"}):
        columns |= UNANSWERED[part]
    numbers = torch.stack([value.double() for value in values.values()], dim=1).tolist()
    return [columns | _recorded(values, row) for row in numbers]


def _stacked(parts: Sequence[Tensor | None], device: torch.device) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.stack(there).to(device) if there else None


def _recorded(names: Iterable[str], row: Sequence[float]) -> Columns:
    found: Columns = {
        name: number if math.isfinite(number) else None for name, number in zip(names, row, strict=True)
    }
    return found | {"success": found["success"] == 1}
