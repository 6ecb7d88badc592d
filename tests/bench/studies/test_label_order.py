"""The study of label attacks: its draws, and that its trials tell the order that it is about."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from bench.cases import models
from bench.cases.client import FedSGDClient
from bench.registry import attacks
from bench.studies.label_order import SETTINGS, attempt, drawn, noise, rows, table


@pytest.fixture(scope="module")
def dataset():
    return noise()


@pytest.mark.parametrize("setting", SETTINGS[:6])
def test_a_batch_is_drawn_from_its_part_and_never_twice(dataset, setting):
    chosen = drawn(dataset, setting, np.random.default_rng(0)).tolist()
    assert len(set(chosen)) == len(chosen) == setting.batch_size
    assert set(chosen) <= set(getattr(dataset, setting.members).tolist())


def test_dirichlet_classes_are_more_unequal(dataset):
    def spread(alpha):
        setting = replace(SETTINGS[1], alpha=alpha)
        batches = [dataset.batch(drawn(dataset, setting, np.random.default_rng(seed))) for seed in range(20)]
        return float(torch.stack([batch.soft_labels.sum(0).std() for batch in batches]).mean())

    assert spread(0.5) > 2 * spread(None)


def test_an_attack_that_does_not_apply_has_its_reason_in_the_row(dataset):
    client = FedSGDClient(models.build("convnet(bias=False)", dataset.image_shape, dataset.num_classes, 0))
    batch = dataset.batch(drawn(dataset, SETTINGS[1], np.random.default_rng(0)))
    row = attempt(attacks.make("ilrg"), client, batch, batch, 0)
    assert row == {"outcome": "skipped", "reason": "needs a last layer with a bias"}


def test_untrained_nets_show_the_order(dataset):
    """LLG alone guesses the impact; dummies, public data or a bias measure it; chance sees the same draws."""
    setting = next(s for s in SETTINGS if s.dataset == "noise" and not s.trained and s.alpha)
    trials = pd.DataFrame([row for seed in range(2) for row in rows(setting, dataset, seed)])
    means = table(trials, "class_counts").iloc[0]
    assert means["random_labels"] < means["llg"] < means["llg_star"]
    assert means[["llg_star", "llg_plus", "zlg", "ilrg", "bias_counts", "rlu"]].min() > 0.9
    assert trials.weights_sha256.nunique() == 2
