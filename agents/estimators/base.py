"""What every value estimator is made of.

All of them but :class:`agents.DM` and :class:`agents.Online` are the mean of

    b_i + w_i (r_i − m_i)

with a baseline ``b``, a weight ``w`` made of an importance ratio ``ρ``, and a prediction ``m`` of the reward; the
self-normalised ones divide by the mean of ``w``. A method says what these four are, and :func:`weighted_estimate` does
the rest.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import numpy as np

from agents.training import StackedLogs, TrainingWarning
from agents.worlds import Worlds
from offprompts_env.simulator import OutputModel
from offprompts_env.types import Array, Estimate, FloatArray, LoggedDataset, Policy

# Share of a policy's choices that fall on prompts without a single logged round, above which an estimate says so.
_UNSUPPORTED = 0.05


@runtime_checkable
class Estimator(Protocol):
    """What estimates a policy's value from a log."""

    def estimate(
        self,
        policy: Policy,
        log: LoggedDataset,
        *,
        generator: OutputModel | None = None,
        logging_policy: Policy | None = None,
        seed: int = 0,
    ) -> Estimate:
        """Estimate ``V(policy)``; `generator` and `logging_policy` are for estimators that are defined with them."""
        ...


def weighted_estimate(
    ratio: FloatArray,
    weights: FloatArray,
    residual: FloatArray,
    baseline: FloatArray | float = 0.0,
    *,
    normalised: bool = False,
    strata: tuple[int, ...] | None = None,
    remedy: str,
    doubt: str,
    notes: tuple[str, ...] = (),
    diagnostics: Mapping[str, float] | None = None,
) -> Estimate:
    """Return the mean of ``baseline + weights · residual``, columns (n,), with what can be said of the weights.

    Args:
        ratio: importance ratios; they average to 1 where the log supports the policy.
        weights: what is made of them, in expectation not more than 1 on average.
        residual: rewards less their predictions.
        baseline: what is added in every round.
        normalised: divide the weighted residuals by the mean weight rather than by 1.
        strata: numbers of rounds that were recorded apart.
        remedy: what to do about a small effective sample size.
        doubt: what it means if the ratios do not average to 1.
        notes: further warnings.
        diagnostics: further diagnostics.
    """
    n, total = len(weights), float(weights.sum())
    size = total**2 / float(np.square(weights).sum()) if total > 0 else 0.0
    found = []
    if size < 30:
        found.append(f"effective sample size {size:.1f} of {n} rounds: the log says little about this policy; {remedy}")
    # Propensities and policies are often float32: a tiny deviation is rounding.
    # Shrinking only lowers weights, so shrunk ones that average above 1 say all the more.
    above, below = _excess(weights), -_excess(ratio)
    if above > 0 or below > 0:
        average = (weights if above > 0 else ratio).mean()
        found.append(f"weights average {average:.3f} instead of 1: {doubt}")
    described = {"mean_weight": total / n, "max_weight": float(weights.max()), **(diagnostics or {})}
    rest: dict[str, Any] = {"effective_sample_size": size, "diagnostics": described, "strata": strata}
    if normalised and total == 0:
        found.append("no logged prompt could have been chosen by this policy: its value is unknown")
    messages = (*found, *notes)
    if normalised:
        base = np.broadcast_to(np.asarray(baseline, dtype=np.float64), weights.shape)
        return Estimate.of_ratio(base, weights * residual, weights, warnings=messages, **rest)
    return Estimate.of_mean(baseline + weights * residual, warnings=messages, **rest)


def _excess(weights: FloatArray) -> float:
    """Return by how much the mean weight is farther from 1 than chance explains; its sign is that of the distance."""
    distance = float(weights.mean()) - 1
    return math.copysign(max(0.0, abs(distance) - 4 * float(weights.std()) / np.sqrt(len(weights)) - 1e-3), distance)


def support(
    average: FloatArray, log: LoggedDataset, tried: Array | None = None
) -> tuple[dict[str, float], tuple[str, ...]]:
    """Return diagnostics and warnings about prompts that the log never shows.

    Args:
        average: how often the policy chooses each prompt, (A,).
        log: the rounds.
        tried: prompts that count as shown (A,), where it is not those that were logged.
    """
    unseen = np.bincount(log.action, minlength=log.n_prompts) == 0 if tried is None else ~tried
    prompts, share = int((average[unseen] > 0).sum()), float(average[unseen].sum())
    notes = []
    if share > _UNSUPPORTED:
        notes.append(
            f"{share:.1%} of the policy's choices are of {prompts} prompts that the log never shows; what they pay is "
            "left out or extrapolated. Record more rounds, or log with a policy that tries them"
        )
    return {"unsupported_prompts": float(prompts), "unsupported_share": share}, tuple(notes)


def clipped(ratio: FloatArray, weights: FloatArray, clip: float | None) -> tuple[dict[str, float], tuple[str, ...]]:
    """Return diagnostics and warnings about `weights` that are below their `ratio` because of `clip`."""
    count = int((weights < ratio).sum())
    notes = []
    if count and clip is not None:
        notes.append(f"{count} of {len(ratio)} weights were clipped at {clip:g}: what they stand for counts too little")
    return {"clipped": float(count)}, tuple(notes)


def constant_rewards(reward: FloatArray) -> tuple[str, ...]:
    """Return a warning if all rewards (n,) of more than one round are the same."""
    if len(reward) < 2 or np.ptp(reward) > 0:
        return ()
    return (
        f"all rewards are {reward[0]:g}: the log cannot tell prompts apart, and standard errors say nothing of prompts "
        "that pay differently. Check how rewards were recorded",
    )


@contextmanager
def noted(notes: list[str]) -> Iterator[None]:
    """Turn what learners and regressions warn of into `notes`: an estimate carries its warnings with it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TrainingWarning)
        yield
    for warning in caught:
        if issubclass(warning.category, TrainingWarning):
            notes.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def one_world(log: LoggedDataset, generator: OutputModel | None, logging_policy: Policy | None, seed: int) -> Worlds:
    """Return what an estimator is given, checked as for a learner."""
    return Worlds(
        StackedLogs([log]),
        None if generator is None else (generator,),
        None if logging_policy is None else (logging_policy,),
        (seed,),
    )


def float64(column: Array) -> FloatArray:
    """Return a column in the precision that estimates are made in."""
    return np.asarray(column, dtype=np.float64)
