"""Wrong input: a typed error, or a warning that the estimate carries."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest

import agents
from agents.clustering import KnownClusters, PromptClusters
from offprompts_env.errors import ConfigError, DataError, DimensionError, NumericalError, PropensityError
from offprompts_env.types import Outputs, PromptSet
from tests.agents.tiny_bandit import LOGGING, MEAN, PROMPTS, TARGET, Generator, Sentences, Table, draw, rounds

LOG = draw(200, np.random.default_rng(0), noise=0.3)
Q = agents.FittedRewards((Table(MEAN),))
CLUSTERS = KnownClusters((PromptClusters(np.array([0, 0, 1, 1]), np.zeros((2, 1))),))
WEIGHTING = [
    agents.IS(),
    agents.SNIPS(),
    agents.SubGaussianIS(),
    agents.ExponentialSmoothing(),
    agents.LogarithmicSmoothing(),
    agents.BetaIPS(),
    agents.DR(Q),
    agents.SNDR(Q),
    agents.SwitchDR(Q),
    agents.DRos(Q),
    agents.SubGaussianDR(Q),
]
CLUSTERED = [agents.MIPS(CLUSTERS), agents.OffCEM(rewards=Q, clusters=CLUSTERS)]
KERNEL = [
    agents.KernelIS(density=agents.MonteCarloDensity(4), n_samples=2),
    agents.KernelDR(
        density=agents.MonteCarloDensity(4), n_samples=2, rewards=agents.FittedSentenceRewards((Sentences(MEAN),))
    ),
]
DIRECT = agents.SentenceDM(agents.FittedSentenceRewards((Sentences(MEAN),)))
EVERY = [*WEIGHTING, agents.DM(Q), *CLUSTERED, *KERNEL]
GIVEN = {"generator": Generator(), "logging_policy": Table(LOGGING)}
NAMES = {"ids": lambda value: type(value).__name__}


class SpokenFor(Table):
    catalogue = "0" * 64


@pytest.mark.parametrize("estimator", EVERY, **NAMES)
@pytest.mark.parametrize(
    ("policy", "error", "match"),
    [
        (agents.UniformPolicy(5), DimensionError, "expected 4 prompts"),
        (SpokenFor(TARGET), DimensionError, "fingerprint"),
        (Table(TARGET * 1.5), DataError, "sum 1"),
        (Table(TARGET * np.nan), NumericalError, "NaN"),
        ("the best one", ConfigError, "policy"),
    ],
)
def test_policies_that_are_none(estimator, policy, error, match):
    with pytest.raises(error, match=match):
        estimator.estimate(policy, LOG, **GIVEN)


@pytest.mark.parametrize("propensity", [0.0, 1.5, -0.1, np.inf])
def test_propensities_that_are_none(propensity):
    with pytest.raises(PropensityError, match="probability in"):
        rounds([0], [0], propensity=[propensity])


@pytest.mark.parametrize("estimator", WEIGHTING, **NAMES)
def test_unknown_propensities(estimator):
    unknown = replace(LOG, propensity=np.where(np.arange(200) < 3, np.nan, LOG.propensity))
    with pytest.raises(PropensityError, match="3 of 200"):
        estimator.estimate(Table(TARGET), unknown)
    estimate = estimator.estimate(Table(TARGET), unknown, logging_policy=Table(LOGGING))
    assert estimate.value == pytest.approx(estimator.estimate(Table(TARGET), LOG).value, rel=1e-5)
    assert any("propensities are unknown in 3 of 200" in note for note in estimate.warnings)
    never = Table(np.eye(4)[[0, 0]])
    with pytest.raises(PropensityError, match="did not record"):
        estimator.estimate(Table(TARGET), unknown, logging_policy=never)


@pytest.mark.parametrize("estimator", CLUSTERED, **NAMES)
def test_clusters_need_a_logging_policy_or_say_what_they_took(estimator):
    cloning = agents.BehaviorCloning(steps=300, learning_rate=1e-2)
    estimate = replace(estimator, cloning=cloning).estimate(Table(TARGET), LOG)
    assert any("cloned from the log" in note for note in estimate.warnings)
    with pytest.raises(PropensityError, match="cluster of the logged prompt"):
        estimator.estimate(Table(TARGET), LOG, logging_policy=Table(np.eye(4)[[0, 0]]))
    short = KnownClusters((PromptClusters(np.zeros(3, int), np.zeros((1, 1))),))
    with pytest.raises(DimensionError, match="labels of 4 prompts"):
        replace(estimator, clusters=short).estimate(Table(TARGET), LOG, **GIVEN)


@pytest.mark.parametrize("estimator", [*WEIGHTING, agents.DM(Q), DIRECT], **NAMES)
def test_what_is_not_asked_is_not_looked_at(estimator):
    unused = {} if estimator is DIRECT else {"generator": "none"}
    if estimator not in WEIGHTING:
        unused["logging_policy"] = "none"
    whole = estimator.estimate(Table(TARGET), LOG, **GIVEN)
    assert np.array_equal(estimator.estimate(Table(TARGET), LOG, **{**GIVEN, **unused}).terms, whole.terms)


@pytest.mark.parametrize("estimator", [*CLUSTERED, *KERNEL], **NAMES)
def test_what_is_asked_is_checked(estimator):
    with pytest.raises(ConfigError, match="generator"):
        estimator.estimate(Table(TARGET), LOG, **{**GIVEN, "generator": object()})
    with pytest.raises(DimensionError, match="expected 4 prompts"):
        estimator.estimate(Table(TARGET), LOG, **{**GIVEN, "logging_policy": agents.UniformPolicy(5)})


def test_warnings_of_the_method_come_before_those_of_the_log_and_of_what_was_fitted():
    class Warns(agents.FittedRewards):
        def fit_many(self, logs, *, seeds=None):
            warnings.warn("useless", agents.TrainingWarning, stacklevel=2)
            return super().fit_many(logs, seeds=seeds)

    found = agents.DM(Warns(Q.models)).estimate(Table(TARGET), replace(LOG, reward=np.ones(200)))
    method, log, fit = found.warnings
    assert method.startswith("the standard error leaves out")
    assert log.startswith("all rewards are 1")
    assert fit == "useless"


class Broken(Generator):
    def sample(self, contexts, actions, rng):
        return Outputs(np.full((len(actions), 1), np.nan, dtype=np.float32))


class Wide(Generator):
    output_dim = 2


class Elsewhere(Generator):
    prompts = PromptSet(np.ones((4, 4)))


@pytest.mark.parametrize("estimator", KERNEL, **NAMES)
@pytest.mark.parametrize(
    ("generator", "error", "match"),
    [
        (None, ConfigError, "generator="),
        (object(), ConfigError, "lacks"),
        (Broken(), NumericalError, "finite output"),
        (Wide(), DimensionError, "outputs of dimension 1"),
        (Elsewhere(), DimensionError, "fingerprint"),
    ],
)
def test_generators_that_are_none(estimator, generator, error, match):
    with pytest.raises(error, match=match):
        estimator.estimate(Table(TARGET), LOG, generator=generator, logging_policy=Table(LOGGING))


def test_a_known_density_asks_for_no_logging_policy():
    estimator = agents.KernelIS(density=agents.KnownDensity((np.ones(200),)), n_samples=2)
    assert not any("cloned" in note for note in estimator.estimate(Table(TARGET), LOG, generator=Generator()).warnings)


def test_reward_models_that_are_none():
    cases = (
        (Table(MEAN * np.nan), NumericalError, "finite predictions"),
        (SpokenFor(MEAN), DimensionError, "fingerprint"),
    )
    for make in (agents.DM, agents.DR, agents.SwitchDR, lambda rewards: agents.OffCEM(rewards, clusters=CLUSTERS)):
        for model, error, match in cases:
            with pytest.raises(error, match=match):
                make(agents.FittedRewards((model,))).estimate(Table(TARGET), LOG, **GIVEN)
        with pytest.raises(ConfigError, match="expected 1, one a log"):
            make(agents.FittedRewards(())).estimate(Table(TARGET), LOG, **GIVEN)
    sentences = agents.FittedSentenceRewards((Sentences(MEAN * np.nan),))
    with pytest.raises(NumericalError, match="finite predictions"):
        replace(KERNEL[1], rewards=sentences).estimate(Table(TARGET), LOG, **GIVEN)


def test_a_log_too_small_for_its_folds():
    few = LOG.take(slice(9))
    regression = agents.PromptRewardRegression(steps=5)
    kernel = replace(KERNEL[1], rewards=agents.SentenceRewardRegression(steps=5))
    for estimator in (
        agents.DR(regression),
        agents.SNDR(regression),
        agents.OffCEM(regression, clusters=CLUSTERS),
        kernel,
    ):
        with pytest.raises(DataError, match="at least 10 rounds, two a fold, got 9"):
            estimator.estimate(Table(TARGET), few, **GIVEN)
    assert np.isfinite(agents.DR(regression, folds=2).estimate(Table(TARGET), few).value)
    assert np.isfinite(replace(kernel, folds=2).estimate(Table(TARGET), few, **GIVEN).value)


@pytest.mark.parametrize("estimator", EVERY, **NAMES)
def test_constant_rewards(estimator):
    flat = replace(LOG, reward=np.full(200, 0.7))
    estimate = estimator.estimate(Table(TARGET), flat, **GIVEN)
    assert any("all rewards are 0.7" in note for note in estimate.warnings)
    assert np.isfinite(estimate.value)


def test_of_constant_rewards_a_self_normalised_estimate_is_their_value():
    flat = replace(LOG, reward=np.full(200, 0.7))
    for estimator in (agents.SNIPS(), agents.BetaIPS()):
        estimate = estimator.estimate(Table(TARGET), flat)
        assert estimate.value == pytest.approx(0.7, abs=1e-6)
        assert estimate.standard_error == pytest.approx(0, abs=1e-6)


def test_negative_rewards_are_no_secret_to_logarithmic_smoothing():
    negative = replace(LOG, reward=LOG.reward - 1)
    assert any("rewards ≥ 0" in n for n in agents.LogarithmicSmoothing().estimate(Table(TARGET), negative).warnings)
    positive = replace(LOG, reward=np.abs(LOG.reward))
    assert not any("rewards ≥ 0" in n for n in agents.LogarithmicSmoothing().estimate(Table(TARGET), positive).warnings)
    # An odd function of the reward.
    found = [
        agents.LogarithmicSmoothing(2.0).estimate(Table(TARGET), replace(LOG, reward=r))
        for r in (LOG.reward, -LOG.reward)
    ]
    assert found[0].value == pytest.approx(-found[1].value)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: agents.IS(clip=0.0), "clip"),
        (lambda: agents.SNIPS(clip=-1.0), "clip"),
        (lambda: agents.MIPS(clip=float("nan")), "clip"),
        (lambda: agents.SubGaussianIS(1.1), "shrinkage"),
        (lambda: agents.SubGaussianDR(shrinkage=-0.1), "shrinkage"),
        (lambda: agents.ExponentialSmoothing(1.5), "exponent"),
        (lambda: agents.LogarithmicSmoothing(-1.0), "smoothing"),
        (lambda: agents.BetaIPS(float("inf")), "beta"),
        (lambda: agents.SwitchDR(tau=-1.0), "tau"),
        (lambda: agents.DRos(shrinkage=float("nan")), "shrinkage"),
        (lambda: agents.DR(folds=1), "folds"),
        (lambda: agents.DM(n_draws=0), "n_draws"),
        (lambda: agents.OffCEM(n_draws=0), "n_draws"),
        (lambda: agents.OffCEM(clip=0.0), "clip"),
        (lambda: agents.KernelIS(tau=0.0), "bandwidth"),
        (lambda: agents.KernelDR(tau=-1.0), "bandwidth"),
        (lambda: agents.KernelDR(folds=1), "folds"),
        (lambda: agents.KernelIS(n_samples=0), "n_samples"),
        (lambda: agents.BalancedIS(folds=1), "folds"),
        (lambda: agents.Online(object()), "simulator"),
    ],
)
def test_settings_out_of_range(make, match):
    with pytest.raises(ConfigError, match=match):
        make()


def test_all_are_estimators(simulator):
    for estimator in (*EVERY, agents.Online(simulator)):
        assert isinstance(estimator, agents.Estimator)


def test_prompts_are_those_of_the_log():
    other = rounds([0], [0], prompts=PromptSet(np.eye(4)[::-1]))
    catalogued = agents.UniformPolicy(4, PROMPTS.fingerprint)
    with pytest.raises(DimensionError, match="fingerprint"):
        agents.IS().estimate(catalogued, other)
