"""Recipes: the published kinds of logging policy."""

from __future__ import annotations

from collections.abc import Sequence

from agents.learners.online import OnlinePG
from agents.policies import NeuralPolicy, SoftmaxPolicy, UniformPolicy
from agents.rewards import PromptRewardRegression
from agents.training import check_seeds, check_simulators
from offprompts_env.collecting import collect
from offprompts_env.config import check_kind, check_number
from offprompts_env.rng import integer_seed
from offprompts_env.simulator import Simulator


def logging_policies(
    simulators: Sequence[Simulator],
    *,
    n: int = 10_000,
    beta: float = 1.0,
    regression: PromptRewardRegression | None = None,
    seeds: Sequence[int] | None = None,
) -> list[SoftmaxPolicy]:
    """Make the logging policy of the published synthetic experiment for each simulator.

    Softmax with β = `beta` over a prompt-reward regression fitted on `n` rounds of uniform prompts.

    Args:
        simulators: the worlds.
        n: uniform rounds.
        beta: inverse temperature.
        regression: settings of the regression.
        seeds: one a simulator.
    """
    check_simulators(simulators)
    chosen = check_seeds(simulators, seeds)
    # A log that is later recorded with the same seed must not repeat the users and the noise of these rounds.
    logs = [
        collect(
            simulator,
            UniformPolicy(simulator.n_prompts),
            n,
            seed=integer_seed(seed, "logging policy", "rounds"),
            progress=False,
        )
        for simulator, seed in zip(simulators, chosen, strict=True)
    ]
    models = (PromptRewardRegression() if regression is None else regression).fit_many(logs, seeds=chosen)
    return [SoftmaxPolicy(model, model.n_prompts, beta, model.catalogue) for model in models]


def logging_policy(
    simulator: Simulator,
    *,
    n: int = 10_000,
    beta: float = 1.0,
    regression: PromptRewardRegression | None = None,
    seed: int = 0,
) -> SoftmaxPolicy:
    """Make the logging policy of the published synthetic experiment; see :func:`logging_policies`."""
    return logging_policies([simulator], n=n, beta=beta, regression=regression, seeds=[seed])[0]


def online_logging_policies(
    simulators: Sequence[Simulator],
    *,
    beta: float = 0.2,
    online: OnlinePG | None = None,
    seeds: Sequence[int] | None = None,
) -> list[NeuralPolicy]:
    """Make the logging policy of the published full-LLM experiment for each simulator.

    ``π₀(a | x, q) ∝ exp(β f(x, q)_a)``, where the softmax of f is what REINFORCE on the true environment found.

    Args:
        simulators: the worlds.
        beta: inverse temperature.
        online: settings of the policy gradient; a skyline learned with the same seeds is another policy.
        seeds: one a simulator.

    Raises:
        ConfigError: `beta` is no number ≥ 0, or `online` no policy gradient.
    """
    check_number("beta", beta, 0)
    learner = OnlinePG() if online is None else online
    check_kind("online", learner, OnlinePG, "such as agents.OnlinePG(steps=600)")
    own = [integer_seed(seed, "logging policy", "online") for seed in check_seeds(simulators, seeds)]
    found = learner.fit_many(simulators, seeds=own)
    return [policy.tempered(beta) for policy in found]


def online_logging_policy(
    simulator: Simulator, *, beta: float = 0.2, online: OnlinePG | None = None, seed: int = 0
) -> NeuralPolicy:
    """Make the logging policy of the published full-LLM experiment; see :func:`online_logging_policies`."""
    return online_logging_policies([simulator], beta=beta, online=online, seeds=[seed])[0]
