"""Intervals of estimates: each against its formula."""

from __future__ import annotations

import numpy as np
import pytest

import agents
from offprompts_env.errors import ConfigError, DataError
from offprompts_env.types import Estimate
from tests.agents.tiny_bandit import LOGGING, TARGET, Table, draw

TERMS = np.random.default_rng(0).exponential(size=400)


def test_normal_intervals_of_any_confidence():
    estimate = Estimate.of_mean(TERMS)
    wide = estimate.normal(0.99)
    assert (wide.value, wide.standard_error, wide.confidence) == (estimate.value, estimate.standard_error, 0.99)
    assert wide.interval[1] - wide.value == pytest.approx(2.575829 * estimate.standard_error, rel=1e-6)


def test_the_bootstrap_of_a_mean_is_that_of_its_distribution():
    estimate = Estimate.of_mean(TERMS)
    found = estimate.bootstrap(n_resamples=4_000)
    assert found.value == estimate.value
    assert found.interval == estimate.bootstrap(n_resamples=4_000).interval
    assert found.interval != estimate.bootstrap(n_resamples=4_000, seed=1).interval
    assert np.subtract(*found.interval[::-1]) == pytest.approx(np.subtract(*estimate.interval[::-1]), rel=0.05)
    narrow = estimate.bootstrap(confidence=0.5)
    assert narrow.confidence == 0.5
    assert found.interval[0] < narrow.interval[0] < narrow.interval[1] < found.interval[1]


def test_the_terms_of_a_ratio_are_linearised():
    rng = np.random.default_rng(1)
    b, v = rng.normal(size=300), rng.exponential(size=300)
    u = 2 * v + rng.normal(size=300)
    estimate = Estimate.of_ratio(b, u, v)
    assert estimate.value == pytest.approx(b.mean() + u.mean() / v.mean())
    assert estimate.terms.mean() == pytest.approx(estimate.value)
    # The standard error is that of the delete-one jackknife, to first order.
    left = [np.delete(b, i).mean() + np.delete(u, i).mean() / np.delete(v, i).mean() for i in range(300)]
    assert estimate.standard_error == pytest.approx(np.sqrt(299 / 300 * 300 * np.var(left)), rel=0.02)


def test_the_bootstrap_makes_a_ratio_again():
    # Few rounds and a denominator that varies much, where linearised terms would mislead.
    v = np.array([0.01, 0.02, 0.01, 3.0, 0.05])
    u = v * np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    estimate = Estimate.of_ratio(np.zeros(5), u, v)
    found = estimate.bootstrap(n_resamples=2_000)
    # A ratio of such columns stays within the range of u / v in every resample.
    assert 1 <= found.interval[0] < found.interval[1] <= 5
    # Without the fourth round it is near 3; its linearisation does not know.
    assert found.interval[0] < 3.5 < Estimate.of_mean(estimate.terms).bootstrap(n_resamples=2_000).interval[0]


def test_resamples_without_weight_are_counted():
    estimate = Estimate.of_ratio(np.zeros(4), np.array([1.0, 0, 0, 0]), np.array([1.0, 0, 0, 0]))
    found = estimate.bootstrap(n_resamples=1_000)
    assert found.interval == (1, 1)
    (note,) = found.warnings
    # (3/4)^4 of them.
    assert int(note.split()[0]) == pytest.approx(1_000 * 0.75**4, abs=80)


def test_strata_are_resampled_apart():
    terms = np.concatenate([np.zeros(50), np.ones(150)])
    apart = Estimate.of_mean(terms, strata=(50, 150))
    assert apart.standard_error == 0
    assert apart.bootstrap(n_resamples=20).interval == (0.75, 0.75)
    assert Estimate.of_mean(terms).bootstrap(n_resamples=200).interval[0] < 0.74
    assert apart.minus(apart).standard_error == 0
    assert np.isnan(Estimate.of_mean(terms, strata=(1, 199)).standard_error)


def test_empirical_bernstein_is_its_formula():
    terms = np.clip(TERMS, 0, 4)
    estimate = Estimate.of_mean(terms)
    found = estimate.empirical_bernstein((0, 4), confidence=0.9)
    scale = np.log(4 / 0.1)
    half = np.sqrt(2 * terms.var(ddof=1) * scale / 400) + 7 * 4 * scale / (3 * 399)
    assert found.interval == pytest.approx((estimate.value - half, estimate.value + half))
    assert (found.confidence, found.warnings) == (0.9, ())
    observed = estimate.empirical_bernstein()
    assert any("observed range" in note for note in observed.warnings)
    assert np.subtract(*observed.interval[::-1]) > 2 * np.subtract(*estimate.interval[::-1]) / 2
    ratio = agents.SNIPS().estimate(Table(TARGET), draw(50, np.random.default_rng(0))).empirical_bernstein()
    assert any("first order" in note for note in ratio.warnings)


def test_wrong_input():
    estimate = Estimate.of_mean(TERMS)
    for confidence in (0.0, 1.0, 95.0, float("nan")):
        for call in (estimate.normal, lambda c: estimate.bootstrap(confidence=c)):
            with pytest.raises(ConfigError, match="confidence"):
                call(confidence)
        with pytest.raises(ConfigError, match="confidence"):
            estimate.empirical_bernstein(confidence=confidence)
    with pytest.raises(ConfigError, match="n_resamples"):
        estimate.bootstrap(n_resamples=1)
    with pytest.raises(DataError, match="bounds"):
        estimate.empirical_bernstein((0, 0.5))
    with pytest.raises(DataError, match="two rounds"):
        Estimate.of_mean(TERMS[:1]).empirical_bernstein()
    with pytest.raises(DataError, match="at least one round"):
        Estimate.of_ratio(np.zeros(0), np.zeros(0), np.zeros(0))


def test_self_normalised_estimates_carry_what_the_bootstrap_needs():
    log = draw(100, np.random.default_rng(0), noise=0.2)
    estimate = agents.SNIPS().estimate(Table(TARGET), log)
    b, u, v = estimate.ratio
    weights = (TARGET / LOGGING)[log.context[:, 0].astype(int), log.action]
    assert v == pytest.approx(weights, rel=1e-6)
    assert u == pytest.approx(weights * log.reward, rel=1e-6)
    assert not b.any()
    low, high = estimate.bootstrap(n_resamples=300).interval
    assert log.reward.min() <= low < estimate.value < high <= log.reward.max()
