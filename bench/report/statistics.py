"""How sure a leaderboard may be: intervals, paired tests, ranks that admit ties.

Pure functions of numbers; nothing here knows what a record is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import special, stats

SIGNIFICANCE = 0.05
"""One attack is ranked below another where chance explains the difference less often than this."""

RESAMPLES = 2000
"""Bootstrap resamples: the 2.5 % tail then rests on 50 of them."""

Floats = npt.NDArray[np.float64]


def wilson(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a rate; it stays in [0, 1] and has a width even at 0 % and 100 %.

    >>> low, high = wilson(10, 10)
    >>> round(low, 4), high
    (0.7225, 1.0)

    Args:
        successes: how many of `n` succeeded.
        n: how many were tried; after none, any rate may be.
        confidence: how often such an interval holds the true rate.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes={successes} is not in [0, n={n}]")
    if n == 0:
        return 0.0, 1.0
    z = _normal_quantile(confidence)
    rate, shrink = successes / n, 1 + z * z / n
    centre = (rate + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else centre - half  # exact at the ends, where rounding would leave 1e-17
    high = 1.0 if successes == n else centre + half
    return low, high


def _normal_quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} is not in (0, 1); 0.95 is usual")
    return float(special.ndtri((1 + confidence) / 2))


def clustered_bootstrap(
    values: npt.ArrayLike, clusters: Sequence[object], confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """The percentile interval of the mean, by resampling clusters (networks), then values within each.

    Samples attacked on one network share that network's luck; resampling networks first lets this show
    in the interval. With one cluster it is the plain bootstrap of the values.

    Args:
        values: (n,), finite.
        clusters: (n,), which network each value comes from.
        confidence: how often such an interval holds the true mean.
        seed: the same seed gives the same interval.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.shape != (len(clusters),):
        raise ValueError(f"values have shape {data.shape}, but there are {len(clusters)} clusters' names")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} is not in (0, 1); 0.95 is usual")
    if len(data) == 0:
        return math.nan, math.nan
    labels: dict[object, int] = {}
    codes = np.array([labels.setdefault(cluster, len(labels)) for cluster in clusters])
    sizes = np.bincount(codes)
    by_cluster = data[np.argsort(codes, kind="stable")]
    starts = np.cumsum(sizes) - sizes

    rng = np.random.default_rng(seed)
    total, count = np.zeros(RESAMPLES), np.zeros(RESAMPLES)
    for chosen in rng.integers(len(sizes), size=(len(sizes), RESAMPLES)):  # one network for each resample
        size = sizes[chosen][:, None]  # (RESAMPLES, 1)
        drawn = np.floor(rng.random((RESAMPLES, sizes.max())) * size).astype(np.intp)
        within = np.arange(sizes.max()) < size
        total += np.where(within, by_cluster[starts[chosen][:, None] + drawn], 0).sum(axis=1)
        count += size[:, 0]
    tail = (1 - confidence) / 2
    low, high = np.quantile(total / count, [tail, 1 - tail])
    return float(low), float(high)


def paired_p_value(a: npt.ArrayLike, b: npt.ArrayLike, finest: float = 0.0) -> float:
    """The two-sided p-value that two attacks do equally well on the observations that they share.

    McNemar's exact test for outcomes of 0 and 1, Wilcoxon's signed-rank test otherwise. No difference at
    all, or nothing shared, is a p-value of 1.

    Args:
        a: (n,), the scores of one attack; NaN where it was not tried.
        b: (n,), those of the other, on the same observations.
        finest: a difference of no more is none.
    """
    difference = _differences(a, b, finest)
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    if wins + losses == 0:
        return 1.0
    if np.isin(_shared(a, b), (0.0, 1.0)).all():
        return min(1.0, 2 * float(special.bdtr(min(wins, losses), wins + losses, 0.5)))
    return float(stats.wilcoxon(difference[difference != 0]).pvalue)


def _shared(a: npt.ArrayLike, b: npt.ArrayLike) -> tuple[Floats, Floats]:
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"paired scores need one length, got shapes {first.shape} and {second.shape}")
    both = ~(np.isnan(first) | np.isnan(second))
    return first[both], second[both]


def _differences(a: npt.ArrayLike, b: npt.ArrayLike, finest: float) -> Floats:
    first, second = _shared(a, b)
    difference = first - second
    return np.where(np.abs(difference) <= finest, 0.0, difference)


def _leaning(a: npt.ArrayLike, b: npt.ArrayLike, finest: float) -> float:
    """Above 0 where `a` does better: Wilcoxon's signed ranks, which for 0/1 is wins against losses."""
    difference = _differences(a, b, finest)
    difference = difference[difference != 0]
    return float((np.sign(difference) * stats.rankdata(np.abs(difference))).sum())


def holm(p_values: npt.ArrayLike) -> Floats:
    """P-values adjusted for having made many tests (Holm 1979), in the order given.

    >>> holm([0.01, 0.04, 0.03, 0.005]).round(3).tolist()
    [0.03, 0.06, 0.06, 0.02]
    """
    raw = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(raw, kind="stable")
    stepped = np.maximum.accumulate(raw[order] * np.arange(len(raw), 0, -1)).clip(max=1.0)
    adjusted = np.empty_like(stepped)
    adjusted[order] = stepped
    return adjusted


def ranks(scores: npt.ArrayLike, finest: float = 0.0) -> npt.NDArray[np.int64]:
    """An attack's rank: 1 + how many attacks do significantly better, so that ties share a rank.

    Each pair is compared on the observations that both were tried on; the tests are Holm-corrected.

    Args:
        scores: (attacks, observations), higher is better, NaN where an attack was not tried.
        finest: a difference of no more is none.

    Returns:
        (attacks,), from 1.
    """
    table = np.asarray(scores, dtype=np.float64)
    placed = np.ones(len(table), dtype=np.int64)
    pairs = list(itertools.combinations(range(len(table)), 2))
    p_values = holm([paired_p_value(table[one], table[other], finest) for one, other in pairs])
    for (one, other), p_value in zip(pairs, p_values, strict=True):
        if p_value < SIGNIFICANCE:
            placed[other if _leaning(table[one], table[other], finest) > 0 else one] += 1
    return placed
