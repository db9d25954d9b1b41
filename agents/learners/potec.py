"""POTEC: importance sampling between clusters of prompts, regression within them.

Source: Saito, Yao, Joachims, "POTEC: Off-Policy Learning for Large Action Spaces via Two-Stage Policy Decomposition",
ICLR 2025 (arXiv 2402.06151). Defaults are those of the released code of Kiyohara, Cao, Saito, Joachims (RecSys 2025,
arXiv 2504.02646).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from agents import gradients
from agents.clustering import EmbeddingClusters, PromptClustering
from agents.feeds import Batch, LoggedRounds
from agents.gradients import ActionDistribution
from agents.learners.base import Callback, OfflineLearner, PolicyGradient
from agents.learners.cloning import BehaviorCloning
from agents.networks import MLP, StackedMLP
from agents.policies import SoftmaxPolicy
from agents.rewards import PromptRewardRegression, PromptRewards, PromptRewardSource
from agents.training import StackedLogs, train, world_streams
from agents.two_stage import SecondStage, TwoStagePolicy
from agents.worlds import Worlds
from offprompts_env.config import check_number
from offprompts_env.errors import DimensionError, PropensityError
from offprompts_env.sampling import pmf_by_parts
from offprompts_env.types import FloatArray, IntArray, LoggedDataset, Policy


@dataclass(frozen=True)
class POTEC(PolicyGradient, OfflineLearner[TwoStagePolicy]):
    """Two-stage policy: the first stage by policy gradient, :func:`agents.gradients.two_stage`, the second by q̂.

    The first stage is a softmax over ``f(x, q, centre of the cluster)``, f a perceptron. The second stage takes the
    prompt of the cluster with the largest q̂. Needs the probabilities of all prompts under the logging policy, which is
    cloned from the log where it is not given.

    Attributes:
        rewards: the regression behind q̂, or :class:`agents.FittedRewards`.
        clusters: how prompts are clustered.
        beta: inverse temperature of a softmax second stage; None is greedy.
        clip: upper bound of the weight π(c) / π₀(c).
        cloning: how a missing logging policy is estimated.
    """

    rewards: PromptRewardSource = field(default_factory=PromptRewardRegression)
    clusters: PromptClustering = field(default_factory=EmbeddingClusters)
    beta: float | None = None
    clip: float = 200.0
    cloning: BehaviorCloning = field(default_factory=BehaviorCloning)

    label: ClassVar[str] = "POTEC"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("clip", self.clip, 0, strict=True)
        if self.beta is not None:
            check_number("beta", self.beta)

    def _learn(self, worlds: Worlds, callbacks: Sequence[Callback]) -> list[TwoStagePolicy]:
        stack, seeds = worlds.stack, worlds.seeds
        logging = worlds.logging_policies_or_clones("agents.POTEC", self.cloning)
        models = self.rewards.fit_many(stack.logs, seeds=seeds)
        clusters = self.clusters.fit_many(stack.logs, generators=worlds.generators, seeds=seeds)
        seconds = [SecondStage(part, model, self.beta) for part, model in zip(clusters, models, strict=True)]
        feed = _Rounds(stack, seconds, logging, LoggedRounds(stack, seeds, self.label, self.batch_size))
        sizes = (feed.n_inputs, *self.hidden, 1)
        network = StackedMLP.initialise(sizes, world_streams(seeds, self.label, "initial weights"))

        def loss(policy: ActionDistribution, batch: _ClusterBatch) -> Tensor:
            return gradients.two_stage(
                policy, batch.clusters, batch.propensity, batch.residual, batch.values, self.clip
            )

        of_logits = gradients.by_scores(loss)

        def gradient(scores: Tensor, batch: _ClusterBatch) -> tuple[Tensor, Tensor]:
            losses, slope = of_logits(scores.view(batch.values.shape), batch)
            return losses, slope.view(scores.shape)

        # Any, because callbacks are declared for the policies that most learners give.
        def policies() -> list[Any]:
            return [_policy(mlp, second) for mlp, second in zip(network.unstack(), seconds, strict=True)]

        def on_step(step: int) -> bool:
            answers = [callback.on_step(step, policies()) for callback in callbacks if step % callback.every == 0]
            return True in answers

        watch = on_step if callbacks else None
        train(network, feed, gradient, self._schedule(), label=self.label, on_step=watch)
        return policies()


def _policy(network: MLP, second: SecondStage) -> TwoStagePolicy:
    scores = PromptRewards(network, second.clusters.centres)
    return TwoStagePolicy(SoftmaxPolicy(scores, second.clusters.n_clusters), second)


@dataclass(frozen=True, slots=True)
class _ClusterBatch:
    """A batch of logged rounds, as the first stage sees it.

    Attributes:
        rounds: ``[x, q, 1]``, (W, B, d + 1).
        centres: of the clusters, (W, C, k).
        clusters: of the logged prompts (W, B).
        propensity: π₀ of these clusters (W, B).
        residual: reward minus q̂ of the logged prompts (W, B).
        values: q̂ of what the second stage chooses in each cluster (W, B, C).
    """

    rounds: Tensor
    centres: Tensor
    clusters: Tensor
    propensity: Tensor
    residual: Tensor
    values: Tensor

    @property
    def inputs(self) -> Tensor:
        """``[x, q, centre, 1]`` of every round and cluster, (W, B · C, d + k + 1)."""
        worlds, rounds, clusters = self.values.shape
        own = self.rounds[:, :, None].expand(-1, -1, clusters, -1)
        centres = self.centres[:, None].expand(-1, rounds, -1, -1)
        return torch.cat([own[..., :-1], centres, own[..., -1:]], dim=-1).view(worlds, rounds * clusters, -1)


class _Rounds:
    """Feed of logged rounds with what the first stage reads of them; each is worked out when it is first drawn."""

    def __init__(
        self, stack: StackedLogs, seconds: Sequence[SecondStage], logging: Sequence[Policy], rounds: LoggedRounds
    ) -> None:
        shapes = [second.clusters.centres.shape for second in seconds]
        if len(set(shapes)) != 1:
            raise DimensionError(
                f"clusters: expected centres {shapes[0]} in all logs as in the first, got {shapes}; fit them one by one"
            )
        self._stack, self._seconds, self._logging, self._rounds = stack, seconds, logging, rounds
        self._centres = torch.from_numpy(np.stack([second.clusters.centres for second in seconds]))
        self.n_inputs = stack.inputs.shape[1] - 1 + self._centres.shape[2]
        n = len(stack.inputs)
        self._known = torch.zeros(n, dtype=torch.bool)
        self._clusters = torch.empty(n, dtype=torch.int64)
        self._propensity, self._residual = torch.empty(n), torch.empty(n)
        self._values = torch.empty(n, self._centres.shape[1])

    def block(self, steps: int, network: StackedMLP) -> list[_ClusterBatch]:
        """Return batches for at most `steps` steps."""
        batches: list[Batch] = self._rounds.block(steps, network)
        rows = torch.stack([batch.rows for batch in batches])
        self._work_out(rows.transpose(0, 1))
        columns = [column[rows] for column in (self._clusters, self._propensity, self._residual, self._values)]
        return [_ClusterBatch(batch.inputs, self._centres, *own) for batch, *own in zip(batches, *columns, strict=True)]

    def _work_out(self, rows: Tensor) -> None:
        """Fill the columns of stacked `rows` (W, ...) that are new."""
        for own, log, second, policy, offset in zip(
            rows, self._stack.logs, self._seconds, self._logging, self._stack.offsets, strict=True
        ):
            drawn = own.unique()
            new = drawn[~self._known[drawn]]
            local = (new - offset).numpy()
            contexts, actions = log.contexts.take(local), log.action[local]
            predicted = second.rewards.chosen(contexts, actions)
            self._clusters[new] = torch.from_numpy(second.clusters.labels[actions])
            self._propensity[new] = torch.from_numpy(_cluster_propensities(policy, second, log, local)).float()
            self._residual[new] = self._stack.reward[new] - torch.from_numpy(predicted)
            self._values[new] = torch.from_numpy(second.values(contexts))
            self._known[new] = True


def _cluster_propensities(policy: Policy, second: SecondStage, log: LoggedDataset, rows: IntArray) -> FloatArray:
    """Return ``π₀(c | x, q)`` of the clusters of the logged prompts in `rows` (m,) of `log`, (m,)."""
    labels, found = second.clusters.labels[log.action[rows]], np.empty(len(rows))
    for part, _, pmf in pmf_by_parts(policy, log.contexts.take(rows)):
        own = second.clusters.marginal(pmf)
        found[part] = own[np.arange(len(own)), labels[part]]
    if not (found > 0).all():
        row = int(np.argmin(found > 0))
        raise PropensityError(
            f"logging_policy: gives the cluster of the logged prompt {log.action[rows[row]]} of row {rows[row]} "
            f"probability {found[row]}, so it did not record this log; pass the policy that did, or none to have it "
            "cloned"
        )
    return found
