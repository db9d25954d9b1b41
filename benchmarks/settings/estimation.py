"""Accuracy of value estimators over logged rounds, prompts, and distance of the target policy.

See :mod:`benchmarks.settings.population` for what logs are drawn from, :mod:`benchmarks.settings.accuracy` for what is
measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import agents
from benchmarks.methods import Method, Own
from benchmarks.plan import Point, Sweep
from benchmarks.rows import Result
from benchmarks.settings.accuracy import ExactDensity, SlopeIS, accuracy
from benchmarks.settings.population import Population
from benchmarks.settings.vectors import VectorSetting, logging_policies
from benchmarks.store import JSON, Store, digest
from offprompts_env.config import check_integer, check_number
from offprompts_env.errors import ConfigError
from offprompts_env.rng import integer_seed
from offprompts_env.types import Policy, PromptSet

# Reward models are fitted anew for every log: a short schedule, and two folds that all estimators share.
_PROMPTS: Mapping[str, Any] = {
    "rewards": agents.PromptRewardRegression(steps=300, learning_rate=3e-3, train_fraction=1.0),
    "folds": 2,
}
_SENTENCES: Mapping[str, Any] = {"rewards": agents.PolynomialRidge(members=1), "folds": 2}

ESTIMATORS: Mapping[str, agents.Estimator] = {
    "mean": agents.SubGaussianIS(shrinkage=1.0),
    "IS": agents.IS(),
    "SNIPS": agents.SNIPS(),
    "SLOPE-IS": SlopeIS(),
    "MIPS": agents.MIPS(),
    "KernelIS": agents.KernelIS(density=ExactDensity()),
    "DM": agents.DM(**_PROMPTS),
    "DR": agents.DR(**_PROMPTS),
    "SNDR": agents.SNDR(**_PROMPTS),
    "SwitchDR": agents.SwitchDR(**_PROMPTS),
    "DRos": agents.DRos(**_PROMPTS),
    "OffCEM": agents.OffCEM(**_PROMPTS),
    "SentenceDM": agents.SentenceDM(**_SENTENCES),
    "KernelDR": agents.KernelDR(density=ExactDensity(), **_SENTENCES),
}
"""What the sweeps compare; "mean" is that of the logged rewards, whatever the policy."""


@dataclass(frozen=True)
class EstimationSetting:
    """A population of a world, and logs of it.

    Attributes:
        vectors: the world, the number of rounds of a log (`n`), of the population (`contexts`), and the effort of the
            logging policy's and the estimators' regressions.
        distance: a in [0, 1] of the target policy, see :mod:`benchmarks.settings.population`.
        beta: β of the target policy.
        logs: independent logs, R.
        resamples: of the bootstrap, which is taken of :class:`agents.IS` alone.
    """

    vectors: VectorSetting = field(default_factory=lambda: VectorSetting(n=2000, prompts=100))
    distance: float = 0.5
    beta: float = 10.0
    logs: int = 50
    resamples: int = 200

    def __post_init__(self) -> None:
        check_number("distance", self.distance, 0)
        if self.distance > 1:
            raise ConfigError(f"distance: expected a number from 0 to 1, got {self.distance!r}")
        check_number("beta", self.beta, 0)
        check_integer("logs", self.logs, 2)
        check_integer("resamples", self.resamples, 2)

    def score(self, result: Result) -> float:
        """Return the mean squared error over the variance of logged rewards: on policy, a mean of n rewards has 1/n."""
        return result.measures["mse"] / result.measures["reward_variance"]

    def quick(self) -> EstimationSetting:
        """Return the setting with a tenth of the steps and a fifth of the logs."""
        return replace(self, vectors=self.vectors.quick(), logs=max(2, self.logs // 5))

    def perform(self, method: Method, units: Sequence[tuple[int, int]], store: Store) -> list[Result]:
        """Return how accurate `method` is in the worlds of `units`, (seed of the world, seed of the logs) each.

        All estimators of the sweeps are made of the same logs at once, by the first that is asked for.

        Raises:
            ConfigError: not an estimator.
        """
        if not isinstance(method, Own):
            _check_estimator(method)
        known = tuple(ESTIMATORS.values())
        family: tuple[Method, ...] = known if method in known else (method,)

        def make(missing: list[int]) -> list[list[dict[str, Any]]]:
            chosen = [units[index] for index in missing]
            policies = logging_policies(self.vectors, [world for world, _ in chosen], store)
            return [
                [result.to_json() for result in self._accuracy(family, world, seed, policy)]
                for (world, seed), policy in zip(chosen, policies, strict=True)
            ]

        keys = [digest("estimates", self, family, world, seed) for world, seed in units]
        found = store.many("estimates", keys, make, JSON)
        return [Result.from_json(kept.value[family.index(method)]) for kept in found]

    def _accuracy(self, family: Sequence[Method], world: int, seed: int, logging_policy: Policy) -> list[Result]:
        population = Population.of(
            self.vectors.build(world),
            logging_policy,
            n=self.vectors.contexts,
            distance=self.distance,
            beta=self.beta,
        )
        effort = self.vectors.effort
        prompts = population.simulator.prompts
        return accuracy(
            [effort.of(_made(estimator, prompts, seed)) for estimator in family],
            population,
            n=self.vectors.n,
            logs=self.logs,
            seed=integer_seed(world, "estimators", seed),
            resamples=self.resamples,
        )


def _made(method: Method, prompts: PromptSet, seed: int) -> agents.Estimator:
    return _check_estimator(method.make(prompts, seed) if isinstance(method, Own) else method)


def _check_estimator(method: object) -> agents.Estimator:
    if not isinstance(method, agents.Estimator):
        raise ConfigError(
            f"{method!r:.80}: expected an estimator with estimate(policy, log, ...), got a learner or policy; run it "
            "through a sweep of learners, such as data_size"
        )
    return method


def sweeps() -> list[Sweep]:
    """Return the sweeps over rounds, prompts, and distance of the target policy."""

    def sweep(name: str, title: str, axis: str, settings: Mapping[str, tuple[float, EstimationSetting]]) -> Sweep:
        points = tuple(Point(point, x, setting, ESTIMATORS) for point, (x, setting) in settings.items())
        return Sweep(name, title, axis, points, worlds=10, chunk=2)

    base = EstimationSetting()

    def of(n: int = base.vectors.n, prompts: int = base.vectors.prompts) -> EstimationSetting:
        return replace(base, vectors=replace(base.vectors, n=n, prompts=prompts))

    return [
        sweep(
            "estimators_n",
            "Estimators: logged rounds",
            "logged rounds",
            {f"n={n}": (n, of(n=n)) for n in (500, 1000, 2000, 4000, 8000)},
        ),
        sweep(
            "estimators_prompts",
            "Estimators: number of prompts",
            "prompts",
            {f"prompts={a}": (a, of(prompts=a)) for a in (10, 50, 100, 500, 1000)},
        ),
        sweep(
            "estimators_distance",
            "Estimators: distance of the policies",
            "distance of target and logging policy",
            {f"distance={a:g}": (a, replace(base, distance=a)) for a in (0.0, 0.25, 0.5, 0.75, 1.0)},
        ),
    ]
