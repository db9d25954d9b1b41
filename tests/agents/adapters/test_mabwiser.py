"""Agents of mabwiser: what the adapter says they do is what the library does."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import agents
import offprompts_env as op
from agents.adapters.base import Adapter, features
from agents.adapters.mabwiser import MABWiser
from offprompts_env.errors import (
    ActionError,
    AgentError,
    ConfigError,
    DataError,
    DimensionError,
    OffPromptsError,
    StorageError,
)
from offprompts_env.types import Contexts, LoggedDataset, PromptSet
from tests.agents.adapters.conformance import N_PROMPTS, Conformance, simulator

mab = pytest.importorskip("mabwiser.mab")
Learning, Around = mab.LearningPolicy, mab.NeighborhoodPolicy


def made(policy: Any, around: Any = None, seed: int = 1) -> Any:
    return mab.MAB(list(range(N_PROMPTS)), policy, around, seed=seed)


class TestLinUCB(Conformance):
    def make(self, prompts: PromptSet, seed: int) -> Adapter:
        return MABWiser(made(Learning.LinUCB(alpha=1.0), seed=seed), prompts, epsilon=0.1)


class TestNamedLinGreedy(Conformance):
    def make(self, prompts: PromptSet, seed: int) -> Adapter:
        names = [f"prompt {9 - index}" for index in range(len(prompts))]
        agent = mab.MAB(names, Learning.LinGreedy(epsilon=0.2, scale=True), seed=seed)
        return MABWiser(agent, prompts, epsilon=0.0)


class TestClusters(Conformance):
    def make(self, prompts: PromptSet, seed: int) -> Adapter:
        return MABWiser(made(Learning.UCB1(alpha=1.0), Around.Clusters(n_clusters=2), seed), prompts)


class TestLinTS(Conformance):
    rows = 200

    def make(self, prompts: PromptSet, seed: int) -> Adapter:
        return MABWiser(made(Learning.LinTS(alpha=1.0), seed=seed), prompts, draws=10)


class TestSoftmax(Conformance):
    """Context-free."""

    def make(self, prompts: PromptSet, seed: int) -> Adapter:
        return MABWiser(made(Learning.Softmax(tau=0.5), seed=seed), prompts, draws=100)


class TestRandom(Conformance):
    learns = False

    def make(self, prompts: PromptSet, seed: int) -> Adapter:
        return MABWiser(made(Learning.Random(), seed=seed), prompts)


def played(n: int = 600) -> LoggedDataset:
    log = op.collect(simulator(), agents.UniformPolicy(N_PROMPTS), n, seed=1, progress=False)
    return with_reward(log, (log.reward > 0).astype(np.float32))


def with_reward(log: LoggedDataset, reward: np.ndarray) -> LoggedDataset:
    return LoggedDataset(log.context, log.query, log.action, log.propensity, reward, log.output, log.prompts)


def context() -> Contexts:
    return simulator().contexts.sample(1, np.random.default_rng(5))


PLAYED = [
    (Learning.LinGreedy(epsilon=0.3), None, None),
    (Learning.EpsilonGreedy(epsilon=0.3), None, None),
    (Learning.EpsilonGreedy(epsilon=0.3), Around.KNearest(k=20), None),
    (Learning.EpsilonGreedy(epsilon=0.3), Around.Clusters(n_clusters=2), None),
    (Learning.Random(), None, None),
    (Learning.LinTS(alpha=1.0), None, 4_000),
    (Learning.ThompsonSampling(), None, 4_000),
    (Learning.Softmax(tau=1.0), None, 4_000),
    (Learning.Popularity(), None, 4_000),
    (Learning.UCB1(alpha=1.0), Around.Radius(radius=0.1), 2_000),
]


@pytest.mark.parametrize(("policy", "around", "draws"), PLAYED)
def test_the_pmf_is_what_the_library_does(policy: Any, around: Any, draws: int | None) -> None:
    adapter, n = MABWiser(made(policy, around), simulator().prompts, epsilon=0.0, draws=draws), 4_000
    adapter.learn(played(300))
    pmf = adapter.probabilities(context())[0]
    assert 0.05 < pmf.max() < 1
    chosen = np.asarray(deepcopy(adapter.agent).predict(features(context().repeat(n))))
    assert np.abs(np.bincount(chosen, minlength=N_PROMPTS) / n - pmf).max() < 0.04


@pytest.mark.parametrize(
    ("policy", "around"),
    [
        (Learning.LinUCB(alpha=1.0), None),
        (Learning.UCB1(alpha=1.0), None),
        (Learning.UCB1(alpha=1.0), Around.KNearest(k=20)),
    ],
)
def test_the_best_prompt_is_played(policy: Any, around: Any) -> None:
    adapter = MABWiser(made(policy, around), simulator().prompts)
    adapter.learn(played())
    contexts = simulator().contexts.sample(50, np.random.default_rng(3))
    pmf, chosen = adapter.probabilities(contexts), adapter.agent.predict(features(contexts))
    np.testing.assert_allclose(pmf[np.arange(50), chosen], 0.95 + 0.05 / N_PROMPTS)


def test_learning_in_parts_is_learning_at_once() -> None:
    log, prompts = played(), simulator().prompts
    whole, parts = (MABWiser(made(Learning.LinUCB(alpha=1.0)), prompts) for _ in range(2))
    whole.learn(log)
    for part in (slice(0, 100), slice(100, 101), slice(101, 600)):
        parts.learn(log.take(part))
    np.testing.assert_allclose(parts.probabilities(log.contexts), whole.probabilities(log.contexts))


def test_it_draws_anew_after_it_learned() -> None:
    adapter = MABWiser(made(Learning.ThompsonSampling()), simulator().prompts, draws=50)
    log = played()
    adapter.learn(log)
    before = adapter.probabilities(context())
    bits = deepcopy(adapter.agent._rng.rng.bit_generator.state)
    adapter.probabilities(log.contexts)
    assert adapter.agent._rng.rng.bit_generator.state == bits
    adapter.learn(log.take(slice(0, 1)))
    assert not np.array_equal(adapter.probabilities(context()), before)


def test_a_saved_agent_goes_on_learning(tmp_path: Path) -> None:
    log = played(400)
    adapter = MABWiser(made(Learning.LinTS(alpha=1.0)), simulator().prompts, draws=20)
    adapter.learn(log.take(slice(0, 200)))
    loaded = MABWiser.load(adapter.save(tmp_path))
    for agent in (adapter, loaded):
        agent.learn(log.take(slice(200, 400)))
    contexts = log.take(slice(0, 20)).contexts
    np.testing.assert_array_equal(loaded.probabilities(contexts), adapter.probabilities(contexts))
    assert (loaded.epsilon, loaded.draws) == (0.05, 20)


@pytest.mark.parametrize(
    ("policy", "around"),
    [
        *((policy, around) for policy, around, _ in PLAYED),
        (Learning.LinUCB(scale=True), None),
        (Learning.UCB1(), Around.Clusters(2, is_minibatch=True)),
    ],
)
def test_all_that_can_be_written_is_read_unasked(policy: Any, around: Any, tmp_path: Path) -> None:
    adapter = MABWiser(made(policy, around), simulator().prompts, draws=2)
    adapter.learn(played(50))
    loaded = MABWiser.load(adapter.save(tmp_path))
    np.testing.assert_array_equal(loaded.probabilities(context()), adapter.probabilities(context()))


def positive(arm: int, reward: float) -> int:
    return int(reward > 0)


def test_parts_from_elsewhere_are_not_read_unasked(tmp_path: Path) -> None:
    adapter = MABWiser(made(Learning.ThompsonSampling(positive)), simulator().prompts, draws=10)
    log = op.collect(simulator(), agents.UniformPolicy(N_PROMPTS), 50, seed=1, progress=False)
    adapter.learn(log)
    adapter.save(tmp_path)
    with pytest.raises(StorageError, match=r"known to be harmless, got .*positive; .* trusted=True"):
        MABWiser.load(tmp_path)
    loaded = MABWiser.load(tmp_path, trusted=True)
    np.testing.assert_array_equal(loaded.probabilities(context()), adapter.probabilities(context()))


@pytest.mark.parametrize("around", [Around.TreeBandit(), Around.LSHNearest()])
def test_what_cannot_be_written_is_said_at_once(around: Any, tmp_path: Path) -> None:
    adapter = MABWiser(made(Learning.UCB1(), around), simulator().prompts, draws=10)
    adapter.learn(played(50))
    adapter.probabilities(context())
    with pytest.raises(StorageError, match="mabwiser's UCB1: skops cannot write it"):
        adapter.save(tmp_path)


WRONG_REWARDS = [
    (Learning.ThompsonSampling(), 0.5, "expected 0 or 1, .* ThompsonSampling .* got 0.5 in row 3; give .* binarizer"),
    (Learning.Popularity(), -1.0, "expected no negative number, .* Popularity .* got -1.0 in row 3; shift"),
]


@pytest.mark.parametrize(("policy", "reward", "says"), WRONG_REWARDS)
def test_rewards_that_a_policy_cannot_take(policy: Any, reward: float, says: str) -> None:
    rewards = np.ones(20, np.float32)
    rewards[3] = reward
    with pytest.raises(DataError, match=says):
        MABWiser(made(policy), simulator().prompts, draws=10).learn(with_reward(played(20), rewards))


WRONG: list[tuple[Any, dict[str, Any], type[OffPromptsError], str]] = [
    (made(Learning.LinTS()), {}, ConfigError, "LinUCB, .*, got LinTS; pass draws=100"),
    (made(Learning.Softmax()), {}, ConfigError, "got Softmax; pass draws=100"),
    (made(Learning.UCB1(), Around.Radius(1.0)), {}, ConfigError, "got UCB1 with Radius; pass draws=100"),
    (mab.MAB([0, 1], Learning.UCB1()), {}, DimensionError, "expected an agent with 6 arms, one a prompt, got 2"),
    (made(Learning.UCB1()), {"epsilon": -1}, ConfigError, "epsilon: expected a finite number ≥ 0"),
    (made(Learning.UCB1()), {"draws": 2.5}, ConfigError, "draws: expected an integer ≥ 2"),
    (Learning.UCB1(), {}, ConfigError, "agent: expected a MAB, got UCB1"),
]


@pytest.mark.parametrize(("agent", "settings", "error", "says"), WRONG)
def test_a_wrong_agent_is_told(agent: Any, settings: dict[str, Any], error: type[OffPromptsError], says: str) -> None:
    with pytest.raises(error, match=says):
        MABWiser(agent, simulator().prompts, **settings)


def test_what_the_agent_does_wrong_is_named() -> None:
    adapter = MABWiser(made(Learning.LinUCB()), simulator().prompts)
    adapter.agent.fit(list(range(N_PROMPTS)), [1.0] * N_PROMPTS, [[1.0, 2.0]] * N_PROMPTS)  # on other features
    with pytest.raises(AgentError, match="mabwiser's LinUCB raised in 1 rounds: ValueError"):
        adapter.probabilities(context())
    adapter = MABWiser(made(Learning.UCB1()), simulator().prompts)
    adapter.learn(played(100))
    adapter.agent.add_arm("seventh")
    adapter.agent.partial_fit(["seventh"], [100.0])
    adapter.agent.arms.remove("seventh")
    with pytest.raises(ActionError, match="expected one of its 6 arms, got 'seventh'"):
        adapter.probabilities(context())
