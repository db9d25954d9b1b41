"""What the runs of one task are made in: simulators, logs, and what learners share through the store.

A run is a unit: (seed of the world or log, seed of learning). The units of a task are learned as one batched problem.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np

import agents
from benchmarks.methods import Logging, Method, Own, Skyline
from benchmarks.rows import Result
from benchmarks.store import REWARDS, VALUES, Kept, Store
from offprompts_env.collecting import collect
from offprompts_env.errors import ConfigError
from offprompts_env.rng import stream
from offprompts_env.simulator import OutputModel, Simulator
from offprompts_env.types import Agent, Contexts, Estimate, IntArray, LoggedDataset, Policy

CURVE_POINTS = 10
"""Looks at a policy while it is trained."""

BATCH = 32
"""Rounds after which an agent that learns while it acts is shown what came of them."""


class BenchWorlds(ABC):
    """The worlds of a task's units. All sequences have one entry a unit.

    Args:
        units: (seed of the world or log, seed of learning) each.
        store: of what is shared.
        simulators: the worlds.
        generators: as learners see them.
        seeds: that name the learning.
        rounds: that are logged.

    Attributes:
        shared: processor seconds of what was shared, so far.
    """

    def __init__(
        self,
        units: Sequence[tuple[int, int]],
        store: Store,
        simulators: Sequence[Simulator],
        generators: Sequence[OutputModel],
        seeds: Sequence[int],
        rounds: int,
    ) -> None:
        self.rounds = rounds
        self.units, self.store, self.seeds = list(units), store, list(seeds)
        self.simulators, self.generators = list(simulators), list(generators)
        self.shared = np.zeros(len(units))

    @property
    @abstractmethod
    def logging(self) -> list[Policy]:
        """The logging policies."""

    @property
    @abstractmethod
    def logs(self) -> list[LoggedDataset]:
        """The logs as learners see them."""

    @property
    @abstractmethod
    def references(self) -> list[Mapping[str, float]]:
        """Values of the policies that the environment owns."""

    @abstractmethod
    def keys(self, stage: str, *parts: object) -> list[str]:
        """Return the keys of what `parts` make of the units' logs."""

    @abstractmethod
    def skylines(self, learner: agents.OnlinePG) -> list[Kept[Policy]]:
        """Return what `learner` reaches by playing."""

    @abstractmethod
    def value(self, index: int, policy: Policy) -> Estimate:
        """Return what `policy` is worth to a unit."""

    @abstractmethod
    def glance(self, index: int, policy: Policy) -> float:
        """Return about what figures show of `policy`, cheaply, while it is trained."""

    @abstractmethod
    def evaluation(self, index: int) -> Contexts:
        """Return the rounds in which policies are valued."""

    @abstractmethod
    def of_actions(self, index: int, actions: IntArray) -> Estimate:
        """Return what one prompt in each of the rounds :meth:`evaluation` is worth."""

    def told(self, index: int, policy: Policy | None, value: Estimate) -> dict[str, Any]:
        """Return what else a unit's result holds of a policy; None is an agent's."""
        return {}

    def share(self, kept: Sequence[Kept[Any]]) -> list[Any]:
        """Return the artefacts, and note what they cost."""
        self.shared += [one.seconds for one in kept]
        return [one.value for one in kept]

    def regression(self, regression: agents.PromptRewardRegression) -> agents.FittedRewards:
        """Return the regression of each log."""
        logs = self.logs

        def make(missing: list[int]) -> Sequence[agents.PromptRewards]:
            return regression.fit_many([logs[i] for i in missing], seeds=[self.seeds[i] for i in missing])

        keys = self.keys("rewards", regression)
        return agents.FittedRewards(tuple(self.share(self.store.many("rewards", keys, make, REWARDS))))

    def density(self, density: agents.LoggingDensity, kernel: agents.Kernel) -> agents.KnownDensity:
        """Return the logging density at the sentences of each log."""
        logs, logging = self.logs, self.logging

        def make(missing: list[int]) -> Sequence[Any]:
            return density.fit_many(
                [logs[i] for i in missing],
                kernel=kernel,
                generators=[self.generators[i] for i in missing],
                logging_policies=[logging[i] for i in missing],
                seeds=[self.seeds[i] for i in missing],
            )

        keys = self.keys("density", density, kernel)
        return agents.KnownDensity(tuple(self.share(self.store.many("density", keys, make, VALUES))))

    def _with_shared(self, learner: Any) -> Any:
        """Return `learner` with the regression and the density that other learners of this log have too."""
        names = {f.name for f in fields(learner)}
        if "rewards" in names and isinstance(learner.rewards, agents.PromptRewardRegression):
            learner = replace(learner, rewards=self.regression(learner.rewards))
        if "density" in names and isinstance(learner.density, agents.NetworkDensity | agents.MonteCarloDensity):
            kernel = agents.GaussianKernel(learner.tau) if learner.kernel is None else learner.kernel
            learner = replace(learner, density=self.density(learner.density, kernel))
        return learner

    def perform(self, method: Method) -> list[Result]:
        """Return what `method` reaches in each world; raises ConfigError for an estimator, which reaches nothing."""
        if isinstance(method, agents.Estimator):
            raise _no_learner(method)
        if isinstance(method, Own):
            return [self._own(method, index) for index in range(len(self.units))]
        if isinstance(method, Logging):
            return [self._judged(index, policy) for index, policy in enumerate(self.logging)]
        if isinstance(method, Skyline):
            kept = self.skylines(method.learner)
            return [self._judged(index, one.value, seconds=one.seconds) for index, one in enumerate(kept)]
        return self._learn(method)

    def _learn(self, method: agents.Learner) -> list[Result]:
        logging, logs, learner = self.logging, self.logs, self._with_shared(method)
        looks: list[tuple[int, list[float]]] = []
        looking = 0.0

        def look(step: int, learned: Sequence[Policy]) -> None:
            nonlocal looking
            began = time.process_time()
            looks.append((step, [self.glance(index, policy) for index, policy in enumerate(learned)]))
            looking += time.process_time() - began

        every = look_every(method)
        started = time.process_time()
        found = learner.fit_many(
            logs,
            generators=self.generators,
            logging_policies=logging,
            seeds=self.seeds,
            callback=agents.Callback(every, look),
        )
        seconds = (time.process_time() - started - looking) / len(found)
        return [
            self._judged(
                index,
                policy,
                curve_steps=tuple(step for step, _ in looks),
                curve=tuple(values[index] for _, values in looks),
                seconds=seconds,
            )
            for index, policy in enumerate(found)
        ]

    def _judged(self, index: int, policy: Policy, **rest: Any) -> Result:
        return self._told(index, policy, self.value(index, policy), **rest)

    def _told(self, index: int, policy: Policy | None, value: Estimate, **rest: Any) -> Result:
        more = self.told(index, policy, value)
        shared = float(self.shared[index])
        return Result(value.value, value.standard_error, self.references[index], shared_seconds=shared, **(rest | more))

    def _own(self, method: Own, index: int) -> Result:
        made = method.make(self.simulators[index].prompts, self.seeds[index])
        started = time.process_time()
        policy = self._made(made, index)
        seconds = time.process_time() - started
        if isinstance(policy, Policy):
            return self._judged(index, policy, seconds=seconds)
        actions, _ = policy.act(self.evaluation(index), stream(self.units[index][0], "benchmarks", "own agent"))
        return self._told(index, None, self.of_actions(index, actions), seconds=seconds)

    def _made(self, made: Any, index: int) -> Any:
        """Let what a user's function made learn: a learner from the log, an agent from as many rounds of its own."""
        if isinstance(made, agents.Estimator):
            raise _no_learner(made)
        if callable(getattr(made, "fit", None)):
            return made.fit(
                self.logs[index],
                generator=self.generators[index],
                logging_policy=self.logging[index],
                seed=self.seeds[index],
            )
        if isinstance(made, Agent):
            seed = self.units[index][0]
            collect(self.simulators[index], made, self.rounds, seed=seed, batch_size=BATCH, progress=False)
        return made


def _no_learner(estimator: agents.Estimator) -> ConfigError:
    return ConfigError(f"{estimator!r:.80}: expected a learner, got an estimator; run it through estimators_n")


def look_every(method: agents.Learner) -> int:
    """Return how many steps are between two looks at a policy; a learner around another one takes that one's."""
    return max(1, int(getattr(getattr(method, "learner", method), "steps", CURVE_POINTS)) // CURVE_POINTS)
