"""Of 1,000 logs, how many intervals hold the value that the estimator is for? A minute or two: ``make slow``."""

from __future__ import annotations

import numpy as np
import pytest

import agents
from tests.agents.tiny_bandit import LOGGING, MEAN, MODEL, TARGET, TRUTH, WEIGHT, Generator, Neighbours, Table, draw

N, LOGS, NOISE, NEAR = 400, 1_000, 0.5, 0.5
SIMILAR = np.eye(4) + NEAR * (np.abs(np.subtract.outer(np.arange(4), np.arange(4))) == 1)
KERNEL_WEIGHT = (TARGET @ SIMILAR) / (LOGGING @ SIMILAR)
BLURRED = float((LOGGING * KERNEL_WEIGHT * MEAN).sum(axis=1).mean())


class CellMeans:
    """A source of models that predict the mean of each context and prompt, 0 where there is none."""

    def fit_many(self, logs, *, seeds=None):
        models = []
        for log in logs:
            table, cell = np.zeros((2, 4)), (log.context[:, 0].astype(int), log.action)
            counts = np.zeros((2, 4))
            np.add.at(table, cell, log.reward)
            np.add.at(counts, cell, 1)
            models.append(Table(table / np.maximum(counts, 1)))
        return models


def kernel_estimate(log):
    x, a = log.context[:, 0].astype(int), log.action
    density = agents.KnownDensity(((LOGGING @ SIMILAR)[x, a],))
    estimator = agents.KernelIS(kernel=Neighbours(NEAR), density=density, n_samples=8)
    return estimator.estimate(Table(TARGET), log, generator=Generator())


def bounds(weight, model=None):
    """Return the smallest and largest term of an estimate with these weights."""
    model = np.zeros((2, 4)) if model is None else model
    base = (TARGET * model).sum(axis=1, keepdims=True)
    ends = [base + weight * (MEAN + sign * NOISE - model) for sign in (-1, 1)]
    return float(np.min(ends)), float(np.max(ends))


Q = agents.FittedRewards((Table(MODEL),))
CASES = {
    "IS": (agents.IS(), TRUTH, bounds(WEIGHT)),
    "SNIPS": (agents.SNIPS(), TRUTH, None),
    "DR": (agents.DR(Q), TRUTH, bounds(WEIGHT, MODEL)),
    "cross-fitted DR": (agents.DR(CellMeans()), TRUTH, None),
    "kernel IS, its own target": (kernel_estimate, BLURRED, bounds(KERNEL_WEIGHT)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_intervals_cover(name):
    estimator, target, limits = CASES[name]
    rng, hits = np.random.default_rng(2025), np.zeros((LOGS, 3), dtype=bool)
    for index in range(LOGS):
        log = draw(N, rng, NOISE)
        estimate = estimator(log) if callable(estimator) else estimator.estimate(Table(TARGET), log)
        intervals = [
            estimate.interval,
            estimate.bootstrap(n_resamples=500, seed=index).interval,
            estimate.empirical_bernstein(limits).interval,
        ]
        hits[index] = [low <= target <= high for low, high in intervals]
    normal, bootstrap, bernstein = hits.mean(axis=0)
    print(f"{name}: normal {normal:.1%}, bootstrap {bootstrap:.1%}, empirical Bernstein {bernstein:.1%}")
    assert 0.93 <= normal <= 0.97
    assert 0.93 <= bootstrap <= 0.97
    assert bernstein >= 0.97
