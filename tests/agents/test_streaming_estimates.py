"""Estimates from a log on disk are those from the same rounds in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

import agents
from agents.estimators.kernel import KernelIS
from agents.estimators.streaming import estimate_stream
from agents.estimators.weighting import IS, SNIPS
from offprompts_env.errors import DataError, DimensionError, PropensityError
from offprompts_env.simulator import Simulator
from offprompts_env.storage import save
from offprompts_env.streaming import LogStream
from offprompts_env.types import Estimate, LoggedDataset

REWARDS = agents.PromptRewardRegression(steps=200, learning_rate=3e-3)


@pytest.fixture(scope="module")
def short(log: LoggedDataset) -> LoggedDataset:
    return log.take(slice(200))


@pytest.fixture(scope="module")
def path(short: LoggedDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(short, tmp_path_factory.mktemp("stream") / "log", shard_rows=30)


@pytest.fixture(scope="module")
def policy(log: LoggedDataset) -> agents.NeuralPolicy:
    return agents.ImportanceSamplingPG(steps=200, learning_rate=5e-3).fit(log)


@pytest.fixture(scope="module")
def fitted(short: LoggedDataset) -> agents.FittedRewards:
    return agents.FittedRewards((REWARDS.fit(short),))


@pytest.mark.parametrize("window", [1, 7, 30, 45, 199])
@pytest.mark.parametrize("name", ["IS", "clipped IS", "SNIPS", "DM"])
def test_windows_add_up_to_the_whole(name, window, short, path, policy, fitted):
    methods = {"IS": IS(), "clipped IS": IS(clip=1.5), "SNIPS": SNIPS(), "DM": agents.DM(rewards=fitted, n_draws=None)}
    stream, estimator = LogStream.open(path, window=window), methods[name]
    found, whole = estimate_stream(estimator, policy, stream), estimator.estimate(policy, short)
    for attribute in ("value", "standard_error", "interval", "effective_sample_size"):
        np.testing.assert_allclose(getattr(found, attribute), getattr(whole, attribute), rtol=1e-6)
    assert len(found.terms) == stream.n_windows
    np.testing.assert_allclose(found.terms.mean(), found.value)
    for key in ("mean_weight", "max_weight", "clipped"):
        np.testing.assert_allclose(found.diagnostics.get(key, 0), whole.diagnostics.get(key, 0), rtol=1e-6)


def test_a_log_of_one_window_gives_what_the_estimator_gives(short, path, policy):
    found, whole = estimate_stream(IS(), policy, LogStream.open(path)), IS().estimate(policy, short)
    np.testing.assert_array_equal(found.terms, whole.terms)
    assert (found.value, found.warnings) == (whole.value, whole.warnings)


def test_a_warning_is_given_once_with_its_number_of_windows(path, policy):
    @dataclass(frozen=True)
    class Warns:
        def estimate(self, policy, log, **given) -> Estimate:
            notes = ("always",) if log.reward[0] < 0 else ("always", f"size {len(log)}")
            return Estimate.of_mean(log.reward, warnings=notes)

    stream = LogStream.open(path, window=45)
    positive = [window.reward[0] >= 0 for window in stream.windows()]
    notes = estimate_stream(Warns(), policy, stream).warnings
    assert notes == ("always (in 5 of 5 windows)", f"size 40 (in {sum(positive)} of 5 windows)")
    assert 0 < sum(positive) < 5


@pytest.mark.filterwarnings("ignore::agents.TrainingWarning")
def test_what_an_estimator_fits_first_is_fitted_once(simulator: Simulator, path, policy):
    stream, fits = LogStream.open(path, window=45), []

    class Counting(agents.PromptRewardRegression):
        def fit_stream(self, log, *, seed=0):
            fits.append(log)
            return REWARDS.fit_stream(log, seed=seed)

    found = estimate_stream(agents.DM(rewards=Counting(), n_draws=None), policy, stream, seed=3)
    (model,) = REWARDS.fit_stream(stream, seed=3).models
    again = estimate_stream(agents.DM(rewards=agents.FittedRewards((model,)), n_draws=None), policy, stream)
    assert fits == [stream]
    assert found.value == again.value

    class Cloning(agents.BehaviorCloning):
        def fit(self, log, **rest):
            fits.append(log)
            return agents.UniformPolicy(12)

    kernel = KernelIS(density=agents.MonteCarloDensity(5), n_samples=2, cloning=Cloning())
    assumed = estimate_stream(kernel, policy, stream, generator=simulator.outputs)
    assert fits == [stream, stream]
    assert any("cloned from the log with Cloning" in note for note in assumed.warnings)
    told = estimate_stream(kernel, policy, stream, generator=simulator.outputs, logging_policy=agents.UniformPolicy(12))
    assert not any("cloned" in note for note in told.warnings)


def test_no_weight_at_all(short, path):
    never = agents.ConstantPolicy(int(np.argmin(np.bincount(short.action, minlength=12))), 12)
    chosen = short.action == never.action
    part = save(short.take(~chosen), path.parent / "never", mode="overwrite", shard_rows=30)
    stream = LogStream.open(part, window=45)
    found = estimate_stream(IS(), never, stream)
    assert (found.value, found.standard_error, found.effective_sample_size) == (0.0, 0.0, 0.0)
    assert np.isnan(estimate_stream(SNIPS(), never, stream).value)


def test_wrong_input(short, path, policy):
    stream = LogStream.open(path, window=45)
    with pytest.raises(DimensionError, match="12 prompts"):
        estimate_stream(IS(), agents.UniformPolicy(5), stream)
    with pytest.raises(DataError, match="at least one round"):
        estimate_stream(IS(), policy, stream.split(1.0, seed=0)[1])
    unknown = save(replace(short, propensity=np.full(200, np.nan)), path.parent / "unknown", mode="overwrite")
    with pytest.raises(PropensityError, match="propensity"):
        estimate_stream(IS(), policy, LogStream.open(unknown, window=45))
