"""Value estimates from several logs, each recorded by a policy of its own (Agarwal et al., KDD 2017).

Symbols: ``J`` logs of ``n_j`` rounds, ``n = Σ_j n_j``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from agents.estimators.base import float64, noted, support, weighted_estimate, with_notes
from agents.estimators.look import Look, fit_rewards, look_at
from agents.learners.base import Learner
from agents.learners.cloning import BehaviorCloning
from agents.rewards import PromptRewardSource
from agents.training import StackedLogs
from agents.worlds import Worlds
from offprompts_env.config import check_integer
from offprompts_env.errors import DataError, PropensityError
from offprompts_env.sampling import check_catalogue, check_policy, chosen_probabilities
from offprompts_env.types import Estimate, FloatArray, LoggedDataset, LogMetadata, Policy


@dataclass(frozen=True)
class NaiveIS:
    """Importance sampling of all rounds, each with its own propensity: ``V̂ = mean_i π(a_i) / π_{j(i)}(a_i) · r_i``.

    Unbiased where every logging policy tries what π chooses. One that hardly does spoils the whole.

    Attributes:
        rewards: a reward model makes it doubly robust, as :class:`agents.DR`; None has none.
        n_draws: as for :class:`agents.DM`.
        folds: as for :class:`agents.DM`, over the rounds of all logs.
        cloning: how missing logging policies are estimated, where they are needed.
    """

    rewards: PromptRewardSource | None = None
    n_draws: int | None = 4
    folds: int | None = 5
    cloning: Learner = field(default_factory=BehaviorCloning)

    def __post_init__(self) -> None:
        if self.n_draws is not None:
            check_integer("n_draws", self.n_draws, 1)
        if self.folds is not None:
            check_integer("folds", self.folds, 2)

    def estimate(
        self,
        policy: Policy,
        logs: Sequence[LoggedDataset],
        *,
        logging_policies: Sequence[Policy] | None = None,
        seed: int = 0,
    ) -> Estimate:
        """Estimate ``V(policy)``. Terms are those of the logs one after the other, and strata of the estimate.

        Args:
            policy: over the logs' prompts.
            logs: logs over the same catalogue.
            logging_policies: what recorded them, one a log.
            seed: of reward models, clones and draws.

        Raises:
            ConfigError: not as many logging policies as logs.
            DataError: no log, or one too small.
            DimensionError: logs or policies over different prompts.
            NumericalError: a policy or the reward model gives NaN.
            PropensityError: propensities are unknown and no logging policies are given.
        """
        stack = StackedLogs(logs)
        for log in logs:
            check_catalogue("log", log.prompts.fingerprint, logs[0].prompts)
        check_policy(policy, logs[0].prompts, "the logs")
        pooled = _pool(logs)
        given = None if logging_policies is None else tuple(logging_policies)
        notes: list[str] = []
        with noted(notes):
            worlds = Worlds(stack, None, given, (seed,) * len(logs))
            propensity = self._propensity(worlds, pooled, seed)
            look = self._look(policy, pooled, seed)
        ratio = look.chosen / propensity
        residual = float64(pooled.reward) - look.predicted
        shares, remarks = self._shares(ratio * residual + look.expected, ratio, stack.sizes)
        scale = np.repeat(shares * len(pooled) / np.array(stack.sizes), stack.sizes)
        found = weighted_estimate(
            ratio,
            scale * ratio,
            residual,
            scale * look.expected,
            strata=tuple(stack.sizes),
            remedy="use agents.BalancedIS or a reward model, or a policy closer to the logging policies",
            doubt="the propensities are wrong, or the policy chooses prompts that a logging policy never does",
            own=({f"share of log {j}": float(share) for j, share in enumerate(shares)}, remarks),
            shown=support(look.average, pooled),
        )
        return with_notes(found, pooled, notes)

    def _look(self, policy: Policy, pooled: LoggedDataset, seed: int) -> Look:
        models = () if self.rewards is None else fit_rewards(self.rewards, pooled, self.folds, seed)
        return look_at(policy, pooled, models, n_draws=self.n_draws, seed=seed)

    def _propensity(self, worlds: Worlds, pooled: LoggedDataset, seed: int) -> FloatArray:
        """Return what the policy's probability is divided by, (n,)."""
        return worlds.logged_propensities(f"agents.{type(self).__name__}")

    def _shares(self, terms: FloatArray, ratio: FloatArray, sizes: Sequence[int]) -> tuple[FloatArray, tuple[str, ...]]:
        """Return how much each log counts (J,), in sum 1, and what is to be said of it."""
        return np.array(sizes) / sum(sizes), ()


@dataclass(frozen=True)
class BalancedIS(NaiveIS):
    """Importance sampling as if one policy, the average of all, had recorded everything.

    ``V̂ = mean_i π(a_i) / π̄(a_i) · r_i``, ``π̄ = Σ_j (n_j / n) π_j``: unbiased where any of the logging policies tries
    what π chooses, and never of larger variance than :class:`NaiveIS`. Without logging policies π̄ is cloned from all
    rounds, and the warnings say so. The settings are those of :class:`NaiveIS`.
    """

    def _propensity(self, worlds: Worlds, pooled: LoggedDataset, seed: int) -> FloatArray:
        if worlds.logging_policies is None:
            everything = Worlds(StackedLogs([pooled]), None, None, (seed,))
            policies = tuple(everything.logging_policies_or_clones("agents.BalancedIS", self.cloning))
            sizes = [len(pooled)]
        else:
            policies, sizes = worlds.logging_policies, worlds.stack.sizes
        average = np.zeros(len(pooled))
        for policy, size in zip(policies, sizes, strict=True):
            average += size / len(pooled) * chosen_probabilities(policy, pooled.contexts, pooled.action)
        if not (average > 0).all():
            row = int(np.argmin(average > 0))
            raise PropensityError(
                f"logging_policies: none of them tries the logged prompt {pooled.action[row]} of row {row}, so they "
                "did not record these logs; pass the policies that did, or none to clone their average"
            )
        return average


@dataclass(frozen=True)
class WeightedIS(NaiveIS):
    """Importance sampling of each log, the estimates averaged with weights inverse to their variance.

    ``V̂ = Σ_j λ_j mean_j(w_i r_i)``, ``λ_j ∝ n_j / σ_j²``, with σ_j² the variance of the terms of log j: how far π is
    from what recorded it. The variances are estimated from the same rounds, for a bias of order 1/n. The settings are
    those of :class:`NaiveIS`.
    """

    def _shares(self, terms: FloatArray, ratio: FloatArray, sizes: Sequence[int]) -> tuple[FloatArray, tuple[str, ...]]:
        if min(sizes) < 2:
            raise DataError(
                f"agents.WeightedIS: expected at least two rounds a log, got {min(sizes)}; use agents.BalancedIS"
            )
        cuts = np.cumsum(sizes)[:-1]
        spread = np.array([part.var(ddof=1) for part in np.split(terms, cuts)])
        useful = np.array([part.any() for part in np.split(ratio, cuts)])
        # A log whose terms are all the same is as good as it gets, but must not make the others' weights 0/0.
        precision = useful * np.array(sizes) / (spread + 1e-12 * max(spread.max(), 1e-300))
        if not useful.any():
            return np.array(sizes) / sum(sizes), ()
        notes = [
            f"log {j} has no round that the policy could have chosen, and is left out" for j in np.flatnonzero(~useful)
        ]
        return precision / precision.sum(), tuple(notes)


def _pool(logs: Sequence[LoggedDataset]) -> LoggedDataset:
    """Return the rounds of all `logs` as one."""
    columns: dict[str, Any] = {}
    for own in fields(LoggedDataset):
        parts = [getattr(log, own.name) for log in logs]
        if own.name not in ("prompts", "oracle", "metadata"):
            columns[own.name] = None if any(part is None for part in parts) else np.concatenate(parts)
    return replace(logs[0], **columns, oracle=None, metadata=LogMetadata())
