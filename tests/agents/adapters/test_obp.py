"""Policies of obp as agents."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import agents
import offprompts_env as op
from agents.adapters.base import Adapter
from agents.adapters.obp import OBP
from offprompts_env.errors import (
    AgentError,
    ConfigError,
    DataError,
    DimensionError,
    MissingDependencyError,
    OffPromptsError,
    PropensityError,
)
from offprompts_env.types import Contexts, LoggedDataset, PromptSet
from tests.agents.adapters import conformance
from tests.agents.adapters.conformance import N_PROMPTS, Conformance, simulator

obp_policy = pytest.importorskip("obp.policy")

DIM = 10


def binary(seed: int = 0) -> op.Simulator:
    return op.SyntheticConfig.preset(
        "paper_code", n_prompts=N_PROMPTS, reward_type="binary", reward_std=0.1, seed=seed
    ).build()


def log_of(world: op.Simulator, n: int = 300, seed: int = 1) -> LoggedDataset:
    return op.collect(world, agents.UniformPolicy(N_PROMPTS), n, seed=seed, progress=False)


def probe(n: int = 40) -> Contexts:
    return simulator().contexts.sample(n, np.random.default_rng(5))


class Numbers(Conformance):
    pickled = True
    name: ClassVar[str]
    settings: ClassVar[dict[str, Any]] = {}
    own: ClassVar[dict[str, Any]] = {"dim": DIM}

    def make(self, prompts: PromptSet, seed: int) -> Adapter:
        policy = getattr(obp_policy, self.name)(n_actions=len(prompts), random_state=seed, **self.own)
        return OBP(policy, prompts, seed=seed, **self.settings)


class Binary(Numbers):
    """For policies that learn from 0 and 1, or from nothing below 0."""

    @pytest.fixture(autouse=True)
    def _world(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(conformance, "simulator", binary)


class Free:
    """Without contexts there is no dimension to be wrong about, but they are looked at all the same."""

    test_contexts_of_another_dimension_are_refused = None


class TestLinUCB(Numbers):
    name, own = "LinUCB", {"dim": DIM, "epsilon": 0.5}


class TestLinTS(Numbers):
    name, settings = "LinTS", {"draws": 50}


class TestLinEpsilonGreedy(Numbers):
    name, own = "LinEpsilonGreedy", {"dim": DIM, "epsilon": 0.2}


class TestEpsilonGreedy(Free, Numbers):
    name, own = "EpsilonGreedy", {"epsilon": 0.2}


class TestRandom(Free, Numbers):
    name, own, learns = "Random", {}, False


class TestBernoulliTS(Free, Binary):
    name, own, settings = "BernoulliTS", {}, {"draws": 50}


class TestLogisticUCB(Binary):
    name, own, rows = "LogisticUCB", {"dim": DIM, "epsilon": 0.5}, 60


class TestLogisticTS(Binary):
    name, settings, rows = "LogisticTS", {"draws": 50}, 60


class TestLogisticEpsilonGreedy(Binary):
    name, own, rows = "LogisticEpsilonGreedy", {"dim": DIM, "epsilon": 0.2}, 60


class TestIPWLearner(Binary):
    name = "IPWLearner"

    def make(self, prompts: PromptSet, seed: int) -> Adapter:
        return OBP(obp_policy.IPWLearner(n_actions=len(prompts)), prompts)


def network(seed: int) -> Any:
    from obp.ope import InverseProbabilityWeighting

    objective = InverseProbabilityWeighting().estimate_policy_value_tensor
    return obp_policy.NNPolicyLearner(
        n_actions=N_PROMPTS, dim_context=DIM, off_policy_objective=objective, max_iter=2, random_state=seed
    )


class TestNNPolicyLearner(Numbers):
    name = "NNPolicyLearner"

    def make(self, prompts: PromptSet, seed: int) -> Adapter:
        return OBP(network(seed), prompts, seed=seed)


# What obp itself does.

GREEDY: dict[str, Callable[[], Any]] = {
    "LinUCB": lambda: obp_policy.LinUCB(dim=DIM, n_actions=N_PROMPTS, epsilon=0.7),
    "LinEpsilonGreedy": lambda: obp_policy.LinEpsilonGreedy(dim=DIM, n_actions=N_PROMPTS, epsilon=0.0),
    "LogisticUCB": lambda: obp_policy.LogisticUCB(dim=DIM, n_actions=N_PROMPTS, epsilon=0.7),
    "LogisticEpsilonGreedy": lambda: obp_policy.LogisticEpsilonGreedy(dim=DIM, n_actions=N_PROMPTS, epsilon=0.0),
}


@pytest.mark.parametrize("name", GREEDY)
@pytest.mark.parametrize("rows", [0, 80])
def test_the_best_prompt_is_the_one_obp_selects(name: str, rows: int) -> None:
    policy = GREEDY[name]()
    agent = OBP(policy, simulator().prompts, epsilon=0.0)
    if rows:
        agent.learn(log_of(binary(), rows))
    contexts = probe()
    x = np.concatenate([contexts.context, contexts.query], axis=1).astype(np.float64)
    selected = [policy.select_action(row[None])[0] for row in x]
    np.testing.assert_array_equal(agent.probabilities(contexts), np.eye(N_PROMPTS)[selected])


DRAWING: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "EpsilonGreedy": (lambda: obp_policy.EpsilonGreedy(N_PROMPTS, epsilon=0.4, random_state=1), {}),
    "LinEpsilonGreedy": (lambda: obp_policy.LinEpsilonGreedy(DIM, N_PROMPTS, epsilon=0.4, random_state=1), {}),
    "BernoulliTS": (lambda: obp_policy.BernoulliTS(N_PROMPTS, random_state=1), {"draws": 4_000}),
    "LinTS": (lambda: obp_policy.LinTS(DIM, N_PROMPTS, random_state=1), {"draws": 4_000}),
    "LogisticTS": (lambda: obp_policy.LogisticTS(DIM, N_PROMPTS, random_state=1), {"draws": 4_000}),
}


@pytest.mark.parametrize("name", DRAWING)
def test_the_pmf_is_how_often_obp_selects(name: str) -> None:
    make, settings = DRAWING[name]
    policy = make()
    agent = OBP(policy, simulator().prompts, epsilon=0.0, **settings)
    agent.learn(log_of(binary(), 60))
    contexts = probe(1)
    x = np.concatenate([contexts.context, contexts.query], axis=1).astype(np.float64)
    own = () if name in ("EpsilonGreedy", "BernoulliTS") else (x,)
    if name == "LogisticTS":
        # All of its models are seeded alike: they would draw together, which is no posterior.
        for index, model in enumerate(policy.model_list):
            model.random_ = np.random.RandomState(index)
    times = 1_500
    selected = np.bincount([policy.select_action(*own)[0] for _ in range(times)], minlength=N_PROMPTS) / times
    np.testing.assert_allclose(agent.probabilities(contexts)[0], selected, atol=0.06)


def test_a_learner_from_logs_is_fitted_as_obp_fits_it() -> None:
    log, agent = log_of(binary()), OBP(obp_policy.IPWLearner(n_actions=N_PROMPTS), simulator().prompts, epsilon=0.1)
    agent.learn(log)
    alone, x = obp_policy.IPWLearner(n_actions=N_PROMPTS), np.concatenate([log.context, log.query], axis=1)
    x = x.astype(np.float64)
    alone.fit(context=x, action=log.action, reward=log.reward.astype(np.float64), pscore=log.propensity)
    expected = 0.9 * alone.predict(x)[:, :, 0] + 0.1 / N_PROMPTS
    np.testing.assert_allclose(agent.probabilities(log.contexts), expected)


def test_a_network_draws_from_its_softmax() -> None:
    policy = network(0)
    agent, contexts = OBP(policy, simulator().prompts), probe()
    x = np.concatenate([contexts.context, contexts.query], axis=1)
    np.testing.assert_allclose(agent.probabilities(contexts), policy.predict_proba(x)[:, :, 0], rtol=1e-5)


@pytest.mark.parametrize("name", ["LinUCB", "LinTS"])
def test_it_earns_more_than_a_uniform_policy(name: str) -> None:
    world = simulator()
    policy = getattr(obp_policy, name)(dim=DIM, n_actions=N_PROMPTS)
    agent = OBP(policy, world.prompts, draws=50 if name == "LinTS" else None)
    op.collect(world, agent, 2_000, seed=0, batch_size=100, progress=False)
    gain = world.policy_value(agent, n=1_000).minus(world.policy_value(agents.UniformPolicy(N_PROMPTS), n=1_000))
    assert gain.interval[0] > 0


def ucb(**settings: Any) -> Any:
    return obp_policy.LinUCB(**{"dim": DIM, "n_actions": N_PROMPTS} | settings)


class Derived(obp_policy.LinUCB):  # type: ignore[misc,name-defined,unused-ignore]
    """A policy of a user's own, which may choose in any way."""


def derived() -> Any:
    return Derived(dim=DIM, n_actions=N_PROMPTS)


@pytest.mark.parametrize(
    ("make", "settings", "error", "says"),
    [
        (lambda: ucb(len_list=3), {}, ConfigError, "got len_list=3"),
        (lambda: ucb(n_actions=4), {}, DimensionError, "with 6 arms, one a prompt, got 4"),
        (ucb, {"epsilon": 1.5}, ConfigError, "epsilon: expected a probability"),
        (ucb, {"draws": 5}, ConfigError, "LinUCB is no Thompson sampling"),
        (ucb, {"seed": -1}, ConfigError, "seed: expected an integer"),
        (lambda: obp_policy.LinTS(DIM, N_PROMPTS), {}, ConfigError, "LinTS needs the number of draws"),
        (lambda: obp_policy.LinTS(DIM, N_PROMPTS), {"draws": 1}, ConfigError, "draws: expected an integer ≥ 2"),
        (derived, {}, ConfigError, "unknown policy of obp 'Derived'"),
        (lambda: "LinUCB", {}, ConfigError, "unknown policy of obp 'str'"),
        (lambda: obp_policy.LinUCB, {}, ConfigError, "unknown policy of obp"),
    ],
)
def test_what_is_no_such_policy_is_refused(
    make: Callable[[], Any], settings: dict[str, Any], error: type[OffPromptsError], says: str
) -> None:
    with pytest.raises(error, match=says):
        OBP(make(), simulator().prompts, **settings)


@pytest.mark.parametrize(
    ("name", "settings", "change", "error", "says"),
    [
        ("IPWLearner", {}, {"reward": [-1.0, 0, 1, 1]}, DataError, r"none below 0.* got -1.0 in row 0"),
        ("IPWLearner", {}, {"propensity": [0.5, np.nan, 0.5, 0.5]}, PropensityError, "IPWLearner needs .* row 1"),
        ("IPWLearner", {}, {"action": [2, 2, 2, 2]}, AgentError, "IPWLearner raised while it learned from 4 rounds"),
        ("BernoulliTS", {"draws": 9}, {"reward": [0, 1, 0.5, 1]}, DataError, "expected 0 or 1, .* got 0.5 in row 2"),
        ("LogisticUCB", {}, {"reward": [0, 1, 2, 1]}, DataError, "expected 0 or 1, .* got 2.0 in row 2"),
        ("LinUCB", {}, {"context": np.zeros((4, 3))}, DimensionError, r"expected d_x \+ d_q = 10.* got 8"),
    ],
)
def test_what_it_cannot_learn_from_is_told(
    name: str, settings: dict[str, Any], change: dict[str, Any], error: type[OffPromptsError], says: str
) -> None:
    own = {"dim": DIM} if name.startswith(("Lin", "Log")) else {}
    agent = OBP(getattr(obp_policy, name)(n_actions=N_PROMPTS, **own), simulator().prompts, **settings)
    log = replace(log_of(binary(), 4), oracle=None, **{key: np.asarray(value) for key, value in change.items()})
    with pytest.raises(error, match=says):
        agent.learn(log)


def test_unknown_propensities_are_no_matter_to_a_bandit() -> None:
    agent = OBP(ucb(), simulator().prompts)
    agent.learn(replace(log_of(simulator(), 5), propensity=np.full(5, np.nan)))
    assert agent.policy.n_trial == 5


def test_a_context_that_is_not_finite_is_named() -> None:
    context = np.zeros((3, 5))
    context[2, 0] = np.nan
    with pytest.raises(DataError, match=r"expected finite numbers, got .* in row 2"):
        OBP(ucb(), simulator().prompts).probabilities(Contexts(context, np.zeros((3, 5))))


def test_before_it_learns_a_learner_from_logs_is_uniform(tmp_path: Path) -> None:
    agent = OBP(obp_policy.IPWLearner(n_actions=N_PROMPTS), simulator().prompts)
    same = OBP.load(agent.save(tmp_path / "agent"), trusted=True)
    np.testing.assert_array_equal(same.probabilities(probe()), np.full((40, N_PROMPTS), 1 / N_PROMPTS))


def test_settings_are_saved(tmp_path: Path) -> None:
    agent = OBP(obp_policy.LinTS(DIM, N_PROMPTS), simulator().prompts, epsilon=0.3, draws=20, seed=4)
    same = OBP.load(agent.save(tmp_path / "agent"), trusted=True)
    np.testing.assert_array_equal(same.probabilities(probe()), agent.probabilities(probe()))
    other = OBP(agent.policy, simulator().prompts, epsilon=0.3, draws=20, seed=5)
    assert not np.array_equal(other.probabilities(probe()), agent.probabilities(probe()))


def test_without_obp_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obp.policy", None)
    with pytest.raises(MissingDependencyError, match=r"offprompts-env\[obp\]"):
        OBP(object(), simulator().prompts)
