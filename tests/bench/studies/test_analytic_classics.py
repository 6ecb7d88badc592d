"""The study of SPEAR and R-GAP: R-GAP's nets are the authors', a row is a run, the table its rows."""

import pandas as pd
import pytest
import torch

from bench.studies.analytic_classics import CNN6, RESULTS, Case, cases, cnn6, run, summary


@pytest.mark.parametrize("second", CNN6.values())
def test_cnn6_has_the_authors_shapes(second):
    """Of their code: 17, 9, 9, 9, 5, 5 places a side, and 3,200 inputs of the head."""
    net, sides = cnn6(second, 10), []
    for module in net:
        module.register_forward_hook(lambda module, given, output: sides.append(output.shape[-1]))
    assert net(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert sides[:12:2] == [17, 9, 9, 9, 5, 5]
    assert net.head.in_features == 3200
    assert net.conv2.out_channels == second


def test_a_batch_of_ten_is_whole():
    row = run(Case("spear", "fcn(depth=6, width=200)", "mnist5k", 10, 0))
    assert row["outcome"] == "ok"
    assert float(row["worst_psnr"]) > 100


def test_the_table_is_that_of_the_rows():
    rows = pd.read_csv(RESULTS / "analytic_classics.csv")
    kept = set(rows[list(Case._fields)].itertuples(index=False, name=None))
    assert kept <= {tuple(case) for case in cases()}
    assert (RESULTS / "analytic_classics.md").read_text() == summary(rows)
