"""Learners that know a prompt by its index and embedding: regression, importance-sampling and doubly robust gradients.

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
from agents.learners.base import Objective, OfflinePolicyGradient
from agents.networks import StackedMLP
from agents.rewards import PromptRewardRegression, PromptRewardSource
from agents.worlds import Worlds
from offprompts_env.config import check_number


class _Predictions:
    """q̂ for the rounds of a batch, by one reward model a world."""

    def __init__(self, worlds: Worlds, rewards: PromptRewardSource) -> None:
        models = rewards.fit_many(worlds.stack.logs, seeds=worlds.seeds)
        self._stack, self._network = worlds.stack, StackedMLP.of([model.network for model in models])

    def __call__(self, inputs: Tensor, actions: Tensor) -> Tensor:
        """Return q̂ for `actions` (W, m) of rounds with `inputs` ``[x, q, 1]`` (W, m, d + 1), (W, m)."""
        embeddings = self._stack.embeddings[self._stack.prompt_rows(actions)]
        return self._network.forward(torch.cat([inputs[..., :-1], embeddings, inputs[..., -1:]], dim=-1))[..., 0]


@dataclass(frozen=True)
class RegressionPG(OfflinePolicyGradient):
    """Policy gradient on a reward model of prompts, :func:`agents.gradients.regression`.

    Attributes:
        rewards: the regression, or :class:`agents.FittedRewards`.
    """

    rewards: PromptRewardSource = field(default_factory=PromptRewardRegression)

    label: ClassVar[str] = "regression PG"

    def _objective(self, worlds: Worlds) -> Objective[Batch]:
        predict = _Predictions(worlds, self.rewards)

        def loss(policy: ActionDistribution, batch: Batch) -> Tensor:
            actions = policy.sample(batch.uniforms)
            return gradients.regression(policy, actions, predict(batch.inputs, actions))

        return Objective.by_scores(self._rounds(worlds), loss)


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

        return Objective.by_scores(self._rounds(worlds), loss)


@dataclass(frozen=True)
class DoublyRobustPG(OfflinePolicyGradient):
    """Doubly robust policy gradient, :func:`agents.gradients.doubly_robust`.

    Importance sampling of what a reward model leaves unexplained, plus the policy gradient on the model itself. Needs
    propensities, or the logging policy.

    Attributes:
        rewards: the regression, or :class:`agents.FittedRewards`.
        clip: upper bound of the weight π(a) / π₀(a).
    """

    rewards: PromptRewardSource = field(default_factory=PromptRewardRegression)
    clip: float = 200.0

    label: ClassVar[str] = "DR PG"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("clip", self.clip, 0, strict=True)

    def _objective(self, worlds: Worlds) -> Objective[Batch]:
        stack = worlds.stack
        propensity = worlds.propensities("agents.DoublyRobustPG")
        predict = _Predictions(worlds, self.rewards)

        def loss(policy: ActionDistribution, batch: Batch) -> Tensor:
            rows, sampled = batch.rows, policy.sample(batch.uniforms)
            logged = stack.action[rows]
            # Both predictions in one pass: at this size a call costs more than its arithmetic.
            both = predict(torch.cat([batch.inputs] * 2, dim=1), torch.cat([logged, sampled], dim=1))
            at_logged, at_sampled = both.chunk(2, dim=1)
            residual = stack.reward[rows] - at_logged
            return gradients.doubly_robust(policy, logged, propensity[rows], residual, sampled, at_sampled, self.clip)

        return Objective.by_scores(self._rounds(worlds), loss)
