"""Value estimates that weight by clusters of prompts: smaller weights, for a bias where prompts of a cluster differ.

w(x, q, c) = π(c | x, q) / π₀(c | x, q),   π(c | x, q) = Σ_{a ∈ c} π(a | x, q)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from agents.clustering import EmbeddingClusters, PromptClustering, PromptClusters
from agents.estimators.base import OfflineEstimator, clipped, float64, support, weighted_estimate
from agents.estimators.direct import ModelBased
from agents.estimators.look import Look, fit_rewards, look_at
from agents.learners.base import Learner
from agents.learners.cloning import BehaviorCloning
from agents.worlds import Worlds
from offprompts_env.config import check_number
from offprompts_env.errors import PropensityError
from offprompts_env.types import Estimate, LoggedDataset, Policy


@dataclass(frozen=True)
class MIPS(OfflineEstimator):
    """Marginalised importance sampling: ``V̂ = mean_i w(x_i, q_i, c(a_i)) r_i`` (Saito and Joachims, ICML 2022).

    Unbiased where the prompts of a cluster pay the same, and π₀ tries every cluster that π does. The logging policy is
    needed as a whole: recorded propensities say nothing of the other prompts of a cluster.

    Attributes:
        clusters: how prompts are grouped; :class:`agents.KnownClusters` for given ones.
        clip: upper bound of the weight, or None.
        cloning: how a missing logging policy is estimated.
    """

    clusters: PromptClustering = field(default_factory=EmbeddingClusters)
    clip: float | None = None
    cloning: Learner = field(default_factory=BehaviorCloning)

    asks_generator: ClassVar[bool] = True
    asks_logging_policy: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.clip is not None:
            check_number("clip", self.clip, 0, strict=True)

    def _estimate(self, policy: Policy, log: LoggedDataset, given: Worlds, seed: int) -> Estimate:
        (clusters,) = self.clusters.fit_many([log], generators=given.generators, seeds=[seed])
        (logger,) = given.logging_policies_or_clones(self._label, self.cloning)
        look = self._look(policy, log, clusters, seed)
        logged = look_at(logger, log, clusters=clusters).chosen
        if not (logged > 0).all():
            row = int(np.argmin(logged > 0))
            raise PropensityError(
                f"logging_policy: gives the cluster of the logged prompt {log.action[row]} of row {row} probability 0, "
                "so it did not record this log; pass the policy that did, or none to clone one"
            )
        ratio = look.chosen / logged
        weights = np.minimum(ratio, np.inf if self.clip is None else self.clip)
        tried = np.isin(clusters.labels, clusters.labels[log.action])
        found, remarks = clipped(ratio, weights, self.clip)
        return weighted_estimate(
            ratio,
            weights,
            float64(log.reward) - look.predicted,
            look.expected,
            remedy="use fewer clusters or DM, or a policy closer to the logging policy",
            doubt="the logging policy did not record the log, or it never tries clusters that the policy chooses",
            own=({"clusters": float(clusters.n_clusters), **found}, remarks),
            shown=support(look.average, log, tried),
        )

    def _look(self, policy: Policy, log: LoggedDataset, clusters: PromptClusters, seed: int) -> Look:
        return look_at(policy, log, clusters=clusters)


@dataclass(frozen=True)
class OffCEM(MIPS, ModelBased):
    """Off-policy estimation with the conjunct effect model (Saito, Ren and Joachims, ICML 2023).

    ``V̂ = mean_i [ Σ_a π(a | x_i, q_i) q̂(x_i, q_i, a) + w(x_i, q_i, c(a_i)) (r_i − q̂(x_i, q_i, a_i)) ]``: weights stand
    for what clusters pay, the model for differences within them. Unbiased where q̂ gets these differences right and π₀
    tries every cluster that π does. The settings are those of :class:`agents.DM` and :class:`MIPS`.
    """

    def __post_init__(self) -> None:
        ModelBased.__post_init__(self)
        MIPS.__post_init__(self)

    def _look(self, policy: Policy, log: LoggedDataset, clusters: PromptClusters, seed: int) -> Look:
        models = fit_rewards(self.rewards, log, self.folds, seed)
        return look_at(policy, log, models, n_draws=self.n_draws, seed=seed, clusters=clusters)
