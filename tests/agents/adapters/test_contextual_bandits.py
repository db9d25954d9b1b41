"""Agents of contextualbandits: what the adapter says they do is what the library does."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import agents
import offprompts_env as op
from agents.adapters.base import Adapter, features
from agents.adapters.contextual_bandits import ContextualBandits
from offprompts_env.errors import AgentError, ConfigError, DataError, DimensionError, OffPromptsError, StorageError
from offprompts_env.types import Contexts, LoggedDataset, PromptSet
from tests.agents.adapters.conformance import N_PROMPTS, Conformance, simulator

online = pytest.importorskip("contextualbandits.online")
linear_model = pytest.importorskip("sklearn.linear_model")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's, on small batches
        yield


def sgd() -> Any:
    return linear_model.SGDClassifier(loss="log_loss", random_state=0)


def made(kind: str, **settings: Any) -> Any:
    """Return an agent of the library over classifiers that learn bit by bit, without a prior."""
    return getattr(online, kind)(sgd(), N_PROMPTS, beta_prior=None, batch_train=True, random_state=1, **settings)


class TestLinUCB(Conformance):
    pickled = True

    def make(self, prompts: PromptSet, seed: int) -> Adapter:
        return ContextualBandits(online.LinUCB(len(prompts), random_state=seed + 1), prompts, epsilon=0.1)


class TestNamedLogisticUCB(Conformance):
    """Refitted on all rounds; its choices have names."""

    pickled = True

    def make(self, prompts: PromptSet, seed: int) -> Adapter:
        names = [f"prompt {9 - index}" for index in range(len(prompts))]
        agent = online.LogisticUCB(names, beta_prior=None, random_state=seed + 1)
        return ContextualBandits(agent, prompts, success=0.0)


class TestEpsilonGreedy(Conformance):
    pickled = True

    def make(self, prompts: PromptSet, seed: int) -> Adapter:
        return ContextualBandits(made("EpsilonGreedy"), prompts, epsilon=0.0, success=0.0)


class TestSoftmaxExplorer(Conformance):
    pickled = True

    def make(self, prompts: PromptSet, seed: int) -> Adapter:
        return ContextualBandits(made("SoftmaxExplorer"), prompts, epsilon=0.0, success=0.0)


class TestBootstrappedUCB(Conformance):
    """What it learns depends on its random state."""

    pickled = True

    def make(self, prompts: PromptSet, seed: int) -> Adapter:
        return ContextualBandits(made("BootstrappedUCB", nsamples=3), prompts, success=0.0)


class TestNamedLinTS(Conformance):
    pickled = True
    rows = 200

    def make(self, prompts: PromptSet, seed: int) -> Adapter:
        names = [f"prompt {9 - index}" for index in range(len(prompts))]
        return ContextualBandits(online.LinTS(names, random_state=seed + 1), prompts, draws=10)


def played(n: int = 600, reward: str = "binary") -> LoggedDataset:
    log = op.collect(simulator(), agents.UniformPolicy(N_PROMPTS), n, seed=1, progress=False)
    return log if reward == "numbers" else _with_reward(log, (log.reward > 0).astype(np.float32))


def _with_reward(log: LoggedDataset, reward: np.ndarray) -> LoggedDataset:
    return LoggedDataset(log.context, log.query, log.action, log.propensity, reward, log.output, log.prompts)


def context() -> Contexts:
    return simulator().contexts.sample(1, np.random.default_rng(5))


def frequencies(agent: Any, n: int = 8_000) -> np.ndarray:
    """Return how often the library's own agent chooses each prompt for one context."""
    chosen = np.asarray(deepcopy(agent).predict(features(context().repeat(n)))).astype(int)
    return np.bincount(chosen, minlength=N_PROMPTS) / n


@pytest.mark.parametrize("kind", ["LinUCB", "LogisticUCB"])
def test_the_best_scored_prompt_is_played(kind: str) -> None:
    adapter = ContextualBandits(getattr(online, kind)(N_PROMPTS, beta_prior=None, random_state=1), simulator().prompts)
    adapter.learn(played())
    contexts = simulator().contexts.sample(200, np.random.default_rng(3))
    chosen = adapter.agent.predict(features(contexts))
    pmf = adapter.probabilities(contexts)
    np.testing.assert_allclose(pmf[np.arange(200), chosen], 0.95 + 0.05 / N_PROMPTS)
    np.testing.assert_allclose(np.sort(pmf, axis=1)[:, :-1], 0.05 / N_PROMPTS)


def test_arms_that_saw_nothing_share() -> None:
    adapter = ContextualBandits(online.LinUCB(N_PROMPTS, random_state=1), simulator().prompts, epsilon=0.0)
    log = played(reward="numbers")
    adapter.learn(log.take(log.action < 2))
    pmf = adapter.probabilities(context())[0]
    np.testing.assert_allclose(pmf, [0, 0, 0.25, 0.25, 0.25, 0.25])
    assert np.abs(frequencies(adapter.agent) - pmf).max() < 0.03


@pytest.mark.parametrize(
    ("agent", "draws"),
    [
        (made("EpsilonGreedy", explore_prob=0.3, decay=None), None),
        (made("SoftmaxExplorer", multiplier=0.05, inflation_rate=None), None),
        (online.LinTS(N_PROMPTS, random_state=1), 4_000),
        (online.LogisticTS(N_PROMPTS, random_state=1), 4_000),
    ],
)
def test_the_pmf_is_what_the_library_does(agent: Any, draws: int | None) -> None:
    adapter = ContextualBandits(deepcopy(agent), simulator().prompts, epsilon=0.0, draws=draws)
    adapter.learn(played())
    pmf = adapter.probabilities(context())[0]
    assert 0.05 < pmf.max() < 0.999
    assert np.abs(frequencies(adapter.agent) - pmf).max() < 0.03


def test_the_softmax_is_the_librarys() -> None:
    adapter = ContextualBandits(made("SoftmaxExplorer", multiplier=0.1), simulator().prompts, epsilon=0.0)
    adapter.learn(played())
    contexts = simulator().contexts.sample(50, np.random.default_rng(3))
    own = deepcopy(adapter.agent)._softmax_scores(features(contexts))
    np.testing.assert_allclose(adapter.probabilities(contexts), own, atol=1e-9)


def test_a_prior_is_played_with_draws() -> None:
    agent = online.BootstrappedTS(sgd(), N_PROMPTS, nsamples=2, batch_train=True, random_state=1, njobs_arms=1)
    adapter = ContextualBandits(agent, simulator().prompts, epsilon=0.0, draws=20)
    log = played()
    adapter.learn(log.take(np.flatnonzero((log.action > 0) | (log.reward == 1))))  # prompt 0 never failed
    pmf = adapter.probabilities(simulator().contexts.sample(20, np.random.default_rng(3)))
    assert set(np.unique(np.round(20 * pmf, 6))) <= set(range(21))
    assert (pmf.max(axis=1) < 1).any()


def test_schedules_count_rounds_that_were_learned() -> None:
    adapter = ContextualBandits(made("EpsilonGreedy", explore_prob=0.5, decay=0.999), simulator().prompts)
    log = played(400)
    adapter.learn(log.take(slice(0, 100)))
    before = adapter.agent.explore_prob  # nothing was fitted while these were played
    adapter.probabilities(log.contexts)
    adapter.act(log.contexts, np.random.default_rng(0))
    assert adapter.agent.explore_prob == before == 0.5
    adapter.learn(log.take(slice(100, 400)))
    np.testing.assert_allclose(adapter.agent.explore_prob, 0.5 * 0.999**300)


def test_learning_in_parts_is_refitting_on_all() -> None:
    log, prompts = played(400), simulator().prompts
    whole, parts = (ContextualBandits(online.LogisticUCB(N_PROMPTS, beta_prior=None), prompts) for _ in range(2))
    whole.learn(log)
    parts.learn(log.take(slice(0, 250)))
    parts.learn(log.take(slice(250, 400)))
    contexts = simulator().contexts.sample(50, np.random.default_rng(3))
    found, expected = (features(contexts), features(contexts))
    np.testing.assert_allclose(parts.agent.decision_function(found), whole.agent.decision_function(expected), atol=0.01)


def test_looking_does_not_change_what_is_learned() -> None:
    log = played(300)

    def taught(*, looks: int) -> np.ndarray:
        adapter = ContextualBandits(made("BootstrappedUCB", nsamples=3), simulator().prompts)
        for part in range(3):
            adapter.learn(log.take(slice(100 * part, 100 * part + 100)))
            for _ in range(looks):
                adapter.probabilities(log.contexts)
        return np.asarray(adapter.agent.decision_function(features(log.contexts)))

    np.testing.assert_array_equal(taught(looks=0), taught(looks=3))


def test_a_saved_agent_goes_on_learning(tmp_path: Path) -> None:
    log = played(400)
    adapter = ContextualBandits(online.LogisticUCB(N_PROMPTS, beta_prior=None, random_state=1), simulator().prompts)
    adapter.learn(log.take(slice(0, 200)))
    loaded = ContextualBandits.load(adapter.save(tmp_path), trusted=True)
    for agent in (adapter, loaded):
        agent.learn(log.take(slice(200, 400)))
    np.testing.assert_array_equal(loaded.probabilities(log.contexts), adapter.probabilities(log.contexts))
    assert loaded.epsilon == adapter.epsilon


def test_rewards_in_between_are_refused() -> None:
    log = _with_reward(played(50), np.linspace(0, 1, 50, dtype=np.float32))
    adapter = ContextualBandits(made("EpsilonGreedy"), simulator().prompts)
    with pytest.raises(DataError, match=r"expected 0 or 1, .* EpsilonGreedy .* got 0.02.* in row 1; pass success"):
        adapter.learn(log)
    ContextualBandits(online.LinTS(N_PROMPTS), simulator().prompts, draws=10).learn(log)


WRONG: list[tuple[Any, dict[str, Any], type[OffPromptsError], str]] = [
    (online.LinTS(N_PROMPTS), {}, ConfigError, "LinUCB, .*, got LinTS; pass draws=100"),
    (online.BootstrappedTS(sgd(), N_PROMPTS), {}, ConfigError, "got BootstrappedTS; pass draws=100"),
    (online.EpsilonGreedy(sgd(), N_PROMPTS), {}, ConfigError, "beta_prior=None, or pass draws=100"),
    (online.LinUCB(N_PROMPTS + 1), {}, DimensionError, "expected an agent with 6 arms, one a prompt, got 7"),
    (online.LinUCB(N_PROMPTS), {"epsilon": 1.5}, ConfigError, "epsilon: expected a probability"),
    (online.LinUCB(N_PROMPTS), {"draws": 1}, ConfigError, "draws: expected an integer ≥ 2"),
    (online.LinUCB(N_PROMPTS), {"success": "yes"}, ConfigError, "success: expected a finite number"),
    (sgd(), {}, ConfigError, "agent: expected a _BasePolicy, got SGDClassifier"),
]


@pytest.mark.parametrize(("agent", "settings", "error", "says"), WRONG)
def test_a_wrong_agent_is_told(agent: Any, settings: dict[str, Any], error: type[OffPromptsError], says: str) -> None:
    with pytest.raises(error, match=says):
        ContextualBandits(agent, simulator().prompts, **settings)


def test_what_the_agent_raises_is_named() -> None:
    adapter = ContextualBandits(online.LinUCB(N_PROMPTS), simulator().prompts)
    adapter.agent.fit(np.ones((20, 3)), np.arange(20) % N_PROMPTS, np.ones(20))  # outside, on other features
    with pytest.raises(AgentError, match=r"contextualbandits' LinUCB raised in 1 rounds: \w+"):
        adapter.probabilities(context())


def test_what_cannot_be_pickled_is_said(tmp_path: Path) -> None:
    adapter = ContextualBandits(online.LinUCB(N_PROMPTS), simulator().prompts)
    adapter.agent.note = lambda: None
    with pytest.raises(StorageError, match="cannot pickle it"):
        adapter.save(tmp_path / "agent")
