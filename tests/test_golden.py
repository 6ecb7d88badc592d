"""What attacks, defenses and the suite gave when their revision was last raised.

An output that changes without a new revision would mix two things under one name in published records. So
each revision's figures are kept in golden.json; where one isn't there yet,

    python tests/test_golden.py

adds it, after looking at what changed. Figures are compared within a tolerance: machines round differently.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from bench.cases import models
from bench.cases.client import FedSGDClient
from bench.cases.scenario import Block, Grid
from bench.registry import attacks, defenses
from bench.report.record import METRICS
from bench.run import InProcess, plan, weights_sha256
from bench.threat import Batch, Facts, Knowledge, Observation, grant, mask
from bench.work import PROTOCOL_VERSION

GOLDEN = Path(__file__).with_name("golden.json")
CLASSES, SHAPE, WIDTH = 5, (1, 8, 8), 32


def batch(n: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(torch.rand(n, *SHAPE, generator=generator), torch.eye(CLASSES)[torch.arange(n) % CLASSES])


def client(bias: bool) -> FedSGDClient:
    return FedSGDClient(models.build(f"fcn(depth=2, width={WIDTH}, bias={bias})", SHAPE, CLASSES, seed=3))


def figures(tensors: list[torch.Tensor | None]) -> list[float]:
    """Three numbers a tensor, which see its size, spread and order."""
    found = []
    for tensor in tensors:
        if tensor is not None:
            flat = tensor.detach().double().flatten()
            ramp = torch.cos(torch.arange(len(flat), dtype=torch.float64))
            found += [float(flat.mean()), float(flat.norm()), float(flat @ ramp)]
    return found


def of_attack(name: str) -> tuple[str, list[float]]:
    attack = attacks.make(name)
    if "iterations" in {field.name for field in dataclasses.fields(attack)}:
        attack = dataclasses.replace(attack, iterations=2)
    found = []
    for bias in (False, True):
        for n in (1, 2):
            for protocol in ("fedsgd", "head_withheld"):
                held, private = client(bias), batch(n, seed=0)
                granted = attack.uses & {"soft_labels", "auxiliary", "defense"}
                everything = Knowledge(
                    soft_labels=private.soft_labels, auxiliary=batch(20, seed=1), defense="none"
                )
                facts = Facts(n, CLASSES, SHAPE, WIDTH, bias, True, protocol, frozenset(granted))
                if attack.skip(facts) is None:
                    update = mask(held.gradient(private), held.head, attack.reads)
                    if protocol == "head_withheld":
                        update = {k: v for k, v in update.items() if not k.startswith(f"{held.head}.")}
                    seen = Observation(held.model, update, held.head, facts, grant(everything, granted))
                    answer = attack.run(seen, torch.Generator().manual_seed(7))
                    found += figures([answer.soft_labels, answer.features, answer.images])
    return attacks.revision(name), found


def of_defense(name: str) -> tuple[str, list[float]]:
    defense, rng = defenses.make(name), torch.Generator().manual_seed(7)
    held = FedSGDClient(defense.prepare(client(bias=True).model, rng).eval())
    released = defense.change_batch(batch(2, seed=0), batch(6, seed=1), rng)
    held = dataclasses.replace(held, pool=batch(6, seed=1))
    sent = defense.change_update(held, defense.gradient(held, released, rng), rng)
    return defenses.revision(name), figures([released.images, released.soft_labels, *sent.values()])


def of_protocol(name: str) -> tuple[str, list[float]]:
    """Every metric of a tiny grid: data, weights, client, defenses' seeds and metrics in one."""
    del name
    block = Block(
        dataset=["mnist5k"],
        model=["fcn(depth=2, width=24)"],
        defense=["none", "mixup(low=0.1, high=0.9)"],
        attacks=["lambda_recovery", "inverting_gradients(iterations=2)"],
        samples=2,
    )
    grid = Grid(name="golden", blocks=[block])
    planned = plan(grid, grid, None, "cpu")
    weights = {network: weights_sha256(network, None) for network in planned.networks.values()}
    rows = [row for _, part in InProcess().rows(planned.chunks(weights), planned.context) for row in part]
    metrics = [getattr(row, metric) for row in rows for metric in METRICS if "lpips" not in metric]
    revisions = [attacks.revision(spec) for spec in block.attacks]  # on which their seeds depend
    return f"{PROTOCOL_VERSION} with {', '.join(revisions)}", [
        float(value) for value in metrics if value is not None
    ]


KINDS = {
    "attack": (attacks.names, of_attack),
    "defense": (defenses.names, of_defense),
    "protocol": (lambda: ["suite"], of_protocol),
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in KINDS[kind][0]()])
def test_gives_what_its_revision_gave(kind, name):
    revision, found = KINDS[kind][1](name)
    kept = json.loads(GOLDEN.read_text()).get(f"{kind} {name}", {})
    assert revision in kept, f"revision {revision} is new: look what changed, then run tests/test_golden.py"
    assert found == pytest.approx(kept[revision], rel=1e-3, abs=1e-4), (
        f"{name} gives something else than revision {revision} gave: raise its revision"
    )


def test_keeps_nothing_of_what_is_gone():
    assert json.loads(GOLDEN.read_text()).keys() == {f"{k} {name}" for k in KINDS for name in KINDS[k][0]()}


def add_what_is_new() -> None:
    torch.set_num_threads(1)
    kept = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    for kind, (names, give) in KINDS.items():
        for name in names():
            revision, found = give(name)
            of = kept.setdefault(f"{kind} {name}", {})
            of.setdefault(revision, [float(f"{value:.6g}") for value in found])
    GOLDEN.write_text(
        json.dumps(dict(sorted(kept.items())), separators=(",", ":")).replace('},"', '},\n"') + "\n"
    )


if __name__ == "__main__":
    add_what_is_new()
