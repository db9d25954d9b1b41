"""Recipes: a log straight from a simulator, and the published kind of logging policy."""

from __future__ import annotations

from collections.abc import Sequence

from agents.policies import SoftmaxPolicy, UniformPolicy
from agents.rewards import PromptRewardRegression
from agents.training import check_seeds
from offprompts_env.rng import stream
from offprompts_env.sampling import sample_actions
from offprompts_env.simulator import Simulator
from offprompts_env.types import LoggedDataset, Policy


def record_rounds(simulator: Simulator, policy: Policy, n: int, seed: int = 0) -> LoggedDataset:
    """Record `n` rounds of `policy` straight from a simulator, without an environment or a file around it."""
    contexts = simulator.contexts.sample(n, stream(seed, "record", "contexts"))
    actions, propensities = sample_actions(policy, contexts, stream(seed, "record", "actions"))
    rounds = simulator.play(contexts, actions, stream(seed, "record", "outputs"), stream(seed, "record", "rewards"))
    return LoggedDataset(
        context=contexts.context,
        query=contexts.query,
        action=actions,
        propensity=propensities,
        reward=rounds.reward,
        output=rounds.outputs.embedding,
        prompts=simulator.prompts,
        sentence=rounds.outputs.text,
        user_id=contexts.user_id,
        item_id=contexts.item_id,
        query_text=contexts.query_text,
    )


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
    chosen = check_seeds(simulators, seeds)
    logs = [
        record_rounds(simulator, UniformPolicy(simulator.n_prompts), n, seed)
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
