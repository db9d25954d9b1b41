"""Lepski's principle for estimators: the least variable one that still agrees with all the less biased ones.

Sources: Su, Srinath, Krishnamurthy, "Adaptive Estimator Selection for Off-Policy Evaluation", ICML 2020 (SLOPE);
Tucker, Lee, "Improved Estimator Selection for Off-Policy Evaluation", 2021 (SLOPE++).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from agents.estimators.base import Estimator
from agents.tuning.record import Tuning, names_of
from offprompts_env.errors import DataError
from offprompts_env.simulator import OutputModel
from offprompts_env.types import FloatArray, LoggedDataset, Policy

Criterion = Callable[[FloatArray, FloatArray], int]
"""``(values (C,), half-widths of their intervals (C,), widest first) -> index of the chosen one``."""


def overlap(values: FloatArray, widths: FloatArray) -> int:
    """SLOPE: the last i for which the intervals ``value ± 2 width`` of all j ≤ i have a point in common."""
    low = np.maximum.accumulate(values - 2 * widths)
    high = np.minimum.accumulate(values + 2 * widths)
    return int(np.flatnonzero(np.logical_and.accumulate(low <= high))[-1])


def agreement(values: FloatArray, widths: FloatArray) -> int:
    """SLOPE++: the last i up to which ``|value_i − value_j| ≤ width_i + (√6 − 1) width_j`` for all j < i."""
    factor = np.sqrt(6) - 1
    chosen = 0
    for i in range(1, len(values)):
        if (np.abs(values[:i] - values[i]) > widths[i] + factor * widths[:i]).any():
            break
        chosen = i
    return chosen


def slope(
    estimators: Sequence[Estimator],
    policy: Policy,
    log: LoggedDataset,
    *,
    generator: OutputModel | None = None,
    logging_policy: Policy | None = None,
    seed: int = 0,
    criterion: Criterion = agreement,
) -> Tuning[Estimator]:
    """Choose among estimators of one policy's value: clips, shrinkages, kernel bandwidths, or methods.

    They are ordered by the width of their intervals, widest first: the method supposes that bias grows as the width
    shrinks, as it does along a grid of clips or bandwidths. The error of the chosen one is then within a constant of
    that of the best candidate, with the confidence of the intervals. An interval that leaves something out, as that of
    :class:`agents.DM` does the error of its model, makes its estimator look better than it is only where it agrees with
    the others.

    Args:
        estimators: the candidates.
        policy: whose value is estimated.
        log: logged rounds.
        generator: for estimators that are defined with it.
        logging_policy: for estimators that are defined with it.
        seed: of whatever the estimators fit or draw.
        criterion: :func:`agreement` or :func:`overlap`.

    Raises:
        ConfigError: no candidate.
        DataError: an estimate has no interval.
    """
    names = names_of(estimators)
    found = [
        estimator.estimate(policy, log, generator=generator, logging_policy=logging_policy, seed=seed)
        for estimator in estimators
    ]
    widths = np.array([(estimate.interval[1] - estimate.interval[0]) / 2 for estimate in found])
    values = np.array([estimate.value for estimate in found])
    if not (np.isfinite(widths).all() and np.isfinite(values).all()):
        worst = int(np.argmin(np.isfinite(widths) & np.isfinite(values)))
        raise DataError(
            f"SLOPE: expected estimates with an interval, got {found[worst]} from {names[worst]} on {len(log)} rounds; "
            "record more rounds or leave this estimator out"
        )
    order = np.argsort(-widths, kind="stable")
    index = criterion(values[order], widths[order])
    return Tuning(
        method=f"SLOPE ({criterion.__name__}), widest interval first",
        candidates=tuple(estimators[i] for i in order),
        names=tuple(names[i] for i in order),
        estimates=tuple(found[i] for i in order),
        columns={"half-width": widths[order]},
        index=index,
        rounds=len(log),
        seed=seed,
        warnings=found[order[index]].warnings,
    )
