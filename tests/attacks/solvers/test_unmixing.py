"""Two images from one: against mixes that are known."""

import pytest
import torch

from attacks.solvers.unmixing import filled, find_box, unmix


def rng():
    return torch.Generator(device="cpu").manual_seed(0)


def test_the_private_half_is_the_conditional_mean():
    """Of two normal variables with unit covariances: μ + w/(w² + v²) (mix - w μ - v μ')."""
    mean = torch.full((2, 3), 0.5, device="cpu")
    mean[1] = 0.4
    count, w = 4000, 0.7
    drawn = 0.05 * torch.randn(2, count, 3, generator=rng(), device="cpu") + mean[:, None]
    public, classes = drawn.reshape(-1, 3, 1, 1), torch.arange(2, device="cpu").repeat_interleave(count)
    mixed = torch.tensor([0.5, 0.45, 0.48], device="cpu")
    expected = mean[0] + w / (w**2 + (1 - w) ** 2) * (mixed - w * mean[0] - (1 - w) * mean[1])
    found = unmix(mixed[:, None, None], w, 0, 1, public, classes)
    assert torch.allclose(found.flatten(), expected, atol=0.01)


def test_a_class_without_spread_is_taken_out_exactly():
    first = torch.rand(50, 1, 4, 4, generator=rng(), device="cpu")
    second = torch.full_like(first, 0.25)
    classes = torch.arange(2, device="cpu").repeat_interleave(50)
    mixed = 0.6 * first[0] + 0.4 * second[0]
    found = unmix(mixed, 0.6, 0, 1, torch.cat([first, second]), classes)
    error = (found - first[0]).square().mean()
    assert error < 0.5 * (mixed - first[0]).square().mean()


@pytest.mark.parametrize(("top", "left", "high", "wide"), [(3, 5, 6, 4), (0, 0, 8, 8), (10, 2, 6, 5)])
def test_a_box_is_found_by_its_border_and_named_by_its_share(top, left, high, wide):
    rows, columns = torch.meshgrid(*[torch.arange(16, device="cpu") / 16] * 2, indexing="ij")
    image = torch.stack([rows, columns, (rows + columns) / 2]) / 2
    true = torch.zeros(16, 16, dtype=torch.bool, device="cpu")
    true[top : top + high, left : left + wide] = True
    pasted = torch.where(true, 1 - image, image)
    share = high * wide / 256
    inside, which = find_box(pasted, (1 - share, share))
    assert inside.equal(true)
    assert which == 1


def test_what_is_filled_continues_what_lies_around():
    rows, columns = torch.meshgrid(*[torch.arange(12, device="cpu") / 12] * 2, indexing="ij")
    ramp = (0.3 * rows + 0.6 * columns)[None]
    hole = torch.zeros(12, 12, dtype=torch.bool, device="cpu")
    hole[4:8, 3:9] = True
    broken = torch.where(hole, 0.0, ramp)
    assert torch.allclose(filled(broken, hole), ramp, atol=1e-3)  # a ramp is harmonic
