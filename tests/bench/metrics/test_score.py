"""A record's columns: what applies, what failed, and one matching for everything."""

import pytest
import torch

from bench.metrics import COLUMNS, EXACT_PSNR, score
from bench.metrics.images import lpips_available
from bench.threat import Batch

EVERYTHING = frozenset({"soft_labels", "features", "images"})


def batch(n, k=6, side=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(n, k, generator=generator)
    images = torch.rand(n, 3, side, side, generator=generator)
    return Batch(images, weights / weights.sum(dim=1, keepdim=True))


def features(n, seed=3):
    return torch.rand(n, 5, generator=torch.Generator().manual_seed(seed))


def filled(columns):
    return {name for name, value in columns.items() if value is not None}


@pytest.mark.parametrize("n", [1, 2, 7])
def test_the_truth_in_any_order_scores_perfectly(n):
    released, x = batch(n), features(n)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(n))
    found = score(released.soft_labels[order], x[order], released.images[order], released, released, x)
    assert tuple(found) == COLUMNS
    assert found["success"] is True
    for name in ("label_error", "label_l1", "feature_error", "mse", "private_mse"):
        assert found[name] == 0
    for name in ("top1", "class_existence", "class_counts", "class_counts_exact", "private_top1"):
        assert found[name] == 1
    assert found["feature_cosine"] == pytest.approx(1)
    assert found["ssim"] == pytest.approx(1)
    assert found["psnr"] is None  # an exact image has none
    assert found["lpips"] == found["private_lpips"]
    assert (found["lpips"] == 0) if lpips_available() else (found["lpips"] is None)


def test_an_exact_image_beside_an_inexact_one_counts_as_200_db():
    released = batch(2)
    images = released.images.clone()
    images[1] = (images[1] + 0.1).clamp(max=1)
    found = score(released.soft_labels, None, images, released, released, None)
    other = -10 * (images[1] - released.images[1]).double().square().mean().log10()
    assert found["psnr"] == pytest.approx((EXACT_PSNR + float(other)) / 2)
    assert found["psnr_8bit"] == pytest.approx(found["psnr"], abs=0.2)


def test_examples_with_one_label_are_matched_on_their_images():
    images = batch(4).images
    released = Batch(images, torch.eye(6)[[2, 2, 2, 2]])
    order = torch.tensor([2, 0, 3, 1])
    jitter = 1e-7 * torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    found = score(released.soft_labels + jitter, None, images[order], released, released, None)
    assert found["mse"] == 0


def test_images_follow_the_matching_of_the_labels():
    released = batch(3)
    wrong = released.images[[1, 2, 0]]  # right labels beside another example's images
    found = score(released.soft_labels, None, wrong, released, released, None)
    assert found["success"] is True
    assert found["mse"] == pytest.approx((wrong - released.images).double().square().mean().item())


@pytest.mark.parametrize("given", [{"images"}, {"features"}])
def test_without_labels_images_or_features_are_matched_themselves(given):
    released, x = batch(4), features(4)
    order = torch.tensor([3, 1, 0, 2])
    found = score(
        None,
        x[order] if "features" in given else None,
        released.images[order] if "images" in given else None,
        released,
        released,
        x,
    )
    assert (found["mse"] if "images" in given else found["feature_error"]) == 0
    assert found["success"] is None


def test_columns_that_do_not_apply_are_none():
    released = batch(1)
    assert filled(score(None, None, None, released, released, features(1))) == set()
    assert filled(score(released.soft_labels, None, None, released, released, None)) == {
        *("success", "label_error", "label_l1", "top1", "class_existence", "class_counts"),
        *("class_counts_exact", "private_top1"),
    }
    assert filled(score(None, features(1), None, released, released, features(1))) == {
        "feature_error",
        "feature_cosine",
    }
    assert filled(score(None, features(1), None, released, released, None)) == set()


def test_what_was_promised_and_not_returned_has_failed():
    released = batch(2)
    found = score(None, None, None, released, released, features(2), produces=EVERYTHING)
    assert {name: value for name, value in found.items() if value is not None} == {
        **{"success": False, "top1": 0, "class_existence": 0, "class_counts": 0, "class_counts_exact": 0},
        "private_top1": 0,
        "feature_cosine": 0,
        "identified": 0,
    }


@pytest.mark.parametrize("shape", [(1, 6), (3, 6), (2, 5), (2,), (0, 6), (2, 6, 1)])
def test_labels_of_another_shape_have_failed(shape):
    released = batch(2)
    found = score(torch.zeros(shape), None, None, released, released, None)
    assert found["success"] is False
    assert found["top1"] == 0
    assert found["label_error"] is None


def test_images_and_features_of_another_shape_have_no_error():
    released = batch(2)
    found = score(None, torch.zeros(2, 4), torch.zeros(2, 1, 12, 12), released, released, features(2))
    assert filled(found) == {"feature_cosine", "identified"}
    assert found["feature_cosine"] == found["identified"] == 0


def test_images_are_told_among_a_pool_after_matching():
    released, pool = batch(2), batch(4).images[2:]
    turned = released.images.flip(0)
    assert score(None, None, turned, released, released, None, pool=pool)["identified"] == 1
    assert score(None, None, pool, released, released, None, pool=pool)["identified"] == 0
    assert score(None, None, turned, released, released, None)["identified"] is None


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_values_that_are_not_finite_fail_and_never_crash(n, broken):
    released, x = batch(n), features(n)
    full = [torch.full_like(t, broken) for t in (released.soft_labels, x, released.images)]
    found = score(*full, released, released, x)
    assert found["success"] is False
    assert [found[name] for name in ("label_error", "label_l1", "feature_error", "mse", "psnr", "ssim")] == [
        None
    ] * 6
    assert [found[name] for name in ("top1", "class_counts", "feature_cosine", "private_top1")] == [0] * 4


def test_images_outside_of_the_range_are_clamped():
    released = Batch(torch.ones(1, 3, 12, 12), torch.eye(2)[[0]])
    assert score(None, None, torch.full((1, 3, 12, 12), 7.0), released, released, None)["mse"] == 0


def test_the_private_batch_is_scored_in_the_order_of_the_released_one():
    private = Batch(batch(3).images, torch.eye(6)[[4, 1, 2]])
    mixed = Batch(private.images * 0.5, 0.6 * private.soft_labels + 0.4 * private.soft_labels[[1, 2, 0]])
    order = torch.tensor([2, 0, 1])
    found = score(mixed.soft_labels[order], None, mixed.images[order], mixed, private, None)
    assert found["success"] is True
    assert found["private_top1"] == 1
    assert found["mse"] == 0
    assert found["private_mse"] == pytest.approx((private.images * 0.5).double().square().mean().item())


def test_a_private_batch_that_was_enlarged_is_matched_by_itself():
    released = Batch(batch(4).images, torch.eye(6)[[0, 1, 2, 3]])
    private = Batch(released.images[[2, 1]], released.soft_labels[[2, 1]])
    found = score(released.soft_labels, None, released.images, released, private, None)
    assert found["private_top1"] == 1
    assert found["private_mse"] == 0


def test_a_private_batch_larger_than_the_released_one_has_failed():
    private = batch(4)
    released = Batch(private.images[:2], private.soft_labels[:2])
    found = score(released.soft_labels, None, released.images, released, private, None)
    assert found["private_top1"] == 0
    assert found["private_mse"] is None
    assert found["success"] is True


def test_predictions_may_carry_a_graph():
    released = batch(1)
    predicted = released.soft_labels.clone().requires_grad_()
    assert score(predicted, None, None, released, released, None)["success"] is True
