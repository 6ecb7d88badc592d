"""The curve of noise against success, at its two ends."""

import pytest

from bench.registry import defenses
from bench.studies.noise_curve import DELTA, PUBLISHED, RATE, ROUNDS, draw, row


@pytest.mark.parametrize("attack", ["lambda_recovery", "published search"])
def test_much_noise_hides_what_little_leaves(attack):
    little, much = (row("untrained", "mixup", sigma, attack, 2) for sigma in (1e-4, 3.0))
    assert much["median_error"] > little["median_error"]
    assert much["within_0.01"] == 0


def test_epsilon_is_the_accountants():
    made = row("untrained", "hard", 1.0, "lambda_recovery_adaptive", 2)
    assert (made["epsilon"], made["delta"]) == defenses.make("dp_gaussian").privacy(ROUNDS, RATE, DELTA)


def test_the_published_experiment_has_no_epsilon_and_succeeds_with_little_noise():
    made = row("untrained", "hard", 1e-4, PUBLISHED, 3)
    assert made["epsilon"] is None
    assert made["within_0.01"] == 1


def test_is_drawn(tmp_path):
    import pandas as pd

    points = [
        {
            "weights": state,
            "label": label,
            "sigma": sigma,
            "epsilon": 1 / sigma,
            "attack": "a",
            "within_0.01": 0.5,
        }
        for state in ("untrained", "epochs=1")
        for label in ("hard", "mixup")
        for sigma in (0.1, 1.0)
    ]
    draw(pd.DataFrame(points), tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 10_000
