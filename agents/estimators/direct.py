"""Value estimates from a reward model alone."""

from __future__ import annotations

from dataclasses import dataclass, field

from agents.estimators.base import MODEL_ERROR, OfflineEstimator, support
from agents.estimators.look import fit_rewards, look_at
from agents.rewards import PromptRewardRegression, PromptRewardSource
from agents.worlds import Worlds
from offprompts_env.config import check_integer
from offprompts_env.types import Estimate, LoggedDataset, Policy


@dataclass(frozen=True)
class ModelBased:
    """What estimators with a prompt-level reward model q̂ share.

    Attributes:
        rewards: the regression behind q̂, or :class:`agents.FittedRewards`.
        n_draws: prompts that are drawn from the policy a round, to average q̂ over; their chance is part of the standard
            error. None takes the exact expectation, an evaluation of q̂ for every round and prompt: many times the time
            of all the rest with 1,000 prompts, for a standard error that is hardly smaller. It is taken anyway where
            there are no more than eight times as many prompts, since it is as fast then.
        folds: K of the cross-fitting, which predicts each round with a model fitted on others; None fits one model on
            the whole log. Models that are already fitted stay as they are.
    """

    rewards: PromptRewardSource = field(default_factory=PromptRewardRegression)
    n_draws: int | None = 4
    folds: int | None = 5

    def __post_init__(self) -> None:
        if self.n_draws is not None:
            check_integer("n_draws", self.n_draws, 1)
        if self.folds is not None:
            check_integer("folds", self.folds, 2)


@dataclass(frozen=True)
class DM(ModelBased, OfflineEstimator):
    """Direct method: ``V̂ = mean_i Σ_a π(a | x_i, q_i) q̂(x_i, q_i, a)``.

    As good as q̂: the standard error leaves out q̂'s own error.

    Attributes:
        folds: None, the default, fits one model on the whole log: there is no noise of a reward in these terms.
    """

    folds: int | None = None

    def _estimate(self, policy: Policy, log: LoggedDataset, given: Worlds, seed: int) -> Estimate:
        models = fit_rewards(self.rewards, log, self.folds, seed)
        look = look_at(policy, log, models, n_draws=self.n_draws, seed=seed)
        diagnostics, unseen = support(look.average, log)
        return Estimate.of_mean(look.expected, diagnostics=diagnostics, warnings=(MODEL_ERROR, *unseen))
