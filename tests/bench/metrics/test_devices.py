"""Metrics stay on their inputs' device: no factory call without `device=`, no tensor of another device."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from bench.metrics import score
from bench.metrics.features import feature_cosine, feature_distances, feature_error
from bench.metrics.images import image_distances, lpips_available, lpips_distance, mse, psnr, ssim
from bench.metrics.labels import (
    class_counts,
    class_counts_exact,
    class_existence,
    label_distances,
    label_error,
    label_errors,
    label_l1,
    match,
    success,
    top1,
)
from bench.threat import Batch

FACTORIES = {
    *(torch.tensor, torch.as_tensor, torch.from_numpy, torch.zeros, torch.ones, torch.full, torch.empty),
    *(torch.arange, torch.linspace, torch.logspace, torch.eye, torch.rand, torch.randn, torch.randperm),
}
ON_VECTORS = [
    *(label_distances, label_errors, label_error, success, label_l1, top1),
    *(class_existence, class_counts, class_counts_exact),
    *(feature_distances, feature_error, feature_cosine),
]
ON_IMAGES = [image_distances, mse, psnr]


class FactoriesNameTheirDevice(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in FACTORIES and (kwargs or {}).get("device") is None:
            raise AssertionError(f"torch.{function.__name__} without device=")
        return function(*args, **(kwargs or {}))


@pytest.fixture
def pairs():
    generator = torch.Generator().manual_seed(0)
    vectors = torch.rand(2, 3, 7, generator=generator)
    images = torch.rand(2, 3, 3, 32, 32, generator=generator)
    return vectors, images


def test_the_watch_catches_a_factory_call():
    with FactoriesNameTheirDevice(), pytest.raises(AssertionError, match="zeros without device="):
        torch.zeros(3)


@pytest.mark.parametrize("metric", ON_VECTORS)
def test_factory_calls_of_vector_metrics_name_their_device(metric, pairs):
    with FactoriesNameTheirDevice():
        metric(*pairs[0])


@pytest.mark.parametrize("metric", [*ON_IMAGES, ssim])
def test_factory_calls_of_image_metrics_name_their_device(metric, pairs):
    with FactoriesNameTheirDevice():
        metric(*pairs[1])


def test_factory_calls_of_matching_and_score_name_their_device(pairs):
    vectors, images = pairs
    if lpips_available():
        lpips_distance(*images)  # its network is built, by the library's own factory calls
    first, second = Batch(images[0], vectors[0]), Batch(images[1], vectors[1])
    with FactoriesNameTheirDevice():
        assert sorted(match(label_distances(*vectors)).tolist()) == [0, 1, 2]
        assert ssim(images[0][..., :5], images[1][..., :5]).isnan().all()
        score(vectors[1], vectors[1], images[1], first, second, vectors[0])


@pytest.mark.parametrize(
    ("metric", "shape"), [*[(m, (3, 7)) for m in ON_VECTORS], *[(m, (3, 3, 32, 32)) for m in ON_IMAGES]]
)
def test_kernels_run_on_a_device_that_is_not_the_default(metric, shape):
    with FakeTensorMode():
        result = metric(torch.empty(shape, device="cuda"), torch.empty(shape, device="cuda"))
    assert result.device.type == "cuda"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_scores_on_a_gpu_are_those_on_the_cpu(pairs):
    vectors, images = pairs
    cpu = Batch(images[0], vectors[0])
    gpu = Batch(images[0].cuda(), vectors[0].cuda())
    on_cpu = score(vectors[1], vectors[1], images[1], cpu, cpu, vectors[0])
    on_gpu = score(vectors[1].cuda(), vectors[1].cuda(), images[1].cuda(), gpu, gpu, vectors[0].cuda())
    for name, value in on_cpu.items():
        assert on_gpu[name] == (value if value is None else pytest.approx(value, abs=1e-4)), name
