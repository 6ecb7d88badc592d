"""What attacks say that they need."""

import pytest

from bench.report.assumptions import assumptions


@pytest.mark.parametrize(
    ("spec", "needs"),
    [
        ("random_labels", []),
        ("lambda_recovery", ["a batch of one"]),
        ("idlg", ["a batch of one", "non-negative features, as after a ReLU"]),
        (
            "bias_closed_form",
            [
                "a batch of one",
                "a last layer with a bias",
                "the client's number of local steps and its learning rate",
            ],
        ),
        ("gradinversion_labels", ["distinct labels", "non-negative features, as after a ReLU"]),
    ],
)
def test_an_attacks_assumptions_are_what_it_skips_for(spec, needs):
    assert assumptions(spec) == needs
