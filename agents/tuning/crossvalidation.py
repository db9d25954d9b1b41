"""Cross-validation on a log: of learners by held-out estimates of their policies, of estimators by held-out error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from agents.estimators.base import Estimator
from agents.estimators.weighting import IS
from agents.learners.base import Learner
from agents.tuning.record import Tuning, distinct, names_of
from offprompts_env.config import check_integer
from offprompts_env.errors import DataError
from offprompts_env.rng import stream
from offprompts_env.simulator import OutputModel
from offprompts_env.types import Estimate, FloatArray, IntArray, LoggedDataset, Policy

_LABEL = "cross-validation"


def split(n: int, folds: int, seed: int) -> list[IntArray]:
    """Return the rows of each of `folds` random parts of n rounds, sorted; sizes differ by at most one.

    Raises:
        ConfigError: fewer than two folds.
        DataError: fewer than two rounds a fold.
    """
    check_integer("folds", folds, 2)
    if n < 2 * folds:
        raise DataError(
            f"{_LABEL}: expected at least two rounds in each of {folds} folds, got {n} rounds; "
            "record more rounds or use fewer folds"
        )
    rows = stream(seed, _LABEL, "folds").permutation(n)
    return [np.sort(part) for part in np.array_split(rows, folds)]


def cross_validate(
    learners: Sequence[Learner],
    log: LoggedDataset,
    *,
    estimator: Estimator | None = None,
    folds: int = 5,
    generator: OutputModel | None = None,
    logging_policy: Policy | None = None,
    seed: int = 0,
) -> Tuning[Learner]:
    """Choose among learners, or settings of one, by the estimated values of what they learn from parts of the log.

    Each learner is fitted on all folds but one, its policy is estimated on that one, and the terms of all folds make
    one estimate. All folds of a learner are trained as one batched problem. The one-standard-error rule: the first
    candidate, in the order given, that is behind the best one by no more than the standard error of their paired
    difference. So list the simplest or most regularised ones first.

    Args:
        learners: the candidates.
        log: logged rounds.
        estimator: of the held-out values; importance sampling by default, which is unbiased and noisy.
        folds: parts of the log.
        generator: for learners and estimators that are defined with it.
        logging_policy: for learners and estimators that are defined with it.
        seed: of the folds, of training and of the estimates.

    Raises:
        ConfigError: no candidate, or fewer than two folds.
        DataError: fewer than two rounds a fold, or no candidate with a value.
    """
    names, judge = names_of(learners), IS() if estimator is None else estimator
    pooled = held_out_estimates(
        learners, log, lambda _: judge, folds=folds, generator=generator, logging_policy=logging_policy, seed=seed
    )
    index, columns = one_standard_error(pooled)
    return Tuning(
        method=f"{folds}-fold {_LABEL} of learners by {type(judge).__name__}, one-standard-error rule",
        candidates=tuple(learners),
        names=names,
        estimates=tuple(pooled),
        columns=columns,
        index=index,
        rounds=len(log),
        seed=seed,
        warnings=pooled[index].warnings,
    )


def one_standard_error(estimates: Sequence[Estimate]) -> tuple[int, dict[str, FloatArray]]:
    """Return the first estimate behind the best by no more than the standard error of their paired difference.

    Also how far each is behind, and that standard error, as columns of a table. One without a value is never returned.

    Raises:
        DataError: none has a value.
    """
    values = np.array([estimate.value for estimate in estimates])
    _check_known(values)
    best = estimates[int(np.argmax(np.where(np.isfinite(values), values, -np.inf)))]
    behind = [best.minus(estimate) for estimate in estimates]
    gaps, errors = (np.array(column) for column in zip(*((b.value, b.standard_error) for b in behind), strict=True))
    return int(np.argmax(gaps <= errors)), {"behind best": gaps, "s.e. of that": errors}


def _check_known(values: FloatArray) -> None:
    """Raise :class:`DataError` unless one of `values`, one a candidate, is a number."""
    if not np.isfinite(values).any():
        raise DataError(
            f"{_LABEL}: expected a value of at least one candidate, got {values}: held-out rounds have no weight under "
            "these policies; record more rounds, use fewer folds or splits, or an estimator with a reward model"
        )


def held_out_estimates(
    learners: Sequence[Learner],
    log: LoggedDataset,
    judge: Callable[[LoggedDataset], Estimator],
    *,
    folds: int,
    generator: OutputModel | None,
    logging_policy: Policy | None,
    seed: int,
) -> list[Estimate]:
    """Return for each learner the estimate whose term of a round is of a policy that was learned without this round.

    Args:
        learners: each is fitted on all folds but one, for every fold, as one batched problem.
        log: logged rounds.
        judge: gives, for the held-out rounds of a fold, the estimator of all policies on them.
        folds: parts of the log.
        generator: for learners and estimators that are defined with it.
        logging_policy: for learners and estimators that are defined with it.
        seed: of the folds, of training and of the estimates.
    """
    parts = split(len(log), folds, seed)
    seen = replace(log, oracle=None)
    training = [seen.take(np.setdiff1d(np.arange(len(log)), rows)) for rows in parts]
    held_out = [seen.take(rows) for rows in parts]
    judges = [judge(rest) for rest in held_out]
    pooled = []
    for learner in learners:
        policies = learner.fit_many(
            training,
            generators=None if generator is None else [generator] * folds,
            logging_policies=None if logging_policy is None else [logging_policy] * folds,
            seeds=[seed] * folds,
        )
        found = [
            own.estimate(policy, rest, generator=generator, logging_policy=logging_policy, seed=seed)
            for own, policy, rest in zip(judges, policies, held_out, strict=True)
        ]
        pooled.append(_pool(found, parts, len(log)))
    return pooled


def _pool(found: Sequence[Estimate], parts: Sequence[IntArray], n: int) -> Estimate:
    """Return the estimate whose terms are those of all folds, in the order of the log."""
    terms = np.empty(n)
    for estimate, rows in zip(found, parts, strict=True):
        terms[rows] = estimate.terms
    size = sum(estimate.effective_sample_size for estimate in found)
    notes = distinct(*(estimate.warnings for estimate in found))
    return Estimate.of_mean(terms, effective_sample_size=size, warnings=notes)


def cross_validate_estimators(
    estimators: Sequence[Estimator],
    policy: Policy,
    log: LoggedDataset,
    *,
    validator: Estimator | None = None,
    splits: int = 10,
    generator: OutputModel | None = None,
    logging_policy: Policy | None = None,
    seed: int = 0,
) -> Tuning[Estimator]:
    """Choose among estimators of one policy's value by their squared distance to an unbiased one on other rounds.

    Cief, Kveton, Kompan, "Cross-Validated Off-Policy Evaluation", AAAI 2025 (arXiv 2405.15332). A candidate gets the
    share ``σ² / (σ² + σ_v²)`` of the rounds, σ² and σ_v² the variances of a round of the candidate and of the
    validator, so that both estimates of a split vary alike. The chosen one has the smallest mean squared distance plus
    its standard error over splits.

    Args:
        estimators: the candidates.
        policy: whose value is estimated.
        log: logged rounds.
        validator: unbiased; importance sampling by default.
        splits: random splits of the log.
        generator: for estimators that are defined with it.
        logging_policy: for estimators that are defined with it.
        seed: of the splits and of whatever the estimators fit.

    Raises:
        ConfigError: no candidate, or fewer than two splits.
        DataError: fewer than four rounds, or no candidate with a value.
    """
    names, judge = names_of(estimators), IS() if validator is None else validator
    check_integer("splits", splits, 2)
    if len(log) < 4:
        raise DataError(f"{_LABEL}: expected at least 4 rounds to split in two, got {len(log)}; record more rounds")
    rng, n, seen = stream(seed, _LABEL, "splits"), len(log), replace(log, oracle=None)
    orders = [rng.permutation(n) for _ in range(splits)]

    def value(estimator: Estimator, part: LoggedDataset) -> Estimate:
        return estimator.estimate(policy, part, generator=generator, logging_policy=logging_policy, seed=seed)

    spread = value(judge, seen).standard_error ** 2
    whole = [value(estimator, seen) for estimator in estimators]
    distances = np.empty((len(estimators), splits))
    for row, (estimator, estimate) in enumerate(zip(estimators, whole, strict=True)):
        own = estimate.standard_error**2
        cut = int(np.clip(round(n * own / (own + spread)) if own + spread > 0 else n // 2, 2, n - 2))
        for column, order in enumerate(orders):
            apart = value(estimator, seen.take(order[:cut])).value - value(judge, seen.take(order[cut:])).value
            distances[row, column] = apart**2
    mean, error = distances.mean(axis=1), distances.std(axis=1, ddof=1) / np.sqrt(splits)
    bound = mean + error
    _check_known(bound)
    index = int(np.argmin(np.where(np.isfinite(bound), bound, np.inf)))
    return Tuning(
        method=f"{_LABEL} of estimators, {splits} splits against {type(judge).__name__}, one-standard-error rule",
        candidates=tuple(estimators),
        names=names,
        estimates=tuple(whole),
        columns={"squared distance": mean, "s.e. of that": error},
        index=index,
        rounds=n,
        seed=seed,
        warnings=whole[index].warnings,
    )
