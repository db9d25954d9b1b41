"""Estimators against enumeration: on the population log the expectation of each is known in closed form."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

import agents
from agents.clustering import KnownClusters, PromptClusters
from agents.estimators.look import draw_prompts, systematic
from agents.networks import MLP
from agents.training import StackedLogs
from agents.worlds import Worlds
from offprompts_env.errors import NumericalError
from offprompts_env.types import PromptSet
from tests.agents.tiny_bandit import (
    LOGGING,
    MEAN,
    MODEL,
    TARGET,
    TRUTH,
    WEIGHT,
    Generator,
    Neighbours,
    Sentences,
    Table,
    draw,
    population,
    rounds,
)

Q = agents.FittedRewards((Table(MODEL),))
DIRECT = (TARGET * MODEL).sum(axis=1).mean()
GROUPS = np.array([0, 0, 1, 1])
CLUSTERS = KnownClusters((PromptClusters(GROUPS, np.zeros((2, 1))),))
GROUP_WEIGHT = np.stack([(TARGET[:, g == GROUPS].sum(1) / LOGGING[:, g == GROUPS].sum(1)) for g in GROUPS], axis=1)


def expectation(weights, residual):
    return (LOGGING * weights * residual).sum(axis=1).mean()


CASES = [
    (agents.IS(), TRUTH),
    (agents.IS(clip=1.5), expectation(np.minimum(WEIGHT, 1.5), MEAN)),
    (agents.SNIPS(), TRUTH),
    (
        agents.SNIPS(clip=1.5),
        expectation(np.minimum(WEIGHT, 1.5), MEAN) / expectation(np.minimum(WEIGHT, 1.5), np.ones((2, 4))),
    ),
    (agents.SubGaussianIS(0.3), expectation(WEIGHT / (0.7 + 0.3 * WEIGHT), MEAN)),
    (agents.SubGaussianIS(0.0), TRUTH),
    (agents.SubGaussianIS(1.0), expectation(1.0, MEAN)),
    (agents.ExponentialSmoothing(0.6), expectation(TARGET / LOGGING**0.6, MEAN)),
    (agents.ExponentialSmoothing(1.0), TRUTH),
    (agents.LogarithmicSmoothing(0.5), expectation(np.log(1 + 0.5 * WEIGHT * MEAN) / 0.5, 1.0)),
    (agents.LogarithmicSmoothing(), expectation(np.log(1 + 0.25 * WEIGHT * MEAN) / 0.25, 1.0)),
    (agents.LogarithmicSmoothing(0.0), TRUTH),
    (agents.BetaIPS(), TRUTH),
    (agents.BetaIPS(3.0), TRUTH),
    (agents.DM(Q), DIRECT),
    (agents.DR(Q), TRUTH),
    (agents.SNDR(Q), TRUTH),
    (agents.SwitchDR(Q, tau=1.5), DIRECT + expectation(WEIGHT * (WEIGHT <= 1.5), MEAN - MODEL)),
    (agents.SwitchDR(Q, tau=float("inf")), TRUTH),
    (agents.SwitchDR(Q, tau=0.0), DIRECT),
    (agents.DRos(Q, shrinkage=2.0), DIRECT + expectation(2 * WEIGHT / (WEIGHT**2 + 2), MEAN - MODEL)),
    (agents.DRos(Q, shrinkage=float("inf")), TRUTH),
    (agents.DRos(Q, shrinkage=0.0), DIRECT),
    (agents.SubGaussianDR(Q, shrinkage=0.3), DIRECT + expectation(WEIGHT / (0.7 + 0.3 * WEIGHT), MEAN - MODEL)),
    (agents.MIPS(CLUSTERS), expectation(GROUP_WEIGHT, MEAN)),
    (agents.MIPS(CLUSTERS, clip=1.1), expectation(np.minimum(GROUP_WEIGHT, 1.1), MEAN)),
    (agents.OffCEM(rewards=Q, clusters=CLUSTERS), DIRECT + expectation(GROUP_WEIGHT, MEAN - MODEL)),
]


@pytest.mark.parametrize(("estimator", "expected"), CASES, ids=lambda value: getattr(type(value), "__name__", ""))
def test_expectation_by_enumeration(estimator, expected):
    given = {"logging_policy": Table(LOGGING)} if isinstance(estimator, agents.MIPS) else {}
    estimate = estimator.estimate(Table(TARGET), population(), **given)
    assert estimate.value == pytest.approx(expected, abs=1e-6)
    assert estimate.terms.mean() == pytest.approx(estimate.value, abs=1e-12)


def test_cluster_weights_are_unbiased_where_their_theory_says_so():
    level = np.array([[0.3, 0.3, 0.8, 0.8], [0.6, 0.6, 0.1, 0.1]])
    log = population()
    x, a = log.context[:, 0].astype(int), log.action
    alike = replace(log, reward=level[x, a])
    given = {"logging_policy": Table(LOGGING)}
    truth = (TARGET * level).sum(axis=1).mean()
    assert agents.MIPS(CLUSTERS).estimate(Table(TARGET), alike, **given).value == pytest.approx(truth, abs=1e-6)
    # A model that is off by the same amount for all prompts of a cluster.
    shifted = agents.FittedRewards((Table(MEAN + level),))
    offcem = agents.OffCEM(rewards=shifted, clusters=CLUSTERS)
    assert offcem.estimate(Table(TARGET), log, **given).value == pytest.approx(TRUTH, abs=1e-6)


@pytest.mark.parametrize("near", [0.0, 0.5])
def test_kernel_estimators_by_enumeration(near):
    similar = np.eye(4) + near * (np.abs(np.subtract.outer(np.arange(4), np.arange(4))) == 1)
    density, weight = LOGGING @ similar, (TARGET @ similar) / (LOGGING @ similar)
    log = population()
    x, a = log.context[:, 0].astype(int), log.action
    # Eight systematic draws hold the target's eighths exactly.
    settings = {"kernel": Neighbours(near), "density": agents.KnownDensity((density[x, a],)), "n_samples": 8}
    given = {"generator": Generator()}
    found = agents.KernelIS(**settings).estimate(Table(TARGET), log, **given).value
    assert found == pytest.approx(expectation(weight, MEAN), abs=1e-6)
    rewards = agents.FittedSentenceRewards((Sentences(MODEL),))
    found = agents.KernelDR(**settings, rewards=rewards).estimate(Table(TARGET), log, **given).value
    assert found == pytest.approx(DIRECT + expectation(weight, MEAN - MODEL), abs=1e-6)
    if near == 0:
        assert found == pytest.approx(TRUTH, abs=1e-6)
    right = agents.FittedSentenceRewards((Sentences(MEAN),))
    found = agents.KernelDR(**settings, rewards=right).estimate(Table(TARGET), log, **given).value
    assert found == pytest.approx(TRUTH, abs=1e-6)


class MeanReward:
    """A source of models that predict the mean reward of what they were fitted on."""

    def fit_many(self, logs, *, seeds=None):
        return [Table(np.full((2, 4), log.reward.mean())) for log in logs]


def test_cross_fitting_predicts_a_round_by_others_only():
    log = draw(40, np.random.default_rng(0), noise=1.0)
    estimate = agents.DR(MeanReward(), folds=4).estimate(Table(TARGET), log)
    weights = WEIGHT[log.context[:, 0].astype(int), log.action]
    # With a constant prediction c a term is c + w (r − c), and no weight of this world is 1.
    predicted = ((estimate.terms - weights * log.reward) / (1 - weights)).round(5)
    folds = [np.flatnonzero(predicted == value) for value in np.unique(predicted)]
    assert [len(own) for own in folds] == [10] * 4
    for own in folds:
        assert predicted[own[0]] == pytest.approx(np.delete(log.reward, own).mean(), abs=1e-4)


def test_cross_fitted_estimates_are_unbiased_and_others_are_not():
    logging, target, pay = np.array([0.25, 0.75]), np.array([0.7, 0.3]), np.array([1.0, 0.2])
    prompts = PromptSet(np.eye(2))

    def expected(estimator):
        total = 0.0
        for actions in itertools.product(range(2), repeat=4):
            a = np.array(actions)
            log = rounds(np.zeros(4, int), a, pay[a], logging[a], prompts)
            total += logging[a].prod() * estimator.estimate(Table(target[None]), log).value
        return total

    class Mean2(MeanReward):
        def fit_many(self, logs, *, seeds=None):
            return [Table(np.full((1, 2), log.reward.mean())) for log in logs]

    truth = float(target @ pay)
    assert expected(agents.DR(Mean2(), folds=2)) == pytest.approx(truth, abs=1e-6)
    assert abs(expected(agents.DR(Mean2(), folds=None)) - truth) > 0.01
    assert expected(agents.BetaIPS(0.4)) == pytest.approx(truth, abs=1e-6)


def test_weights_that_happen_to_be_small_do_not_make_the_best_constant_large():
    """Weights 0.5 and 1.2072, whose ``Σ (w² − w)`` is nearly 0 though they vary."""
    table = np.array([[0.5, 1.2072]])
    log = rounds([0, 0], [0, 1], [0.0, 1.0], np.full(2, 1 / table.sum()), PromptSet(np.eye(2)))
    policy = Table(table / table.sum())
    estimate = agents.BetaIPS().estimate(policy, log)
    assert -1 < estimate.diagnostics["beta"] < 3
    moved = agents.BetaIPS().estimate(policy, replace(log, reward=log.reward + 5))
    assert moved.value == pytest.approx(estimate.value + 5)


@pytest.mark.parametrize("log", [population(), draw(30, np.random.default_rng(2), noise=0.5)], ids=["all", "drawn"])
def test_the_best_constant_has_the_least_variance(log):
    best = agents.BetaIPS().estimate(Table(TARGET), log)
    beta = best.diagnostics["beta"]
    for other in (beta - 0.05, beta + 0.05, 0.0):
        worse = agents.BetaIPS(other).estimate(Table(TARGET), log)
        assert best.terms.var() < worse.terms.var()


@pytest.mark.parametrize(
    "estimator",
    [
        agents.IS(),
        agents.SNIPS(),
        agents.SubGaussianIS(),
        agents.LogarithmicSmoothing(0.0),
        agents.ExponentialSmoothing(1.0),
        agents.BetaIPS(),
        agents.DR(agents.FittedRewards((Table(np.zeros((2, 4))),))),
        agents.MIPS(CLUSTERS),
    ],
    ids=lambda value: type(value).__name__,
)
def test_on_policy_is_the_mean(estimator):
    log = draw(200, np.random.default_rng(1), noise=0.5)
    estimate = estimator.estimate(Table(LOGGING), log, logging_policy=Table(LOGGING))
    assert estimate.value == pytest.approx(log.reward.mean(), abs=1e-6)
    assert estimate.effective_sample_size == pytest.approx(200)
    assert estimate.diagnostics["max_weight"] == pytest.approx(1)
    assert (estimate.diagnostics["unsupported_prompts"], estimate.diagnostics["unsupported_share"]) == (0, 0)


@pytest.mark.parametrize("chance", [1 / 7, 1e-60], ids=["sevenths", "tiny"])
def test_propensities_are_not_rounded(chance):
    """Neither to the digits of float32 nor to its zero."""
    table = np.array([[chance, 1 - chance]])
    log = rounds(np.zeros(3, int), [0, 1, 0], [0.25, 1, 0.75], table[0, [0, 1, 0]], PromptSet(np.eye(2)))
    for estimator in (agents.IS(), agents.SNIPS(), agents.NaiveIS()):
        logs = [log] if isinstance(estimator, agents.NaiveIS) else log
        assert estimator.estimate(Table(table), logs).value == pytest.approx(2 / 3, abs=1e-15)
    assert (Worlds(StackedLogs([log]), None, None, (0,)).propensities("training") > 0).all()


def test_one_prompt_is_the_mean():
    log = rounds(np.zeros(50, int), np.zeros(50, int), np.linspace(0, 1, 50), np.ones(50), PromptSet(np.ones((1, 1))))
    only = agents.UniformPolicy(1)
    model = agents.FittedRewards((Table(np.full((1, 1), 0.3)),))
    for estimator in (agents.IS(), agents.SNIPS(), agents.BetaIPS(), agents.DR(model), agents.SNDR(model)):
        assert estimator.estimate(only, log).value == pytest.approx(0.5, abs=1e-6)
    assert agents.DM(model).estimate(only, log).value == pytest.approx(0.3)


def test_all_weights_zero():
    log = draw(100, np.random.default_rng(0))
    part = log.take(log.action != 3)
    policy = agents.ConstantPolicy(3, 4)
    for estimator in (
        agents.IS(),
        agents.SubGaussianIS(),
        agents.ExponentialSmoothing(),
        agents.LogarithmicSmoothing(),
    ):
        estimate = estimator.estimate(policy, part)
        assert (estimate.value, estimate.effective_sample_size) == (0, 0)
        assert any("instead of 1" in note for note in estimate.warnings)
    for estimator in (agents.SNIPS(), agents.SNDR(Q)):
        estimate = estimator.estimate(policy, part)
        assert np.isnan([estimate.value, estimate.standard_error, *estimate.interval]).all()
        assert any("value is unknown" in note for note in estimate.warnings)
        assert np.isnan(estimate.bootstrap(n_resamples=5).interval).all()
    direct = agents.DM(Q).estimate(policy, part)
    assert agents.DR(Q).estimate(policy, part).value == pytest.approx(direct.value)


def test_unsupported_prompts_are_counted():
    log = draw(2_000, np.random.default_rng(0))
    part = log.take((log.action != 0) & (log.action != 3))
    for estimator in (agents.IS(), agents.DM(Q), agents.DR(Q)):
        estimate = estimator.estimate(Table(TARGET), part)
        rows = part.context[:, 0].astype(int)
        assert estimate.diagnostics["unsupported_prompts"] == 2
        assert estimate.diagnostics["unsupported_share"] == pytest.approx(TARGET[rows][:, [0, 3]].sum(1).mean())
        assert any("prompts that the log never shows" in note for note in estimate.warnings)
    never = agents.IS().estimate(Table(np.array([[0, 1, 0, 0], [0, 0, 1, 0]])), part)
    assert never.diagnostics["unsupported_prompts"] == 0
    # A prompt that was not logged is supported where its cluster was.
    marginal = agents.MIPS(CLUSTERS).estimate(Table(TARGET), part, logging_policy=Table(LOGGING))
    assert marginal.diagnostics["unsupported_prompts"] == 0


@pytest.mark.parametrize("n_prompts", [1, 3, 64, 97, 1000])
def test_systematic_draws_are_unbiased(n_prompts):
    rng = np.random.default_rng(n_prompts)
    pmf = rng.dirichlet(np.full(n_prompts, 0.2), size=3).astype(np.float32)
    pmf[0] = 0
    pmf[0, -1] = 1
    found, steps = np.zeros((3, n_prompts)), 2_000
    for offset in range(steps):
        drawn = systematic(pmf, np.full(3, (offset + 0.5) / steps), 5)
        for row in range(3):
            np.add.at(found[row], drawn[row], 1 / (5 * steps))
    assert np.abs(found - pmf).max() < 1e-3
    assert (found[0, :-1] == 0).all()


def test_the_mean_over_draws_is_near_the_exact_expectation(simulator, log):
    policy = agents.SoftmaxPolicy(lambda contexts: contexts.context @ np.ones((5, 12)) * np.arange(12), 12, beta=0.1)
    model = agents.PromptRewardRegression(steps=2_000, learning_rate=2e-3).fit(log)
    rewards = agents.FittedRewards((model,))
    for estimator in (agents.DM, agents.DR):
        exact = estimator(rewards, n_draws=None).estimate(policy, log)
        drawn = estimator(rewards, n_draws=1).estimate(policy, log)
        difference = drawn.minus(exact)
        assert difference.standard_error > 0
        assert estimator(rewards, n_draws=2).estimate(policy, log).value == exact.value
        assert abs(difference.value) < 4 * difference.standard_error
        assert drawn.standard_error < 2 * exact.standard_error


def test_simulated_prompts_are_those_of_the_policy(log):
    drawn, average = draw_prompts(agents.UniformPolicy(12), log, 50, seed=0)
    assert np.abs(average - 1 / 12).max() < 5 * np.sqrt(1 / 12 / drawn.size)
    table = Table(np.arange(12)[None] / 66)
    single = replace(log, context=np.zeros((len(log), 1)))
    drawn, average = draw_prompts(table, single, 50, seed=0)
    assert average == pytest.approx(np.arange(12) / 66)
    assert np.bincount(drawn.ravel(), minlength=12) / drawn.size == pytest.approx(np.arange(12) / 66, abs=1e-3)


def test_online_is_the_truth(simulator):
    policy = agents.UniformPolicy(12)
    truth = simulator.policy_value(policy)
    assert agents.Online(simulator).estimate(policy).value == truth.value
    played = agents.Online(simulator, n=20_000, played=True).estimate(policy, seed=1)
    assert abs(played.value - truth.value) < 4 * np.hypot(played.standard_error, truth.standard_error)
    assert len(played.terms) == 20_000


class Drawing(Table):
    """A policy that draws, and tells the probability of a prompt, without its pmf."""

    def sample(self, contexts, rng):
        pmf = self.table[contexts.context[:, 0].astype(int)]
        actions = (pmf.cumsum(1) < rng.random(len(contexts))[:, None]).sum(1)
        return actions, pmf[np.arange(len(actions)), actions]

    def probabilities(self, contexts):
        raise AssertionError("a pmf over very many prompts")

    def chosen(self, contexts, actions):
        return self.table[contexts.context[:, 0].astype(int), actions]


def test_policies_that_draw_without_their_pmf_are_never_asked_for_it():
    log = draw(3_000, np.random.default_rng(4), noise=0.3)
    policy, drawing = Table(np.repeat(TARGET, 10, axis=1) / 10), Drawing(np.repeat(TARGET, 10, axis=1) / 10)
    wide = replace(log, action=log.action * 10, propensity=log.propensity / 10, prompts=PromptSet(np.eye(40)))
    rewards = agents.FittedRewards((Table(np.repeat(MODEL, 10, axis=1)),))
    for estimator in (agents.IS(), agents.SNIPS(), agents.DM(rewards), agents.DR(rewards)):
        found, expected = estimator.estimate(drawing, wide), estimator.estimate(policy, wide)
        difference = found.minus(expected)
        assert abs(difference.value) <= 4 * difference.standard_error + 1e-9
        shares = [estimate.diagnostics["unsupported_share"] for estimate in (found, expected)]
        assert shares[0] == pytest.approx(shares[1], abs=0.05)


def test_networks_give_what_their_pmf_gives(log):
    rng = np.random.default_rng(0)
    network = MLP(tuple(rng.normal(size=shape).astype(np.float32) for shape in ((11, 20), (21, 12))))
    policy = agents.NeuralPolicy(network)

    class Plain:
        n_prompts = 12

        def probabilities(self, contexts):
            return policy.probabilities(contexts)

    for estimator in (agents.IS(), agents.DM(agents.FittedRewards((agents.PromptRewardRegression(steps=9).fit(log),)))):
        found, expected = (estimator.estimate(own, log) for own in (policy, Plain()))
        assert found.terms == pytest.approx(expected.terms, rel=1e-4, abs=1e-6)
        assert found.diagnostics["unsupported_share"] == expected.diagnostics["unsupported_share"]
    broken = agents.NeuralPolicy(MLP((network.layers[0], network.layers[1] * np.nan)))
    with pytest.raises(NumericalError, match="NaN"):
        agents.IS().estimate(broken, log)
