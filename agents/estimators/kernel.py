"""Value estimates that weight logged rewards in the space of sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch

from agents.estimators.base import OfflineEstimator, clipped, float64, support, weighted_estimate
from agents.estimators.look import (
    RewardSource,
    check_predictions,
    draw_prompts,
    fit_rewards,
)
from agents.estimators.sentence import expected_reward, simulate
from agents.kernels import (
    GaussianKernel,
    Kernel,
    KnownDensity,
    LoggingDensity,
    MonteCarloDensity,
    blurred,
)
from agents.learners.base import Learner
from agents.learners.cloning import BehaviorCloning
from agents.rewards import SentenceModel, SentenceRewardRegression
from agents.worlds import Worlds
from offprompts_env.config import check_integer, check_number
from offprompts_env.rng import stream
from offprompts_env.types import Estimate, FloatArray, LoggedDataset, Outputs, Policy


@dataclass(frozen=True)
class KernelIS(OfflineEstimator):
    """Kernel importance sampling: ``V̂ = mean_i w_i r_i``, ``w = min(E[K(s_i, s')] / π₀(s_i | x_i, q_i), clip)``.

    The expectation is over prompts of π and the generator's sentences, by simulation. It estimates the value under
    sentences blurred by the kernel (Kiyohara et al., RecSys 2025): biased by the kernel, with far smaller weights than
    :class:`IS`.

    Attributes:
        tau: bandwidth of the Gaussian kernel; ignored where `kernel` is given.
        kernel: similarity of sentences; None is ``GaussianKernel(tau)``.
        density: estimate of the logging marginal density. The default asks the generator for 100 sentences a round;
            the network that :class:`agents.DSO` trains with is cheaper and too crude to weigh values with.
        n_samples: simulated sentences of `policy` a round.
        clip: upper bound of the weight.
        cloning: how a missing logging policy is estimated.
    """

    tau: float = 1.0
    kernel: Kernel | None = None
    density: LoggingDensity = field(default_factory=MonteCarloDensity)
    n_samples: int = 16
    clip: float = 200.0
    cloning: Learner = field(default_factory=BehaviorCloning)

    asks_generator: ClassVar[bool] = True
    asks_logging_policy: ClassVar[bool] = True

    def __post_init__(self) -> None:
        GaussianKernel(self.tau)
        check_integer("n_samples", self.n_samples, 1)
        check_number("clip", self.clip, 0, strict=True)

    def _estimate(self, policy: Policy, log: LoggedDataset, given: Worlds, seed: int) -> Estimate:
        generators = given.require_generators(self._label)
        known = isinstance(self.density, KnownDensity)
        policies = () if known else given.logging_policies_or_clones(self._label, self.cloning)
        (density,) = self.density.fit_many(
            [log], kernel=self._kernel(), generators=generators, logging_policies=policies, seeds=[seed]
        )
        models = self._models(log, seed)
        drawn, average = draw_prompts(policy, log, self.n_samples, seed)
        sentences = simulate(generators[0], log, np.arange(len(log)), drawn, stream(seed, "kernel IS", "outputs"))
        ratio = self._similarity(log, sentences, seed) / density
        weights = np.minimum(ratio, self.clip)
        expected, predicted = _predictions(models, log, sentences)
        return weighted_estimate(
            ratio,
            weights,
            float64(log.reward) - predicted,
            expected,
            remedy="use a wider kernel or DM, or a policy closer to the logging policy",
            doubt="the density does not fit, the kernel is wide, or the policy gets sentences that were never logged",
            own=clipped(ratio, weights, self.clip),
            shown=support(average, log),
        )

    def _kernel(self) -> Kernel:
        return GaussianKernel(self.tau) if self.kernel is None else self.kernel

    def _models(self, log: LoggedDataset, seed: int) -> Sequence[tuple[object, SentenceModel]]:
        """Return reward models, where the method has any, and the rounds each is for."""
        return ()

    def _similarity(self, log: LoggedDataset, sentences: FloatArray, seed: int) -> FloatArray:
        """Return ``E[K(s_i, s')]`` over prompts of the policy and their simulated `sentences` (n, m, d_o), (n,)."""
        rng, kernel = stream(seed, "kernel IS", "blur"), self._kernel()
        similarity: FloatArray = np.zeros(len(log))
        logged = torch.from_numpy(log.output)
        for sample in range(sentences.shape[1]):
            noise = torch.from_numpy(rng.standard_normal(log.output.shape, dtype=np.float32))
            similarity += blurred(kernel, logged, torch.from_numpy(sentences[:, sample]), noise).numpy()
        similarity /= sentences.shape[1]
        return similarity


@dataclass(frozen=True)
class KernelDR(KernelIS):
    """Doubly robust in the space of sentences.

    ``V̂ = mean_i [ E[r̂(x_i, q_i, s')] + w_i (r_i − r̂(x_i, q_i, s_i)) ]`` with the weights of :class:`KernelIS` and
    a sentence-level reward model r̂; the expectation is over prompts of π and the generator's sentences. The kernel only
    biases what the model leaves unexplained.

    Attributes:
        rewards: the regression behind r̂, or :class:`agents.FittedSentenceRewards`.
        folds: K of the cross-fitting; None fits one model on the whole log.
    """

    rewards: RewardSource[SentenceModel] = field(default_factory=SentenceRewardRegression)
    folds: int | None = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.folds is not None:
            check_integer("folds", self.folds, 2)

    def _models(self, log: LoggedDataset, seed: int) -> Sequence[tuple[object, SentenceModel]]:
        return fit_rewards(self.rewards, log, self.folds, seed)


def _predictions(
    models: Sequence[tuple[object, SentenceModel]], log: LoggedDataset, sentences: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Return the mean prediction over simulated `sentences` (n, m, d_o), and that of the logged one, (n,) each."""
    expected, predicted = np.zeros(len(log)), np.zeros(len(log))
    everything = np.arange(len(log))
    for where, model in models:
        rows = everything[where]  # type: ignore[call-overload]
        contexts = log.contexts.take(rows)
        expected[rows] = expected_reward(model, contexts, sentences[rows])
        predicted[rows] = model(contexts, Outputs(log.output[rows]))
    for column in (expected, predicted):
        check_predictions(column)
    return expected, predicted
