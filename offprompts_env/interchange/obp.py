"""Logged datasets from and to the ``bandit_feedback`` of the Open Bandit Pipeline (obp): a dict of arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from offprompts_env.errors import DataError, DimensionError, PropensityError
from offprompts_env.interchange.common import split_observation, warn_dropped
from offprompts_env.types import Array, FloatArray, LoggedDataset, LogMetadata, Oracle, Policy, PromptSet

# The least that obp has in its dict; a missing or empty pscore is an unknown propensity.
_NEEDED = ("n_actions", "context", "action", "reward")


def to_obp(log: LoggedDataset, policy: Policy | None = None) -> dict[str, Any]:
    """Return the log as obp's ``bandit_feedback``.

    That is ``n_rounds``, ``n_actions``, ``context`` [x, q] (n, d_x + d_q), ``action_context`` (the prompt embeddings,
    (A, d_e)), ``action`` (n,), ``position=None``, ``reward`` (n,), ``pscore`` (n,), and with a `policy` also ``pi_b``
    (n, A, 1).

    Args:
        log: the rounds, all with known propensities: obp would take unknown ones for those of a uniform policy, or
            return NaN.
        policy: the logging policy.

    Raises:
        PropensityError: a propensity is unknown, or is not the probability that `policy` gives the recorded action.
        DimensionError: `policy` is over another catalogue.

    Warns:
        UserWarning: what the format cannot hold, once.
    """
    propensity = log.require_propensities("bandit_feedback of obp")
    feedback: dict[str, Any] = {
        "n_rounds": len(log),
        "n_actions": log.n_prompts,
        "context": np.concatenate([log.context, log.query], axis=1),
        "action_context": log.prompts.embeddings.copy(),
        "action": log.action.copy(),
        "position": None,
        "reward": log.reward.astype(np.float64),
        "pscore": propensity.copy(),
    }
    if policy is not None:
        feedback["pi_b"] = _all_probabilities(log, policy)[:, :, None]
    warn_dropped(log, "bandit_feedback of obp", "propensity", "embeddings")
    return feedback


def _all_probabilities(log: LoggedDataset, policy: Policy) -> FloatArray:
    """Return the pmf (n, A) float64 of the policy that recorded `log`; rows sum to one."""
    from offprompts_env.sampling import check_policy, pmf_by_parts

    check_policy(policy, log.prompts, "the log")
    pmf = np.empty((len(log), log.n_prompts))
    for rows, _, part in pmf_by_parts(policy, log.contexts):
        np.divide(part, part.sum(axis=1, dtype=np.float64, keepdims=True), out=pmf[rows])
    chosen = pmf[np.arange(len(log)), log.action]
    wrong = ~np.isclose(chosen, log.propensity, rtol=1e-3, atol=0)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise PropensityError(
            f"policy: expected the one that recorded the log, whose propensity is {log.propensity[row]:.6g} in row "
            f"{row}, got one of probability {chosen[row]:.6g} there; pass the logging policy, or none"
        )
    return pmf


def from_obp(
    feedback: Mapping[str, Any],
    prompts: PromptSet | None = None,
    *,
    context_dim: int | None = None,
    oracle: bool = False,
    metadata: LogMetadata | None = None,
) -> LoggedDataset:
    """Make a log from obp's ``bandit_feedback``, for instance of ``SyntheticBanditDataset``.

    Args:
        feedback: the dict; without ``pscore`` propensities are unknown, NaN.
        prompts: the catalogue; None takes the embeddings in ``action_context``.
        context_dim: how many numbers of ``context`` are the user's, the rest being the query; None takes all.
        oracle: put the entries of ``expected_reward`` (n, A) of the recorded actions into the oracle field.
        metadata: provenance.

    Raises:
        DataError: a key is missing, an array has another shape, or rounds have several positions (slates).
        ActionError: an action is not in the catalogue.
        PropensityError: a ``pscore`` is no probability.
        DimensionError: there is another number of prompts than of actions.
    """
    if not isinstance(feedback, Mapping):
        raise DataError(f"feedback: expected the dict bandit_feedback of obp, got {type(feedback).__name__}")
    if missing := [key for key in _NEEDED if feedback.get(key) is None]:
        raise DataError(f"feedback: expected the keys {', '.join(_NEEDED)}, but {', '.join(missing)} is missing")
    context = _array(feedback, "context", 2)
    n = len(context)
    if feedback.get("n_rounds", n) != n:
        raise DataError(f"feedback: expected n_rounds to be {n}, the rows of context, got {feedback['n_rounds']!r}")
    action = _array(feedback, "action", 1)
    _check_position(feedback.get("position"))
    catalogue = _catalogue(feedback, prompts)
    pscore = np.full(n, np.nan) if feedback.get("pscore") is None else _array(feedback, "pscore", 1)
    first, rest = split_observation(context, context_dim)
    log = LoggedDataset(
        context=first,
        query=rest,
        action=action,
        propensity=pscore,
        reward=_array(feedback, "reward", 1),
        output=np.empty((n, 0), dtype=np.float32),
        prompts=catalogue,
        metadata=metadata if metadata is not None else LogMetadata(),
    )
    return _with_oracle(log, feedback) if oracle else log


def _with_oracle(log: LoggedDataset, feedback: Mapping[str, Any]) -> LoggedDataset:
    from dataclasses import replace

    expected = _array(feedback, "expected_reward", 2)
    if expected.shape != (len(log), log.n_prompts):
        raise DataError(
            f"expected_reward: expected shape ({len(log)}, {log.n_prompts}), one a round and action, got "
            f"{expected.shape}; pass oracle=False to do without"
        )
    return replace(log, oracle=Oracle(expected[np.arange(len(log)), log.action]))


def _array(feedback: Mapping[str, Any], key: str, ndim: int) -> Array:
    array = np.asarray(feedback.get(key))
    if array.ndim != ndim or array.dtype.kind not in "iufb":
        raise DataError(
            f"{key}: expected an array of numbers with {ndim} dimension{'s' * (ndim > 1)}, got "
            f"{type(feedback.get(key)).__name__} of shape {array.shape} and dtype {array.dtype}"
        )
    return array


def _check_position(position: Any) -> None:
    """Raise :class:`DataError` for slates; one position for all rounds says nothing."""
    if position is None:
        return
    slots = np.unique(np.asarray(position))
    if len(slots) > 1:
        raise DataError(
            f"position: expected one for all rounds, got {len(slots)}; a round here shows one prompt, so select the "
            "rounds of one position first"
        )


def _catalogue(feedback: Mapping[str, Any], prompts: PromptSet | None) -> PromptSet:
    n_actions = feedback["n_actions"]
    if prompts is None:
        if feedback.get("action_context") is None:
            raise DataError("prompts: expected a PromptSet, as the feedback has no action_context; pass prompts=")
        prompts = PromptSet(_array(feedback, "action_context", 2))
    if len(prompts) != n_actions:
        raise DimensionError(f"prompts: expected {n_actions} as n_actions says, got {len(prompts)}")
    return prompts
