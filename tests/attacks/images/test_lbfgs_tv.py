"""L-BFGS with total variation: inside the box, and better than the start."""

import pytest
import torch
from torch import nn

from attacks.images.lbfgs_tv import LBFGSTV


@pytest.mark.parametrize("layers", ["whole", "by_tensor"])
@pytest.mark.parametrize("line_search", ["none", "wolfe"])
def test_it_sees_more_than_the_mean_colour(observe, small_net, smooth_picture, layers, line_search):
    observed = observe(small_net(), smooth_picture, torch.eye(4)[:1])
    attack = LBFGSTV(iterations=150, labels="idlg", tv=1e-4, layers=layers, line_search=line_search)
    found = attack.run(observed, torch.Generator())
    error = (found.images - smooth_picture).square().mean()
    assert error < 0.25 * smooth_picture.var(dim=(2, 3), correction=0).mean()


def test_where_no_lower_point_is_found_the_notes_say_so(observe, small_net, smooth_picture):
    observed = observe(small_net(nn.ReLU()), smooth_picture, torch.eye(4)[:1])
    found = LBFGSTV(iterations=2000, labels="joint", line_search="wolfe").run(observed, torch.Generator())
    assert found.notes["stopped"] == "no lower point"
    assert found.notes["iterations"] < 2000


def test_a_weight_below_zero_is_refused():
    with pytest.raises(ValueError, match=r"tv=-1.* is not"):
        LBFGSTV(tv=-1.0)
