"""Registration against shifts that are known."""

import pytest
import torch

from attacks.solvers.registration import shifted_towards


def pictures(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("size", [(8, 8), (7, 10)])
def test_shifted_copies_come_back_to_the_bit(size):
    image = pictures(3, *size)
    copies = torch.stack([image.roll(shift, dims=(1, 2)) for shift in [(0, 0), (1, 0), (-2, 3), (4, -1)]])
    assert torch.equal(shifted_towards(copies, image), image.expand_as(copies))


def test_what_is_equal_or_constant_stays():
    image = pictures(2, 3, 8, 8).float()
    assert torch.equal(shifted_towards(image, image), image)
    assert torch.equal(shifted_towards(image, torch.zeros_like(image)), image)
    assert torch.equal(shifted_towards(torch.ones_like(image), image), torch.ones_like(image))


def test_no_shift_is_nearer():
    images, reference = pictures(5, 3, 6, 6), pictures(8, 6, 6)[-3:]
    near = (shifted_towards(images, reference) - reference).square().sum(dim=(1, 2, 3))
    shifts = [(down, across) for down in range(6) for across in range(6)]
    distances = torch.stack(
        [(images.roll(s, dims=(2, 3)) - reference).square().sum(dim=(1, 2, 3)) for s in shifts]
    )
    torch.testing.assert_close(near, distances.amin(dim=0))
