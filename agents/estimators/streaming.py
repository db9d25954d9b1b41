"""Value estimates from a log that is larger than memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any

import numpy as np

from agents.estimators.base import Estimator, noted
from agents.learners.base import OfflineLearner
from agents.streaming import settled, without_numbers
from agents.worlds import assume_cloned
from offprompts_env.errors import DataError
from offprompts_env.rng import integer_seed
from offprompts_env.simulator import OutputModel
from offprompts_env.streaming import LogStream
from offprompts_env.types import Estimate, FloatArray, Policy


def estimate_stream(
    estimator: Estimator,
    policy: Policy,
    log: LogStream,
    *,
    generator: OutputModel | None = None,
    logging_policy: Policy | None = None,
    seed: int = 0,
) -> Estimate:
    """Estimate ``V(policy)`` window by window; a log of a single window gives what the estimator gives for it.

    Means, and the two means of a self-normalised estimate, are those over all rounds, with their standard error; so are
    the effective sample size and the mean weight. A reward model and a clone of the logging policy are fitted to the
    whole log once, without cross-fitting: so many rounds leave a model little room for the noise of each. What else an
    estimator takes from the log (a baseline, a bound that depends on n) it takes from each window. Of diagnostics,
    counts of clipped weights add up, the largest weight is the largest, and others are averaged; a warning is given
    once, with the number of windows it came from.

    Args:
        estimator: any.
        policy: as for the estimator.
        log: on disk.
        generator: as for the estimator.
        logging_policy: as for the estimator.
        seed: as for the estimator.

    Returns:
        An estimate with one term a window instead of one a round: they average to the value. Differences of two
        policies over the same windows come from them.

    Raises:
        DataError: the log has no rows, and what the estimator raises.
    """
    given = {"generator": generator, "logging_policy": logging_policy}
    if log.n_windows == 1:
        return estimator.estimate(policy, log.load(), **given, seed=seed)  # type: ignore[arg-type]
    notes: list[str] = []
    if is_dataclass(estimator) and not isinstance(estimator, type):
        cloning = getattr(estimator, "cloning", None)
        with noted(notes):
            if logging_policy is None and isinstance(cloning, OfflineLearner):
                given["logging_policy"] = cloning.fit(log, seed=seed)
                assume_cloned(f"agents.{type(estimator).__name__}", cloning)
            estimator = settled(estimator, log, seed)
    total = _Total()
    for index, window in enumerate(log.windows()):
        own = integer_seed(seed, "window", index)
        total.add(estimator.estimate(policy, window, **given, seed=own), len(window))  # type: ignore[arg-type]
    found = total.estimate()
    return replace(found, warnings=(*found.warnings, *notes))


@dataclass
class _Total:
    """Sums over windows. Columns are the terms, or the b, u, v of ``mean(b) + mean(u) / mean(v)``."""

    rounds: list[int] = field(default_factory=list)
    means: list[FloatArray] = field(default_factory=list)
    scatter: list[FloatArray] = field(default_factory=list)
    weights: list[tuple[float, float]] = field(default_factory=list)
    diagnostics: list[Mapping[str, float]] = field(default_factory=list)
    warnings: dict[str, tuple[str, int]] = field(default_factory=dict)
    confidence: float = 0.95

    def add(self, estimate: Estimate, rounds: int) -> None:
        columns = np.stack([estimate.terms] if estimate.ratio is None else estimate.ratio)
        mean = columns.mean(axis=1)
        centred = columns - mean[:, None]
        self.rounds.append(rounds)
        self.means.append(mean)
        self.scatter.append(centred @ centred.T)
        # Of unweighted rounds each weighs 1.
        weight = rounds * estimate.diagnostics.get("mean_weight", 1.0)
        size = estimate.effective_sample_size
        self.weights.append((weight, weight**2 / size if size > 0 else 0.0))
        self.diagnostics.append(estimate.diagnostics)
        for message in estimate.warnings:
            first, count = self.warnings.get(key := without_numbers(message), (message, 0))
            self.warnings[key] = first, count + 1
        self.confidence = estimate.confidence

    def estimate(self) -> Estimate:
        if not self.rounds:
            raise DataError("estimate: expected at least one round, got none")
        rounds, means = np.array(self.rounds, dtype=np.float64), np.array(self.means)
        n, share = rounds.sum(), rounds / rounds.sum()
        mean = share @ means
        apart = (means - mean) * np.sqrt(rounds)[:, None]
        covariance = (np.sum(self.scatter, axis=0) + apart.T @ apart) / (n - 1)
        value, slope = float(mean[0]), np.ones(1)
        if len(mean) == 3:
            scale = mean[2] if mean[2] != 0 else math.nan
            value, slope = float(mean[0] + mean[1] / scale), np.array([1, 1 / scale, -mean[1] / scale**2])
        weight, squares = (sum(part) for part in zip(*self.weights, strict=True))
        return Estimate(
            value=value,
            standard_error=float(np.sqrt(slope @ covariance @ slope / n)),
            terms=value + len(rounds) * share * ((means - mean) @ slope),
            effective_sample_size=weight**2 / squares if squares > 0 else 0.0,
            confidence=self.confidence,
            diagnostics=self._diagnostics(share),
            warnings=tuple(f"{first} (in {count} of {len(rounds)} windows)" for first, count in self.warnings.values()),
        )

    def _diagnostics(self, share: FloatArray) -> dict[str, float]:
        def of(name: str) -> float:
            values = [window.get(name, 0.0) for window in self.diagnostics]
            if name == "clipped":
                return float(sum(values))
            return max(values) if name.startswith("max_") else float(share @ np.array(values))

        names: dict[str, Any] = dict.fromkeys(name for window in self.diagnostics for name in window)
        return {name: of(name) for name in names}
