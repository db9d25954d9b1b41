"""Learners that know a prompt by its index and embedding: regression and importance-sampling policy gradients.

Defaults are those of the released code of Kiyohara, Cao, Saito, Joachims (RecSys 2025, arXiv 2504.02646).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from agents import gradients
from agents.feeds import Batch
from agents.gradients import ActionDistribution
from agents.learners.base import Objective, OfflinePolicyGradient, Worlds
from agents.networks import StackedMLP
from agents.rewards import PromptRewardRegression, PromptRewardSource
from offprompts_env.config import check_number


@dataclass(frozen=True)
class RegressionPG(OfflinePolicyGradient):
    """Policy gradient on a reward model of prompts, :func:`agents.gradients.regression`.

    Attributes:
        rewards: the regression, or :class:`agents.FittedRewards`.
    """

    rewards: PromptRewardSource = field(default_factory=PromptRewardRegression)

    label: ClassVar[str] = "regression PG"

    def _objective(self, worlds: Worlds) -> Objective[Batch]:
        stack = worlds.stack
        models = self.rewards.fit_many(stack.logs, seeds=worlds.seeds)
        network = StackedMLP.of([model.network for model in models])

        def loss(policy: ActionDistribution, batch: Batch) -> Tensor:
            actions = policy.sample(batch.uniforms)
            embeddings = stack.embeddings[stack.prompt_rows(actions)]
            inputs = torch.cat([batch.inputs[..., :-1], embeddings, batch.inputs[..., -1:]], dim=-1)
            return gradients.regression(policy, actions, network.forward(inputs)[..., 0])

        return Objective.of(self._rounds(worlds), loss)


@dataclass(frozen=True)
class ImportanceSamplingPG(OfflinePolicyGradient):
    """Importance-sampling policy gradient, :func:`agents.gradients.importance_sampling`.

    Needs propensities, or the logging policy.

    Attributes:
        clip: upper bound of the weight π(a) / π₀(a).
    """

    clip: float = 200.0

    label: ClassVar[str] = "IS PG"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("clip", self.clip, 0, strict=True)

    def _objective(self, worlds: Worlds) -> Objective[Batch]:
        stack = worlds.stack
        propensity = worlds.propensities("agents.ImportanceSamplingPG")

        def loss(policy: ActionDistribution, batch: Batch) -> Tensor:
            rows = batch.rows
            return gradients.importance_sampling(
                policy, stack.action[rows], propensity[rows], stack.reward[rows], self.clip
            )

        return Objective.of(self._rounds(worlds), loss)
