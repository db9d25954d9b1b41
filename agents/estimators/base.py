"""What every value estimator is made of.

All of them but :class:`agents.DM`, :class:`agents.SentenceDM` and :class:`agents.Online` are the mean of

    b_i + w_i (r_i − m_i)

with a baseline ``b``, a weight ``w`` made of an importance ratio ``ρ``, and a prediction ``m`` of the reward; the
self-normalised ones divide by the mean of ``w``. A method says what these four are, and :func:`weighted_estimate` does
the rest.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from agents.training import StackedLogs, TrainingWarning
from agents.worlds import Worlds
from offprompts_env.sampling import check_policy
from offprompts_env.simulator import OutputModel
from offprompts_env.types import Array, Estimate, FloatArray, LoggedDataset, Policy

Remarks = tuple[dict[str, float], tuple[str, ...]]
"""Diagnostics, and warnings."""

# What estimates from a reward model alone say.
MODEL_ERROR = "the standard error leaves out the error of the reward model"

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


class OfflineEstimator:
    """Estimates from a log: what it is given is checked here, what it makes of it is its :meth:`_estimate`.

    Attributes:
        asks_generator: whether it asks the generator; one that is given otherwise is not looked at.
        asks_logging_policy: likewise.
    """

    asks_generator: ClassVar[bool] = False
    asks_logging_policy: ClassVar[bool] = False

    def estimate(
        self,
        policy: Policy,
        log: LoggedDataset,
        *,
        generator: OutputModel | None = None,
        logging_policy: Policy | None = None,
        seed: int = 0,
    ) -> Estimate:
        """Estimate ``V(policy)``.

        Args:
            policy: over the log's prompts.
            log: logged rounds, other ones than `policy` was learned from.
            generator: the frozen generator, for estimators that ask it for sentences; others do not look at it.
            logging_policy: what recorded the log, for estimators that use it: where all of it is needed and it is not
                given, it is cloned from the log; otherwise it stands in for propensities that are NaN. The warnings
                say so. Others do not look at it.
            seed: of whatever is fitted or drawn.

        Raises:
            ConfigError: a generator is needed and not given.
            DataError: the policy does not give distributions, or the log is too small for what is fitted to it.
            DimensionError: policy, log, generator, clusters and reward model do not fit.
            NumericalError: the policy, the generator or a reward model gives NaN.
            PropensityError: propensities are needed and unknown, or the logging policy did not record the log.
        """
        check_policy(policy, log.prompts, "the log")
        notes: list[str] = []
        with noted(notes):
            given = Worlds(
                StackedLogs([log]),
                (generator,) if self.asks_generator and generator is not None else None,
                (logging_policy,) if self.asks_logging_policy and logging_policy is not None else None,
                (seed,),
            )
            found = self._estimate(policy, log, given, seed)
        return with_notes(found, log, notes)

    def _estimate(self, policy: Policy, log: LoggedDataset, given: Worlds, seed: int) -> Estimate:
        """Return the estimate with the method's own warnings; what learners and regressions warn of is added to it.

        Args:
            policy: over the log's prompts.
            log: the rounds.
            given: log, seed, and the generator and logging policy that are asked for, where given.
            seed: of whatever is fitted or drawn.
        """
        raise NotImplementedError

    @property
    def _label(self) -> str:
        """What it is called in messages."""
        return f"agents.{type(self).__name__}"


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
    own: Remarks = ({}, ()),
    shown: Remarks = ({}, ()),
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
        own: what the method says of its weights.
        shown: what :func:`support` says of the policy.
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
    described = {"mean_weight": total / n, "max_weight": float(weights.max()), **shown[0], **own[0]}
    rest: dict[str, Any] = {"effective_sample_size": size, "diagnostics": described, "strata": strata}
    if normalised and total == 0:
        found.append("no logged prompt could have been chosen by this policy: its value is unknown")
    messages = (*found, *own[1], *shown[1])
    if normalised:
        base = np.broadcast_to(np.asarray(baseline, dtype=np.float64), weights.shape)
        return Estimate.of_ratio(base, weights * residual, weights, warnings=messages, **rest)
    return Estimate.of_mean(baseline + weights * residual, warnings=messages, **rest)


def _excess(weights: FloatArray) -> float:
    """Return by how much the mean weight is farther from 1 than chance explains; its sign is that of the distance."""
    distance = float(weights.mean()) - 1
    return math.copysign(max(0.0, abs(distance) - 4 * float(weights.std()) / np.sqrt(len(weights)) - 1e-3), distance)


def support(average: FloatArray, log: LoggedDataset, tried: Array | None = None) -> Remarks:
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


def clipped(ratio: FloatArray, weights: FloatArray, clip: float | None) -> Remarks:
    """Return diagnostics and warnings about `weights` that are below their `ratio` because of `clip`."""
    count = int((weights < ratio).sum())
    notes = []
    if count and clip is not None:
        notes.append(f"{count} of {len(ratio)} weights were clipped at {clip:g}: what they stand for counts too little")
    return {"clipped": float(count)}, tuple(notes)


def with_notes(found: Estimate, log: LoggedDataset, notes: Sequence[str]) -> Estimate:
    """Return `found` with `notes` after its warnings, and before them one if all rewards of the log are the same."""
    told = [*found.warnings]
    if len(log) > 1 and np.ptp(log.reward) == 0:
        told.append(
            f"all rewards are {log.reward[0]:g}: the log cannot tell prompts apart, and standard errors say nothing of "
            "prompts that pay differently. Check how rewards were recorded"
        )
    return replace(found, warnings=(*told, *notes))


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


def float64(column: Array) -> FloatArray:
    """Return a column in the precision that estimates are made in."""
    return np.asarray(column, dtype=np.float64)
