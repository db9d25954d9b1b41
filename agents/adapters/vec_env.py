"""Stable-Baselines3 trains in a vector environment of this project as a whole, not in one round after the other."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType, new_class
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode, VectorEnv

from offprompts_env.config import check_kind
from offprompts_env.errors import ConfigError, DataError, DimensionError, ResetNeededError
from offprompts_env.recording import layers
from offprompts_env.types import Array

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import VecEnv as _Base
    from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn
else:
    # The base is added when the first one is made: that import takes seconds.
    _Base = object

# Read-only, because all rounds share it.
_NOTHING: Mapping[str, Any] = MappingProxyType({})


class PromptVecEnv(_Base):
    """A vector environment as Stable-Baselines3 wants it: a ``VecEnv`` over ``gym.make_vec("OffPrompts-...")``.

    A step is one call of the environment whatever the number of rounds; hundreds of them at once train fastest.
    It works around :class:`~offprompts_env.recording.RecordVectorLoggedData`, and within ``VecMonitor`` and
    ``VecNormalize``. To record with propensities what a model does while it trains::

        envs = gym.make_vec("OffPrompts-Synthetic-v0", num_envs=256)
        model = PPO("MultiInputPolicy", PromptVecEnv(envs), gamma=0.0, gae_lambda=1.0)
        live = StableBaselines3(model, envs.unwrapped.simulator.prompts)
        model.set_env(PromptVecEnv(op.RecordVectorLoggedData(envs, "log", policy=live)))
        model.learn(100_000)

    Where ``infos`` have an ``action_mask`` (n, A) of the rounds that begin, ``MaskablePPO`` finds it; a `live` policy
    that records needs it too: ``masks=lambda contexts: model.env.env_method("action_masks")``.

    Args:
        envs: with same-step autoreset, as the native environments have it.
        infos: whether each finished round gets a dict of its own with all that the environment says of it (output,
            sentence, expected reward, ...) and its ``terminal_observation``. Training needs none, and it costs time.

    Raises:
        ConfigError: not a vector environment, or another autoreset mode.
    """

    def __new__(cls, *_: Any, **__: Any) -> PromptVecEnv:  # noqa: D102
        return super().__new__(_on_vec_env(cls))

    def __init__(self, envs: VectorEnv[Any, Any, Any], *, infos: bool = False) -> None:
        check_kind("envs", envs, VectorEnv, "make one with gym.make_vec; a single one SB3 takes as it is")
        mode = envs.metadata.get("autoreset_mode")
        if mode != AutoresetMode.SAME_STEP:
            raise ConfigError(
                f"envs: expected same-step autoreset, got {mode}, under which rows are dummies; use the native vector "
                "environment, or vector_kwargs={'autoreset_mode': gym.vector.AutoresetMode.SAME_STEP}"
            )
        self.envs = envs
        self._tells = infos
        self._masks: Array | None = None
        super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)

    def reset(self) -> VecEnvObs:
        """Begin `num_envs` rounds, with the seed that ``seed`` was called with since the last reset, if any."""
        observation, infos = self.envs.reset(seed=self._seeds[0], options=self._options[0] or None)
        self._reset_seeds()
        self._reset_options()
        self._note_masks(infos)
        if self._tells:
            self.reset_infos = [_row(_columns(infos), row) for row in range(self.num_envs)]
        return observation  # type: ignore[no-any-return]

    def step_async(self, actions: np.ndarray) -> None:
        """Take the actions (n,) of the next :meth:`step_wait`."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Play them; the observations are those of the next rounds.

        Raises:
            ActionError: not prompt indices.
        """
        observation, reward, terminated, truncated, infos = self.envs.step(self._actions)
        self._note_masks(infos)
        told: list[Any] = [_NOTHING] * self.num_envs
        if self._tells or truncated.any():  # of truncated rounds SB3 asks what comes after them
            told = self._told(infos, truncated & ~terminated)
        return observation, reward.astype(np.float32), terminated | truncated, told

    def _told(self, infos: Mapping[str, Any], truncated: Array) -> list[dict[str, Any]]:
        columns, shown = _columns(infos.get("final_info", {})), infos["final_obs"]
        return [
            _row(columns, row) | {
                "terminal_observation": _row(shown, row) if isinstance(shown, Mapping) else shown[row],
                "TimeLimit.truncated": bool(truncated[row]),
            }
            for row in range(self.num_envs)
        ]  # fmt: skip

    def _note_masks(self, infos: Mapping[str, Any]) -> None:
        masks = infos.get("action_mask")
        n_prompts = int(self.action_space.n)  # type: ignore[attr-defined]
        self._masks = None if masks is None else check_masks(masks, self.num_envs, n_prompts)

    def action_masks(self) -> Array:
        """Return which prompts may be played in the open rounds, (n, A) bool.

        Raises:
            AttributeError: the environment does not mask.
            ResetNeededError: it does, and no round is open yet.
        """
        if self._masks is None:
            self._owner("action_masks")
            raise ResetNeededError("action_masks: expected open rounds, found none; call reset() first")
        return self._masks

    def close(self) -> None:
        """Close the environment."""
        self.envs.close()

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method of the environment, once, as it plays all rounds; return what it gives for each round."""
        rows = self._get_indices(indices)
        if method_name == "action_masks":
            masks = self.action_masks()
            return [masks[row] for row in rows]
        result = getattr(self._owner(method_name), method_name)(*method_args, **method_kwargs)
        return [result for _ in rows]

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """Return an attribute of the environment or of a wrapper, the same for each round.

        Raises:
            AttributeError: none of them has it.
        """
        if attr_name == "action_masks":
            if self._masks is None:
                self._owner(attr_name)  # sb3-contrib asks whether there are masks before it resets
            value: Any = self.action_masks
        else:
            value = getattr(self._owner(attr_name), attr_name)
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute where it is, in the environment or in a wrapper.

        Raises:
            ConfigError: only for some rounds; one environment plays them all.
        """
        if len(set(self._get_indices(indices))) != self.num_envs:
            raise ConfigError("indices: expected None, as one environment plays all rounds; set it for all of them")
        setattr(self._owner(attr_name), attr_name, value)

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper[Any, Any]], indices: VecEnvIndices = None) -> list[bool]:
        """Say for each round whether a wrapper of the class is around the environment."""
        wrapped = any(isinstance(env, wrapper_class) for env in layers(self.envs))
        return [wrapped for _ in self._get_indices(indices)]

    def _owner(self, name: str) -> Any:
        for env in layers(self.envs):
            if hasattr(env, name):
                return env
        raise AttributeError(f"{name}: neither {self.envs} nor what it wraps has it")


@cache
def _on_vec_env(kind: type[PromptVecEnv]) -> type[PromptVecEnv]:
    from stable_baselines3.common.vec_env import VecEnv

    if issubclass(kind, VecEnv):
        return kind
    made: type[PromptVecEnv] = new_class(kind.__name__, (kind, VecEnv))
    made.__module__, made.__doc__ = kind.__module__, kind.__doc__
    return made


def _columns(infos: Mapping[str, Any]) -> dict[str, Any]:
    # Gymnasium's own vector environments say in "_name" which rows have "name".
    return {name: values for name, values in infos.items() if not name.startswith("_")}


def _row(columns: Mapping[str, Any], row: int) -> dict[str, Any]:
    return {name: values[row] for name, values in columns.items()}


def check_masks(masks: npt.ArrayLike, n: int, n_prompts: int) -> Array:
    """Return `masks` as (n, A) bool.

    Raises:
        DimensionError: another shape.
        DataError: a round in which no prompt may be played.
    """
    allowed = np.asarray(masks, dtype=bool)
    if allowed.shape != (n, n_prompts):
        raise DimensionError(
            f"action masks: expected shape ({n}, {n_prompts}), got {allowed.shape}; give one row a round and one "
            "column a prompt"
        )
    if not allowed.any(axis=1).all():
        row = int(np.argmin(allowed.any(axis=1)))
        raise DataError(f"action masks: expected an allowed prompt in each round, got none in row {row}")
    return allowed
