"""Value estimates that weight logged rewards in the space of sentences."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from agents.estimators.base import one_world, weighted_estimate
from agents.kernels import (
    GaussianKernel,
    Kernel,
    LoggingDensity,
    MonteCarloDensity,
    blurred,
    draw_actions,
    generate,
)
from agents.learners.cloning import BehaviorCloning
from offprompts_env.config import check_integer, check_number
from offprompts_env.rng import stream
from offprompts_env.sampling import check_policy
from offprompts_env.simulator import OutputModel
from offprompts_env.types import Estimate, LoggedDataset, Policy


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
        worlds = one_world(log, generator, logging_policy, seed)
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
