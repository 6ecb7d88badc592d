"""What clients of a chunk let out."""

import dataclasses

import pytest
import torch

from bench.cases.scenario import Block, Grid
from bench.run import plan, weights_sha256
from bench.work import POOL, observe
from defenses.graddefense import GradDefense


def chunk_and_context(**axes):
    """The one chunk of a small grid of a label attack."""
    block = Block(dataset=["mnist5k"], model=["fcn(depth=2, width=16)"], attacks=["idlg"], samples=3, **axes)
    grid = Grid(name="small", blocks=[block])
    planned = plan(grid, grid, None, "cpu")
    weights = {network: weights_sha256(network, None) for network in planned.networks.values()}
    (chunk,) = planned.chunks(weights)
    return chunk, planned.context


@pytest.mark.parametrize(
    "defense",
    ["none", "mixup", "quantization", "pruning", "sign_sgd", "label_smoothing+quantization(bits=4)"],
)
def test_the_head_computed_alone_is_the_head_of_the_whole_update(defense):
    chunk, context = chunk_and_context(defense=[defense])
    assert chunk.reads == "head"
    alone = observe(chunk, context).observations
    whole = observe(dataclasses.replace(chunk, reads="all"), context).observations
    for one, other in zip(alone, whole, strict=True):
        assert set(one.update) == {"head.weight", "head.bias"} < set(other.update)
        for name, value in one.update.items():
            assert torch.allclose(value, other.update[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "protocol", ["fedsgd", "rounds(count=3)", "fedavg(steps=1, lr=0.5)", "secure_aggregation(clients=1)"]
)
def test_features_that_are_drawn_are_those_of_the_update(protocol):
    """PRECODE draws ε with every gradient: ∇W = (p - y) xᵀ holds for the x of that one alone."""
    chunk, context = chunk_and_context(defense=["precode(width=8)"], protocol=[protocol])
    observed = observe(chunk, context)
    for seen, truth in zip(observed.observations, observed.truths, strict=True):
        sent = seen.update[f"{seen.head}.weight"] / (-0.5 if protocol.startswith("fedavg") else 1)
        gradient = torch.outer(truth.u[0], truth.features[0].double())
        assert torch.allclose(sent.double(), gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("protocol", ["fedsgd", "fedavg(steps=2, lr=0.1)"])
def test_a_defense_of_the_gradient_meets_what_else_the_client_holds(protocol, monkeypatch):
    seen = []

    def gradient(self, client, batch, rng):
        seen.append((client.pool, batch))
        return client.gradient(batch)

    monkeypatch.setattr(GradDefense, "gradient", gradient)
    chunk, context = chunk_and_context(defense=["graddefense"], protocol=[protocol])
    observe(chunk, context)
    assert len(seen) == 3 * (1 + protocol.startswith("fedavg"))
    for pool, batch in seen:
        assert len(pool) == POOL
        assert not (pool.images == batch.images).flatten(1).all(dim=1).any()
