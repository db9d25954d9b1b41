"""What every adapter must do, whatever library is behind it: a test class of an adapter inherits from `Conformance`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest

import agents
import offprompts_env as op
from agents.adapters.base import Adapter
from offprompts_env.errors import DimensionError, OffPromptsError, StorageError
from offprompts_env.types import Agent, Contexts, LoggedDataset, Policy, PromptSet

N_PROMPTS = 6


def simulator(seed: int = 0) -> op.Simulator:
    return op.SyntheticConfig.preset("paper_code", n_prompts=N_PROMPTS, reward_std=0.1, seed=seed).build()


def other_prompts() -> PromptSet:
    return PromptSet(np.random.default_rng(9).normal(size=(N_PROMPTS, 5)))


class Conformance:
    """Inherit, and give `make` and what else differs.

    Attributes:
        learns: whether `learn` changes what the agent does.
        pickled: whether its file needs ``trusted=True``.
        rows: rounds that it is taught with.
    """

    learns: ClassVar[bool] = True
    pickled: ClassVar[bool] = False
    rows: ClassVar[int] = 400

    def make(self, prompts: PromptSet, seed: int) -> Adapter:
        """Return a fresh agent for contexts of 5 and queries of 5 numbers."""
        raise NotImplementedError

    def load(self, path: Path, *, trusted: bool) -> Adapter:
        """Read what the agent saved."""
        kind = type(self.make(simulator().prompts, 0))
        return kind.load(path, trusted=trusted) if self.pickled else kind.load(path)  # type: ignore[attr-defined,no-any-return]

    def taught(self, seed: int = 0) -> Adapter:
        agent = self.make(simulator().prompts, seed)
        agent.learn(self.log())
        return agent

    def log(self) -> LoggedDataset:
        return op.collect(simulator(), agents.UniformPolicy(N_PROMPTS), self.rows, seed=1, progress=False)

    def contexts(self, n: int = 7) -> Contexts:
        return simulator().contexts.sample(n, np.random.default_rng(2))

    def test_it_is_a_policy_and_an_agent(self) -> None:
        agent = self.make(simulator().prompts, 0)
        assert isinstance(agent, Policy)
        assert isinstance(agent, Agent)
        assert agent.n_prompts == N_PROMPTS

    def test_shapes_and_types(self) -> None:
        agent, contexts = self.taught(), self.contexts()
        pmf = agent.probabilities(contexts)
        assert pmf.shape == (7, N_PROMPTS)
        np.testing.assert_allclose(pmf.sum(axis=1), 1, atol=1e-5)
        assert pmf.min() >= 0
        actions, propensities = agent.act(contexts, np.random.default_rng(0))
        assert (actions.shape, actions.dtype) == ((7,), np.int64)
        assert (propensities.shape, propensities.dtype) == ((7,), np.float64)

    def test_propensities_are_frequencies(self) -> None:
        agent, contexts, times = self.taught(), self.contexts(3), 4_000
        pmf = agent.probabilities(contexts)
        actions, propensities = agent.act(contexts.repeat(times), np.random.default_rng(0))
        for row in range(3):
            own = slice(row * times, (row + 1) * times)
            found = np.bincount(actions[own], minlength=N_PROMPTS) / times
            assert np.abs(found - pmf[row]).max() < 0.04
            np.testing.assert_allclose(propensities[own], pmf[row, actions[own]], rtol=1e-5)

    def test_looking_changes_nothing(self) -> None:
        agent, contexts = self.taught(), self.contexts()
        before = agent.probabilities(contexts)
        agent.act(contexts, np.random.default_rng(0))
        np.testing.assert_array_equal(agent.probabilities(contexts), before)

    def test_rows_do_not_depend_on_their_batch(self) -> None:
        agent, contexts = self.taught(), self.contexts()
        alone = np.concatenate([agent.probabilities(contexts.take(slice(i, i + 1))) for i in range(len(contexts))])
        np.testing.assert_allclose(agent.probabilities(contexts), alone, atol=1e-5)

    def test_same_seed_same_agent(self) -> None:
        first, second, contexts = self.taught(3), self.taught(3), self.contexts()
        np.testing.assert_array_equal(first.probabilities(contexts), second.probabilities(contexts))
        drawn = [agent.act(contexts, np.random.default_rng(4)) for agent in (first, second)]
        np.testing.assert_array_equal(drawn[0], drawn[1])

    def test_learning_changes_what_it_does(self) -> None:
        contexts = self.contexts(50)
        before = self.make(simulator().prompts, 0).probabilities(contexts)
        changed = not np.array_equal(before, self.taught(0).probabilities(contexts))
        assert changed == self.learns

    def test_a_log_over_other_prompts_is_refused(self) -> None:
        agent = self.make(simulator().prompts, 0)
        log = op.LoggedDataset(
            context=np.zeros((2, 5)), query=np.zeros((2, 5)), action=np.zeros(2, dtype=int), propensity=np.ones(2),
            reward=np.zeros(2), output=np.zeros((2, 0)), prompts=other_prompts(),
        )  # fmt: skip
        with pytest.raises(DimensionError, match="fingerprint"):
            agent.learn(log)

    def test_contexts_of_another_dimension_are_refused(self) -> None:
        with pytest.raises(OffPromptsError, match="expected"):
            self.taught().probabilities(Contexts(np.zeros((2, 3)), np.zeros((2, 4))))

    def test_save_and_load(self, tmp_path: Path) -> None:
        agent, contexts = self.taught(), self.contexts(20)
        assert agent.save(tmp_path / "agent") == tmp_path / "agent"
        same = self.load(tmp_path / "agent", trusted=True)
        np.testing.assert_array_equal(same.probabilities(contexts), agent.probabilities(contexts))
        assert same.catalogue == agent.catalogue
        agent.save(tmp_path / "agent")  # over what is there
        assert sorted(file.suffix for file in (tmp_path / "agent").iterdir()) == [".bin", ".json", ".safetensors"]

    def test_a_pickle_is_not_opened_unasked(self, tmp_path: Path) -> None:
        path = self.taught().save(tmp_path / "agent")
        if not self.pickled:
            self.load(path, trusted=False)
            return
        # Whatever the description says, which is of whoever wrote the directory.
        file = path / "agent.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"pickled": False, "trusted": True}))
        with pytest.raises(StorageError, match="trusted=True"):
            self.load(path, trusted=False)

    def test_a_damaged_file_is_named(self, tmp_path: Path) -> None:
        path = self.taught().save(tmp_path / "agent")
        file = next(path.glob("agent-*.bin"))
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(StorageError, match="damaged"):
            self.load(path, trusted=True)

    def test_it_is_recorded_while_it_learns(self, tmp_path: Path) -> None:
        noted: list[np.ndarray] = []
        agent = self.make(simulator().prompts, 0)
        act = agent.act

        def noting(contexts: Contexts, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
            pmf = agent.probabilities(contexts)
            actions, propensities = act(contexts, rng)
            noted.append(pmf[np.arange(len(actions)), actions])
            return actions, propensities

        agent.act = noting  # type: ignore[method-assign]
        log = op.collect(simulator(), agent, 300, tmp_path / "log", seed=0, batch_size=100, progress=False)
        assert len(log) == 300
        np.testing.assert_allclose(log.propensity, np.concatenate(noted), rtol=1e-5)

    def test_it_acts_in_an_environment(self, tmp_path: Path) -> None:
        env = gym.make("OffPrompts-Synthetic-v0", preset="paper_code", n_prompts=N_PROMPTS, seed=0)
        agent, rng = self.make(env.unwrapped.simulator.prompts, 0), np.random.default_rng(0)  # type: ignore[attr-defined]
        with op.RecordLoggedData(env, tmp_path / "log") as recorder:
            for round_ in range(20):
                observation, info = recorder.reset(seed=0 if round_ == 0 else None)
                (action,), (propensity,) = agent.act(Contexts.of(observation, info), rng)
                recorder.record_propensity(propensity)
                recorder.step(action)
            log = recorder.dataset()
        assert len(log) == 20
        assert np.isfinite(log.propensity).all()
