"""Images brought into the same place: translation in whole pixels, by least squares.

Of all cyclic shifts the one is taken at which an image is nearest to a reference: where their correlation,
summed over channels, is greatest, by FFT. Rotation, scale and what moves in only a part of an image stay.
"""

import torch
from torch import Tensor


def shifted_towards(images: Tensor, reference: Tensor) -> Tensor:
    """Each image (..., C, H, W), shifted along its rows and columns, with what leaves coming in again.

    Args:
        images: (..., C, H, W).
        reference: what they are to be near to, of a shape that fits; an image that is as near where it is as
            anywhere else stays.
    """
    height, width = images.shape[-2:]
    spectrum = torch.fft.rfft2(images)
    towards = torch.fft.rfft2(reference) * spectrum.conj()
    correlation = torch.fft.irfft2(towards.sum(dim=-3), s=(height, width)).flatten(-2)
    gain = correlation - correlation.narrow(-1, 0, 1)
    # A shift has to gain more than the rounding of the transform.
    rounding = 100 * torch.finfo(images.dtype).eps * images.square().sum(dim=(-3, -2, -1))
    best = torch.where(gain.amax(dim=-1) > rounding, gain.argmax(dim=-1), 0)
    best = best.view(*best.shape, 1, 1)
    rows = (torch.arange(height, device=images.device).view(-1, 1) - best // width) % height
    columns = (torch.arange(width, device=images.device) - best % width) % width
    flat = (rows * width + columns).flatten(-2).unsqueeze(-2).expand(*images.shape[:-2], -1)
    return images.flatten(-2).gather(-1, flat).view_as(images)
