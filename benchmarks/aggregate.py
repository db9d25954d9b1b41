"""Learners over a whole sweep, from rows alone: interquartile means, profiles, probabilities of improvement.

The aggregates are those of Agarwal et al. 2021, "Deep reinforcement learning at the edge of the statistical precipice"
(arXiv 2108.13264), with points of a sweep for tasks and worlds for runs. One thing differs: their bootstrap draws runs
anew within each task. Here a world is the same process at every point, so one draw of worlds holds for all points and
both learners of a comparison; drawn apart, the intervals would be too narrow.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from benchmarks.rows import Row
from benchmarks.summaries import LEVEL, Interval, grouped, in_order, mean_interval, optimality, over_worlds
from offprompts_env.errors import DataError
from offprompts_env.rng import stream
from offprompts_env.types import Array

DRAWS = 2_000
"""Of the bootstrap."""


@dataclass(frozen=True)
class Aggregate:
    """What a learner reached in a sweep, with bootstrap intervals over worlds.

    Attributes:
        sweep: of the rows.
        learner: name.
        points: number of points at which there is a score.
        worlds: smallest number of worlds at these.
        mean: mean over points of the mean over worlds.
        median: median over points of the mean over worlds.
        iqm: mean of the middle half of all scores.
        gap: mean over scores of ``1 − min(optimality, 1)``; NaN where rows do not name the values of "uniform" and
            "oracle".
    """

    sweep: str
    learner: str
    points: int
    worlds: int
    mean: Interval
    median: Interval
    iqm: Interval
    gap: Interval


@dataclass(frozen=True)
class Profile:
    """How often a learner of a sweep scores above a threshold.

    Attributes:
        learner: name.
        thresholds: scores.
        share: of scores above each, one a world and point, with its pointwise 95% band.
    """

    learner: str
    thresholds: Array
    share: Array
    low: Array
    high: Array


@dataclass(frozen=True)
class Improvement:
    """One learner against another, at the points and in the worlds that both have.

    Attributes:
        learner: the one.
        over: the other.
        points: number of points with a common world.
        worlds: smallest number of common worlds at these.
        probability: ``P(X > Y) + P(X = Y) / 2`` (Mann-Whitney, unpaired), mean over points, with a bootstrap interval.
        difference: mean over worlds of the paired difference, itself a mean over points, with Student's 95% interval.
    """

    learner: str
    over: str
    points: int
    worlds: int
    probability: Interval
    difference: Interval


def _tables(rows: Iterable[Row], number: Callable[[Row], float]) -> dict[str, Array]:
    """Return the means over learning seeds of `number` for the learners of one sweep: (world, point), NaN: none.

    Raises:
        DataError: the rows are of several sweeps.
    """
    held = in_order(rows)
    if len({row.sweep for row in held}) > 1:
        raise DataError(f"expected rows of one sweep, got {sorted({row.sweep for row in held})}; aggregate each apart")
    worlds = {world: place for place, world in enumerate(sorted({row.world for row in held}))}
    points = {point: place for place, point in enumerate(dict.fromkeys(row.point for row in held))}
    tables = {
        learner: np.full((len(worlds), len(points)), np.nan) for learner in dict.fromkeys(r.learner for r in held)
    }
    for (learner, point), own in grouped(held, lambda row: (row.learner, row.point)).items():
        for world, value in over_worlds(own, number).items():
            tables[learner][worlds[world], points[point]] = value
    return tables


def _score(row: Row) -> float:
    return row.score


@lru_cache(maxsize=8)
def _draws(n_worlds: int) -> Array:
    """Return worlds drawn with replacement, (DRAWS, W); the same for all, so that learners are compared in the same."""
    return stream(0, "benchmarks", "bootstrap").integers(n_worlds, size=(DRAWS, n_worlds))


@lru_cache(maxsize=8)
def _times_drawn(n_worlds: int) -> Array:
    """Return how often each world is in each draw, (DRAWS, W)."""
    return np.asarray((_draws(n_worlds)[:, :, None] == np.arange(n_worlds)).sum(axis=1), dtype=float)


def _bootstrapped(scores: Array, statistic: Callable[[Array], Array]) -> Interval:
    """Return `statistic`, which maps (..., W, P) to (...,), with its percentile interval over draws of worlds."""
    present = scores[np.isfinite(scores).any(axis=1)]
    if not len(present):
        return Interval(float("nan"), float("nan"), float("nan"))
    low, high = _ends(statistic(present[_draws(len(present))])) if len(present) > 1 else (np.nan, np.nan)
    return Interval(float(statistic(present)), float(low), float(high))


def _ends(drawn: Array) -> Array:
    """Return both ends of the percentile interval over the first axis."""
    tails = [50 * (1 - LEVEL), 50 * (1 + LEVEL)]
    return np.asarray(np.percentile(drawn, tails, axis=0))


def _point_means(scores: Array) -> Array:
    with warnings.catch_warnings():
        # A draw may hold only worlds that a half-finished sweep lacks at a point.
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
        return np.asarray(np.nanmean(scores, axis=-2))


def _mean(scores: Array) -> Array:
    return np.asarray(np.nanmean(_point_means(scores), axis=-1))


def _median(scores: Array) -> Array:
    return np.asarray(np.nanmedian(_point_means(scores), axis=-1))


def interquartile_mean(scores: Array) -> Array:
    """Return the mean of the middle half of the finite scores over the last two axes, (..., W, P) to (...,).

    The quarter that is cut at either end is rounded down to whole scores, as ``scipy.stats.trim_mean`` does.
    """
    flat = np.sort(scores.reshape(*scores.shape[:-2], -1), axis=-1)
    count = np.isfinite(flat).sum(axis=-1, keepdims=True)
    cut, place = count // 4, np.arange(flat.shape[-1])
    middle = (place >= cut) & (place < count - cut)
    return np.asarray(np.where(middle, flat, 0).sum(axis=-1) / middle.sum(axis=-1))


def _gap(scores: Array) -> Array:
    return np.asarray(1 - np.nanmean(np.minimum(scores, 1), axis=(-2, -1)))


def aggregates(rows: Iterable[Row]) -> list[Aggregate]:
    """Return one aggregate a learner of the one sweep of `rows`, the best interquartile mean first.

    Raises:
        DataError: the rows are of several sweeps.
    """
    held, found = list(rows), []
    optimal = _tables(held, optimality)
    for learner, scores in _tables(held, _score).items():
        counts = np.isfinite(scores).sum(axis=0)
        if counts.any():
            present = counts[counts > 0]
            one = Aggregate(
                held[0].sweep,
                learner,
                points=len(present),
                worlds=int(present.min()),
                mean=_bootstrapped(scores, _mean),
                median=_bootstrapped(scores, _median),
                iqm=_bootstrapped(scores, interquartile_mean),
                gap=_bootstrapped(optimal[learner], _gap),
            )
            found.append(one)
    return sorted(found, key=lambda one: -one.iqm.value)


def profiles(rows: Iterable[Row], thresholds: Array) -> list[Profile]:
    """Return the performance profile of each learner of the one sweep of `rows`, (T,) thresholds.

    Raises:
        DataError: the rows are of several sweeps.
    """
    found = []
    for learner, scores in _tables(rows, _score).items():
        present = scores[np.isfinite(scores).any(axis=1)]
        if len(present):
            above = (present[:, :, None] > thresholds).sum(axis=1)
            known = np.isfinite(present).sum(axis=1)
            drawn = _times_drawn(len(present))
            bands = _ends((drawn @ above) / (drawn @ known)[:, None])
            low, high = bands if len(present) > 1 else np.full_like(bands, np.nan)
            found.append(Profile(learner, thresholds, above.sum(axis=0) / known.sum(), low, high))
    return found


def improvement(rows: Iterable[Row], learner: str, over: str) -> Improvement:
    """Compare `learner` with the learner `over` in the one sweep of `rows`.

    Raises:
        DataError: the rows are of several sweeps, or the two have no world of a point in common.
    """
    tables = _tables(rows, _score)
    blank = np.full_like(next(iter(tables.values())), np.nan)
    first, second = (tables.get(name, blank) for name in (learner, over))
    common = np.isfinite(first) & np.isfinite(second)
    if not common.any():
        raise DataError(f"{learner} and {over}: expected a world of a point that both were run in, got none; run both")
    taken = common.any(axis=1)
    first, second = (np.where(common, scores, np.nan)[taken] for scores in (first, second))
    pairs, wins = _wins(first, second)

    def probability(weights: Array) -> Array:
        won, of = (np.einsum("bi,pij,bj->bp", weights, one, weights) for one in (wins, pairs))
        # A point none of whose worlds was drawn says nothing.
        return np.asarray(np.nanmean(np.where(of > 0, won / np.maximum(of, 1), np.nan), axis=1))

    n = int(taken.sum())
    low, high = _ends(probability(_times_drawn(n))) if n > 1 else (np.nan, np.nan)
    counts = common.sum(axis=0)
    return Improvement(
        learner,
        over,
        int((counts > 0).sum()),
        int(counts[counts > 0].min()),
        Interval(float(probability(np.ones((1, n)))[0]), float(low), float(high)),
        mean_interval(np.nanmean(first - second, axis=1).tolist()),
    )


def _wins(first: Array, second: Array) -> tuple[Array, Array]:
    """Return for each point which pairs of worlds there are, and how many of them `first` wins, (P, W, W) both."""
    x, y = first.T[:, :, None], second.T[:, None, :]
    pairs = np.isfinite(x) & np.isfinite(y)
    return pairs.astype(float), np.where(pairs, (x > y) + 0.5 * (x == y), 0.0)
