"""The study of small budgets: torch's L-BFGS and ours look at the same objective, and the table's figures."""

import pandas as pd
import pytest
import torch

from bench.studies.lbfgs_budget import BUDGETS, RESULTS, observe, run, summary


def test_with_a_constant_weight_ours_ends_where_torchs_does():
    seen, truth = observe("convnet(bias=False)", "untrained", 0)
    ours, torchs = (
        run(f"constant, 0.01{by}", seen, truth, 0, evaluations=20)["psnr"] for by in ("", "; torch's L-BFGS")
    )
    assert ours == pytest.approx(torchs, abs=0.5)


def test_the_committed_rows_show_what_a_falling_weight_gains():
    rows = pd.read_csv(RESULTS / "lbfgs_budget.csv")
    mean = rows.pivot_table(index="search", columns=["net", "weights", "evaluations"], values="psnr")
    gained = mean.loc["falling, 3 to 0.01"] - mean.loc["constant, 0.01"]
    assert (gained.xs(300, level="evaluations") > 1).all()
    assert (RESULTS / "lbfgs_budget.md").read_text() == summary(rows)
    assert set(rows.evaluations) == set(BUDGETS)
    assert torch.isfinite(torch.tensor(rows.psnr.to_numpy())).all()
