"""Direct Sentence Off-policy gradient: importance sampling in the space of sentences.

Defaults are those of the released code of Kiyohara, Cao, Saito, Joachims (RecSys 2025, arXiv 2504.02646).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from agents import gradients
from agents.feeds import FreshFeed, PreparedFeed, SentenceBatch
from agents.gradients import ActionDistribution
from agents.kernels import GaussianKernel, Kernel, LoggingDensity, NetworkDensity, blurred
from agents.learners.base import Objective, OfflinePolicyGradient
from agents.learners.cloning import BehaviorCloning
from agents.networks import StackedMLP
from agents.rewards import SentenceModel, SentenceRewards, SentenceRewardSource
from agents.training import Feed, StackedLogs
from agents.worlds import Worlds
from offprompts_env.config import check_integer, check_number
from offprompts_env.simulator import GaussianOutputs
from offprompts_env.types import Outputs


class _SentencePredictions:
    """r̂ of W worlds for the rounds of a batch, as tensors.

    Args:
        stack: the logs, whose contexts the batches are of.
        models: one a log.
    """

    def __init__(self, stack: StackedLogs, models: Sequence[SentenceModel]) -> None:
        self._stack, self._models = stack, models
        perceptrons = [model.network for model in models if isinstance(model, SentenceRewards)]
        alike = len(perceptrons) == len(models) and len({network.sizes for network in perceptrons}) == 1
        # Perceptrons of one shape are evaluated as one; any other model world by world, outside PyTorch.
        self._network = StackedMLP.of(perceptrons) if alike else None

    def __call__(self, rows: Tensor, outputs: Tensor) -> Tensor:
        """Return r̂ for sentences `outputs` (W, m, d_o) in the stacked `rows` (W, m), (W, m)."""
        if self._network is not None:
            own = self._stack.inputs[rows]
            return self._network.forward(torch.cat([own[..., :-1], outputs, own[..., -1:]], dim=-1))[..., 0]
        local = self._stack.local(list(rows))
        worlds = zip(self._models, self._stack.logs, local, outputs, strict=True)
        predicted = [
            np.asarray(model(log.contexts.take(own), Outputs(sentences.numpy())), dtype=np.float32)
            for model, log, own, sentences in worlds
        ]
        return torch.from_numpy(np.stack(predicted))


@dataclass(frozen=True)
class DSO(OfflinePolicyGradient):
    """Direct Sentence Off-policy gradient, :func:`agents.gradients.kernel_importance_sampling`.

    Needs the generator. The logging policy is cloned from the log where it is not given. With a reward model of
    sentences it is the hybrid, :func:`agents.gradients.kernel_doubly_robust`.

    A vector generator answers every step afresh. With a language model a sentence costs milliseconds and a call more,
    so two settings bound the cost. With `refresh` = k the prompts of k steps are drawn at once from the policy at the
    first of them and answered in one call; each step weights them by ``π(a) / π_first(a)``, so that its gradient has
    the same expectation (where the clip does not bite) and more variance. With `max_sentences` below ``steps ·
    batch_size`` a block gets its share of sentences and its batches are drawn from them with replacement: its first
    step is unbiased, later ones follow the block's empirical objective and so fit its sampling error a little.

    What a budget costs, on ``paper_code`` with 8,000 rounds (optimality, mean of four worlds, standard errors 0.03 to
    0.09): 640,000 fresh sentences 0.47; as many with ``refresh=100`` 0.46; 20,000 with ``steps=2500, batch_size=128,
    learning_rate=1e-3, refresh=50`` 0.35; 20,000 with ``refresh=100`` and the other defaults 0.23.

    Attributes:
        tau: bandwidth of the Gaussian kernel; ignored where `kernel` is given. :class:`agents.TunedDSO` finds it in the
            log.
        kernel: similarity of sentences; None is ``GaussianKernel(tau)``.
        density: estimate of the logging marginal density.
        rewards: a regression on sentences, or :class:`agents.FittedSentenceRewards`, that leaves to the kernel only
            what it does not explain; None weights whole rewards.
        clip: upper bound of the weight K / π₀.
        refresh: steps for which sentences are asked for at once, unless the generator is Gaussian.
        max_sentences: ask the generator for at most about this many sentences during the gradient steps, unless it is
            Gaussian; the density has a budget of its own.
        cloning: how a missing logging policy is estimated.
    """

    tau: float = 1.0
    kernel: Kernel | None = None
    density: LoggingDensity = field(default_factory=NetworkDensity)
    rewards: SentenceRewardSource | None = None
    clip: float = 200.0
    refresh: int = 1
    max_sentences: int | None = None
    cloning: BehaviorCloning = field(default_factory=BehaviorCloning)

    label: ClassVar[str] = "DSO"

    def __post_init__(self) -> None:
        super().__post_init__()
        GaussianKernel(self.tau)
        check_number("clip", self.clip, 0, strict=True)
        check_integer("refresh", self.refresh, 1)
        if self.max_sentences is not None:
            check_integer("max_sentences", self.max_sentences, 1)

    def _objective(self, worlds: Worlds) -> Objective[SentenceBatch]:
        stack = worlds.stack
        kernel: Kernel = GaussianKernel(self.tau) if self.kernel is None else self.kernel
        generators = worlds.require_generators("agents.DSO")
        policies = worlds.logging_policies_or_clones("agents.DSO", self.cloning)
        density = StackedLogs.join(
            self.density.fit_many(
                stack.logs, kernel=kernel, generators=generators, logging_policies=policies, seeds=worlds.seeds
            )
        )

        predict = None
        if self.rewards is not None:
            predict = _SentencePredictions(stack, self.rewards.fit_many(stack.logs, seeds=worlds.seeds))

        def loss(policy: ActionDistribution, batch: SentenceBatch) -> Tensor:
            rows = batch.rows
            actions, sentences, ratio = batch.draw(policy)
            similarity = blurred(kernel, stack.output[rows], sentences, batch.blur)
            reward, weights = stack.reward[rows], (similarity, density[rows])
            if predict is None:
                return gradients.kernel_importance_sampling(policy, actions, *weights, reward, self.clip, ratio)
            both = predict(torch.cat([rows] * 2, dim=1), torch.cat([stack.output[rows], sentences], dim=1))
            at_logged, at_drawn = both.chunk(2, dim=1)
            residual = reward - at_logged
            return gradients.kernel_doubly_robust(policy, actions, *weights, residual, at_drawn, self.clip, ratio)

        gaussian = [generator for generator in generators if isinstance(generator, GaussianOutputs)]
        feed: Feed[SentenceBatch]
        if len(gaussian) == len(generators):
            feed = FreshFeed(stack, worlds.seeds, gaussian, self.label, self.batch_size)
        else:
            asked = self.steps * self.batch_size
            feed = PreparedFeed(
                stack,
                worlds.seeds,
                generators,
                self.label,
                batch_size=self.batch_size,
                refresh=self.refresh,
                share=1.0 if self.max_sentences is None else min(1.0, self.max_sentences / asked),
            )
        return Objective.by_scores(feed, loss)
