"""Image metrics against closed forms; LPIPS against the figures that the right trunk gives."""

import math

import pytest
import torch

from bench.errors import UserError
from bench.metrics import images
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

needs_trunk = pytest.mark.skipif(
    not lpips_available(), reason="LPIPS's trunk is not in the cache: run `leakbench data lpips`"
)


def noise(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


def waves(shift, size):
    """S(shift)[c, i, j] = ½ + ½ sin(2π (i (c + 1) + 2 j + shift) / 16), (1, 3, size, size)."""
    c, i, j = (torch.arange(n, dtype=torch.float64) for n in (3, size, size))
    phase = i[None, :, None] * (c[:, None, None] + 1) + 2 * j[None, None, :] + shift
    return (0.5 + 0.5 * torch.sin(2 * math.pi * phase / 16)).float()[None]


@pytest.mark.parametrize("offset", [0.5, 0.1, 1e-4])
def test_a_constant_offset_has_its_square_as_mse(offset):
    true = noise(3, 3, 8, 8).double() * 0.5
    assert mse(true + offset, true).tolist() == pytest.approx([offset**2] * 3)
    assert psnr(true + offset, true).tolist() == pytest.approx([-20 * math.log10(offset)] * 3)


def test_an_exact_image_has_an_infinite_psnr():
    true = noise(2, 1, 4, 4)
    assert psnr(true, true).tolist() == [float("inf")] * 2


@pytest.mark.parametrize("channels", [1, 3])
def test_mse_and_psnr_are_scikit_image_s(channels):
    metrics = pytest.importorskip("skimage.metrics")
    true, predicted = noise(2, channels, 12, 14).double(), noise(2, channels, 12, 14).double().flip(3)
    for value, decibels, a, b in zip(
        mse(predicted, true), psnr(predicted, true), predicted.numpy(), true.numpy(), strict=True
    ):
        assert value.item() == pytest.approx(metrics.mean_squared_error(a, b))
        assert decibels.item() == pytest.approx(metrics.peak_signal_noise_ratio(b, a, data_range=1))


def test_8_bit_psnr_is_scikit_image_s_on_bytes():
    metrics = pytest.importorskip("skimage.metrics")
    true, predicted = noise(1, 3, 12, 14), noise(1, 3, 12, 14).flip(3)
    as_bytes = [(image * 255).round().to(torch.uint8).numpy() for image in (true, predicted)]
    expected = metrics.peak_signal_noise_ratio(*as_bytes, data_range=255)
    assert psnr_8bit(predicted, true).item() == pytest.approx(expected)


def test_8_bit_psnr_does_not_see_what_rounding_hides():
    true = (noise(2, 3, 4, 4) * 255).round() / 255
    assert psnr_8bit(true + 0.4 / 255, true).tolist() == [math.inf] * 2
    one_level = true.clone()
    one_level[0, 0, 0, 0] = (true[0, 0, 0, 0] * 255 - 1).abs() / 255
    assert psnr_8bit(one_level, true)[0].item() == pytest.approx(10 * math.log10(255**2 * 48))


def test_the_true_image_is_identified_where_it_is_nearer_than_the_pool_and_the_batch():
    true, pool = noise(3, 1, 4, 4)[:2], noise(3, 1, 4, 4)[2:]
    assert identified(true + 1e-3, true, pool).tolist() == [1, 1]
    assert identified(true.flip(0), true, pool).tolist() == [0, 0]
    assert identified(true.mean(dim=0, keepdim=True).expand(2, 1, 4, 4), true, pool).sum() <= 1
    assert identified(pool.expand(2, 1, 4, 4), true, pool).tolist() == [0, 0]
    assert identified(true, true, true[:1]).tolist() == [0, 1]  # a copy is in the pool


def test_distances_between_all_pairs_are_their_mse():
    predicted, true = noise(3, 1, 4, 4), noise(2, 1, 4, 4) * 0.5
    for row, first in enumerate(predicted):
        for column, second in enumerate(true):
            expected = mse(first[None], second[None]).item()
            assert image_distances(predicted, true)[row, column].item() == pytest.approx(expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_of_constant_images_is_that_of_their_means(channels):
    a, b, c1 = 0.25, 0.75, 0.01**2
    shape = (2, channels, 16, 16)
    expected = (2 * a * b + c1) / (a**2 + b**2 + c1)
    assert ssim(torch.full(shape, a), torch.full(shape, b)).tolist() == pytest.approx([expected] * 2)


def test_ssim_of_an_image_with_itself_is_one():
    assert ssim(noise(2, 3, 12, 14), noise(2, 3, 12, 14)).tolist() == pytest.approx([1, 1])


def test_ssim_of_one_window_follows_the_gaussian_by_hand():
    true, predicted = noise(1, 1, 11, 11).double(), noise(1, 1, 11, 11).double().flip(2) * 0.5
    offsets = torch.arange(-5, 6, dtype=torch.float64)
    line = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = torch.outer(line, line) / line.sum() ** 2
    x, y = predicted[0, 0], true[0, 0]
    mean_x, mean_y = (window * x).sum(), (window * y).sum()
    var_x, var_y = (window * x * x).sum() - mean_x**2, (window * y * y).sum() - mean_y**2
    covariance = (window * x * y).sum() - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    expected = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    expected /= (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    assert ssim(predicted, true).item() == pytest.approx(expected.item(), abs=1e-9)


def test_images_smaller_than_the_window_have_no_ssim():
    assert ssim(noise(2, 1, 10, 30), noise(2, 1, 10, 30)).isnan().tolist() == [True, True]


FIGURES = {
    32: (0.00704, 0.05267, 0.02816, 0.64210),
    64: (0.01363, 0.07986, 0.02744, 0.86191),
    128: (0.02317, 0.09584, 0.02716, 0.87021),
}


@needs_trunk
@pytest.mark.parametrize("size", FIGURES)
def test_lpips_gives_the_figures_of_the_right_trunk(size):
    first = waves(0, size)
    others = (waves(1, size), waves(4, size), 1 - first, torch.full_like(first, 0.5))
    found = [lpips_distance(other, first).item() for other in others]
    assert found == pytest.approx(FIGURES[size], abs=1e-5)


@needs_trunk
def test_a_grey_image_is_scored_as_its_repetition_over_the_channels():
    a, b = noise(2, 1, 40, 40), noise(2, 1, 40, 40).flip(3)
    repeated = lpips_distance(a.repeat(1, 3, 1, 1), b.repeat(1, 3, 1, 1))
    assert lpips_distance(a, b).tolist() == pytest.approx(repeated.tolist())


@needs_trunk
@pytest.mark.parametrize("side", [1, 28, 30, 31])
def test_small_images_have_a_perceptual_distance(side):
    black, white = torch.zeros(1, 1, side, side), torch.ones(1, 1, side, side)
    assert lpips_distance(black, black).item() == 0
    assert 0 < lpips_distance(black, white).item() < 2


@needs_trunk
def test_building_the_network_leaves_the_global_generator_alone():
    images._lpips_network.cache_clear()
    before = torch.get_rng_state()
    lpips_distance(waves(0, 32), waves(1, 32))
    assert torch.equal(torch.get_rng_state(), before)


def test_without_its_trunk_lpips_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setenv("LEAKBENCH_CACHE", str(tmp_path))
    assert not lpips_available()
    with pytest.raises(UserError, match="run `leakbench data lpips`"):
        lpips_distance(noise(1, 3, 32, 32), noise(1, 3, 32, 32))


def test_a_damaged_trunk_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setenv("LEAKBENCH_CACHE", str(tmp_path))
    (tmp_path / "lpips").mkdir()
    (tmp_path / "lpips" / "alexnet.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="remove it and run `leakbench data lpips`"):
        lpips_distance(noise(1, 3, 32, 32), noise(1, 3, 32, 32))
