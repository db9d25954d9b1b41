"""What every value estimator is made of."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np

from agents.learners.base import Worlds
from agents.training import StackedLogs
from offprompts_env.simulator import OutputModel
from offprompts_env.types import Estimate, FloatArray, LoggedDataset, Policy


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
    weights: FloatArray, terms: FloatArray, clip: float | None, clipped: int, *, remedy: str, doubt: str
) -> Estimate:
    """Return the mean of `terms` with diagnostics of the `weights` behind them, (n,) each.

    Args:
        weights: importance weights, after clipping; unclipped ones average to 1 where the log supports the policy.
        terms: what is averaged.
        clip: the bound, if any.
        clipped: how many weights it cut.
        remedy: what to do about a small effective sample size.
        doubt: what it means if the weights do not average to 1.
    """
    n, total = len(weights), float(weights.sum())
    size = total**2 / float(np.square(weights).sum()) if total > 0 else 0.0
    mean, spread = total / n, float(weights.std() / np.sqrt(n))
    notes = []
    if size < 30:
        notes.append(f"effective sample size {size:.1f} of {n} rounds: the log says little about this policy; {remedy}")
    # Propensities and policies are often float32: a tiny deviation is rounding.
    # Clipping only lowers weights, so a clipped mean below 1 says nothing more, and one above 1 all the more.
    if mean - 1 > 4 * spread + 1e-3 or (1 - mean > 4 * spread + 1e-3 and not clipped):
        notes.append(f"weights average {mean:.3f} instead of 1: {doubt}")
    if clipped:
        notes.append(f"{clipped} of {n} weights were clipped at {clip:g}: what they stand for counts too little")
    diagnostics = {"mean_weight": mean, "max_weight": float(weights.max()), "clipped": float(clipped)}
    return Estimate.of_mean(terms, effective_sample_size=size, diagnostics=diagnostics, warnings=tuple(notes))


def one_world(log: LoggedDataset, generator: OutputModel | None, logging_policy: Policy | None, seed: int) -> Worlds:
    """Return what an estimator is given, checked as for a learner."""
    return Worlds(
        StackedLogs([log]),
        None if generator is None else (generator,),
        None if logging_policy is None else (logging_policy,),
        (seed,),
    )
