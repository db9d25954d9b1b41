"""A policy of this package as a model of Stable-Baselines3: an object with ``predict``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from offprompts_env.config import check_integer, check_kind
from offprompts_env.errors import DataError
from offprompts_env.rng import stream
from offprompts_env.sampling import check_policy, pmf_by_parts, sample_actions
from offprompts_env.types import Contexts, FloatArray, IntArray, Policy, PromptSet

State = tuple[Any, ...]


class Predictor:
    """Gives a policy the ``predict`` of Stable-Baselines3, for code that takes its models.

        from stable_baselines3.common.evaluation import evaluate_policy
        evaluate_policy(agents.Predictor(policy), env, n_eval_episodes=1_000, deterministic=False)

    Args:
        policy: any policy.
        prompts: the catalogue that it is to act on, for a check; of an environment ``env.unwrapped.simulator.prompts``.
        context_dim: d_x, for flat observations ``[x, q]``; ``FlatObservation`` has it as an attribute.
        seed: names the draws, one after the other as `predict` is called.

    Raises:
        ConfigError: not a policy, or a wrong argument.
        DimensionError: a policy over another catalogue.
    """

    def __init__(
        self, policy: Policy, *, prompts: PromptSet | None = None, context_dim: int | None = None, seed: int = 0
    ) -> None:
        check_kind("policy", policy, Policy, "pass a policy, for instance agents.UniformPolicy(n_prompts)")
        check_integer("seed", seed, 0)
        if prompts is not None:
            check_policy(policy, prompts, "prompts")
        if context_dim is not None:
            check_integer("context_dim", context_dim, 0)
        self.policy, self._context_dim = policy, context_dim
        self._rng = stream(seed, "predictor")

    def predict(
        self,
        observation: FloatArray | Mapping[str, Any],
        state: State | None = None,
        episode_start: npt.ArrayLike | None = None,
        deterministic: bool = False,
    ) -> tuple[IntArray, State | None]:
        """Return prompts for what an environment shows.

        Args:
            observation: with the keys ``context`` and ``query``, or flat; of one round, or of a batch.
            state: returned as it is; a policy of single rounds has none.
            episode_start: does not matter either.
            deterministic: take the most probable prompt, the first of equal ones, instead of drawing. That is another
                policy: of a uniform one always prompt 0.

        Returns:
            Prompts, (n,) int64 of a batch and () of one round, and `state`.

        Raises:
            DataError: an observation of another shape.
            DimensionError: of other dimensions than the policy knows.
        """
        contexts, single = self._contexts(observation)
        if deterministic:
            actions = np.empty(len(contexts), dtype=np.int64)
            for rows, _, pmf in pmf_by_parts(self.policy, contexts):
                actions[rows] = pmf.argmax(axis=1)
        else:
            actions = np.asarray(sample_actions(self.policy, contexts, self._rng)[0])
        return (actions[0:1].reshape(()) if single else actions), state

    def _contexts(self, observation: Any) -> tuple[Contexts, bool]:
        if isinstance(observation, Mapping):
            # What describes a round may lie in the observation, as after TextObservation.
            return Contexts.of(observation, observation), np.ndim(observation["context"]) == 1
        try:
            flat = np.asarray(observation, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"observation: expected a dict or a flat array of numbers, got {type(observation).__name__}"
            ) from error
        if self._context_dim is None or flat.ndim not in (1, 2) or flat.shape[-1] < self._context_dim:
            raise DataError(
                f"observation: expected a dict with 'context' and 'query', or flat (d_x + d_q,) or (n, d_x + d_q) "
                f"with context_dim=d_x given, got shape {flat.shape} and context_dim={self._context_dim}"
            )
        rows = np.atleast_2d(flat)
        return Contexts(rows[:, : self._context_dim], rows[:, self._context_dim :]), flat.ndim == 1
