"""How near predicted images are to the true ones; all metrics give one value an example.

Images are (N, C, H, W), C = 1 or 3, in [0, 1] and in the truth's order (`labels.match`); `score` clamps
what an attack returns outside of the range.
"""

import warnings
from functools import lru_cache

import torch
from torch import Tensor, nn

from bench.cache import lpips_trunk_file
from bench.errors import UserError

SSIM_WINDOW = 11
LPIPS_LEAST = 31
"""AlexNet's pooling leaves nothing of an image with fewer pixels a side."""
LPIPS_ENLARGED = 32


def image_distances(predicted: Tensor, true: Tensor) -> Tensor:
    """MSE of every prediction (M, C, H, W) to every true image (N, C, H, W): (M, N), float64."""
    distances = torch.cdist(
        predicted.double().flatten(1), true.double().flatten(1), compute_mode="donot_use_mm_for_euclid_dist"
    )
    return distances.square() / true.shape[1:].numel()


def mse(predicted: Tensor, true: Tensor) -> Tensor:
    """Mean squared error, (N, C, H, W), (N, C, H, W) -> (N,), float64.

    >>> mse(torch.full((1, 1, 2, 2), 0.5), torch.zeros(1, 1, 2, 2)).tolist()
    [0.25]
    """
    return (predicted.double() - true.double()).square().flatten(1).mean(dim=1)


def psnr(predicted: Tensor, true: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, 10 log10(1 / MSE), (N, C, H, W), (N, C, H, W) -> (N,), float64.

    An image that is exact has no finite PSNR: it is infinite here, and null beside `mse` 0 in a record.

    >>> psnr(torch.full((1, 1, 2, 2), 0.1), torch.zeros(1, 1, 2, 2)).round(decimals=4).tolist()
    [20.0]
    """
    return -10 * mse(predicted, true).log10()


def psnr_8bit(predicted: Tensor, true: Tensor) -> Tensor:
    """PSNR after rounding both to 256 levels, as a saved PNG has it, (N, C, H, W), (N, C, H, W) -> (N,).

    Infinite where all levels agree; else at most 10 log10(255² · C · H · W), one level off in one entry.

    >>> psnr_8bit(torch.full((1, 1, 2, 2), 0.001), torch.zeros(1, 1, 2, 2)).tolist()
    [inf]
    """
    return psnr(_rounded(predicted), _rounded(true))


def _rounded(images: Tensor) -> Tensor:
    return (images.double() * 255).round() / 255


def identified(predicted: Tensor, true: Tensor, pool: Tensor) -> Tensor:
    """Whether the true image is nearer by MSE than any of a pool: 0 or 1.

    (N, C, H, W), (N, C, H, W), (P, C, H, W) -> (N,), float64.

    What the others of the batch are like counts as well: a mean of the batch identifies no one. A tie, as
    with a copy of the true image in the pool, identifies no one either; chance gives 1 / (P + N).

    >>> black, grey, white = torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.4), torch.ones(1, 1, 2, 2)
    >>> identified(grey, black, pool=white).tolist(), identified(grey, white, pool=black).tolist()
    ([1.0], [0.0])
    """
    to_true = image_distances(predicted, true)  # (N, N)
    own = to_true.diagonal()
    of_others = to_true.masked_fill(torch.eye(len(true), dtype=torch.bool, device=true.device), torch.inf)
    others = torch.cat([of_others, image_distances(predicted, pool)], dim=1)
    return (own[:, None] < others).all(dim=1).double()


def ssim(predicted: Tensor, true: Tensor) -> Tensor:
    """Structural similarity by scikit-image, (N, C, H, W), (N, C, H, W) -> (N,), float64.

    As Wang et al. define it: a Gaussian window of 11 pixels (σ 1.5), `data_range=1`, biased covariances,
    the mean over channels; computed on the CPU. NaN for images with fewer than 11 pixels a side, which hold
    no window.
    """
    from skimage.metrics import structural_similarity

    if min(true.shape[2:]) < SSIM_WINDOW:
        return torch.full((len(true),), float("nan"), dtype=torch.float64, device=true.device)
    values = [
        structural_similarity(
            a, b, channel_axis=0, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        for a, b in zip(predicted.double().cpu().numpy(), true.double().cpu().numpy(), strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64, device=true.device)


def lpips_available() -> bool:
    """Whether LPIPS's trunk is in the user's cache (`leakbench data lpips` puts it there)."""
    return lpips_trunk_file().is_file()


def lpips_distance(predicted: Tensor, true: Tensor) -> Tensor:
    """LPIPS (AlexNet, version 0.1), (N, C, H, W), (N, C, H, W) -> (N,), float64; 0 for equal images.

    A grey image is repeated over the three channels; one with fewer than 31 pixels a side, on which AlexNet
    is not defined, is enlarged to 32 by bilinear interpolation. UserError where the trunk is not in the
    cache.
    """
    network = _lpips_network(str(lpips_trunk_file()), str(true.device))
    with torch.no_grad():
        distances: Tensor = network(_for_alexnet(predicted), _for_alexnet(true), normalize=True)
    return distances.flatten().double()


def _for_alexnet(images: Tensor) -> Tensor:
    """(N, 1 or 3, H, W) -> (N, 3, H', W'), float32."""
    images = images.float()
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    if min(images.shape[2:]) < LPIPS_LEAST:
        size = [max(side, LPIPS_ENLARGED) for side in images.shape[2:]]
        images = nn.functional.interpolate(images, size=size, mode="bilinear", align_corners=False)
    return images


@lru_cache(maxsize=4)
def _lpips_network(file: str, device: str) -> nn.Module:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from bench.torchvision_ops import ensure_importable

    advice = "run `leakbench data lpips`"
    try:
        trunk = load_file(file)
    except FileNotFoundError as error:
        raise UserError(f"LPIPS needs its trunk, and {file} is not there; {advice}") from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"LPIPS's trunk {file} cannot be read; remove it and {advice}") from error
    ensure_importable()
    import lpips

    # The trunk is drawn at random before it is replaced: the caller's generator must not notice; and
    # torchvision's advice on the arguments that lpips passes is not for our users.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        built = lpips.LPIPS(net="alex", version="0.1", pnet_rand=True, verbose=False)
    slots = dict(built.net.named_parameters())  # slice2.3.weight <- features.3.weight
    loaded = {name: trunk.get(f"features.{name.partition('.')[2]}") for name in slots}
    if any(loaded[name] is None or loaded[name].shape != slots[name].shape for name in slots):
        raise UserError(f"LPIPS's trunk {file} is not AlexNet's; remove it and {advice}")
    built.net.load_state_dict(loaded)
    network: nn.Module = built.to(device).eval().requires_grad_(False)
    return network
