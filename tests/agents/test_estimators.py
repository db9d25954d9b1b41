from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

import agents
import offprompts_env as op
from offprompts_env.errors import ConfigError, DataError, DimensionError, NumericalError, PropensityError
from offprompts_env.types import LoggedDataset, PromptSet

# A discrete world of two contexts and three prompts, enumerated: context x is the number x.
RNG = np.random.default_rng(1)
P_CONTEXT = np.array([0.4, 0.6])
MEAN = RNG.normal(size=(2, 3))
LOGGING = RNG.dirichlet([2, 2, 2], size=2)
TARGET = RNG.dirichlet([2, 2, 2], size=2)


class Table:
    """A policy given by a table, which is a fitted q̂ just as well."""

    n_prompts = 3

    def __init__(self, table):
        self.table = table

    def probabilities(self, contexts):
        return self.table[contexts.context[:, 0].astype(int)]

    __call__ = probabilities


class Known:
    """A source of reward models that always gives the same one."""

    def __init__(self, model):
        self.model = model

    def fit_many(self, logs, *, seeds=None):
        return [self.model] * len(logs)


def cells() -> list[tuple[float, LoggedDataset]]:
    """Every log of one round, with its probability."""
    found = []
    for x, a in itertools.product(range(2), range(3)):
        log = LoggedDataset(
            context=[[x]],
            query=[[0]],
            action=[a],
            propensity=[LOGGING[x, a]],
            reward=[MEAN[x, a]],
            output=[[0]],
            prompts=PromptSet(np.eye(3)),
        )
        found.append((P_CONTEXT[x] * LOGGING[x, a], log))
    return found


TRUTH = float((P_CONTEXT[:, None] * TARGET * MEAN).sum())


@pytest.mark.parametrize("estimator", [agents.IS(), agents.DM(Known(Table(MEAN)))])
def test_unbiased_by_enumeration(estimator):
    expected = sum(chance * estimator.estimate(Table(TARGET), log).value for chance, log in cells())
    assert expected == pytest.approx(TRUTH, rel=1e-5)


def test_clipped_importance_sampling_has_the_bias_it_should():
    expected = sum(chance * agents.IS(clip=0.5).estimate(Table(TARGET), log).value for chance, log in cells())
    bias = (P_CONTEXT[:, None] * LOGGING * np.minimum(TARGET / LOGGING, 0.5) * MEAN).sum()
    assert expected == pytest.approx(bias, rel=1e-5)


def test_on_policy_is_the_mean(log):
    estimate = agents.IS().estimate(agents.UniformPolicy(12), log)
    assert estimate.value == pytest.approx(log.reward.mean(), rel=1e-5)
    assert estimate.effective_sample_size == pytest.approx(len(log))
    assert estimate.diagnostics["max_weight"] == pytest.approx(1)
    assert estimate.warnings == ()


def test_a_policy_the_log_never_played(log):
    part = log.take(log.action != 3)
    estimate = agents.IS().estimate(agents.ConstantPolicy(3, 12), part)
    assert estimate.value == 0
    assert estimate.effective_sample_size == 0
    assert any("effective sample size" in note for note in estimate.warnings)
    assert any("instead of 1" in note for note in estimate.warnings)


def test_estimates_cover_the_truth(simulator, log):
    policy = agents.ImportanceSamplingPG(steps=300, learning_rate=2e-3).fit(log)
    fresh = op.collect(simulator, agents.UniformPolicy(12), 4_000, seed=77)
    truth = simulator.policy_value(policy).value
    importance = agents.IS().estimate(policy, fresh)
    assert abs(importance.value - truth) < 4 * importance.standard_error
    arguments = {"generator": simulator.outputs, "logging_policy": agents.UniformPolicy(12)}
    kernel = agents.KernelIS(kernel=agents.GaussianKernel(0.3, output_noise=0.0), density=agents.MonteCarloDensity(300))
    blurred = kernel.estimate(policy, fresh, **arguments)
    assert abs(blurred.value - truth) < 4 * blurred.standard_error + 0.1 * abs(truth)


def test_each_estimator_doubts_what_it_uses(simulator, log):
    arguments = {"generator": simulator.outputs, "logging_policy": agents.UniformPolicy(12)}
    off = agents.KnownDensity((np.full(len(log), 1e-3),))
    notes = agents.KernelIS(density=off, clip=1e9).estimate(agents.UniformPolicy(12), log, **arguments).warnings
    assert any("instead of 1: the density does not fit" in note for note in notes)
    assert not any("propensities" in note for note in notes)
    halved = replace(log, propensity=log.propensity / 2)
    assert "the propensities are wrong" in agents.IS().estimate(agents.UniformPolicy(12), halved).warnings[0]


def test_direct_method_says_when_its_model_is_bad(log):
    noise = replace(log.take(slice(60)), reward=np.random.default_rng(0).normal(size=60))
    regression = agents.PromptRewardRegression(steps=3_000, learning_rate=1e-2)
    estimate = agents.DM(regression).estimate(agents.UniformPolicy(12), noise)
    assert any("Record more rounds" in note for note in estimate.warnings)
    assert any("leaves out" in note for note in estimate.warnings)


def test_wrong_input(simulator, log):
    unknown = replace(log, propensity=np.full(len(log), np.nan))
    policy = agents.UniformPolicy(12)
    with pytest.raises(PropensityError, match="BehaviorCloning"):
        agents.IS().estimate(policy, unknown)
    assert agents.IS().estimate(policy, unknown, logging_policy=policy).value == pytest.approx(
        log.reward.mean(), rel=1e-5
    )
    for estimator in (agents.IS(), agents.DM(Known(lambda contexts: np.zeros((len(contexts), 3))))):
        with pytest.raises(DataError, match=r"sum 1\.5"):
            estimator.estimate(Table(np.full((2, 3), 0.5)), cells()[0][1])
        with pytest.raises(NumericalError, match="NaN"):
            estimator.estimate(Table(np.full((2, 3), np.nan)), cells()[0][1])
    with pytest.raises(DimensionError, match="12 prompts"):
        agents.IS().estimate(agents.UniformPolicy(5), log)
    with pytest.raises(DimensionError, match="fingerprint"):
        agents.IS().estimate(agents.UniformPolicy(12, "0" * 64), log)
    with pytest.raises(ConfigError, match="generator="):
        agents.KernelIS().estimate(policy, log, logging_policy=policy)
    with pytest.raises(ConfigError, match="bandwidth"):
        agents.KernelIS(tau=-1.0)
    with pytest.raises(ConfigError, match="clip"):
        agents.IS(clip=0.0)
    for estimator in (agents.IS(), agents.DM(), agents.KernelIS()):
        assert isinstance(estimator, agents.Estimator)


def test_kernel_is_with_its_defaults_gives_the_logging_policy_its_value():
    simulator = op.SyntheticConfig.preset("paper_code", n_prompts=200).build()
    uniform = agents.UniformPolicy(200, simulator.prompts.fingerprint)
    fresh = op.collect(simulator, uniform, n=3000)
    estimate = agents.KernelIS().estimate(uniform, fresh, generator=simulator.outputs, logging_policy=uniform)
    truth = simulator.policy_value(uniform).value
    assert abs(estimate.value - truth) < 3 * estimate.standard_error
    assert estimate.standard_error < 0.2
    assert 0.8 < estimate.diagnostics["mean_weight"] < 1.8


def test_a_clip_does_not_hide_weights_that_are_too_large(simulator, log):
    arguments = {"generator": simulator.outputs, "logging_policy": agents.UniformPolicy(12)}
    off = agents.KnownDensity((np.full(len(log), 1e-3),))
    estimate = agents.KernelIS(density=off, clip=100).estimate(agents.UniformPolicy(12), log, **arguments)
    assert estimate.diagnostics["clipped"] > 0
    assert any("instead of 1" in note for note in estimate.warnings)
