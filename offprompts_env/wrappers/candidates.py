"""A few candidates in place of the whole catalogue: for agents that rank what they are offered."""

from __future__ import annotations

import zlib
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs

from offprompts_env.config import check_integer
from offprompts_env.errors import ActionError, ConfigError, ResetNeededError
from offprompts_env.recording import check_propensities
from offprompts_env.types import FloatArray, IntArray, PromptSet
from offprompts_env.wrappers.observations import keyed

Observation = dict[str, Any]
_STREAM = zlib.crc32(b"candidates")


class CandidatePrompts(gym.Wrapper[Observation, np.int64, Observation, np.int64], RecordConstructorArgs):
    """Offers k candidates out of the A prompts in each round, uniformly drawn without replacement.

    An action is a slot, 0 to k − 1; ``info["candidates"]`` (k,) says which prompts are in the slots, at reset and at
    step. They are drawn from a stream of their own next to those of the environment, named by the same seed: rounds,
    outputs and noise stay those of the environment without this wrapper.

    **Recording.** Put the recorder inside, so that rows say which prompt was played, and tell it the propensity:

        recorder = RecordLoggedData(gym.make(...), "log")
        env = CandidatePrompts(recorder, k=10)
        observation, info = env.reset(seed=0)
        slot, p = ...                                      # p: probability of the slot, given the candidates
        recorder.record_propensity(env.propensity(p))      # not p itself
        env.step(slot)

    A log does not say what the candidates S were. With p(a | S) itself as propensity, weights π(a) / p(a | S) average
    to k/A, not to one: prompts that were not offered are not in the log. :meth:`propensity` gives
    ``P(a ∈ S) p(a | S) = (k/A) p(a | S)``: π(a) over it is the importance weight in the space of (S, a), for a target
    that draws a from π, and S among the sets with a. Its mean is one, and IS, SNIPS and DR with it are unbiased (SNIPS
    consistent) however the slot depends on the set. It equals the marginal ``p(a) = E_S[1{a ∈ S} p(a | S)]`` where
    ``p(a | S)`` is the same for all sets with a, such as 1/k for uniform slots, which gives 1/A; otherwise the
    marginal would give weights of less variance, but has no closed form for a policy that compares candidates. Methods
    that need the logging policy itself, as a pmf over all prompts, take an estimate: ``agents.BehaviorCloning``.
    So leave the recorder's ``policy`` out: no policy over all prompts acts here.

    ``op.collect`` and a recorder outside of this wrapper would take slots for prompts: do not use them so.

    Attributes:
        k: number of candidates.

    Args:
        env: an environment of this project; flat observations only without `embeddings`.
        k: from 1 to A.
        embeddings: whether the observation gets the candidates' prompt embeddings, ``candidates`` (k, d_e).

    Raises:
        ConfigError: k out of range, or an environment without a catalogue.
    """

    renames_actions = True
    """Actions are no prompts, also where there are as many; what records must lie inside."""

    def __init__(self, env: gym.Env[Observation, np.int64], k: int, *, embeddings: bool = False) -> None:
        RecordConstructorArgs.__init__(self, k=k, embeddings=embeddings)
        gym.Wrapper.__init__(self, env)
        prompts = getattr(getattr(env.unwrapped, "simulator", None), "prompts", None)
        if not isinstance(prompts, PromptSet) or getattr(env.action_space, "n", None) != len(prompts):
            raise ConfigError(
                f"env: expected an environment of this project whose actions are prompts, got {env}; candidates are "
                "drawn once, and not from excluded prompts"
            )
        check_integer("k", k, 1, len(prompts))
        self.k, self._n_prompts = k, len(prompts)
        self._embeddings = np.ascontiguousarray(prompts.embeddings, dtype=np.float32) if embeddings else None
        self.action_space = spaces.Discrete(k)
        if self._embeddings is not None:
            box = spaces.Box(-np.inf, np.inf, (k, self._embeddings.shape[1]), np.float32)
            self.observation_space = spaces.Dict({**keyed(env.observation_space), "candidates": box})
        self._drawn_from: np.random.Generator | None = None
        self._candidates: IntArray | None = None

    def propensity(self, of_slot: npt.ArrayLike) -> FloatArray:
        """Return ``(k/A) p(a | S)`` for p(a | S), the probability of the chosen slot given the candidates.

        Args:
            of_slot: one number or an array, in (0, 1], or NaN for unknown, which stays NaN.

        Raises:
            PropensityError: not such numbers.
        """
        return check_propensities(of_slot, np.shape(of_slot)) * (self.k / self._n_prompts)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin a round, and draw its candidates."""
        observation, info = self.env.reset(seed=seed, options=options)
        if self.np_random is not self._drawn_from:
            self._drawn_from = self.np_random
            own = self.np_random.bit_generator.seed_seq
            # A sibling of the streams that the environment spawns, which are numbered from zero: spawning one more
            # would move the environment's own.
            key = (*own.spawn_key, _STREAM)  # type: ignore[attr-defined]
            sequence = np.random.SeedSequence(own.entropy, spawn_key=key)  # type: ignore[attr-defined]
            self._rng = np.random.default_rng(sequence)
        self._candidates = self._rng.choice(self._n_prompts, self.k, replace=False)
        return self._with_candidates(observation, self._candidates), {**info, "candidates": self._candidates.copy()}

    def step(self, action: np.int64) -> tuple[Observation, Any, bool, bool, dict[str, Any]]:
        """Play the candidate of a slot.

        Raises:
            ActionError: not a slot; the round stays open.
            ResetNeededError: no round is open.
        """
        if self._candidates is None:
            raise ResetNeededError("step: expected an open round, found none; call reset() first")
        candidates, prompt = self._candidates, self._candidates[self._slot(action)]
        observation, reward, terminated, truncated, info = self.env.step(np.int64(prompt))
        observation = self._with_candidates(observation, candidates)
        return observation, reward, terminated, truncated, {**info, "candidates": candidates.copy()}

    def _slot(self, action: object) -> int:
        array = np.asarray(action)
        if array.size == 1 and array.dtype.kind in "iu" and 0 <= array.item() < self.k:
            return int(array.item())
        raise ActionError(
            f"action: expected a slot, an integer in [0, {self.k}), got {action!r}; slots point to the prompts in "
            'info["candidates"], an action is not a prompt here'
        )

    def _with_candidates(self, observation: Observation, candidates: IntArray) -> Observation:
        if self._embeddings is None:
            return observation
        return {**observation, "candidates": self._embeddings[candidates]}
