"""Learning from a log on disk, window by window."""

from __future__ import annotations

import warnings
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import agents
from agents.networks import StackedMLP
from agents.regression import RegressionBatch, squared_error_gradient
from agents.streaming import settled, training_windows
from agents.training import Phase, Schedule, train, train_in_phases, world_streams
from offprompts_env.errors import ConfigError, NumericalError, PropensityError
from offprompts_env.storage import save
from offprompts_env.streaming import LogStream
from offprompts_env.types import LoggedDataset

SHORT = 60
QUICK_REWARDS = agents.PromptRewardRegression(steps=SHORT)
QUICK_CLONING = agents.BehaviorCloning(steps=SHORT)
LEARNERS = [
    agents.ImportanceSamplingPG(steps=SHORT),
    agents.RegressionPG(steps=SHORT, rewards=QUICK_REWARDS),
    agents.DSO(steps=SHORT, density=agents.MonteCarloDensity(5), cloning=QUICK_CLONING),
    QUICK_CLONING,
]


@pytest.fixture(scope="module")
def path(log: LoggedDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log of 2,000 rounds, in shards of 300."""
    return save(log, tmp_path_factory.mktemp("stream") / "log", shard_rows=300)


def identical(left: agents.NeuralPolicy, right: agents.NeuralPolicy) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(left.network.layers, right.network.layers, strict=True))


@pytest.mark.filterwarnings("ignore::agents.TrainingWarning")
@pytest.mark.parametrize("learner", LEARNERS, ids=lambda learner: type(learner).__name__)
def test_a_log_of_one_window_gives_the_policy_of_the_log_in_memory(learner, simulator, log, path):
    streamed = learner.fit(LogStream.open(path), generator=simulator.outputs, seed=3)
    assert identical(streamed, learner.fit(log, generator=simulator.outputs, seed=3))


@pytest.mark.filterwarnings("ignore::agents.TrainingWarning")
@pytest.mark.parametrize("learner", LEARNERS, ids=lambda learner: type(learner).__name__)
def test_a_seed_names_a_run_over_windows(learner, simulator, path):
    stream = LogStream.open(path, window=450)
    first, again, other = (learner.fit(stream, generator=simulator.outputs, seed=seed) for seed in (3, 3, 4))
    assert identical(first, again)
    assert not identical(first, other)
    assert first.catalogue == simulator.prompts.fingerprint


def test_learners_beat_the_logging_policy_by_streaming(simulator, path):
    stream = LogStream.open(path, window=450)
    uniform = simulator.policy_value(agents.UniformPolicy(12)).value
    best = simulator.policy_value(agents.OraclePolicy(simulator)).value
    rewards = agents.PromptRewardRegression(steps=1_500, learning_rate=3e-3)
    for learner in (
        agents.RegressionPG(steps=600, learning_rate=5e-3, rewards=rewards),
        agents.ImportanceSamplingPG(steps=600, learning_rate=5e-3),
    ):
        value = simulator.policy_value(learner.fit(stream)).value
        assert value > uniform + 0.4 * (best - uniform), learner


class Noise:
    """Feed of regressions on noise, endless and the same however it is cut into blocks."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def block(self, steps: int, network: StackedMLP) -> list[RegressionBatch]:
        drawn = torch.from_numpy(self.rng.standard_normal((steps, network.worlds, 16, 4), dtype=np.float32))
        drawn[..., 2] = 1
        return [RegressionBatch(x[..., :3], x[..., 3:]) for x in drawn]


def test_phases_share_one_network_and_one_adam():
    whole, cut = (StackedMLP.initialise((2, 8, 1), world_streams([0, 1], "test")) for _ in range(2))
    train(whole, Noise(0), squared_error_gradient, Schedule(90, 16, 1e-2), label="whole")
    feed, seen = Noise(0), []
    train_in_phases(
        cut,
        (Phase(steps, feed, squared_error_gradient) for steps in (40, 1, 49)),
        Schedule(90, 16, 1e-2),
        label="cut",
        on_step=lambda step: seen.append(step),
    )
    assert torch.equal(whole.parameters, cut.parameters)
    assert seen == list(range(1, 91))


def test_a_callback_ends_all_phases():
    network, asked = StackedMLP.initialise((2, 8, 1), world_streams([0], "test")), []

    def phases():
        for number in range(5):
            asked.append(number)
            yield Phase(10, Noise(number), squared_error_gradient)

    train_in_phases(network, phases(), Schedule(50, 16, 1e-2), label="test", on_step=lambda step: step == 13)
    assert asked == [0, 1]


def test_a_phase_is_let_go_before_the_next_one_is_made():
    network = StackedMLP.initialise((2, 8, 1), world_streams([0], "test"))
    held: list[weakref.ref[Noise]] = []

    def phases():
        for number in range(3):
            assert all(feed() is None for feed in held)
            feed = Noise(number)
            held.append(weakref.ref(feed))
            yield Phase(10, feed, squared_error_gradient)
            del feed

    train_in_phases(network, phases(), Schedule(30, 16, 1e-2), label="test")
    assert len(held) == 3


@pytest.mark.parametrize("steps", [1, 3, 100, 1_000])
@pytest.mark.parametrize("window", [7, 450, 2_000])
def test_windows_share_the_steps_in_proportion_to_their_rows(steps, window, path):
    stream = LogStream.open(path, window=window)
    windows = list(training_windows(stream, Schedule(steps, 8, 1e-3), seed=0))
    assert sum(part.steps for part in windows) == steps
    passes = max(1, round(steps * 8 / 2_000))
    for part in windows:
        assert abs(part.steps - steps * len(part.log) / (passes * 2_000)) < 1
    assert len({part.seed for part in windows}) == len(windows)


def test_a_regression_is_fitted_to_all_windows(log, path):
    regression = agents.PromptRewardRegression(steps=1_000, learning_rate=3e-3)
    (whole,) = regression.fit_stream(LogStream.open(path), seed=1).models
    assert whole.validation == regression.fit(log, seed=1).validation
    (model,) = regression.fit_stream(LogStream.open(path, window=300), seed=1).models
    kept, held_out = model.validation, model.validation["rounds"]
    assert held_out == 6 * 60 + 40
    assert kept["error"] < 1.3 * whole.validation["error"] < kept["baseline"]
    np.testing.assert_allclose(kept["baseline"], np.var(log.reward), rtol=0.2)
    again = regression.fit_stream(LogStream.open(path, window=300), seed=1).models[0]
    assert all(np.array_equal(a, b) for a, b in zip(model.network.layers, again.network.layers, strict=True))


def test_all_of_a_stream_may_be_trained_on(path):
    regression = agents.PromptRewardRegression(steps=SHORT, train_fraction=1.0)
    (model,) = regression.fit_stream(LogStream.open(path, window=300)).models
    assert np.isnan(model.validation["error"])
    assert model.validation["rounds"] == 0
    cloning = agents.BehaviorCloning(steps=SHORT, train_fraction=1.0)
    assert cloning.fit(LogStream.open(path, window=300)).n_prompts == 12


@pytest.mark.filterwarnings("ignore::agents.TrainingWarning")
def test_what_a_learner_fits_first_is_fitted_once(path):
    stream, fits = LogStream.open(path, window=450), []

    class Counting(agents.PromptRewardRegression):
        def fit_many(self, logs, *, seeds=None):
            raise AssertionError("fitted to a window")

        def fit_stream(self, log, *, seed=0):
            fits.append(log)
            return QUICK_REWARDS.fit_stream(log, seed=seed)

    learner = agents.RegressionPG(steps=SHORT, rewards=Counting())
    learner.fit(stream, seed=2)
    assert fits == [stream]
    assert settled(learner, stream, 2).rewards.models[0].catalogue == stream.prompts.fingerprint
    assert settled(agents.ImportanceSamplingPG(), stream, 2) == agents.ImportanceSamplingPG()


def test_the_logging_policy_is_cloned_once_and_said_once(simulator, path):
    stream, fits = LogStream.open(path, window=450), []

    class Counting(agents.BehaviorCloning):
        def fit_many(self, logs, **rest):
            fits.append(logs)
            return QUICK_CLONING.fit_many(logs, **rest)

    learner = agents.DSO(steps=SHORT, density=agents.MonteCarloDensity(5), cloning=Counting())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        learner.fit(stream, generator=simulator.outputs)
    assert fits == [[stream]]
    assert len([w for w in caught if "cloned from the log" in str(w.message)]) == 1


def test_several_streams_and_a_log_are_fitted_one_by_one(log, path):
    stream, learner = LogStream.open(path, window=450), agents.ImportanceSamplingPG(steps=SHORT)
    uniform = [agents.UniformPolicy(12)] * 3
    together = learner.fit_many([stream, log, LogStream.open(path)], logging_policies=uniform, seeds=[4, 5, 5])
    assert identical(together[0], learner.fit(stream, seed=4))
    assert identical(together[1], learner.fit(log, seed=5))
    assert identical(together[2], together[1])


def test_a_callback_counts_steps_over_windows(path):
    seen = []

    def on_step(step, policies):
        seen.append((step, policies[0]))
        return step == 40

    callback = agents.Callback(every=20, on_step=on_step)
    policy = agents.ImportanceSamplingPG(steps=SHORT).fit(LogStream.open(path, window=300), callback=callback)
    assert [step for step, _ in seen] == [20, 40]
    assert identical(policy, seen[-1][1])


def unknown_propensities(log: LoggedDataset, folder: Path) -> LogStream:
    unknown = replace(log, propensity=np.full(len(log), np.nan))
    return LogStream.open(save(unknown, folder / "unknown", shard_rows=300), window=300)


def test_an_assumption_is_said_once(log, tmp_path):
    stream, learner = unknown_propensities(log, tmp_path), agents.ImportanceSamplingPG(steps=SHORT)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        learner.fit(stream, logging_policy=agents.UniformPolicy(12))
    assert len([w for w in caught if issubclass(w.category, agents.AssumptionWarning)]) == 1


def test_wrong_input(simulator, log, path, tmp_path):
    stream, learner = LogStream.open(path, window=450), agents.ImportanceSamplingPG(steps=SHORT)
    with pytest.raises(PropensityError, match="propensity"):
        learner.fit(unknown_propensities(log, tmp_path))
    with pytest.raises(ConfigError, match="logging_policies: expected 1"):
        learner.fit_many([stream], logging_policies=[])
    with pytest.raises(ConfigError, match="pass generator="):
        LEARNERS[2].fit(stream, logging_policy=agents.UniformPolicy(12))
    with pytest.raises(NumericalError, match="lower learning_rate"):
        agents.PromptRewardRegression(steps=300, learning_rate=1e30).fit_stream(stream)

    for compared in (agents.BanditNet(), agents.SentenceDR()):
        with pytest.raises(ConfigError, match="learns from logs in memory only"):
            compared.fit(stream)

    class InMemory(agents.OfflineLearner[agents.NeuralPolicy]):
        pass

    with pytest.raises(ConfigError, match="InMemory: learns from logs in memory only, got a stream of 2000 rows"):
        InMemory().fit(stream)
