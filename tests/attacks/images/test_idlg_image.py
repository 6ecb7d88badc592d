"""iDLG's image is DLG's with its label known beforehand."""

import torch
from torch import nn

from attacks.images.idlg_image import IDLGImage


def test_the_label_comes_from_signs_and_the_image_from_matching(observe, small_net, smooth_picture):
    observed = observe(small_net(nn.Sigmoid()), smooth_picture, torch.eye(4)[2:3])
    found = IDLGImage(iterations=150).run(observed, torch.Generator())
    assert torch.equal(found.soft_labels, torch.eye(4)[2:3])
    assert (found.images - smooth_picture).square().mean() < 1e-3


def test_it_builds_on_idlg():
    assert IDLGImage().builds_on == ("idlg",)
