"""Recipes: the published kind of logging policy."""

from __future__ import annotations

from collections.abc import Sequence

from agents.policies import SoftmaxPolicy, UniformPolicy
from agents.rewards import PromptRewardRegression
from agents.training import check_seeds, check_simulators
from offprompts_env.collecting import collect
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
    """Make the published kind of logging policy for each simulator.

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
    """Make the published kind of logging policy; see :func:`logging_policies`."""
    return logging_policies([simulator], n=n, beta=beta, regression=regression, seeds=[seed])[0]
