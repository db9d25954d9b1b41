"""Logged datasets from and to d3rlpy's offline reinforcement learning: every round is an episode of one step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from offprompts_env.errors import ActionError, DataError, missing_dependency
from offprompts_env.interchange.common import split_observation, warn_dropped
from offprompts_env.types import Array, LoggedDataset, LogMetadata, PromptSet

if TYPE_CHECKING:
    from d3rlpy.dataset import MDPDataset, ReplayBufferBase


def to_d3rlpy(log: LoggedDataset) -> MDPDataset:
    """Return the log as an ``MDPDataset`` with flat observations [x, q], discrete actions and terminals of 1.

    Learn with ``gamma=0.0``, for instance ``DiscreteCQLConfig(gamma=0.0).create().fit(dataset, n_steps=...)``. d3rlpy
    makes an object of every episode, which sets the speed of this.

    Raises:
        DataError: the log has neither context nor query.

    Warns:
        UserWarning: what the format cannot hold, once.
    """
    try:
        from d3rlpy.constants import ActionSpace
        from d3rlpy.dataset import MDPDataset
    except ImportError as error:
        raise missing_dependency("d3rlpy", "d3rlpy", "exporting an MDPDataset") from error

    observations = np.concatenate([log.context, log.query], axis=1)
    if observations.shape[1] == 0:
        raise DataError("log: expected a context or query of at least one number, got none; d3rlpy needs observations")
    warn_dropped(log, "d3rlpy's MDPDataset")
    return MDPDataset(
        observations=observations,
        actions=log.action[:, None],
        rewards=log.reward[:, None],
        terminals=np.ones(len(log), dtype=np.float32),
        action_space=ActionSpace.DISCRETE,
        action_size=log.n_prompts,
    )


def from_d3rlpy(
    dataset: ReplayBufferBase,
    prompts: PromptSet,
    *,
    context_dim: int | None = None,
    metadata: LogMetadata | None = None,
) -> LoggedDataset:
    """Make a log of one-step episodes; propensities are unknown, NaN, and there are no outputs (d_o = 0).

    A round that ended by a time limit is not there: d3rlpy drops one-step episodes that are truncated, without a word.

    Args:
        dataset: an ``MDPDataset`` or another replay buffer of d3rlpy.
        prompts: the catalogue that its actions index.
        context_dim: how many numbers of an observation are the context, the rest being the query; None takes all.
        metadata: provenance.

    Raises:
        DataError: an episode is longer than one step, or an observation is no vector.
        DimensionError: observations have fewer than `context_dim` numbers.
        ActionError: actions are not those of the catalogue.
    """
    episodes = getattr(dataset, "episodes", None)
    if episodes is None:
        raise DataError(
            f"dataset: expected an MDPDataset or another replay buffer of d3rlpy, got {type(dataset).__name__}"
        )
    if len(episodes) == 0:
        raise DataError("dataset: expected at least one episode, got none")
    # Episodes are objects of their own: d3rlpy has no arrays of all rounds.
    for index, episode in enumerate(episodes):
        if len(episode.rewards) != 1:
            raise DataError(
                f"dataset: expected episodes of one step, got one of {len(episode.rewards)} steps at position {index}; "
                "set a terminal of 1 after each round"
            )
    observations = _stack(episodes, "observations")
    if observations.ndim != 2:
        raise DataError(f"observations: expected vectors, got shape {observations.shape[1:]} a round; flatten them")
    actions, rewards = _stack(episodes, "actions"), _stack(episodes, "rewards")
    for name, column in (("actions", actions), ("rewards", rewards)):
        if column.shape != (len(episodes), 1):
            raise DataError(f"{name}: expected one number a round, got shape {column.shape[1:]}")
    if not np.issubdtype(actions.dtype, np.integer):
        raise ActionError(
            f"actions: expected discrete ones, integers in [0, {len(prompts)}), got dtype {actions.dtype}"
        )
    context, query = split_observation(observations, context_dim)
    return LoggedDataset(
        context=context,
        query=query,
        action=actions[:, 0],
        propensity=np.full(len(episodes), np.nan),
        reward=rewards[:, 0],
        output=np.empty((len(episodes), 0), dtype=np.float32),
        prompts=prompts,
        metadata=metadata if metadata is not None else LogMetadata(),
    )


def _stack(episodes: Any, name: str) -> Array:
    try:
        return np.concatenate([getattr(episode, name) for episode in episodes])
    except ValueError as error:
        raise DataError(f"{name}: expected arrays of one shape in all episodes: {error}") from error
