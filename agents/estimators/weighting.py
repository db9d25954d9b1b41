"""Value estimates that weight logged rewards by the ratio of the policies' probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from agents.estimators.base import one_world, weighted_estimate
from offprompts_env.config import check_number
from offprompts_env.sampling import check_policy, chosen_probabilities
from offprompts_env.simulator import OutputModel
from offprompts_env.types import Estimate, LoggedDataset, Policy


@dataclass(frozen=True)
class IS:
    """Importance sampling: ``V̂ = mean_i w_i r_i``, ``w = min(π(a | x, q) / π₀(a | x, q), clip)``.

    Unbiased without clip where π₀ > 0 wherever π > 0 (Horvitz and Thompson, 1952).

    Attributes:
        clip: upper bound of the weight, or None.
    """

    clip: float | None = None

    def __post_init__(self) -> None:
        if self.clip is not None:
            check_number("clip", self.clip, 0, strict=True)

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

        Raises:
            DimensionError: policy and log are over different prompts.
            PropensityError: propensities are unknown and no logging policy is given.
        """
        check_policy(policy, log.prompts, "the log")
        propensity = one_world(log, None, logging_policy, seed).propensities("agents.IS").numpy().astype(np.float64)
        weights = chosen_probabilities(policy, log.contexts, log.action) / propensity
        clipped = 0 if self.clip is None else int((weights > self.clip).sum())
        weights = np.minimum(weights, np.inf if self.clip is None else self.clip)
        return weighted_estimate(
            weights,
            weights * log.reward,
            self.clip,
            clipped,
            remedy="use KernelIS or DM, or a policy closer to the logging policy",
            doubt="the propensities are wrong, or the policy chooses prompts that the logging policy never does",
        )
