"""Estimates from several logs against enumeration."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import agents
from offprompts_env.errors import ConfigError, DataError, DimensionError, PropensityError
from offprompts_env.types import LoggedDataset, PromptSet
from tests.agents.tiny_bandit import LOGGING, MEAN, MODEL, TARGET, TRUTH, Table, draw, population, rounds

OTHER = np.array([[4, 1, 1, 2], [1, 2, 4, 1]]) / 8
NEVER_ONE = np.array([[0, 4, 2, 2], [4, 0, 2, 2]]) / 8
EVERY = [agents.NaiveIS(), agents.BalancedIS(), agents.WeightedIS()]
Q = agents.FittedRewards((Table(MODEL),))
ROBUST = [agents.NaiveIS(Q), agents.BalancedIS(Q), agents.WeightedIS(Q)]
NAMES = {"ids": lambda value: type(value).__name__}


def population_of(pmf, times=1) -> LoggedDataset:
    counts = np.round(pmf * 8).astype(int)
    cells = [(x, a) for x in range(2) for a in range(4) for _ in range(times * counts[x, a])]
    x, a = np.transpose(cells)
    return rounds(x, a, propensity=pmf[x, a])


@pytest.mark.parametrize("estimator", [*EVERY, *ROBUST], **NAMES)
def test_unbiased_by_enumeration(estimator):
    logs, policies = [population_of(LOGGING, 3), population_of(OTHER)], [Table(LOGGING), Table(OTHER)]
    estimate = estimator.estimate(Table(TARGET), logs, logging_policies=policies)
    assert estimate.value == pytest.approx(TRUTH, abs=1e-6)
    assert estimate.terms.mean() == pytest.approx(estimate.value)
    assert estimate.strata == (48, 16)


def test_one_log_is_importance_sampling():
    log = draw(300, np.random.default_rng(0), noise=0.5)
    single, robust = agents.IS().estimate(Table(TARGET), log), agents.DR(Q).estimate(Table(TARGET), log)
    for estimator, expected in ((EVERY, single), (ROBUST, robust)):
        for own in estimator:
            found = own.estimate(Table(TARGET), [log], logging_policies=[Table(LOGGING)])
            assert found.value == pytest.approx(expected.value, rel=1e-5)
            assert found.standard_error == pytest.approx(expected.standard_error, rel=1e-5)


def test_balancing_asks_only_that_some_policy_tries_a_prompt():
    logs, policies = [population_of(NEVER_ONE), population_of(LOGGING)], [Table(NEVER_ONE), Table(LOGGING)]
    assert agents.BalancedIS().estimate(Table(TARGET), logs, logging_policies=policies).value == pytest.approx(
        TRUTH, abs=1e-6
    )
    assert abs(agents.NaiveIS().estimate(Table(TARGET), logs, logging_policies=policies).value - TRUTH) > 0.01


def test_balanced_weights_are_those_of_the_average_policy():
    logs, policies = [population_of(LOGGING), population_of(OTHER, 2)], [Table(LOGGING), Table(OTHER)]
    estimate = agents.BalancedIS().estimate(Table(TARGET), logs, logging_policies=policies)
    weight = TARGET / (LOGGING / 3 + 2 * OTHER / 3)
    x = np.concatenate([log.context[:, 0].astype(int) for log in logs])
    a = np.concatenate([log.action for log in logs])
    assert estimate.terms == pytest.approx((weight * MEAN)[x, a], rel=1e-5)
    naive = agents.NaiveIS().estimate(Table(TARGET), logs)
    assert estimate.terms.var() < naive.terms.var()


def test_logs_count_by_their_precision():
    rng = np.random.default_rng(3)
    logs = [draw(400, rng, noise=0.1), draw(100, rng, noise=0.1)]
    # The second log's recorder was the policy itself: its terms vary less.
    x = rng.integers(2, size=100)
    a = (TARGET.cumsum(1)[x] < rng.random(100)[:, None]).sum(1)
    logs[1] = rounds(x, a, propensity=TARGET[x, a])
    estimate = agents.WeightedIS().estimate(Table(TARGET), logs)
    single = [agents.IS().estimate(Table(TARGET), log) for log in logs]
    precision = np.array([1 / own.standard_error**2 for own in single])
    share = precision / precision.sum()
    assert [estimate.diagnostics[f"share of log {j}"] for j in range(2)] == pytest.approx(list(share), rel=1e-5)
    assert estimate.value == pytest.approx(sum(s * own.value for s, own in zip(share, single, strict=True)), rel=1e-5)
    assert estimate.standard_error == pytest.approx(precision.sum() ** -0.5, rel=1e-5)


def test_a_log_without_overlap_is_left_out():
    empty = rounds(np.zeros(20, int), np.zeros(20, int))
    only = Table(np.array([[0, 1, 0, 0], [0, 0, 1, 0]]))
    log = population()
    estimate = agents.WeightedIS().estimate(only, [log, empty])
    assert estimate.diagnostics["share of log 1"] == 0
    assert estimate.value == pytest.approx(agents.IS().estimate(only, log).value)
    assert any("log 1 has no round" in note for note in estimate.warnings)


def test_strata_have_errors_of_their_own():
    logs = [population_of(LOGGING), population_of(OTHER)]
    estimate = agents.NaiveIS().estimate(Table(TARGET), logs)
    parts = np.split(estimate.terms, [16])
    assert estimate.standard_error == pytest.approx(np.sqrt(sum(16 * part.var(ddof=1) for part in parts)) / 32)
    assert estimate.bootstrap(n_resamples=50).interval[0] < estimate.value


def test_unknown_propensities():
    rng = np.random.default_rng(0)
    logs = [replace(draw(300, rng), propensity=np.full(300, np.nan)) for _ in range(2)]
    with pytest.raises(PropensityError, match="unknown"):
        agents.NaiveIS().estimate(Table(TARGET), logs)
    known = agents.NaiveIS().estimate(Table(TARGET), logs, logging_policies=[Table(LOGGING)] * 2)
    assert any("propensities are unknown" in note for note in known.warnings)
    cloning = agents.BehaviorCloning(steps=1_500, learning_rate=1e-2)
    cloned = agents.BalancedIS(cloning=cloning).estimate(Table(TARGET), logs)
    assert any("cloned from the log" in note for note in cloned.warnings)
    assert cloned.value == pytest.approx(known.value, abs=0.15)


def test_wrong_input():
    log = population()
    with pytest.raises(DataError, match="at least one log"):
        agents.NaiveIS().estimate(Table(TARGET), [])
    with pytest.raises(ConfigError, match="logging_policies: expected 2"):
        agents.BalancedIS().estimate(Table(TARGET), [log, log], logging_policies=[Table(LOGGING)])
    with pytest.raises(DimensionError, match="fingerprint"):
        agents.NaiveIS().estimate(Table(TARGET), [log, replace(log, prompts=PromptSet(np.ones((4, 4))))])
    with pytest.raises(DimensionError, match="expected 4 prompts"):
        agents.NaiveIS().estimate(agents.UniformPolicy(3), [log])
    with pytest.raises(DataError, match="two rounds a log"):
        agents.WeightedIS().estimate(Table(TARGET), [log, log.take(slice(1))])
    with pytest.raises(PropensityError, match="none of them tries"):
        agents.BalancedIS().estimate(Table(TARGET), [log], logging_policies=[Table(np.eye(4)[[0, 0]])])
