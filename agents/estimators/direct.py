"""Value estimates from a reward model alone."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import numpy as np

from agents.rewards import PromptRewardRegression, PromptRewardSource
from agents.training import TrainingWarning
from offprompts_env.sampling import check_policy, pmf_by_parts
from offprompts_env.simulator import OutputModel
from offprompts_env.types import Estimate, LoggedDataset, Policy


@dataclass(frozen=True)
class DM:
    """Direct method: ``V̂ = mean_i Σ_a π(a | x_i, q_i) q̂(x_i, q_i, a)``.

    As good as q̂: the standard error leaves out q̂'s own error.

    Attributes:
        rewards: the regression behind q̂, or :class:`agents.FittedRewards`.
    """

    rewards: PromptRewardSource = field(default_factory=PromptRewardRegression)

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
            DimensionError: policy, log and reward model are over different prompts.
        """
        check_policy(policy, log.prompts, "the log")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", TrainingWarning)
            (model,) = self.rewards.fit_many([log], seeds=[seed])
        terms = np.empty(len(log))
        for rows, contexts, pmf in pmf_by_parts(policy, log.contexts):
            terms[rows] = np.einsum("na,na->n", pmf, model(contexts), dtype=np.float64)
        notes = ("the standard error leaves out the error of the reward model", *(str(w.message) for w in caught))
        return Estimate.of_mean(terms, warnings=notes)
