"""Means of a result set with their intervals, from rows alone: one summary for each sweep, point and learner."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from scipy import stats

from benchmarks.rows import ResultsWarning, Row
from offprompts_env.errors import DataError

LEVEL = 0.95
"""Of all intervals and bands."""

K = TypeVar("K")
T = TypeVar("T")


@dataclass(frozen=True)
class Interval:
    """A number with its 95% interval, whose ends are NaN where there is but one world."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Summary:
    """What a learner reached at a point.

    Attributes:
        sweep: of the rows.
        point: name.
        x: on the axis.
        learner: name.
        scores: one a world, the mean over its learning seeds.
        runs: rows with a finite score.
        mean: over worlds, in the unit of :attr:`benchmarks.rows.Row.score`, with Student's 95% interval.
        standard_error: of the mean, over worlds; NaN with one.
    """

    sweep: str
    point: str
    x: float
    learner: str
    scores: tuple[float, ...]
    runs: int
    mean: Interval
    standard_error: float

    @property
    def worlds(self) -> int:
        """Number of worlds with a score."""
        return len(self.scores)


def comparable(rows: Iterable[Row]) -> list[Row]:
    """Return the rows that may stand in one figure: at each point those of the setting that finished last.

    A folder may hold rows of a quick sweep beside those of a full one, which must not be averaged.
    A :class:`benchmarks.rows.ResultsWarning` says how many are left out.
    """
    held = list(rows)
    latest: dict[tuple[str, str], Row] = {}
    methods: dict[tuple[str, str, str], Row] = {}
    for row in sorted(held, key=lambda row: row.finished):
        latest[row.sweep, row.point] = row
        methods[row.sweep, row.point, row.learner] = row
    kept = [
        row
        for row in held
        if _setting(row) == _setting(latest[row.sweep, row.point])
        and row.config == methods[row.sweep, row.point, row.learner].config
    ]
    if len(kept) < len(held):
        warnings.warn(
            f"{len(held) - len(kept)} rows have another setting than the newest of their point (a quick sweep beside a "
            "full one?) and are left out; run the sweep again to replace them",
            ResultsWarning,
            stacklevel=2,
        )
    return kept


def _setting(row: Row) -> str:
    return row.config.split("; ")[0]


def grouped(rows: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Return rows, or what is made of them, by `key`, groups in the order of their first row."""
    groups: dict[K, list[T]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def in_order(rows: Iterable[Row]) -> list[Row]:
    """Return rows by sweep, then by place on the axis, names with numbers in the order of these; then by learner."""

    def place(row: Row) -> tuple[object, ...]:
        x = row.x if np.isfinite(row.x) else np.inf
        parts = tuple((float(p), "") if p[:1].isdigit() else (np.inf, p) for p in re.split(r"(\d+\.?\d*)", row.point))
        return row.sweep, x, parts, row.learner, row.world, row.seed

    return sorted(rows, key=place)


def compared(rows: Iterable[Row]) -> bool:
    """Return whether some point has two learners; where each has points of its own, such as budgets, none is better."""
    return any(len({row.learner for row in own}) > 1 for own in grouped(rows, lambda row: row.point).values())


def over_worlds(rows: Iterable[Row], number: Callable[[Row], float] = lambda row: row.score) -> dict[int, float]:
    """Return world to the mean over its learning seeds of `number` (default: the score); what is not finite is out."""
    found: dict[int, list[float]] = {}
    for row in rows:
        value = number(row)
        if np.isfinite(value):
            found.setdefault(row.world, []).append(value)
    return {world: float(np.mean(values)) for world, values in sorted(found.items())}


def mean_interval(scores: Sequence[float]) -> Interval:
    """Return the mean of independent scores with Student's 95% interval.

    Raises:
        DataError: there are none.
    """
    if len(scores) == 0:
        raise DataError("expected at least one finite score, got none; run the sweep again")
    mean = float(np.mean(scores))
    half = standard_error(scores) * float(stats.t.ppf((1 + LEVEL) / 2, max(len(scores) - 1, 1)))
    return Interval(mean, mean - half, mean + half)


def standard_error(scores: Sequence[float]) -> float:
    """Return the standard error of the mean of independent scores; NaN if there are fewer than two."""
    return float(np.std(scores, ddof=1) / np.sqrt(len(scores))) if len(scores) > 1 else float("nan")


def summaries(rows: Iterable[Row]) -> list[Summary]:
    """Return one summary for each sweep, point and learner with a finite score, sweeps and points in order."""
    found = []
    for (sweep, point, learner), own in grouped(
        in_order(rows), lambda row: (row.sweep, row.point, row.learner)
    ).items():
        scores = tuple(over_worlds(own).values())
        if scores:
            runs = sum(np.isfinite(row.score) for row in own)
            mean = mean_interval(scores)
            found.append(Summary(sweep, point, own[0].x, learner, scores, int(runs), mean, standard_error(scores)))
    return found


def optimality(row: Row) -> float:
    """Return ``(V(π) − V(uniform)) / (V(oracle) − V(uniform))``; NaN where the row does not name both values."""
    low, high = (row.result.references.get(name, np.nan) for name in ("uniform", "oracle"))
    return (row.result.value - low) / (high - low) if high > low else float("nan")
