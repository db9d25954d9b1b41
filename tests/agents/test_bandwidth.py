from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import agents
from agents.tuning.bandwidth import bandwidths, median_distance, short, with_tau
from agents.tuning.crossvalidation import split
from offprompts_env.errors import ConfigError, DataError
from offprompts_env.types import LoggedDataset, Outputs

UNIFORM = agents.UniformPolicy(12)
QUICK = agents.DSO(steps=40, learning_rate=5e-3, density=agents.MonteCarloDensity(5))
REWARDS = agents.SentenceRewardRegression(steps=200, learning_rate=3e-3)


class Echo:
    """A reward model that pays the first coordinate of a sentence."""

    def __call__(self, contexts, outputs):
        return outputs.embedding[:, 0]


class Same:
    """A generator that always says the same."""

    def __init__(self, log: LoggedDataset):
        self.prompts, self.output_dim, self.sentence = log.prompts, log.output.shape[1], log.output[0]

    def sample(self, contexts, actions, rng):
        return Outputs(np.tile(self.sentence, (len(contexts), 1)))


def test_sentence_dm_is_the_mean_of_the_model_over_the_policys_sentences(simulator, log):
    """For a linear model the expectation is known: the generator's mean, up to its noise."""
    policy = agents.ConstantPolicy(4, 12)
    estimator = agents.SentenceDM(agents.FittedSentenceRewards((Echo(),)), n_samples=50)
    estimate = estimator.estimate(policy, log, generator=simulator.outputs)
    outputs = simulator.outputs
    mean = outputs.base(log.contexts)[:, 0] + outputs.effects[4, 0]
    bound = 4 * outputs.noise_std[0] / np.sqrt(50 * len(log))
    assert estimate.value == pytest.approx(mean.mean(), abs=bound)
    assert np.abs(estimate.terms - mean).max() < 5 * outputs.noise_std[0] / np.sqrt(50)
    assert any("leaves out the error" in note for note in estimate.warnings)
    assert estimator.estimate(policy, log, generator=simulator.outputs).value == estimate.value


def test_sentence_dm_cross_fits(simulator, log):
    part = log.take(slice(60))
    whole, folded = (
        agents.SentenceDM(REWARDS, folds=folds).estimate(UNIFORM, part, generator=simulator.outputs)
        for folds in (None, 3)
    )
    assert len(folded.terms) == 60
    assert not np.array_equal(folded.terms, whole.terms)


def test_the_scale_of_distances(simulator, log):
    """Two sentences of the same round differ by the distance of two prompts and twice the generator's noise."""
    found = median_distance(log, generator=simulator.outputs, logging_policy=UNIFORM)
    rng = np.random.default_rng(0)
    effects, std = simulator.outputs.effects, simulator.outputs.noise_std
    pairs = rng.integers(12, size=(2, 4000))
    noise = np.sqrt(2) * std * rng.standard_normal((4000, len(std)))
    expected = np.median(np.linalg.norm(effects[pairs[0]] - effects[pairs[1]] + noise, axis=1)) / len(std)
    assert found == pytest.approx(expected, rel=0.1)
    blurred = median_distance(log, generator=simulator.outputs, logging_policy=UNIFORM, output_noise=50.0)
    assert blurred > 3 * found
    assert bandwidths(4.0) == (4.0, 2.0, 1.0, 0.5, 0.25)


def test_with_tau_changes_the_kernel_there_is():
    assert with_tau(agents.DSO(), 0.3) == agents.DSO(tau=0.3)
    own = agents.KernelIS(kernel=agents.UniformKernel(2.0, output_noise=0.0))
    assert with_tau(own, 0.3).kernel == agents.UniformKernel(0.3, output_noise=0.0)


def test_a_bandwidth_is_chosen_by_what_is_learned_with_it(simulator, log):
    """So wide a kernel sees no difference between prompts, so narrow a one hardly any sentence: neither learns."""
    learner = replace(QUICK, steps=300, kernel=agents.GaussianKernel(output_noise=0.0))
    log = log.take(slice(1000))
    found = agents.choose_tau(
        log,
        generator=simulator.outputs,
        logging_policy=UNIFORM,
        learner=learner,
        candidates=(1e-3, 1.0, 1e3),
        rewards=replace(REWARDS, steps=1000),
    )
    assert found.candidates == (1e3, 1.0, 1e-3)
    assert found.chosen == 1.0
    assert "> tau=1 " in str(found)
    truth = [
        simulator.policy_value(
            with_tau(learner, tau).fit(log, generator=simulator.outputs, logging_policy=UNIFORM)
        ).value
        for tau in found.candidates
    ]
    assert int(np.argmax(truth)) == 1


@pytest.mark.filterwarnings("ignore::agents.TrainingWarning")
def test_the_judge_never_sees_what_was_trained_on(simulator, log):
    """The estimates by hand: policies of one half, predictions of a model of the other half."""
    part = log.take(slice(60))
    found = agents.choose_tau(
        part,
        generator=simulator.outputs,
        logging_policy=UNIFORM,
        learner=QUICK,
        candidates=(0.7,),
        rewards=REWARDS,
        seed=3,
    )
    terms = np.empty(60)
    for rows in split(60, 2, 3):
        training, rest = part.take(np.setdiff1d(np.arange(60), rows)), part.take(rows)
        policy = with_tau(QUICK, 0.7).fit(training, generator=simulator.outputs, logging_policy=UNIFORM, seed=3)
        judge = agents.SentenceDM(agents.FittedSentenceRewards((REWARDS.fit(rest, seed=3),)))
        terms[rows] = judge.estimate(policy, rest, generator=simulator.outputs, seed=3).terms
    np.testing.assert_allclose(found.estimate.terms, terms)
    assert found.chosen == 0.7


def test_the_grid_comes_from_the_log_and_a_missing_logging_policy_is_cloned(simulator, log):
    learner = replace(QUICK, cloning=agents.BehaviorCloning(steps=60))
    with pytest.warns(agents.AssumptionWarning, match="choose_tau: no logging policy was given") as caught:
        found = agents.choose_tau(
            log.take(slice(100)), generator=simulator.outputs, learner=learner, rewards=REWARDS, n_samples=1
        )
    assert len([w for w in caught if issubclass(w.category, agents.AssumptionWarning)]) == 1
    assert len(found.candidates) == 5
    assert any("Record more rounds" in note for note in found.warnings)
    np.testing.assert_allclose(np.array(found.candidates[1:]) / found.candidates[:-1], 0.5, rtol=0.05)


@pytest.mark.filterwarnings("ignore::agents.TrainingWarning")
def test_tuned_dso_is_dso_with_the_chosen_bandwidth(simulator, log):
    logs, inner = [log.take(slice(80)), log.take(slice(80, 200))], replace(QUICK, steps=40)
    learner = agents.TunedDSO(inner, candidates=(0.5, 3.0), rewards=REWARDS)
    arguments = {"generators": [simulator.outputs] * 2, "logging_policies": [UNIFORM] * 2}
    together = learner.fit_many(logs, seeds=[4, 4], **arguments)
    for own, policy in zip(logs, together, strict=True):
        settings = {"generator": simulator.outputs, "logging_policy": UNIFORM, "seed": 4}
        found = agents.choose_tau(own, learner=short(inner), candidates=learner.candidates, rewards=REWARDS, **settings)
        expected = with_tau(inner, found.chosen).fit(own, **settings)
        for left, right in zip(policy.network.layers, expected.network.layers, strict=True):
            np.testing.assert_array_equal(left, right)
    seen = []
    callback = agents.Callback(20, lambda step, policies: seen.append(len(policies)))
    learner.fit(logs[0], generator=simulator.outputs, logging_policy=UNIFORM, callback=callback)
    assert seen == [1, 1]
    assert isinstance(learner, agents.Learner)


@pytest.mark.filterwarnings("ignore::agents.TrainingWarning")
def test_worlds_with_different_bandwidths_share_no_callback(simulator, log, monkeypatch):
    """Each world learns with its own bandwidth, in the order of the logs."""
    chosen = iter([0.5, 3.0, 0.5] * 2)

    class Found:
        def __init__(self):
            self.chosen = next(chosen)

    monkeypatch.setattr("agents.tuning.bandwidth.choose_tau", lambda log, **rest: Found())
    logs, learner = [log.take(slice(50 * i, 50 * i + 50)) for i in range(3)], agents.TunedDSO(QUICK)
    arguments = {"generators": [simulator.outputs] * 3, "logging_policies": [UNIFORM] * 3}
    policies = learner.fit_many(logs, **arguments)
    for world, tau in enumerate([0.5, 3.0, 0.5]):
        alone = with_tau(QUICK, tau).fit(logs[world], generator=simulator.outputs, logging_policy=UNIFORM, seed=world)
        np.testing.assert_array_equal(alone.network.layers[-1], policies[world].network.layers[-1])
    with pytest.raises(ConfigError, match="fit the logs one by one"):
        learner.fit_many(logs, callback=agents.Callback(20, lambda step, policies: None), **arguments)


def test_a_short_schedule_keeps_the_proportions():
    found = short(agents.DSO(max_sentences=1_000))
    assert (found.steps, found.learning_rate, found.max_sentences) == (1500, 2e-3, 75)
    assert (found.density.steps, found.density.learning_rate) == (3000, 5e-4)
    assert short(agents.DSO(steps=1, density=agents.MonteCarloDensity())) == agents.DSO(
        steps=1, learning_rate=2e-3, density=agents.MonteCarloDensity()
    )


def test_ties_go_to_the_wider_kernel(simulator, log):
    flat = agents.FittedSentenceRewards((lambda contexts, outputs: np.zeros(len(contexts)),))
    found = agents.choose_tau(
        log.take(slice(40)),
        generator=simulator.outputs,
        logging_policy=UNIFORM,
        learner=replace(QUICK, steps=2),
        candidates=(0.5, 2.0),
        rewards=flat,
    )
    assert found.chosen == 2.0


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"candidates": ()}, ConfigError, "at least one bandwidth"),
        ({"candidates": (0.0,)}, ConfigError, "bandwidth > 0, got 0.0"),
        ({"folds": 1}, ConfigError, "folds"),
        ({"n_samples": 0}, ConfigError, "n_samples"),
        ({"generator": 3}, ConfigError, "simulator.outputs"),
        ({"logging_policy": agents.UniformPolicy(3)}, ConfigError, "12 prompts"),
    ],
)
def test_wrong_input(arguments, error, words, simulator, log):
    with pytest.raises(error, match=words):
        agents.choose_tau(log, **{"generator": simulator.outputs, "logging_policy": UNIFORM, **arguments})


def test_logs_that_cannot_be_judged(simulator, log):
    arguments = {"generator": simulator.outputs, "logging_policy": UNIFORM, "learner": QUICK}
    with pytest.raises(DataError, match="at least two rounds in each of 2 folds, got 3"):
        agents.choose_tau(log.take(slice(3)), candidates=(1.0,), **arguments)
    with pytest.raises(DataError, match="no outputs"):
        agents.choose_tau(replace(log, output=log.output[:, :0]), **arguments)
    silent = replace(log, output=np.tile(log.output[0], (len(log), 1)))
    with pytest.raises(DataError, match="differ from prompt to prompt"):
        median_distance(silent, generator=Same(log), logging_policy=UNIFORM)
    with pytest.raises(ConfigError, match="bandwidth tau, got function"):
        with_tau(agents.DSO(kernel=lambda difference: difference), 1.0)
    with pytest.raises(ConfigError, match="folds"):
        agents.TunedDSO(folds=1)
    with pytest.raises(ConfigError, match="pass generator="):
        agents.TunedDSO().fit(log)
    with pytest.raises(ConfigError, match="n_samples"):
        agents.SentenceDM(n_samples=0)
    with pytest.raises(ConfigError, match="folds"):
        agents.SentenceDM(folds=1)
    with pytest.raises(ConfigError, match="pass generator="):
        agents.SentenceDM().estimate(UNIFORM, log)
