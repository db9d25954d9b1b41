"""The native vector environment under Stable-Baselines3: the same rounds, masks, records while it trains, learning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, VectorWrapper
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv, VecMonitor, VecNormalize

import offprompts_env as op
from agents.adapters.stable_baselines3 import StableBaselines3
from agents.adapters.vec_env import PromptVecEnv
from offprompts_env.errors import ActionError, ConfigError, DataError, DimensionError, OffPromptsError

torch.set_num_threads(1)
N_PROMPTS, NUM_ENVS = 6, 8
SETTINGS: dict[str, Any] = {"preset": "paper_code", "n_prompts": N_PROMPTS, "reward_std": 0.1, "seed": 0}
SMALL: dict[str, Any] = {"gamma": 0.0, "device": "cpu", "seed": 0}


def envs(num_envs: int = NUM_ENVS, **settings: Any) -> Any:
    return gym.make_vec("OffPrompts-Synthetic-v0", num_envs=num_envs, **SETTINGS | settings)


class Masking(VectorWrapper[Any, Any, Any, Any, Any]):
    """Allows the first two prompts only to users whose first number is positive."""

    def _mask(self, observation: Any, infos: dict[str, Any]) -> dict[str, Any]:
        return infos | {"action_mask": allowed(observation["context"])}

    def reset(self, **given: Any) -> Any:
        observation, infos = self.env.reset(**given)
        return observation, self._mask(observation, infos)

    def step(self, actions: Any) -> Any:
        observation, *rest, infos = self.env.step(actions)
        return observation, *rest, self._mask(observation, infos)


def allowed(context: np.ndarray) -> np.ndarray:
    mask = np.ones((len(context), N_PROMPTS), dtype=bool)
    mask[:, :2] = context[:, :1] > 0
    return mask


class Noting(BaseCallback):
    """Keeps what the model says of its own draws."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, list[np.ndarray]] = {"actions": [], "rewards": [], "log_probs": [], "explored": []}

    def _on_step(self) -> bool:
        for name in ("actions", "rewards"):
            self.kept[name].append(np.array(self.locals[name]).reshape(-1))
        if "log_probs" in self.locals:
            self.kept["log_probs"].append(self.locals["log_probs"].numpy())
        else:
            early = self.model.num_timesteps - NUM_ENVS < self.model.learning_starts
            self.kept["explored"].append(np.full(NUM_ENVS, 1.0 if early else self.model.exploration_rate))
        return True

    def __getitem__(self, name: str) -> np.ndarray:
        return np.concatenate(self.kept[name])


def test_it_plays_the_rounds_of_the_environment() -> None:
    bare, wrapped = envs(), PromptVecEnv(envs())
    assert isinstance(wrapped, VecEnv)
    wrapped.seed(3)
    (expected, _), found = bare.reset(seed=3), wrapped.reset()
    for step in range(3):
        np.testing.assert_array_equal(found["context"], expected["context"])
        np.testing.assert_array_equal(found["query"], expected["query"])
        actions = (np.arange(NUM_ENVS) + step) % N_PROMPTS
        expected, reward, *_ = bare.step(actions)
        found, rewards, dones, infos = wrapped.step(actions)
        np.testing.assert_array_equal(rewards, reward.astype(np.float32))
        assert rewards.dtype == np.float32
        assert dones.all()
        assert [dict(info) for info in infos] == [{}] * NUM_ENVS


def test_without_a_new_seed_a_reset_shows_new_rounds() -> None:
    world = PromptVecEnv(envs())
    world.seed(3)
    assert not np.array_equal(world.reset()["context"], world.reset()["context"])


def test_what_is_shared_cannot_be_written_to() -> None:
    world = PromptVecEnv(envs())
    world.reset()
    *_, infos = world.step(np.zeros(NUM_ENVS, dtype=int))
    with pytest.raises(TypeError):
        infos[0]["mine"] = 1


def same_step() -> Any:
    return gym.make_vec(
        "OffPrompts-Synthetic-v0", NUM_ENVS, vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP}, **SETTINGS,
    )  # fmt: skip


@pytest.mark.parametrize("make", [envs, same_step])
def test_infos_of_each_round(make: Any) -> None:
    world = PromptVecEnv(make(), infos=True)
    world.seed(0)
    shown = {name: value.copy() for name, value in world.reset().items()}
    _, rewards, _, infos = world.step(np.arange(NUM_ENVS) % N_PROMPTS)
    for row, info in enumerate(infos):
        assert abs(info["expected_reward"] - rewards[row]) < 1
        assert info["output"].shape == (5,)
        np.testing.assert_array_equal(info["terminal_observation"]["context"], shown["context"][row])
        assert info["TimeLimit.truncated"] is False
    assert len({info["expected_reward"] for info in infos}) == NUM_ENVS


def test_a_truncated_round_says_so_unasked() -> None:
    class Truncating(VectorWrapper[Any, Any, Any, Any, Any]):
        def step(self, actions: Any) -> Any:
            observation, reward, terminated, truncated, infos = self.env.step(actions)
            truncated[2], terminated[2] = True, False
            return observation, reward, terminated, truncated, infos

    world = PromptVecEnv(Truncating(envs()))
    world.reset()
    _, _, dones, infos = world.step(np.zeros(NUM_ENVS, dtype=int))
    assert dones.all()
    assert [info["TimeLimit.truncated"] for info in infos] == [row == 2 for row in range(NUM_ENVS)]
    assert infos[2]["terminal_observation"]["context"].shape == (5,)


def test_it_is_monitored(tmp_path: Path) -> None:
    world = VecMonitor(PromptVecEnv(envs(), infos=True), str(tmp_path / "log"), info_keywords=("expected_reward",))
    A2C("MultiInputPolicy", world, n_steps=2, **SMALL).learn(64)
    world.close()
    rows = (tmp_path / "log.monitor.csv").read_text().splitlines()[1:]
    assert rows[0] == "r,l,t,expected_reward"
    assert len(rows) == 65
    bare = VecMonitor(PromptVecEnv(envs()))
    model = A2C("MultiInputPolicy", bare, n_steps=2, **SMALL).learn(64)
    assert all(episode["l"] == 1 for episode in model.ep_info_buffer)


def test_it_is_evaluated() -> None:
    model = PPO("MultiInputPolicy", PromptVecEnv(envs()), **SMALL)
    rewards, lengths = evaluate_policy(
        model, VecMonitor(PromptVecEnv(envs())), n_eval_episodes=40, return_episode_rewards=True
    )
    assert len(rewards) == 40
    assert set(lengths) == {1}


def test_attributes_and_methods_are_found_through_wrappers() -> None:
    world = PromptVecEnv(Masking(envs()))
    assert world.get_attr("simulator") == [world.envs.unwrapped.simulator] * NUM_ENVS
    assert world.get_attr("num_envs", indices=[1, 3]) == [NUM_ENVS] * 2
    assert world.has_attr("simulator")
    assert not world.has_attr("no_such")
    world.set_attr("config", {"mine": 1})
    assert world.envs.unwrapped.config == {"mine": 1}
    assert "config" not in vars(world.envs)
    assert world.env_method("__str__", indices=0) == [str(world.envs)]
    assert world.env_is_wrapped(Masking) == [True] * NUM_ENVS
    assert world.env_is_wrapped(Monitor) == [False] * NUM_ENVS
    with pytest.raises(AttributeError, match="no_such: neither"):
        world.get_attr("no_such")
    with pytest.raises(ConfigError, match="one environment plays all rounds"):
        world.set_attr("config", {}, indices=[0])


def test_a_subclass_is_one_too() -> None:
    class Own(PromptVecEnv):
        pass

    assert isinstance(Own(envs()), Own)
    assert isinstance(Own(envs()), VecEnv)
    assert type(PromptVecEnv(envs())) is type(PromptVecEnv(envs()))


def test_masks_reach_the_model_that_asks() -> None:
    contrib = pytest.importorskip("sb3_contrib")
    from sb3_contrib.common.maskable.utils import is_masking_supported

    world = VecMonitor(PromptVecEnv(Masking(envs())))
    world.reset()
    assert is_masking_supported(world)
    assert not is_masking_supported(PromptVecEnv(envs()))
    played: list[tuple[np.ndarray, np.ndarray]] = []

    class Looking(BaseCallback):
        def _on_step(self) -> bool:
            played.append((self.locals["action_masks"], self.locals["actions"]))
            return True

    contrib.MaskablePPO("MultiInputPolicy", world, n_steps=32, batch_size=64, **SMALL).learn(512, Looking())
    masks, actions = (np.concatenate(part) for part in zip(*played, strict=True))
    assert (~masks).any()
    assert masks[np.arange(len(actions)), actions].all()


@pytest.mark.parametrize(
    ("mask", "error", "says"),
    [
        (np.ones((NUM_ENVS, 2)), DimensionError, r"expected shape \(8, 6\), got \(8, 2\)"),
        (np.arange(NUM_ENVS)[:, None] * np.ones(N_PROMPTS) != 5, DataError, "none in row 5"),
    ],
)
def test_wrong_masks_are_told(mask: np.ndarray, error: type[OffPromptsError], says: str) -> None:
    class Wrong(Masking):
        def _mask(self, observation: Any, infos: dict[str, Any]) -> dict[str, Any]:
            return infos | {"action_mask": mask}

    with pytest.raises(error, match=says):
        PromptVecEnv(Wrong(envs())).reset()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: gym.make("OffPrompts-Synthetic-v0"), "expected a VectorEnv"),
        (lambda: gym.make_vec("OffPrompts-Synthetic-v0", 2, vectorization_mode="sync"), "expected same-step autoreset"),
        (lambda: None, "expected a VectorEnv"),
    ],
)
def test_no_vector_environment_is_told(make: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        PromptVecEnv(make())


def test_wrong_actions_are_told() -> None:
    world = PromptVecEnv(envs())
    world.reset()
    with pytest.raises(ActionError, match="got 6"):
        world.step(np.full(NUM_ENVS, N_PROMPTS))


def recorded(model: Any, path: Path, steps: int, base: Any, **live: Any) -> tuple[op.LoggedDataset, Noting]:
    """Train `model` in `base`; return the log of that and what the model says of its own draws."""
    agent, noting = StableBaselines3(model, base.unwrapped.simulator.prompts, **live), Noting()
    with op.RecordVectorLoggedData(base, path, policy=agent) as recorder:
        world: Any = PromptVecEnv(recorder)
        normalising = model.get_vec_normalize_env()
        if normalising is not None:
            normalising.venv, world = world, normalising
        model.set_env(world)
        model.learn(steps, noting)
        log = recorder.dataset()
    assert len(log) == steps
    np.testing.assert_array_equal(log.action, noting["actions"])
    np.testing.assert_array_equal(log.reward, noting["rewards"])
    return log, noting


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("kind", [PPO, A2C])
def test_propensities_while_it_trains_are_those_of_its_draws(kind: Any, normalised: bool, tmp_path: Path) -> None:
    base = envs()
    world: Any = VecNormalize(PromptVecEnv(base), norm_reward=False) if normalised else PromptVecEnv(base)
    model = kind("MultiInputPolicy", world, n_steps=16, learning_rate=0.01, **SMALL)
    log, noting = recorded(model, tmp_path / "log", 512, base)
    np.testing.assert_allclose(log.propensity, np.exp(noting["log_probs"]), rtol=1e-4)
    # It did learn in between, so that the policy of the end would have been wrong.
    late = StableBaselines3(model, base.simulator.prompts).probabilities(log.contexts)[np.arange(512), log.action]
    assert np.abs(late / log.propensity - 1).max() > 0.05


def test_propensities_of_masked_draws(tmp_path: Path) -> None:
    contrib = pytest.importorskip("sb3_contrib")
    base = Masking(envs())
    model = contrib.MaskablePPO("MultiInputPolicy", PromptVecEnv(base), n_steps=16, batch_size=64, **SMALL)
    log, noting = recorded(
        model, tmp_path / "log", 512, base, masks=lambda contexts: model.env.env_method("action_masks")
    )
    np.testing.assert_allclose(log.propensity, np.exp(noting["log_probs"]), rtol=1e-4)
    assert allowed(log.context)[np.arange(512), log.action].all()


def test_masked_draws_are_not_recorded_with_unmasked_propensities(tmp_path: Path) -> None:
    contrib = pytest.importorskip("sb3_contrib")
    base = Masking(envs())
    model = contrib.MaskablePPO("MultiInputPolicy", PromptVecEnv(base), n_steps=16, batch_size=64, **SMALL)
    with pytest.raises(ConfigError, match="masks: expected a function, as the model trains under masks"):
        recorded(model, tmp_path / "log", 128, base)


def test_propensities_of_a_model_that_explores(tmp_path: Path) -> None:
    base = envs()
    model = DQN(
        "MultiInputPolicy", PromptVecEnv(base), learning_starts=64, buffer_size=600, exploration_fraction=0.8,
        target_update_interval=NUM_ENVS, **SMALL,
    )  # fmt: skip
    log, noting = recorded(model, tmp_path / "log", 512, base)
    np.testing.assert_allclose(log.propensity[:64], 1 / N_PROMPTS)
    # A round has either of two propensities, by the rate of its step: that of the greedy prompt, or of another.
    rate = noting["explored"]
    low, high = rate / N_PROMPTS, 1 - rate + rate / N_PROMPTS
    np.testing.assert_allclose(np.minimum(np.abs(log.propensity - low), np.abs(log.propensity - high)), 0, atol=1e-9)
    assert (np.isclose(log.propensity, high) & (rate < 0.5)).sum() > 50


def test_a_model_of_a_log_without_policy_leaves_propensities_open(tmp_path: Path) -> None:
    with op.RecordVectorLoggedData(envs(), tmp_path / "log") as recorder:
        A2C("MultiInputPolicy", PromptVecEnv(recorder), n_steps=2, **SMALL).learn(64)
        assert np.isnan(recorder.dataset().propensity).all()


@pytest.mark.parametrize(
    ("kind", "steps", "settings"),
    [(PPO, 10_000, {"n_steps": 8, "batch_size": 256, "n_epochs": 4}), (A2C, 30_000, {"n_steps": 1})],
)
def test_training_in_it_learns(kind: Any, steps: int, settings: dict[str, Any]) -> None:
    base = envs(128, reward_std=0.05)
    truth = op.Truth.exact(base.simulator, 2_000)
    model = kind("MultiInputPolicy", PromptVecEnv(base), gae_lambda=1.0, learning_rate=3e-3, **SMALL, **settings)
    agent = StableBaselines3(model, base.simulator.prompts)
    before = truth.optimality(agent)
    model.learn(steps)
    assert abs(before) < 0.1
    assert truth.optimality(agent) > 0.7
