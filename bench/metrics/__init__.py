"""Metrics of one trial: `score` gives a record's columns from `labels`, `features` and `images`."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from bench.metrics.features import feature_cosine, feature_distances, feature_error
from bench.metrics.images import (
    identified,
    image_distances,
    lpips_available,
    lpips_distance,
    mse,
    psnr,
    psnr_8bit,
    ssim,
)
from bench.metrics.labels import (
    class_counts,
    class_counts_exact,
    class_existence,
    label_distances,
    label_error,
    label_l1,
    match,
    success,
    top1,
)
from bench.threat import Batch

COLUMNS = (
    *("success", "label_error", "label_l1", "top1", "class_existence", "class_counts", "class_counts_exact"),
    *("feature_error", "feature_cosine", "mse", "psnr", "psnr_8bit", "ssim", "lpips", "identified"),
    *("private_top1", "private_mse", "private_ssim", "private_lpips"),
)
"""What `score` fills; `lam_error` and `format_found` need an attack's notes and are the runner's."""
UNANSWERED: Mapping[str, Mapping[str, float | bool]] = {
    "soft_labels": {
        "success": False,
        "top1": 0.0,
        "class_existence": 0.0,
        "class_counts": 0.0,
        "class_counts_exact": 0.0,
        "private_top1": 0.0,
    },
    "features": {"feature_cosine": 0.0},
    "images": {"identified": 0.0},
}
"""The columns of something that an attack should have returned and didn't; its errors have no value."""
EXACT_PSNR = 200.0
"""In dB: what an exact image counts beside inexact ones of its batch."""

IMAGE_WEIGHT = 1e-3
"""What an image's mean squared error adds to a label's L1 distance: it decides among labels that agree."""


def score(
    soft_labels: Tensor | None,
    features: Tensor | None,
    images: Tensor | None,
    released: Batch,
    private: Batch,
    true_features: Tensor | None,
    produces: frozenset[str] = frozenset(),
    pool: Tensor | None = None,
) -> dict[str, float | bool | None]:
    """The metrics of one reconstruction under a record's column names; None where one doesn't apply.

    `soft_labels` (N, K), `features` (N, D) and `images` (N, C, H, W) are what an attack returned;
    `released` holds N examples, `true_features` (N, D) belong to it (None: not known). One matching with
    the released batch, on labels, then images (on features where there is neither), serves all metrics; a
    private batch of another size has its own. Images are clamped to [0, 1]; whether they identify their
    original is asked among `pool` (P, C, H, W), other images of its kind, where that is given.

    What was returned in another shape, or not at all although the attack `produces` it, has failed:
    `success` is False, shares (`top1`, `class_existence`, `class_counts`, `class_counts_exact`,
    `private_top1`, `feature_cosine`, `identified`) are 0, errors and image metrics None. So have images with
    any pixel that is not finite; labels and features fail row by row. A metric whose value is not finite is
    None: the error of a row with NaN, the PSNR of a batch with an exact image.
    """
    returned = {"soft_labels": soft_labels, "features": features, "images": images}
    columns: dict[str, float | bool | None] = dict.fromkeys(COLUMNS)
    for name, value in returned.items():
        if (value is not None or name in produces) and (name != "features" or true_features is not None):
            columns |= UNANSWERED[name]

    labels = _usable(soft_labels, released.soft_labels)
    codes = _usable(features, true_features)
    pictures = _in_range(_usable(images, released.images))
    order = private_order = None  # of a batch of one
    if len(released) > 1:
        order = _matched(labels, pictures, codes, released, true_features)
    if len(private) == len(released):
        private_order = order
    elif len(private) < len(released):
        private_order = _matched(labels, pictures, None, private, None)

    values: dict[str, Tensor] = {}
    if labels is not None:
        values |= label_columns(_ordered(labels, order), released.soft_labels)
    if codes is not None and true_features is not None:
        ordered = _ordered(codes, order)
        values["feature_error"] = feature_error(ordered, true_features)
        values["feature_cosine"] = feature_cosine(ordered, true_features)
    if pictures is not None:
        values |= _image_columns(_ordered(pictures, order), released.images)
        columns["identified"] = None
        if pool is not None:
            values["identified"] = identified(_ordered(pictures, order), released.images, pool).mean()
    if len(private) <= len(released):  # else some private example has no prediction
        if labels is not None:
            values["private_top1"] = top1(_ordered(labels, private_order), private.soft_labels)
        if pictures is not None and _same(private.images, released.images):
            values |= {f"private_{name}": values[name] for name in ("mse", "ssim", "lpips") if name in values}
        elif pictures is not None:
            values |= _private_image_columns(_ordered(pictures, private_order), private.images)
    columns |= _recorded(values)
    return columns


def _usable(returned: Tensor | None, true: Tensor | None) -> Tensor | None:
    """What an attack returned, on the truth's device; None where the shapes differ."""
    if returned is None or true is None or returned.shape != true.shape:
        return None
    return returned.detach().to(true.device)


def _in_range(images: Tensor | None) -> Tensor | None:
    """Clamped to [0, 1]; None where a pixel is not finite."""
    if images is None or not bool(torch.isfinite(images).all()):
        return None
    return images.clamp(0, 1)


def _matched(
    labels: Tensor | None,
    images: Tensor | None,
    features: Tensor | None,
    batch: Batch,
    true_features: Tensor | None,
) -> Tensor | None:
    """For each example of the batch its prediction, (N,); None where nothing tells."""
    if labels is not None:
        distances = label_distances(labels, batch.soft_labels)
        if images is not None:
            distances = distances + IMAGE_WEIGHT * image_distances(images, batch.images)
        return match(distances)
    if images is not None:
        return match(image_distances(images, batch.images))
    if features is not None and true_features is not None:
        return match(feature_distances(features, true_features))
    return None


def _ordered(predictions: Tensor, order: Tensor | None) -> Tensor:
    return predictions if order is None else predictions[order]


def _same(first: Tensor, second: Tensor) -> bool:
    return first is second or (first.shape == second.shape and torch.equal(first, second))


def label_columns(predicted: Tensor, true: Tensor) -> dict[str, Tensor]:
    """What is measured of labels in the truth's order, (..., N, K), (..., N, K) -> (...) each."""
    metrics = (success, label_error, label_l1, top1, class_existence, class_counts, class_counts_exact)
    return {metric.__name__: metric(predicted, true) for metric in metrics}


def _image_columns(predicted: Tensor, true: Tensor) -> dict[str, Tensor]:
    columns = {metric.__name__: metric(predicted, true).mean() for metric in (mse, ssim)}
    columns |= {metric.__name__: _mean_of_decibels(metric(predicted, true)) for metric in (psnr, psnr_8bit)}
    if lpips_available():
        columns["lpips"] = lpips_distance(predicted, true).mean()
    return columns


def _mean_of_decibels(values: Tensor) -> Tensor:
    """(N,) -> (); infinite where all images are exact, else at most `EXACT_PSNR` each."""
    exact = values.isposinf()
    return values.mean() if exact.all() else values.clamp(max=EXACT_PSNR).mean()


def _private_image_columns(predicted: Tensor, true: Tensor) -> dict[str, Tensor]:
    if predicted.shape != true.shape:
        return {}
    columns = {"private_mse": mse(predicted, true).mean(), "private_ssim": ssim(predicted, true).mean()}
    if lpips_available():
        columns["private_lpips"] = lpips_distance(predicted, true).mean()
    return columns


def _recorded(values: dict[str, Tensor]) -> dict[str, float | bool | None]:
    """Python's numbers, fetched from the device at once."""
    if not values:
        return {}
    numbers = torch.stack([value.double() for value in values.values()]).tolist()
    columns: dict[str, float | bool | None] = {
        name: number if math.isfinite(number) else None for name, number in zip(values, numbers, strict=True)
    }
    if "success" in columns:
        columns["success"] = columns["success"] == 1
    return columns
