"""What rewards look like: their spread, their kind, their tails, and whether they drift."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from offprompts_env.types import Array, FloatArray

Kind = Literal["constant", "binary", "discrete", "continuous"]

LEVELS = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
"""Of the quantiles."""

# Up to this many different values are a scale, such as stars or counts.
_DISCRETE = 20
# The top of the tails: one round in a thousand.
_TOP = 1_000


@dataclass(frozen=True, slots=True)
class Rewards:
    """A summary of the rewards.

    Attributes:
        mean, standard_error, deviation, minimum, maximum: of all rounds; the mean is the logging policy's value.
        quantiles: at :data:`LEVELS`.
        distinct: number of different values.
        kind: what they look like.
        top_share: share of the variance that is due to the one round in a thousand farthest from the mean (0.013 of
            normal rewards); NaN below a thousand rounds.
        drift: mean of the second half less that of the first.
        drift_z: the same in standard errors.
    """

    mean: float
    standard_error: float
    deviation: float
    minimum: float
    maximum: float
    quantiles: tuple[float, ...]
    distinct: int
    kind: Kind
    top_share: float
    drift: float
    drift_z: float


def rewards(reward: FloatArray) -> Rewards:
    """Summarise `reward`, (n,)."""
    values = np.asarray(reward, dtype=np.float64)
    n, mean, deviation = len(values), float(values.mean()), float(values.std())
    distinct = count_distinct(values)
    drift, drift_z = _drift(values)
    return Rewards(
        mean=mean,
        standard_error=deviation / math.sqrt(n),
        deviation=deviation,
        minimum=float(values.min()),
        maximum=float(values.max()),
        quantiles=tuple(float(value) for value in np.quantile(values, LEVELS)),
        distinct=distinct,
        kind=_kind(distinct),
        top_share=_top_share(values - mean),
        drift=drift,
        drift_z=drift_z,
    )


def _kind(distinct: int) -> Kind:
    if distinct <= 2:
        return "constant" if distinct == 1 else "binary"
    return "discrete" if distinct <= _DISCRETE else "continuous"


def _top_share(centred: FloatArray) -> float:
    count, squares = len(centred) // _TOP, centred**2
    if count == 0 or not squares.any():
        return math.nan
    return float(np.partition(squares, -count)[-count:].sum() / squares.sum())


def _drift(values: FloatArray) -> tuple[float, float]:
    half = len(values) // 2
    if half < 2:
        return math.nan, math.nan
    first, second = values[:half], values[half:]
    difference = float(second.mean() - first.mean())
    error = math.sqrt(first.var(ddof=1) / len(first) + second.var(ddof=1) / len(second))
    if error == 0:
        return difference, 0.0 if difference == 0 else math.copysign(math.inf, difference)
    return difference, difference / error


def count_distinct(values: Array) -> int:
    """Return the number of different values of a column, (n,)."""
    # NumPy's own way hashes, which takes ten times as long for a million different numbers.
    ordered = np.sort(values)
    return 1 + int(np.count_nonzero(ordered[1:] != ordered[:-1]))
