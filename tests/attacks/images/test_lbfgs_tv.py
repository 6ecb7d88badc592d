"""L-BFGS with total variation: inside the box, and better than the start."""

import pytest
import torch
from torch import nn

from attacks.images.lbfgs_tv import LBFGSTV


@pytest.mark.parametrize("layers", ["whole", "by_tensor"])
@pytest.mark.parametrize("line_search", ["none", "wolfe"])
def test_it_sees_more_than_the_mean_colour(observe, small_net, smooth_picture, layers, line_search):
    observed = observe(small_net(), smooth_picture, torch.eye(4)[:1])
    attack = LBFGSTV(
        iterations=150, labels="idlg", tv=0.1, tv_end=1e-4, layers=layers, line_search=line_search
    )
    found = attack.run(observed, torch.Generator())
    error = (found.images - smooth_picture).square().mean()
    assert error < 0.25 * smooth_picture.var(dim=(2, 3), correction=0).mean()


def test_where_no_lower_point_is_found_the_notes_say_so(observe, small_net, smooth_picture):
    observed = observe(small_net(nn.ReLU()), smooth_picture, torch.eye(4)[:1])
    found = LBFGSTV(iterations=2000, labels="joint", line_search="wolfe").run(observed, torch.Generator())
    assert found.notes["stopped"] == "no lower point"
    assert found.notes["iterations"] < 2000


def test_the_weight_falls_by_one_factor_from_first_to_last(observe, small_net, smooth_picture):
    attack = LBFGSTV(iterations=4, tv=1.0, tv_end=0.0001, labels="joint")
    observed = observe(small_net(), smooth_picture, torch.eye(4)[:1])
    objective = attack._objective(observed, observed.update, None)
    striped = torch.tensor([0.0, 1.0]).repeat(1, 1, 3, 8, 4)
    function = attack._function(objective, torch.eye(4)[:1])
    penalties = torch.stack(
        [value.total - value.distance for value in (function((striped,)) for _ in range(5))]
    )
    torch.testing.assert_close(
        penalties[:, 0], penalties[0, 0] * 0.1 ** torch.arange(5.0), rtol=0.02, atol=1e-5
    )


def test_what_constant_weights_miss_in_a_short_search(observe, small_net, smooth_picture):
    observed = observe(small_net(nn.ReLU()), smooth_picture, torch.eye(4)[:1])
    errors = [
        (
            LBFGSTV(iterations=60, labels="idlg", tv=tv).run(observed, torch.Generator()).images
            - smooth_picture
        )
        .square()
        .mean()
        for tv in (0.01, 3.0)
    ]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("weights", [{"tv_end": 0.0}, {"tv_end": -1.0}, {"tv": 0.001}])
def test_a_weight_out_of_range_is_refused(weights):
    name, value = next(iter(weights.items()))
    with pytest.raises(ValueError, match=f"{name}={value} is not"):
        LBFGSTV(**weights)
