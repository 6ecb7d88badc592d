"""What clients of a chunk let out."""

import dataclasses

import pytest
import torch

from bench.cases.scenario import Block, Grid
from bench.run import plan, weights_sha256
from bench.work import observe


@pytest.mark.parametrize(
    "defense",
    ["none", "mixup", "quantization", "pruning", "sign_sgd", "label_smoothing+quantization(bits=4)"],
)
def test_the_head_computed_alone_is_the_head_of_the_whole_update(defense):
    block = Block(
        dataset=["mnist5k"], model=["fcn(depth=2, width=16)"], defense=[defense], attacks=["idlg"], samples=3
    )
    grid = Grid(name="heads", blocks=[block])
    planned = plan(grid, grid, None, "cpu")
    weights = {network: weights_sha256(network, None) for network in planned.networks.values()}
    (chunk,) = planned.chunks(weights)
    assert chunk.reads == "head"
    alone = observe(chunk, planned.context).observations
    whole = observe(dataclasses.replace(chunk, reads="all"), planned.context).observations
    for one, other in zip(alone, whole, strict=True):
        assert set(one.update) == {"head.weight", "head.bias"} < set(other.update)
        for name, value in one.update.items():
            assert torch.allclose(value, other.update[name], rtol=1e-5, atol=1e-7)
