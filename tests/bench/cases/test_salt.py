"""Under a salt clients hold other examples in another order, each changed by what only the salt tells."""

import numpy as np
import pytest
import torch

from bench.cases.data import attacked_order, load
from bench.cases.salt import salted


@pytest.fixture(scope="module")
def mnist():
    return load("mnist5k")


def test_the_same_salt_gives_the_same_and_another_one_other_examples(mnist):
    first, again, other = (salted(mnist, salt).pixels([0, 7]) for salt in ("a", "a", "b"))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert not torch.allclose(first, mnist.pixels([0, 7]))


def test_labels_and_the_split_stay_and_the_order_does_not(mnist):
    changed = salted(mnist, "a")
    assert torch.equal(changed.labels, mnist.labels)
    assert torch.equal(changed.held_out, mnist.held_out)
    own, public = attacked_order(changed, members=False), attacked_order(mnist, members=False)
    assert not torch.equal(own, public)
    assert torch.equal(own.sort().values, public.sort().values)


def test_an_example_does_not_depend_on_which_others_are_read_with_it(mnist):
    changed = salted(mnist, "a")
    together = changed.pixels([3, 4, 5])
    assert torch.allclose(together[1], changed.pixels([4])[0], atol=1e-6)
    assert changed.pixels([]).shape == (0, 1, 28, 28)


@pytest.mark.parametrize("name", ["mnist5k", "cifar10_samples"])
def test_an_example_stays_what_it_was_to_the_eye(name):
    dataset = load(name)
    spread = range(0, len(dataset), len(dataset) // 20)  # mnist5k is sorted by class
    before, after = dataset.pixels(spread), salted(dataset, "a").pixels(spread)
    assert after.shape == before.shape
    assert after.dtype == torch.float32
    assert 0 <= float(after.min()) <= float(after.max()) <= 1
    flat = [images.flatten(1) - images.flatten(1).mean(1, keepdim=True) for images in (before, after)]
    alike = torch.nn.functional.cosine_similarity(*flat, dim=1)
    strangers = torch.nn.functional.cosine_similarity(flat[0], flat[1].roll(1, 0), dim=1)
    assert float(alike.mean()) > 0.6 > 0.45 > float(strangers.mean())
    assert float((alike < 0.999).float().mean()) > 0.9  # none is there as it was


def test_images_from_floats_are_changed_alike(tmp_path):
    images = np.random.default_rng(0).random((20, 8, 8, 3), dtype=np.float32)
    np.savez(tmp_path / "own.npz", images=images, labels=np.arange(20) % 4)
    dataset = load(f"npz:{tmp_path / 'own.npz'}")
    assert salted(dataset, "a").pixels([1]).shape == (1, 3, 8, 8)
