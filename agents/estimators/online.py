"""The value itself, where there is a simulator: what the estimates from a log are measured against."""

from __future__ import annotations

from dataclasses import dataclass

from offprompts_env.config import check_integer, check_kind
from offprompts_env.rng import stream
from offprompts_env.sampling import check_policy, sample_actions
from offprompts_env.simulator import OutputModel, Simulator
from offprompts_env.types import Estimate, LoggedDataset, Policy


@dataclass(frozen=True)
class Online:
    """Play the policy: the truth, in the form of an estimator.

    Attributes:
        simulator: where to play.
        n: rounds; None takes as many as :meth:`Simulator.policy_value`.
        played: average the rewards of rounds that are played, noise and all, as an A/B test does; else the expected
            rewards of :meth:`Simulator.policy_value`, without noise.
    """

    simulator: Simulator
    n: int | None = None
    played: bool = False

    def __post_init__(self) -> None:
        check_kind("simulator", self.simulator, Simulator, "of an environment pass env.unwrapped.simulator")
        if self.n is not None:
            check_integer("n", self.n, 1)

    def estimate(
        self,
        policy: Policy,
        log: LoggedDataset | None = None,
        *,
        generator: OutputModel | None = None,
        logging_policy: Policy | None = None,
        seed: int = 0,
    ) -> Estimate:
        """Estimate ``V(policy)``; all but `policy` and `seed` is there to be like other estimators, and not looked at.

        Raises:
            DimensionError: the policy is over other prompts than the simulator.
        """
        simulator = self.simulator
        if not self.played:
            return simulator.policy_value(policy, n=self.n, seed=seed)
        check_policy(policy, simulator.prompts, "this simulator")
        contexts = simulator.evaluation_contexts(10_000 if self.n is None else self.n, seed)
        actions, _ = sample_actions(policy, contexts, stream(seed, "online", "actions"))
        rounds = simulator.play(contexts, actions, stream(seed, "online", "outputs"), stream(seed, "online", "rewards"))
        return Estimate.of_mean(rounds.reward)
