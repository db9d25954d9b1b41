"""Choose a policy to deploy from the log that the old one recorded, without becoming worse."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import NormalDist

import numpy as np

from agents.estimators.base import Estimator
from agents.estimators.weighting import IS
from agents.tuning.record import Tuning, distinct
from offprompts_env.config import check_number
from offprompts_env.errors import ConfigError
from offprompts_env.simulator import OutputModel
from offprompts_env.types import Estimate, LoggedDataset, Policy

# Below as many effective rounds the normal bound is no bound: a policy without a single matching round has none.
_EFFECTIVE_ROUNDS = 30


def select_policy(
    policies: Mapping[str, Policy],
    log: LoggedDataset,
    *,
    estimator: Estimator | None = None,
    confidence: float = 0.95,
    generator: OutputModel | None = None,
    logging_policy: Policy | None = None,
    seed: int = 0,
) -> Tuning[Policy | None]:
    """Choose the policy whose improvement is surest, or keep the logging policy where none is surely better.

    Of many candidates, the one with the largest estimate is likely one that is overestimated (Saito and Nomura, IJCAI
    2024, arXiv 2404.15084). So candidates are compared by a lower bound of their improvement over the logged rewards,
    paired round by round: ``Δ − z · s.e.(Δ)``, with z such that all bounds hold at once with `confidence` (Bonferroni).
    A candidate whose bound is not above 0, or that is supported by fewer than 30 effective rounds, is never chosen.
    Bounds know of an estimator's variance only: a biased one, or rounds that the candidates were learned from, make
    them too high. Estimate on held-out rounds.

    Args:
        policies: candidates by name.
        log: rounds recorded by the logging policy, not those that the candidates were learned from.
        estimator: with one term a round; importance sampling by default.
        confidence: that all bounds hold at once.
        generator: for estimators that are defined with it.
        logging_policy: the fallback, and for estimators that are defined with it.
        seed: of whatever the estimator fits or draws.

    Returns:
        The candidates after the logging policy, which is None where it was not given.

    Raises:
        ConfigError: no candidate, or a confidence outside (0, 1).
        DimensionError: a candidate over other prompts, or an estimator without one term a round.
    """
    if not policies:
        raise ConfigError("policies: expected at least one candidate, got none")
    check_number("confidence", confidence, 0, strict=True)
    if confidence >= 1:
        raise ConfigError(f"confidence: expected a number in (0, 1), got {confidence}")
    judge = IS() if estimator is None else estimator
    logged = Estimate.of_mean(log.reward)
    found = [
        judge.estimate(policy, log, generator=generator, logging_policy=logging_policy, seed=seed)
        for policy in policies.values()
    ]
    gains = [estimate.minus(logged) for estimate in found]
    quantile = NormalDist().inv_cdf(1 - (1 - confidence) / len(found))
    bounds = np.array([gain.value - quantile * gain.standard_error for gain in gains])
    trusted = np.array([estimate.effective_sample_size >= _EFFECTIVE_ROUNDS for estimate in found])
    # A bound that is NaN, of a single round, is no bound either.
    bounds = np.where(trusted & np.isfinite(bounds), bounds, -np.inf)
    index = int(np.argmax([0.0, *bounds]))
    chosen = found[index - 1].warnings if index else ()
    return Tuning(
        method=f"largest lower bound of the improvement by {type(judge).__name__}, {confidence:.0%} for all at once",
        candidates=(logging_policy, *policies.values()),
        names=("logging policy", *policies),
        estimates=(logged, *found),
        columns={
            "improvement": np.array([0.0, *(gain.value for gain in gains)]),
            "lower bound": np.array([0.0, *bounds]),
            "effective rounds": np.array([len(log), *(estimate.effective_sample_size for estimate in found)]),
        },
        index=index,
        rounds=len(log),
        seed=seed,
        warnings=distinct(chosen),
    )
