"""Prompts that are excluded in some rounds: rules that a policy must keep, such as prompts that no child may see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper

from offprompts_env.errors import ActionError, ConfigError, ResetNeededError, foreign
from offprompts_env.types import Array, Contexts, FloatArray

Observation = dict[str, Any]
Mask = npt.ArrayLike | Callable[[Contexts], npt.ArrayLike]
"""Which prompts are allowed, (A,) for all rounds; or a function from n contexts to (n, A)."""


class _Masks:
    """Masks of rounds, from a fixed array or a function."""

    def __init__(self, mask: Mask, n_prompts: int) -> None:
        self.n_prompts = n_prompts
        self._mask = mask if callable(mask) else _checked(mask, (n_prompts,), n_prompts)

    def of(self, observation: Observation, info: dict[str, Any], n: int) -> npt.NDArray[np.bool_]:
        """Return the masks (n, A) of what was shown."""
        if not callable(self._mask):
            return np.broadcast_to(self._mask, (n, self.n_prompts))
        contexts = Contexts.of(observation, info)
        with foreign(f"the function of the mask raised in {n} rounds"):
            found = self._mask(contexts)
        return _checked(found, (n, self.n_prompts), self.n_prompts)


def _checked(mask: npt.ArrayLike, shape: tuple[int, ...], n_prompts: int) -> npt.NDArray[np.bool_]:
    """Return `mask` as booleans of `shape`, each row with an allowed prompt."""
    try:
        array = np.asarray(mask)
    except ValueError as error:
        raise ConfigError(f"mask: expected shape {shape}, one entry a prompt, got rows of different lengths") from error
    if array.shape != shape:
        raise ConfigError(f"mask: expected shape {shape}, one entry for each of {n_prompts} prompts, got {array.shape}")
    if array.dtype.kind not in "biuf" or not (array.dtype == bool or ((array == 0) | (array == 1)).all()):
        raise ConfigError(
            "mask: expected True or 1 where a prompt is allowed and False or 0 elsewhere, got other values"
        )
    allowed = array.astype(bool)
    empty = ~np.atleast_2d(allowed).any(axis=1)
    if empty.any():
        raise ConfigError(
            f"mask: expected at least one allowed prompt a round, got none in row {int(np.argmax(empty))}; allow a "
            "prompt that is always right"
        )
    return allowed


def _n_prompts(space: gym.Space[Any]) -> int:
    if not isinstance(space, gym.spaces.Discrete):
        raise ConfigError(f"env: expected a Discrete action space, got {space}; mask an environment of this project")
    return int(space.n)


class ActionMask(gym.Wrapper[Observation, np.int64, Observation, np.int64], RecordConstructorArgs):
    """Says which prompts are allowed in a round, and refuses the others.

    ``info["action_mask"]``, at reset and at step, is (A,) int8 with 1 for an allowed prompt, so that
    ``env.action_space.sample(mask=info["action_mask"])`` works; that of a step belongs to the round that it ended.
    :meth:`action_masks` gives the same as booleans: what ``sb3_contrib.MaskablePPO`` asks for. An excluded prompt
    raises :class:`~offprompts_env.errors.ActionError` and the round stays open. Observations and rewards stay the same.

    The propensity to record is that of the restricted policy, whose probabilities sum to one over the allowed prompts;
    a log so recorded has no support for excluded ones. ``op.collect`` works around it with a policy or an agent that
    keeps to the mask, and ends with the ActionError of one that does not.

    Args:
        env: an environment of this project; a function as `mask` needs its observations' keys.
        mask: allowed prompts (A,); or a function from contexts (n of them) to masks (n, A), called with one at a time.

    Raises:
        ConfigError: a mask of another shape, or without any allowed prompt; of a function at reset.
        AgentError: the function raised.
    """

    def __init__(self, env: gym.Env[Observation, np.int64], mask: Mask) -> None:
        self._masks = _Masks(mask, _n_prompts(env.action_space))
        # A spec goes into JSON, which knows no arrays; a function it cannot hold, as with Gymnasium's own wrappers.
        RecordConstructorArgs.__init__(self, mask=mask if callable(mask) else np.asarray(mask).tolist())
        gym.Wrapper.__init__(self, env)
        self._mask: npt.NDArray[np.bool_] | None = None
        self._open = False

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """Return which prompts are allowed in the round at hand, (A,).

        Raises:
            ResetNeededError: before the first reset.
        """
        if self._mask is None:
            raise ResetNeededError("action_masks: expected a round, found none; call reset() first")
        return self._mask.copy()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin a round."""
        observation, info = self.env.reset(seed=seed, options=options)
        self._mask, self._open = self._masks.of(observation, info, 1)[0], True
        return observation, {**info, "action_mask": self._mask.astype(np.int8)}

    def step(self, action: np.int64) -> tuple[Observation, Any, bool, bool, dict[str, Any]]:
        """Play an allowed prompt.

        Raises:
            ActionError: the prompt is excluded in this round, which stays open.
        """
        if self._open and self._mask is not None:
            _refuse_excluded(np.atleast_1d(action), self._mask[None])
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._open = False
        if self._mask is not None:
            info = {**info, "action_mask": self._mask.astype(np.int8)}
        return observation, reward, terminated, truncated, info


class VectorActionMask(VectorWrapper[Observation, Array, Observation, Array, FloatArray]):
    """Says which prompts are allowed in each round of a batch; the sibling of :class:`ActionMask`.

    ``infos["action_mask"]`` is (num_envs, A) int8 of the rounds that are shown; that of the finished rounds is in
    ``infos["final_info"]``. One excluded prompt raises, and all rounds stay open.

    Args:
        env: a vector environment that resets in the same step, as those of this project do.
        mask: as for :class:`ActionMask`; a function is called with the whole batch.

    Raises:
        ConfigError: as for :class:`ActionMask`, or another autoreset mode.
        AgentError: the function raised.
    """

    def __init__(self, env: VectorEnv[Observation, Array, FloatArray], mask: Mask) -> None:
        if isinstance(env, gym.Env):
            raise ConfigError("env: expected a vector environment, got a single one; mask it with ActionMask")
        VectorWrapper.__init__(self, env)
        if env.metadata.get("autoreset_mode") != AutoresetMode.SAME_STEP:
            raise ConfigError(
                f"env: expected same-step autoreset, got {env.metadata.get('autoreset_mode')}; in other modes some "
                "steps only reset, and their actions mean nothing"
            )
        self._masks = _Masks(mask, _n_prompts(env.single_action_space))
        self._mask: npt.NDArray[np.bool_] | None = None

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """Return which prompts are allowed in the rounds at hand, (num_envs, A).

        Raises:
            ResetNeededError: before the first reset.
        """
        if self._mask is None:
            raise ResetNeededError("action_masks: expected rounds, found none; call reset() first")
        return self._mask.copy()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin a round in every sub-environment."""
        observation, infos = self.env.reset(seed=seed, options=options)
        self._mask = self._masks.of(observation, infos, self.num_envs)
        return observation, {**infos, "action_mask": self._mask.astype(np.int8)}

    def step(self, actions: Array) -> tuple[Observation, FloatArray, FloatArray, FloatArray, dict[str, Any]]:
        """Play one allowed prompt in each round.

        Raises:
            ActionError: a prompt is excluded in its round; all rounds stay open.
        """
        finished = self._mask
        if finished is not None:
            _refuse_excluded(np.asarray(actions), finished)
        observation, reward, terminated, truncated, infos = self.env.step(actions)
        self._mask = self._masks.of(observation, infos, self.num_envs)
        infos = {**infos, "action_mask": self._mask.astype(np.int8)}
        if finished is not None and "final_info" in infos:
            infos["final_info"] = {**infos["final_info"], "action_mask": finished.astype(np.int8)}
        return observation, reward, terminated, truncated, infos


def _refuse_excluded(actions: Array, masks: npt.NDArray[np.bool_]) -> None:
    """Raise for a prompt that is excluded; what is no prompt at all, the environment itself refuses."""
    n, n_prompts = masks.shape
    if actions.shape != (n,) or actions.dtype.kind not in "iu" or not ((actions >= 0) & (actions < n_prompts)).all():
        return
    excluded = ~masks[np.arange(n), actions]
    if excluded.any():
        row = int(np.argmax(excluded))
        where = f" in row {row}" if n > 1 else ""
        raise ActionError(
            f"action: expected one of {int(masks[row].sum())} allowed prompts{where}, got {actions[row]}, which is "
            'excluded; the round is still open: choose where info["action_mask"] is 1'
        )
