"""Both sides of the comparison with breaching take the same path."""

import pandas as pd
import pytest

from bench.speed import images
from bench.torchvision_ops import ensure_importable


def test_starts_are_those_that_the_attack_draws():
    case = images.CASES[0]._replace(restarts=2, iterations=1)
    seen, _ = images.observe(case.model, 0)
    found = images.ours(seen, case, seed=5)
    drawn = images.starts(case, seed=5)
    assert len(drawn) == 2
    # A step is as long as `LR` in every pixel, unless the border of [0, 1] is nearer.
    assert any(((found - start).abs() <= images.LR + 1e-6).all() for start in drawn)
    assert not all(((found - start).abs() <= images.LR + 1e-6).all() for start in drawn)


def test_breachings_first_step_is_ours():
    ensure_importable()  # breaching imports torchvision
    pytest.importorskip("breaching")
    case = images.CASES[0]._replace(iterations=1)
    seen, _ = images.observe(case.model, 0)
    theirs, ours = (side(seen, case, 5) for side in (images.breachings, images.ours))
    inside = (..., slice(1, -1), slice(1, -1))  # total variation at the borders is another
    start = images.starts(case, 5)[0]  # theirs takes a thousandth of a step, by its rounded milestones
    same = (theirs - start).sign() == (ours - start).sign()
    assert same[inside].double().mean() > 0.99


def test_the_summary_has_the_ratio_of_times():
    case = images.CASES[0]
    common = {"model": case.model, "restarts": case.restarts, "iterations": case.iterations, "psnr": 20.0}
    rows = [
        common | {"image": image, "side": side, "seconds": 3.0 if side == "ours" else 12.0}
        for image in range(3)
        for side in images.SIDES
    ]
    assert "| 0.250 | 0.35 | 20.00 | 20.00 | +0.00 |" in images.summary(pd.DataFrame(rows))
