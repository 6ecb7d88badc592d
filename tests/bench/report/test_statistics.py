"""Intervals, paired tests and ranks against values that can be written down."""

import math

import numpy as np
import pytest

from bench.report.statistics import clustered_bootstrap, holm, paired_p_value, ranks, wilson

Z2 = 1.959963984540054**2


@pytest.mark.parametrize("n", [1, 10, 50, 1000])
def test_after_n_of_n_the_rate_is_at_least_n_over_n_plus_z_squared(n):
    assert wilson(n, n) == pytest.approx((n / (n + Z2), 1.0), abs=1e-14)


def test_ten_of_ten_leaves_rates_above_72_per_cent():
    assert wilson(10, 10)[0] == pytest.approx(0.7225, abs=5e-5)


def test_failures_mirror_successes():
    low, high = wilson(3, 20)
    assert wilson(17, 20) == pytest.approx((1 - high, 1 - low))


def test_the_bounds_solve_the_score_equation():
    for bound in wilson(7, 31):
        assert (7 / 31 - bound) ** 2 == pytest.approx(Z2 * bound * (1 - bound) / 31)


def test_a_higher_confidence_widens_the_interval():
    narrow, wide = wilson(7, 31, confidence=0.9), wilson(7, 31, confidence=0.99)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_no_trials_leave_every_rate_possible():
    assert wilson(0, 0) == (0.0, 1.0)


def test_more_successes_than_trials_are_refused():
    with pytest.raises(ValueError, match="successes=3"):
        wilson(3, 2)


def test_a_confidence_in_per_cent_is_refused():
    with pytest.raises(ValueError, match="confidence=95"):
        wilson(1, 2, confidence=95)


def test_equal_values_have_an_interval_without_a_width():
    assert clustered_bootstrap([3.0] * 8, ["a", "b"] * 4) == (3.0, 3.0)


def test_the_same_seed_gives_the_same_interval():
    values, clusters = np.arange(12.0), ["a", "b", "c"] * 4
    once = clustered_bootstrap(values, clusters, seed=5)
    assert clustered_bootstrap(values, clusters, seed=5) == once
    assert clustered_bootstrap(values, clusters, seed=6) != once


def test_one_cluster_gives_the_plain_bootstrap_of_the_mean():
    values = np.random.default_rng(0).normal(size=400)
    low, high = clustered_bootstrap(values, ["a"] * 400)
    half = math.sqrt(Z2) * values.std() / math.sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_networks_that_differ_widen_the_interval():
    values, networks = np.repeat([0.0, 1.0], 50), ["a"] * 50 + ["b"] * 50
    assert clustered_bootstrap(values, networks) == (0.0, 1.0)  # a quarter of the draws is one network twice
    low, high = clustered_bootstrap(values, ["a"] * 100)
    assert 0.35 < low < high < 0.65


def test_clusters_of_different_sizes_keep_every_resample_within_the_values():
    low, high = clustered_bootstrap([1.0, 2.0, 2.0, 2.0, 3.0], ["a", "b", "b", "b", "c"])
    assert 1.0 <= low < 2.0 < high <= 3.0


def test_no_values_have_no_interval():
    assert all(map(math.isnan, clustered_bootstrap([], [])))


def test_every_value_needs_its_cluster():
    with pytest.raises(ValueError, match="1 clusters"):
        clustered_bootstrap([1.0, 2.0], ["a"])


@pytest.mark.parametrize(("wins", "losses"), [(6, 0), (5, 1), (10, 3), (4, 4)])
def test_rates_are_compared_by_mcnemars_exact_test(wins, losses):
    a = [1.0] * wins + [0.0] * losses + [1.0, 0.0] * 20
    b = [0.0] * wins + [1.0] * losses + [1.0, 0.0] * 20
    n, few = wins + losses, min(wins, losses)
    tail = sum(math.comb(n, k) for k in range(few + 1)) / 2**n
    assert paired_p_value(a, b) == pytest.approx(min(1.0, 2 * tail))


@pytest.mark.parametrize("n", [4, 6, 10])
def test_a_constant_lead_has_the_signed_ranks_smallest_p_value(n):
    a = np.arange(n) + 1.5 + np.linspace(0, 0.4, n)
    assert paired_p_value(a, np.arange(n)) == pytest.approx(2 / 2**n)


def test_attacks_that_never_differ_have_a_p_value_of_one():
    assert paired_p_value([0.1, 0.2], [0.1, 0.2]) == 1.0
    assert paired_p_value([1, 0], [1, 0]) == 1.0


def test_only_shared_observations_count():
    shared = paired_p_value([1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0])
    assert paired_p_value([1] * 6 + [1, np.nan], [0] * 6 + [np.nan, 0]) == shared
    assert paired_p_value([np.nan, 1], [1, np.nan]) == 1.0


def test_scores_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="one length"):
        paired_p_value([1, 0], [1])


def test_holm_adjusts_the_textbook_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_leaves_one_p_value_as_it_is_and_none_above_one():
    assert holm([0.04]).tolist() == [0.04]
    assert holm([0.6, 0.7]).tolist() == [1.0, 1.0]
    assert holm([]).tolist() == []


def test_ties_share_a_rank_and_the_next_one_counts_them():
    always, never = np.ones(50), np.zeros(50)
    assert ranks([never, always, always, never]).tolist() == [3, 1, 1, 3]


def test_what_is_rounding_is_no_lead():
    exact = np.full(50, 1.0)
    assert ranks([exact, exact - 1e-15]).tolist() == [1, 2]
    assert ranks([exact, exact - 1e-15], finest=1e-6).tolist() == [1, 1]
    assert ranks([exact, exact - 1e-3], finest=1e-6).tolist() == [1, 2]


def test_a_lead_that_chance_explains_is_a_tie():
    a, b = np.zeros(50), np.zeros(50)
    a[:4] = 1  # p = 1/8
    assert ranks([a, b]).tolist() == [1, 1]


def test_holm_takes_back_a_lead_that_only_many_tests_found():
    lead, rest = np.zeros(50), np.zeros(50)
    lead[:6] = 1  # p = 1/32: below 5 % alone, not among six tests
    assert ranks([lead, rest]).tolist() == [1, 2]
    assert ranks([lead, rest, rest, rest]).tolist() == [1, 1, 1, 1]


def test_continuous_scores_rank_by_signed_ranks_not_by_an_outlier():
    base = np.linspace(20, 30, 40)
    better = base + np.linspace(0.5, 1.5, 40)
    better[0] = -500.0  # drags the mean far below
    assert ranks([base, better]).tolist() == [2, 1]


def test_one_attack_alone_is_first():
    assert ranks([[0.0, 0.0]]).tolist() == [1]
