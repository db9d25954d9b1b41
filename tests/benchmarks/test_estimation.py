from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
import pytest

import agents
from benchmarks.methods import Effort
from benchmarks.settings.accuracy import ExactDensity, SlopeIS, accuracy, draw_logs, summary
from benchmarks.settings.estimation import ESTIMATORS, EstimationSetting, sweeps
from benchmarks.settings.population import Population
from benchmarks.settings.vectors import VectorSetting
from benchmarks.store import Store
from offprompts_env.collecting import collect
from offprompts_env.errors import ConfigError, DataError
from offprompts_env.rng import integer_seed
from offprompts_env.synthetic import SyntheticConfig

CONTEXTS, PROMPTS = 40, 3
SIMULATOR = SyntheticConfig.preset("paper_code", n_prompts=PROMPTS, seed=1).build()
ROUNDS = SIMULATOR.evaluation_contexts(CONTEXTS)
MEAN = SIMULATOR.expected_rewards(ROUNDS)


class Logger:
    """Chooses the prompts with probabilities that depend on the sign of a context."""

    n_prompts = PROMPTS
    catalogue = None

    def probabilities(self, contexts):
        return np.where(contexts.context[:, :1] > 0, [[0.2, 0.3, 0.5]], [[0.6, 0.3, 0.1]])


LOGGING = Logger().probabilities(ROUNDS)


def population(distance=0.5):
    return Population.of(SIMULATOR, Logger(), n=CONTEXTS, distance=distance, beta=10.0)


def softmax_of_truth():
    masses = np.exp(10 * (MEAN - MEAN.max(axis=1, keepdims=True)))
    return masses / masses.sum(axis=1, keepdims=True)


def measured(estimator, distance=0.5, logs=300):
    (found,) = accuracy([estimator], population(distance), n=30, logs=logs, seed=0, resamples=20)
    return found.measures


# What logs are drawn from.


@pytest.mark.parametrize("distance", [0.0, 0.3, 1.0])
def test_the_truth_is_the_sum_over_rounds_and_prompts(distance):
    target = (1 - distance) * LOGGING + distance * softmax_of_truth()
    found = population(distance).references
    expected = {
        "uniform": MEAN.mean(),
        "oracle": MEAN.max(axis=1).mean(),
        "best single": MEAN.mean(axis=0).max(),
        "logging": (LOGGING * MEAN).sum() / CONTEXTS,
        "target": (target * MEAN).sum() / CONTEXTS,
    }
    assert found == pytest.approx(expected, abs=1e-6)


def test_the_distance_is_the_enumerated_one_and_none_on_policy():
    assert population(0.0).distance == pytest.approx(
        {"chi_square": 0, "effective_share": 1, "kl": 0, "max_ratio": 1}, abs=1e-6
    )
    target = 0.3 * LOGGING + 0.7 * softmax_of_truth()
    second = (target**2 / LOGGING).sum() / CONTEXTS
    assert population(0.7).distance == pytest.approx(
        {
            "chi_square": second - 1,
            "effective_share": 1 / second,
            "kl": (target * np.log(target / LOGGING)).sum() / CONTEXTS,
            "max_ratio": (target / LOGGING).max(),
        },
        rel=1e-4,
    )


def test_a_log_holds_rounds_of_the_population_with_its_propensities():
    world = population()
    log = collect(world.simulator, world.logging, 500, seed=3, progress=False)
    assert np.array_equal(log.context, ROUNDS.context[log.user_id])
    assert np.array_equal(log.query, ROUNDS.query[log.user_id])
    assert len(np.unique(log.user_id)) == CONTEXTS
    np.testing.assert_allclose(log.propensity, LOGGING[log.user_id, log.action], rtol=1e-5)


def test_a_table_is_of_its_population_only():
    with pytest.raises(DataError, match="user_id"):
        population().target.probabilities(ROUNDS)


# What is measured.


def test_importance_sampling_is_unbiased_with_the_enumerated_variance():
    found = measured(agents.IS())
    assert abs(found["bias"]) < 4 * found["bias_se"]
    target = 0.5 * LOGGING + 0.5 * softmax_of_truth()
    weights = SIMULATOR.rewards.weights(ROUNDS) * SIMULATOR.outputs.noise_std
    noise = SIMULATOR.noise.std**2 + np.square(weights).sum(axis=1)
    second = (target**2 / LOGGING * (MEAN**2 + noise[:, None])).sum() / CONTEXTS
    assert found["variance"] == pytest.approx((second - found["truth"] ** 2) / 30, rel=0.35)
    assert found["reward_variance"] == pytest.approx(
        (LOGGING * (MEAN**2 + noise[:, None])).sum() / CONTEXTS - ((LOGGING * MEAN).sum() / CONTEXTS) ** 2, rel=0.1
    )
    assert 0.85 < found["coverage"] < 0.99
    assert 0.8 < found["bootstrap_coverage"] < 0.99


SHIFT = np.array([0.5, -1.0, 2.0])


class Wrong:
    """The true expected rewards, and a constant for each prompt."""

    def __call__(self, contexts):
        return SIMULATOR.expected_rewards(contexts) + SHIFT

    def chosen(self, contexts, actions):
        return self(contexts)[np.arange(len(contexts)), actions]


@dataclass(frozen=True)
class WrongSource:
    def fit_many(self, logs, *, seeds=None):
        return [Wrong()] * len(logs)


def test_the_bias_of_a_wrong_model_is_the_enumerated_one_and_weights_remove_it():
    target = 0.5 * LOGGING + 0.5 * softmax_of_truth()
    direct, doubly = accuracy(
        [agents.DM(rewards=WrongSource(), folds=2), agents.DR(rewards=WrongSource(), folds=2)],
        population(), n=30, logs=300, seed=0, resamples=2,
    )  # fmt: skip
    error = (target * SHIFT).sum() / CONTEXTS
    assert direct.measures["bias"] == pytest.approx(error, abs=4 * direct.measures["bias_se"])
    assert abs(error) > 8 * direct.measures["bias_se"]
    assert abs(doubly.measures["bias"]) < 4 * doubly.measures["bias_se"]
    assert "bootstrap_coverage" not in direct.measures


def test_on_policy_estimates_are_means_of_logged_rewards():
    world = population(0.0)
    mean = np.mean([log.reward.mean(dtype=np.float64) for log in draw_logs(world, 30, 5, 0)])
    for estimator in (agents.IS(), agents.SNIPS(), SlopeIS(), ESTIMATORS["mean"]):
        found = measured(estimator, 0.0, logs=5)
        assert found["mean"] == pytest.approx(mean, rel=1e-5)
        assert found["truth"] == pytest.approx((LOGGING * MEAN).sum() / CONTEXTS, abs=1e-6)
        assert found["ess"] == pytest.approx(30, rel=1e-5)


def test_the_mean_of_logged_rewards_ignores_the_policy():
    assert measured(ESTIMATORS["mean"], 1.0, 9)["mean"] == measured(ESTIMATORS["mean"], 0.2, 9)["mean"]


def test_measures_are_those_of_the_estimates():
    values = np.array([1.0, 2.0, 4.0, 5.0])
    intervals = np.array([[0.0, 3.0], [2.5, 3.5], [3.1, 9.0], [np.nan, np.nan]])
    found = summary(values, intervals, 3.0)
    assert found["coverage"] == 0.5  # an end counts, NaN does not
    assert np.isnan(found.pop("width"))
    assert summary(values[:3], intervals[:3], 3.0)["width"] == pytest.approx((3 + 1 + 5.9) / 3)
    spread = values.std(ddof=1)
    assert found == pytest.approx(
        {
            "truth": 3.0, "mean": 3.0, "bias": 0.0, "bias_se": spread / 2, "variance": spread**2,
            "mse": 2.5, "mse_se": np.std([4, 1, 1, 4], ddof=1) / 2, "coverage": 0.5,
        }
    )  # fmt: skip


@dataclass(frozen=True)
class Failing:
    """Raises on some logs, and has NaN to say of others: the first round tells which."""

    always: bool = False

    def estimate(self, policy, log, *, generator=None, logging_policy=None, seed=0):
        if log.user_id[0] % 3 == 0 or self.always:
            raise DataError("no")
        found = agents.IS().estimate(policy, log)
        return replace(found, value=float("nan")) if log.user_id[0] % 3 == 1 else found


def test_failures_are_counted_and_left_out():
    world = population()
    kinds = np.array([log.user_id[0] % 3 for log in draw_logs(world, 30, 12, 0)])
    assert set(kinds) == {0, 1, 2}
    values = [
        agents.IS().estimate(world.target, log).value for log in draw_logs(world, 30, 12, 0) if log.user_id[0] % 3 == 2
    ]
    failing, never = measured(Failing(), logs=12), measured(Failing(always=True), logs=12)
    assert failing["failures"] == (kinds < 2).sum()
    assert failing["mean"] == pytest.approx(np.mean(values))
    assert never["failures"] == 12
    assert np.isnan([never["mean"], never["mse"], never["coverage"]]).all()


def test_logs_are_independent_and_named_by_their_seed():
    first, second = draw_logs(population(), 30, 2, 0)
    assert (len(first), len(second)) == (30, 30)
    assert not np.array_equal(first.reward, second.reward)
    assert np.array_equal(draw_logs(population(), 30, 1, 0)[0].reward, first.reward)
    assert not np.array_equal(draw_logs(population(), 30, 1, 1)[0].reward, first.reward)


def test_what_is_shared_is_what_an_estimator_makes_by_itself():
    world = population()
    regression = agents.PromptRewardRegression(steps=20, train_fraction=1.0)
    estimators = [
        agents.DR(rewards=regression, folds=2),
        agents.OffCEM(rewards=regression, folds=3, clusters=agents.EmbeddingClusters(3)),
        agents.KernelDR(rewards=agents.PolynomialRidge(degree=1, members=1), folds=2, density=ExactDensity()),
        agents.KernelIS(density=agents.MonteCarloDensity(10)),
    ]
    given = {"generator": world.simulator.outputs, "logging_policy": world.logging}
    found = accuracy(estimators, world, n=30, logs=2, seed=0, resamples=2)
    for estimator, result in zip(estimators, found, strict=True):
        own = [
            estimator.estimate(world.target, log, **given, seed=integer_seed(0, "estimate", index)).value
            for index, log in enumerate(draw_logs(world, 30, 2, 0))
        ]
        assert result.value == pytest.approx(np.mean(own), rel=1e-4)
        assert result.standard_error == pytest.approx(np.std(own, ddof=1) / np.sqrt(2), rel=1e-3)


class SlowDensity(ExactDensity):
    def fit_many(self, *logs, **given):
        ends = time.process_time() + 0.2
        while time.process_time() < ends:
            pass
        return super().fit_many(*logs, **given)


def test_densities_count_as_what_estimators_share():
    (found,) = accuracy(
        [agents.KernelIS(density=SlowDensity())], population(), n=30, logs=3, seed=0, resamples=2
    )  # fmt: skip
    assert found.shared_seconds > 3 * 0.2


def test_the_exact_density_is_what_samples_average_to():
    world = population()
    log = collect(world.simulator, world.logging, 20, seed=0, progress=False)
    given = {"generators": [world.simulator.outputs], "logging_policies": [world.logging]}
    (exact,) = ExactDensity().fit_many([log], kernel=agents.GaussianKernel(0.5), **given)
    (sampled,) = agents.MonteCarloDensity(20_000).fit_many([log], kernel=agents.GaussianKernel(0.5), **given)
    np.testing.assert_allclose(exact, sampled, rtol=0.1)
    with pytest.raises(ConfigError, match="MonteCarloDensity"):
        ExactDensity().fit_many([log], kernel=agents.UniformKernel(1.0), **given)


def test_slope_takes_one_of_its_clips():
    world = population(1.0)
    log = collect(world.simulator, world.logging, 30, seed=0, progress=False)
    clips = [agents.IS(clip=clip).estimate(world.target, log).value for clip in (None, 2.0, 5.0)]
    assert SlopeIS(clips=(2.0, 5.0)).estimate(world.target, log).value in clips


# Runs of the sweeps.

TINY = EstimationSetting(
    VectorSetting(n=40, prompts=PROMPTS, effort=Effort(steps=0.003, learning_rate=20.0), contexts=CONTEXTS),
    logs=3,
    resamples=5,
)


def without_time(results):
    return [replace(result, seconds=0.0, shared_seconds=0.0).to_json() for result in results]


def test_a_run_is_the_same_in_any_company(tmp_path):
    both = TINY.perform(ESTIMATORS["IS"], [(0, 0), (1, 0)], Store(tmp_path / "a"))
    alone = TINY.perform(ESTIMATORS["IS"], [(1, 0)], Store(tmp_path / "b"))
    assert without_time(alone) == without_time(both[1:])
    assert both[0].measures["mean"] != both[1].measures["mean"]
    assert len([path for path in (tmp_path / "a" / "estimates").iterdir() if not path.name.startswith(".")]) == 2
    other = TINY.perform(agents.IS(clip=1e9), [(1, 0)], Store(tmp_path / "a"))
    assert other[0].measures["mse"] == pytest.approx(alone[0].measures["mse"])


def test_all_estimators_of_the_sweeps_run_and_are_scored(tmp_path):
    for estimator in ESTIMATORS.values():
        (result,) = TINY.perform(estimator, [(0, 0)], Store(tmp_path))
        assert result.measures["failures"] == 0
        assert np.isfinite(list(result.measures.values())).all()
        assert TINY.score(result) == result.measures["mse"] / result.measures["reward_variance"]
        assert result.value == result.measures["mean"]
        assert result.standard_error == result.measures["bias_se"]


def test_ids_and_keys_are_stable():
    rounds, prompts, distance = sweeps()
    assert [sweep.name for sweep in (rounds, prompts, distance)] == [
        "estimators_n", "estimators_prompts", "estimators_distance",
    ]  # fmt: skip
    runs = {run.id: run for sweep in (rounds, prompts, distance) for run in replace(sweep, worlds=4).runs()}
    assert "estimators_n/n=500/world=3/learner=IS" in runs
    # The settings in which the sweeps meet are run once.
    meeting = ("estimators_n/n=2000", "estimators_prompts/prompts=100", "estimators_distance/distance=0.5")
    assert len({runs[f"{place}/world=3/learner=DR"].key for place in meeting}) == 1
    assert len({run.key for run in runs.values() if run.world == 3}) == 13 * len(ESTIMATORS)


def test_the_quick_form_keeps_the_points():
    quick = EstimationSetting().quick()
    assert quick.logs < EstimationSetting().logs
    assert quick.vectors.effort.steps < 1
    assert replace(quick, logs=50, vectors=replace(quick.vectors, effort=Effort())) == EstimationSetting()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distance": -0.1}, "distance"),
        ({"distance": 1.1}, "from 0 to 1"),
        ({"distance": float("nan")}, "distance"),
        ({"beta": -1.0}, "beta"),
        ({"logs": 1}, "logs"),
        ({"resamples": 0}, "resamples"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        EstimationSetting(**settings)


def test_learners_and_estimators_have_settings_of_their_own(tmp_path):
    with pytest.raises(ConfigError, match="data_size"):
        TINY.perform(agents.DSO(), [(0, 0)], Store(tmp_path))
    with pytest.raises(ConfigError, match="estimators_n"):
        TINY.vectors.perform(agents.IS(), [(0, 0)], Store(tmp_path))
