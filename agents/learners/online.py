"""Policy gradient on the true environment: the skyline of every offline learner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from agents import gradients
from agents.feeds import LinearFeed, OnlineBatch, PlayedFeed
from agents.gradients import ActionDistribution
from agents.learners.base import Callback, Objective, PolicyGradient
from agents.policies import NeuralPolicy
from agents.training import Feed, check_seeds, check_simulators
from offprompts_env.config import check_integer
from offprompts_env.errors import DimensionError
from offprompts_env.simulator import Simulator


@dataclass(frozen=True)
class OnlinePG(PolicyGradient):
    """REINFORCE on the true environment, :func:`agents.gradients.online`: a skyline, and a way to a logging policy.

    Attributes:
        refresh: steps whose rounds are played at once with the policy at the first of them, and weighted by π / π_first
            later, unless the simulator is linear and Gaussian; for generators with a high cost a call.
    """

    refresh: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("refresh", self.refresh, 1)

    def fit(self, simulator: Simulator, *, seed: int = 0, callback: Callback | None = None) -> NeuralPolicy:
        """Learn a policy by playing ``steps · batch_size`` rounds of `simulator`.

        Raises:
            NumericalError: training diverged.
        """
        return self.fit_many([simulator], seeds=[seed], callback=callback)[0]

    def fit_many(
        self, simulators: Sequence[Simulator], *, seeds: Sequence[int] | None = None, callback: Callback | None = None
    ) -> list[NeuralPolicy]:
        """Learn a policy in each simulator as one batched problem."""
        check_simulators(simulators)
        label, chosen = "online PG", check_seeds(simulators, seeds)
        shapes = [(s.contexts.context_dim, s.contexts.query_dim, s.n_prompts) for s in simulators]
        if len(set(shapes)) != 1:
            raise DimensionError(f"simulators: expected the same d_x, d_q and number of prompts in all, got {shapes}")
        linear = all(simulator.exact and simulator.rewards.kind == "continuous" for simulator in simulators)
        feed: Feed[OnlineBatch]
        if linear:
            feed = LinearFeed(simulators, chosen, label, self.batch_size)
        else:
            feed = PlayedFeed(simulators, chosen, label, self.batch_size, self.refresh)

        def loss(policy: ActionDistribution, batch: OnlineBatch) -> Tensor:
            return gradients.online(policy, *batch.play(policy))

        catalogues = [simulator.prompts.fingerprint for simulator in simulators]
        d_x, d_q, n_prompts = shapes[0]
        callbacks = () if callback is None else (callback,)
        objective = Objective.by_scores(feed, loss)
        return self._optimise(d_x + d_q, catalogues, n_prompts, objective, chosen, label, callbacks)
