"""Off-policy estimates of a policy's value ``V(π) = E[r]`` from a log alone.

Each is a frozen configuration; ``estimate(policy, log, ...)`` gives an :class:`offprompts_env.types.Estimate` whose
terms, one a round, average to the value, with what a reader must know before trusting it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from agents.kernels import (
    GaussianKernel,
    Kernel,
    LoggingDensity,
    MonteCarloDensity,
    blurred,
    draw_actions,
    generate,
)
from agents.learners import BehaviorCloning, Worlds
from agents.rewards import PromptRewardRegression, PromptRewardSource
from agents.training import StackedLogs, TrainingWarning
from offprompts_env.config import check_integer, check_number
from offprompts_env.rng import stream
from offprompts_env.sampling import check_policy, chosen_probabilities, pmf_by_parts
from offprompts_env.simulator import OutputModel
from offprompts_env.types import Estimate, FloatArray, LoggedDataset, Policy


@runtime_checkable
class Estimator(Protocol):
    """What estimates a policy's value from a log."""

    def estimate(
        self,
        policy: Policy,
        log: LoggedDataset,
        *,
        generator: OutputModel | None = None,
        logging_policy: Policy | None = None,
        seed: int = 0,
    ) -> Estimate:
        """Estimate ``V(policy)``; `generator` and `logging_policy` are for estimators that are defined with them."""
        ...


def weighted_estimate(
    weights: FloatArray, terms: FloatArray, clip: float | None, clipped: int, *, remedy: str, doubt: str
) -> Estimate:
    """Return the mean of `terms` with diagnostics of the `weights` behind them, (n,) each.

    Args:
        weights: importance weights, after clipping; unclipped ones average to 1 where the log supports the policy.
        terms: what is averaged.
        clip: the bound, if any.
        clipped: how many weights it cut.
        remedy: what to do about a small effective sample size.
        doubt: what it means if the weights do not average to 1.
    """
    n, total = len(weights), float(weights.sum())
    size = total**2 / float(np.square(weights).sum()) if total > 0 else 0.0
    mean, spread = total / n, float(weights.std() / np.sqrt(n))
    notes = []
    if size < 30:
        notes.append(f"effective sample size {size:.1f} of {n} rounds: the log says little about this policy; {remedy}")
    # Propensities and policies are often float32: a tiny deviation is rounding.
    # Clipping only lowers weights, so a clipped mean below 1 says nothing more, and one above 1 all the more.
    if mean - 1 > 4 * spread + 1e-3 or (1 - mean > 4 * spread + 1e-3 and not clipped):
        notes.append(f"weights average {mean:.3f} instead of 1: {doubt}")
    if clipped:
        notes.append(f"{clipped} of {n} weights were clipped at {clip:g}: what they stand for counts too little")
    diagnostics = {"mean_weight": mean, "max_weight": float(weights.max()), "clipped": float(clipped)}
    return Estimate.of_mean(terms, effective_sample_size=size, diagnostics=diagnostics, warnings=tuple(notes))


def _worlds(log: LoggedDataset, generator: OutputModel | None, logging_policy: Policy | None, seed: int) -> Worlds:
    return Worlds(
        StackedLogs([log]),
        None if generator is None else (generator,),
        None if logging_policy is None else (logging_policy,),
        (seed,),
    )


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
        propensity = _worlds(log, None, logging_policy, seed).propensities("agents.IS").numpy().astype(np.float64)
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


@dataclass(frozen=True)
class KernelIS:
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
    cloning: BehaviorCloning = field(default_factory=BehaviorCloning)

    def __post_init__(self) -> None:
        GaussianKernel(self.tau)
        check_integer("n_samples", self.n_samples, 1)
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
            ConfigError: no generator.
            DimensionError: policy, generator and log do not fit.
        """
        check_policy(policy, log.prompts, "the log")
        worlds = _worlds(log, generator, logging_policy, seed)
        kernel: Kernel = GaussianKernel(self.tau) if self.kernel is None else self.kernel
        generators = worlds.require_generators("agents.KernelIS")
        policies = worlds.logging_policies or tuple(self.cloning.fit_many([log], seeds=[seed]))
        (density,) = self.density.fit_many(
            [log], kernel=kernel, generators=generators, logging_policies=policies, seeds=[seed]
        )
        rows = np.arange(len(log))
        similarity = np.zeros(len(log))
        actions_rng, outputs_rng, blur_rng = (
            stream(seed, "kernel IS", part) for part in ("actions", "outputs", "blur")
        )
        for _ in range(self.n_samples):
            actions = draw_actions(policy, log.contexts, rows, actions_rng)
            drawn = torch.from_numpy(generate(generators[0], log.contexts, rows, actions, outputs_rng))
            noise = torch.from_numpy(blur_rng.standard_normal(tuple(drawn.shape), dtype=np.float32))
            similarity += blurred(kernel, torch.from_numpy(log.output), drawn, noise).numpy()
        ratio = similarity / self.n_samples / density
        weights = np.minimum(ratio, self.clip)
        return weighted_estimate(
            weights,
            weights * log.reward,
            self.clip,
            int((ratio > self.clip).sum()),
            remedy="use a wider kernel or DM, or a policy closer to the logging policy",
            doubt="the density does not fit, the kernel is wide, or the policy gets sentences that were never logged",
        )
