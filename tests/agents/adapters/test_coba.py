"""coba's learners as agents, and our worlds and logs in coba's experiments."""

from __future__ import annotations

import itertools
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest

import agents
import offprompts_env as op
from agents.adapters.base import Adapter
from agents.adapters.coba import Coba, CobaLog, coba_environment
from offprompts_env.errors import (
    ActionError,
    AgentError,
    ConfigError,
    DataError,
    MissingDependencyError,
    OffPromptsError,
    PropensityError,
    StorageError,
)
from offprompts_env.types import Contexts, LoggedDataset, Outputs, PromptSet
from tests.agents.adapters.conformance import N_PROMPTS, Conformance, simulator

coba = pytest.importorskip("coba")


class TestLinUCB(Conformance):
    pickled = True

    def make(self, prompts: PromptSet, seed: int) -> Adapter:
        return Coba(coba.LinUCBLearner(), prompts, embeddings=True)


class TestEpsilonGreedy(Conformance):
    pickled = True

    def make(self, prompts: PromptSet, seed: int) -> Adapter:
        return Coba(coba.BanditEpsilonLearner(0.3), prompts)


class TestRandom(Conformance):
    pickled, learns = True, False

    def make(self, prompts: PromptSet, seed: int) -> Adapter:
        return Coba(coba.RandomLearner(), prompts)

    def test_contexts_of_another_dimension_are_refused(self) -> None:
        with pytest.raises(OffPromptsError, match="expected"):
            self.taught().probabilities(Contexts(np.zeros((2, 3)), np.zeros((2, 4))))


class TestVowpal(Conformance):
    """A learner that says more than an action, which its ``learn`` needs."""

    rows = 150

    def make(self, prompts: PromptSet, seed: int) -> Adapter:
        pytest.importorskip("vowpalwabbit")
        return Coba(coba.VowpalEpsilonLearner(0.2, features=[1, "a", "ax"], seed=seed), prompts)

    def test_save_and_load(self, tmp_path: Path) -> None:
        with pytest.raises(StorageError, match=r"cannot be pickled.*agents.adapters.VowpalWabbit"):
            self.taught().save(tmp_path)

    test_a_pickle_is_not_opened_unasked = None  # type: ignore[assignment]
    test_a_damaged_file_is_named = None  # type: ignore[assignment]


class Counting(coba.primitives.Learner):  # type: ignore[misc,name-defined,unused-ignore]
    """A learner of a user's own, in coba's public protocol alone, that notes what it is given."""

    def __init__(self) -> None:
        self.learned: list[tuple[Any, ...]] = []

    def score(self, context: Any, actions: Any, action: Any) -> float:
        weights = [1 + len(self.learned) % 3 + index for index in range(len(actions))]
        return weights[actions.index(action)] / sum(weights)

    def predict(self, context: Any, actions: Any) -> Any:
        return actions[0], self.score(context, actions, actions[0]), {"seen": len(self.learned)}

    def learn(self, context: Any, action: Any, reward: float, probability: float, seen: int) -> None:
        self.learned.append((context, action, reward, probability, seen))


class TestOwn(Conformance):
    pickled = True

    def make(self, prompts: PromptSet, seed: int) -> Adapter:
        return Coba(Counting(), prompts)


def log_of(n: int, seed: int = 1) -> LoggedDataset:
    return op.collect(simulator(), agents.UniformPolicy(N_PROMPTS), n, seed=seed, progress=False)


def probe(n: int = 12) -> Contexts:
    return simulator().contexts.sample(n, np.random.default_rng(5))


def test_a_learner_gets_each_round_with_what_it_said() -> None:
    log, learner = log_of(5), Counting()
    Coba(learner, simulator().prompts).learn(log)
    for row, (context, action, reward, probability, seen) in enumerate(learner.learned):
        assert context == tuple(np.concatenate([log.context[row], log.query[row]]).tolist())
        assert action.index(1.0) == log.action[row]
        assert (reward, probability, seen) == (log.reward[row], log.propensity[row], row)
    assert len(learner.learned) == 5


LEARNERS = {
    "LinUCB": lambda: coba.LinUCBLearner(),
    "epsilon": lambda: coba.BanditEpsilonLearner(0.2),
    "UCB": lambda: coba.BanditUCBLearner(),
    "fixed": lambda: coba.FixedLearner([0.5, 0.3, 0.2, 0, 0, 0]),
    "misguided": lambda: coba.MisguidedLearner(coba.LinUCBLearner(), 1, -1),
}


@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize("embeddings", [False, True])
def test_the_pmf_is_what_the_learner_scores(name: str, embeddings: bool) -> None:
    learner, prompts = LEARNERS[name](), simulator().prompts
    agent = Coba(learner, prompts, embeddings=embeddings)
    agent.learn(log_of(60))
    rows = prompts.embeddings if embeddings else np.eye(N_PROMPTS)
    actions = [tuple(row) for row in rows.tolist()]
    expected = [
        [learner.score(tuple(x), actions, action) for action in actions]
        for x in np.concatenate([probe().context, probe().query], axis=1).tolist()
    ]
    np.testing.assert_array_equal(agent.probabilities(probe()), expected)


@pytest.mark.parametrize("embeddings", [False, True])
def test_it_earns_more_than_a_uniform_policy(embeddings: bool) -> None:
    world = simulator()
    agent = Coba(coba.LinUCBLearner(), world.prompts, embeddings=embeddings)
    op.collect(world, agent, 1_500, seed=0, batch_size=50, progress=False)
    gain = world.policy_value(agent, n=300).minus(world.policy_value(agents.UniformPolicy(N_PROMPTS), n=300))
    assert gain.interval[0] > 0


class Draws(Counting):
    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.default_rng(0)

    def score(self, context: Any, actions: Any, action: Any) -> float:
        return float(actions.index(action) == self.rng.integers(len(actions)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: coba.LinTSLearner(),
        lambda: coba.CorralLearner([coba.BanditEpsilonLearner(), coba.RandomLearner()]),
        lambda: coba.MisguidedLearner(coba.LinTSLearner(), 0, 1),
        Draws,
    ],
)
def test_a_learner_that_draws_to_tell_is_refused(make: Any) -> None:
    with pytest.raises(ConfigError, match="without drawing"):
        Coba(make(), simulator().prompts).probabilities(probe())


class NoScore(coba.primitives.Learner):  # type: ignore[misc,name-defined,unused-ignore]
    def predict(self, context: Any, actions: Any) -> Any:
        return actions[0]

    def learn(self, context: Any, action: Any, reward: float, probability: float) -> None:
        pass


def test_what_is_no_such_learner_is_refused() -> None:
    prompts = simulator().prompts
    with pytest.raises(ConfigError, match="score tells probabilities, but NoScore has none"):
        Coba(NoScore(), prompts)
    with pytest.raises(ConfigError, match="lacks learn, predict, score"):
        Coba(object(), prompts)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="got two that are equal"):
        Coba(coba.RandomLearner(), PromptSet(np.ones((3, 2))), embeddings=True)


class Wrong(Counting):
    given: ClassVar[Any] = 0.5

    def score(self, context: Any, actions: Any, action: Any) -> float:
        if self.given is None:
            raise KeyError("weights")
        return float(self.given)


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        (0.5, DataError, "sum to 1, got sum 3"),
        (np.inf, DataError, "sum to 1"),
        (None, AgentError, "Wrong.score raised in 12 rounds: KeyError: 'weights'"),
    ],
)
def test_a_wrong_score_is_told(given: Any, error: type[OffPromptsError], says: str) -> None:
    learner = Wrong()
    learner.given = given  # type: ignore[misc]
    with pytest.raises(error, match=says):
        Coba(learner, simulator().prompts).probabilities(probe())


def test_wrong_logs_are_told() -> None:
    log, prompts = log_of(10), simulator().prompts
    with pytest.raises(PropensityError, match="Coba needs"):
        Coba(coba.RandomLearner(), prompts).learn(replace(log, propensity=np.full(10, np.nan)))


def test_a_pmf_of_another_size_is_told() -> None:
    agent = Coba(coba.FixedLearner([0.5, 0.5]), simulator().prompts)
    with pytest.raises(DataError, match=r"expected shape \(12, 6\), got \(12, 2\)"):
        agent.probabilities(probe())
    with pytest.raises(ConfigError, match="contexts: expected a Contexts"):
        agent.probabilities(None)  # type: ignore[arg-type]


# Experiments of coba.


def run(environment: Any, *learners: Any, evaluator: Any = None) -> dict[str, list[float]]:
    coba.CobaContext.logger.sink = coba.pipes.NullSink()
    evaluator = evaluator or coba.SequentialCB()
    result = coba.Experiment(coba.Environments(environment), list(learners), evaluator).run(quiet=True)
    families = dict(zip(result.learners["learner_id"], result.learners["family"], strict=True))
    rewards: dict[str, list[float]] = {}
    for learner, reward in zip(result.interactions["learner_id"], result.interactions["reward"], strict=True):
        rewards.setdefault(families[learner], []).append(reward)
    return rewards


@pytest.mark.parametrize("embeddings", [False, True])
def test_a_learner_beats_chance_in_an_experiment(embeddings: bool) -> None:
    environment = coba_environment(simulator(), 800, seed=3, embeddings=embeddings)
    rewards = run(environment, coba.LinUCBLearner(), coba.RandomLearner())
    assert {name: len(found) for name, found in rewards.items()} == {"LinUCB": 800, "Random": 800}
    gain = np.subtract(rewards["LinUCB"], rewards["Random"])
    assert gain.mean() > 3 * gain.std() / np.sqrt(800)
    again = run(coba_environment(simulator(), 800, seed=3, embeddings=embeddings), coba.LinUCBLearner())
    assert again["LinUCB"] == rewards["LinUCB"]
    other = run(coba_environment(simulator(), 800, seed=4, embeddings=embeddings), coba.LinUCBLearner())
    assert other["LinUCB"] != rewards["LinUCB"]


def test_rewards_are_observed_ones_around_the_expectation() -> None:
    world, n = simulator(), 600
    observed, expected = (coba_environment(world, n, seed=1, expected=flag).read() for flag in (False, True))
    noise = []
    for ours, truth in zip(observed, expected, strict=True):
        assert ours["context"] == truth["context"]
        assert len(ours["context"]) == 10
        action = ours["actions"][2]
        noise.append(ours["rewards"](action) - truth["rewards"](action))
        contexts = Contexts(np.array([ours["context"][:5]]), np.array([ours["context"][5:]]))
        means = world.expected_rewards(contexts)[0]
        np.testing.assert_allclose([truth["rewards"](a) for a in truth["actions"]], means, rtol=1e-4, atol=1e-4)
    assert np.std(noise) > 0.09
    assert abs(np.mean(noise)) < 4 * np.std(noise) / np.sqrt(n)


def test_a_round_is_the_same_whoever_asks_in_which_order() -> None:
    rounds = list(coba_environment(simulator(), 300).read())
    once = [[round_["rewards"](a) for a in round_["actions"]] for round_ in rounds]
    again = list(coba_environment(simulator(), 500).read())[:300]
    for row in reversed(range(300)):
        found = [again[row]["rewards"](list(a)) for a in reversed(again[row]["actions"])]
        assert found[::-1] == once[row]
    assert len(rounds) == 300


def test_it_is_made_while_it_is_read() -> None:
    world, drawn = simulator(), []
    sample = world.contexts.sample

    def counting(n: int, rng: np.random.Generator) -> Contexts:
        drawn.append(n)
        return sample(n, rng)

    world.contexts.sample = counting  # type: ignore[method-assign]
    list(itertools.islice(coba_environment(world, 10**9).read(), 300))
    assert sum(drawn) < 1_000


def test_where_a_model_answers_each_round_is_played_alone() -> None:
    world = simulator()
    played: list[int] = []

    class Model:
        """An output model without a closed form."""

        output_dim, prompts = world.outputs.output_dim, world.prompts

        def sample(self, contexts: Contexts, actions: np.ndarray, rng: np.random.Generator) -> Outputs:
            played.append(len(contexts))
            return world.outputs.sample(contexts, actions, rng)

    sampled = op.Simulator(world.contexts, Model(), world.rewards)
    for round_ in coba_environment(sampled, 5).read():
        action = round_["actions"][1]
        assert round_["rewards"](action) == round_["rewards"](action)
    assert played == [1] * 5


def test_environments_and_other_worlds() -> None:
    env = gym.make("OffPrompts-Synthetic-v0", preset="paper_code", n_prompts=N_PROMPTS, seed=0)
    (round_,) = coba_environment(env, 1).read()
    assert [len(round_["context"]), len(round_["actions"])] == [10, N_PROMPTS]
    for world in (gym.make("CartPole-v1"), "simulator", None):
        with pytest.raises(ConfigError, match="world: expected a Simulator"):
            coba_environment(world, 3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="n: expected an integer"):
        coba_environment(env, 0)
    for action in ((1.0, 2.0), 3, None):
        with pytest.raises(ActionError, match="expected one of the round's 6 actions"):
            round_["rewards"](action)


def test_an_environment_travels_to_other_processes() -> None:
    environment = coba_environment(simulator(), 20)
    same = pickle.loads(pickle.dumps(environment))
    assert [r["context"] for r in same.read()] == [r["context"] for r in environment.read()]
    assert same.params == environment.params


def test_a_log_is_an_environment() -> None:
    log = log_of(4_100)
    rounds = list(CobaLog(log, embeddings=True).read())
    assert len(rounds) == 4_100
    for row in (0, 4_099):
        np.testing.assert_allclose(rounds[row]["action"], log.prompts.embeddings[log.action[row]])
        assert (rounds[row]["reward"], rounds[row]["probability"]) == (log.reward[row], log.propensity[row])
        assert rounds[row]["action"] in rounds[row]["actions"]
    unknown = replace(log.take(slice(0, 3)), propensity=np.array([0.5, np.nan, 0.5]))
    assert ["probability" in round_ for round_ in CobaLog(unknown).read()] == [True, False, True]
    with pytest.raises(ConfigError, match="log: expected a LoggedDataset"):
        CobaLog("log")  # type: ignore[arg-type]


def test_coba_estimates_a_policy_from_our_log_as_we_do() -> None:
    log, pmf = log_of(500), [0.5, 0.3, 0.2, 0, 0, 0]
    rewards = run(
        CobaLog(log), coba.FixedLearner(pmf), evaluator=coba.SequentialCB(learn=None, eval="ips", record="reward")
    )
    policy = Coba(coba.FixedLearner(pmf), log.prompts)
    ours = agents.IS().estimate(policy, log)
    (found,) = rewards.values()
    assert np.mean(found) == pytest.approx(ours.value, rel=1e-4)


def test_without_coba_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "coba", None)
    with pytest.raises(MissingDependencyError, match=r"offprompts-env\[coba\]"):
        Coba(coba.RandomLearner(), simulator().prompts)
