"""The speed of agents of other libraries, and of their training in the environments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np

import agents
import offprompts_env as op
from agents.adapters.vec_env import PromptVecEnv
from benchmarks.hot_paths.timing import Figure, seconds

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import VecEnv

_WORLD: dict[str, Any] = {"preset": "paper_code", "n_prompts": 20}


class _Idle(gym.vector.VectorEnv[Any, Any, Any]):
    """Shows the same rounds for ever: what is left is what training costs."""

    def __init__(self, envs: gym.vector.VectorEnv[Any, Any, Any]) -> None:
        self.num_envs, self.metadata, self.render_mode = envs.num_envs, envs.metadata, None
        self.single_observation_space, self.single_action_space = (
            envs.single_observation_space,
            envs.single_action_space,
        )
        self._shown = envs.reset(seed=0)[0]
        self._played = envs.step(np.zeros(envs.num_envs, dtype=np.int64))[1:4]

    def reset(self, **_: Any) -> tuple[Any, dict[str, Any]]:
        return self._shown, {}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        return self._shown, *self._played, {}


def _envs(num_envs: int) -> gym.vector.VectorEnv[Any, Any, Any]:
    return gym.make_vec("OffPrompts-Synthetic-v0", num_envs=num_envs, **_WORLD)


def sb3(num_envs: int = 256, n_steps: int = 5, updates: int = 50) -> list[Figure]:
    """Steps a second of A2C, and rounds a second of recording what a model does.

    Args:
        num_envs: rounds at once, also where single environments play them in turn.
        n_steps: steps an update.
        updates: updates measured; a tenth of them in single environments.
    """
    from stable_baselines3 import A2C
    from stable_baselines3.common.vec_env import DummyVecEnv

    from agents.adapters.stable_baselines3 import StableBaselines3

    def model(world: VecEnv) -> A2C:
        return A2C("MultiInputPolicy", world, n_steps=n_steps, gamma=0.0, gae_lambda=1.0, device="cpu", seed=0)

    def rate(world: VecEnv, updates: int) -> float:
        training, steps = model(world), updates * n_steps * world.num_envs
        return steps / seconds(lambda: training.learn(steps), 3)

    singles = DummyVecEnv([lambda: gym.make("OffPrompts-Synthetic-v0", **_WORLD)] * num_envs)
    limit = rate(PromptVecEnv(_Idle(_envs(num_envs))), updates)
    what = "the same training in an environment that does nothing"
    envs = _envs(num_envs)
    simulator = envs.unwrapped.simulator  # type: ignore[attr-defined]
    agent, uniform = StableBaselines3(model(PromptVecEnv(envs)), simulator.prompts), agents.UniformPolicy(20)

    def recorded(policy: Any, n: int = 1 << 16) -> float:
        return n / seconds(lambda: op.collect(simulator, policy, n, progress=False), 3)

    return [
        Figure(f"A2C in {num_envs} rounds at once", rate(PromptVecEnv(envs), updates), "steps/s", "higher", 50e3, limit,
               what),
        Figure(f"A2C in {num_envs} single environments", rate(singles, max(1, updates // 10)), "steps/s", "higher", 5e3,
               limit, what),
        Figure("recording an A2C model", recorded(agent), "rows/s", "higher", 200e3, recorded(uniform),
               "recording the uniform policy"),
    ]  # fmt: skip
